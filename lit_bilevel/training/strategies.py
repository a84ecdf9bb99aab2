"""Names what single strategies and kernels cannot do, before a run starts.

    OneStep under DeepSpeed     evaluates the policy at other parameter values; use `Penalty`, or FSDP2
    fsdp (FSDP1)                no step with several backward passes; use FSDP2 or DDP

Left out: what follows from the settings of the module alone; see `refusals`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy

    from lit_bilevel.module import LitBilevel
    from lit_bilevel.refinement.response_weights import ResponseWeights
    from lit_bilevel.solvers.base import BilevelSolver

SHARDING = "configs/strategies/fsdp2.yaml"


def takes_one_optimizer(strategy: Strategy) -> bool:
    """Whether the outer optimizer has to be stepped and checkpointed by the module itself.

    DeepSpeed takes one optimizer. FSDP2 takes several, but Lightning cannot load one whose state is empty.
    """
    return isinstance(strategy, DeepSpeedStrategy | ModelParallelStrategy)


def of_strategy(module: LitBilevel, stage: str) -> list[str]:
    """What the Trainer's strategy does not allow, one line for each.

    Args:
        module: with its Trainer.
        stage: Lightning's.
    """
    strategy = module.trainer.strategy
    problems = []
    if isinstance(strategy, SingleDeviceStrategy) and strategy.root_device.type == "mps":
        problems.append(
            "`trainer.accelerator` is (or chose) MPS, which has no float64, and the weights are summed in it; use"
            " `trainer.accelerator: cpu`"
        )
    if isinstance(strategy, FSDPStrategy):
        problems.append(
            "`trainer.strategy` is FSDP1 (`fsdp`), which does not allow a step with several backward passes; use FSDP2"
            f" ({SHARDING}) or `ddp`"
        )
    if type(strategy) is DDPStrategy and strategy._ddp_kwargs.get("gradient_as_bucket_view"):
        problems.append(
            "`gradient_as_bucket_view` of `DDPStrategy` lets the second backward pass of a step write over the gradient"
            " that the first one gave; leave it out"
        )
    if isinstance(strategy, ModelParallelStrategy):
        problems += _of_sharding(module, stage)
    if isinstance(strategy, DeepSpeedStrategy):
        problems += _of_deepspeed(module, strategy)
    return problems


def of_kernels(module: LitBilevel) -> list[str]:
    """Derivatives along a direction need forward mode below float32, and fused kernels do not have it."""
    settings = module.policy_settings
    problems: list[str] = []
    directional: list[BilevelSolver | ResponseWeights] = [*_aligned(module)]
    if module.solver.directional and module.learns_weights:
        directional.insert(0, module.solver)
    if not directional:
        return problems
    name = f"`{type(directional[0]).__name__}`"
    if settings.quantization is not None:
        problems.append(
            f"{name} needs derivatives along a direction, and `model.policy.quantization` has kernels without forward"
            " mode and too few digits for differences; use `ValueFunction`, or `BMOWeights` with `Mixing`, and other"
            " `model.response_weights` than `Aligned`"
        )
    if "flash" in (settings.attn_implementation or ""):
        problems.append(
            f"{name} needs derivatives along a direction, and `model.policy.attn_implementation:"
            f" {settings.attn_implementation}` has no forward mode; use `sdpa`"
        )
    return problems


def _of_sharding(module: LitBilevel, stage: str) -> list[str]:
    problems = []
    if stage == "predict":
        problems.append(
            "`predict` generates, which a sharded policy does not allow; run it on one process, with the run's"
            " `policy/` as `model.policy.path`"
        )
    if module.solver.second_order and module.learns_weights:
        problems.append(
            f"`{type(module.solver).__name__}` needs Hessian-vector products, which FSDP2 does not give; use `OneStep`,"
            " or `trainer.strategy: ddp`"
        )
    if module.policy_settings.compile:
        problems.append(
            "`model.policy.compile` and FSDP2's gathering of parameters do not go together here; leave one of them out"
        )
    if module.policy_settings.quantization is not None:
        problems.append("a quantized policy cannot be sharded by FSDP2; use `trainer.strategy: ddp`")
    return problems


def _of_deepspeed(module: LitBilevel, strategy: DeepSpeedStrategy) -> list[str]:
    problems = []
    takes_apart: list[BilevelSolver] = [module.solver] if module.solver.substitutes and module.learns_weights else []
    for part in [*takes_apart, *_aligned(module)]:
        problems.append(
            f"`{type(part).__name__}` evaluates the policy at other parameter values or takes gradients apart, which"
            f" DeepSpeed does not allow; use `Penalty`, or FSDP2 ({SHARDING})"
        )
    if strategy.zero_stage_3:
        problems.append(
            "DeepSpeed stage 3 would split the output layer, which the policy reads directly, and learnable weights;"
            f" use stage 2, or FSDP2 ({SHARDING})"
        )
    if not ((strategy.config or {}).get("zero_optimization") or {}).get("stage"):
        problems.append(
            "DeepSpeed without ZeRO does not look at its gradients in float32, so one that is not finite would be"
            " stepped on, and it shares nothing out; use stage 1 or 2, or `trainer.strategy: ddp`"
        )
    if module.policy_settings.compile:
        problems.append("`model.policy.compile` was never tried under DeepSpeed; leave it out")
    if module.gradient_clip_val is not None:
        problems.append(
            "`model.gradient_clip_val` cannot reach gradients that DeepSpeed keeps; set it to null, and"
            " `gradient_clipping` in the strategy's `config`"
        )
    if module.accumulate_grad_batches > 1:
        problems.append(
            "`model.accumulate_grad_batches` above 1 needs several backward passes in a step, which DeepSpeed takes for"
            " several steps; raise `data.batch_size`"
        )
    return problems


def _aligned(module: LitBilevel) -> list[ResponseWeights]:
    """The rule of the response weights where it asks for ∇f and derivatives along it."""
    return [module.refinement.rule] if module.refinement.rule.needs_alignment else []
