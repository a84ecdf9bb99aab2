"""Other engines behind the generation socket: transformers' continuous batching, and vLLM.

Both are meant for accelerators, and run on a CPU too. vLLM keeps a copy of the base model and is handed the adapter's
weights at every round, so it needs a LoRA policy. Log-probabilities never come from an engine: the trainer scores the
sampled ids itself.

Left out: a vLLM server in another process, and pushing full weights into an engine (its internals change by release).
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from lit_bilevel.errors import UserError
from lit_bilevel.generation.base import GenerationBackend, Request, Sample, Sampling, cut_at_end
from lit_bilevel.generation.ending import without_settings
from lit_bilevel.policy.causal import embeddings_of
from lit_bilevel.policy.policy import Policy

if TYPE_CHECKING:
    from types import ModuleType

    from transformers import ContinuousBatchingConfig

VLLM_OLDEST, VLLM_NEWEST = (0, 10), (1, 0)
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the largest ranks it can be made for
CHUNK = 1024  # requests that are handed to an engine at once


def _chunks(count: int) -> list[list[int]]:
    return [list(range(i, min(i + CHUNK, count))) for i in range(0, count, CHUNK)]


@dataclass(frozen=True)
class ContinuousBatching(GenerationBackend):
    """transformers' `generate_batch` with a paged cache.

    Its draws come from the process's random state (put back afterwards), seeded by the first request, so samples
    depend on how requests are dealt out; use `HFGenerate` where that matters. It takes most of the free memory for its
    cache unless `options` say how much, also on a CPU, where it is only worth trying out.

    Args:
        options: of transformers' `ContinuousBatchingConfig`, such as `num_blocks` or `max_memory_percent`.
    """

    options: dict[str, Any] = field(default_factory=dict)

    def batches(self, requests: Sequence[Request]) -> list[list[int]]:
        return _chunks(len(requests))

    def generate(
        self,
        policy: Policy,
        requests: Sequence[Request],
        sampling: Sampling,
        end_ids: Sequence[int],
        progress: Callable[[int], object] | None = None,
    ) -> list[Sample]:
        """As in the socket.

        Raises:
            UserError: if transformers does not take the options.
            RuntimeError: if the engine lost requests.
        """
        from transformers import GenerationConfig

        device = embeddings_of(policy.causal_lm).device
        limit = max(request.max_new_tokens for request in requests)
        config = GenerationConfig(
            max_new_tokens=min(limit, sampling.max_new_tokens),
            do_sample=sampling.temperature > 0,
            temperature=sampling.temperature or None,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            eos_token_id=list(end_ids),
            pad_token_id=end_ids[0],
        )
        further = {"continuous_batching_config": self._options()} if self.options else {}
        forked = torch.random.fork_rng([device] if device.type == "cuda" else [])
        with policy.evaluating(), without_settings(policy.causal_lm), forked:
            torch.manual_seed(requests[0].seed)
            prompts = [request.prompt_ids for request in requests]
            library: Any = policy.causal_lm  # it mixes `generate_batch` into models without telling their types
            outputs = list(library.generate_batch(prompts, generation_config=config, **further).values())
        failed = [output.error for output in outputs if output.error]
        if failed or len(outputs) != len(requests):
            raise RuntimeError(
                f"`ContinuousBatching` finished {len(outputs) - len(failed)} of {len(requests)} requests"
                f" ({failed[0] if failed else 'no error was given'}); use `HFGenerate`."
            )
        samples = [
            cut_at_end(output.generated_tokens[: request.max_new_tokens], end_ids)
            for output, request in zip(outputs, requests, strict=True)
        ]
        if progress is not None:
            progress(sum(len(sample.token_ids) for sample in samples))
        return samples

    def _options(self) -> ContinuousBatchingConfig:
        try:
            return importlib.import_module("transformers").ContinuousBatchingConfig(**self.options)
        except (AttributeError, TypeError) as error:
            raise UserError(
                f"transformers does not take the `options` of `ContinuousBatching` ({error}); leave them out, or use a"
                " newer version of it."
            ) from error


@dataclass
class VLLM(GenerationBackend):
    """vLLM in this process, an optional extra; every response has a seed of its own.

    Args:
        gpu_memory_utilization: share of the device's memory that the engine may take.
        max_model_len: longest sequence it must hold.
        options: further arguments of `vllm.LLM`.
    """

    gpu_memory_utilization: float = 0.3
    max_model_len: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    _engine: Any = field(default=None, init=False, repr=False)
    _handed_over: int = field(default=0, init=False, repr=False)

    def batches(self, requests: Sequence[Request]) -> list[list[int]]:
        return _chunks(len(requests))

    def generate(
        self,
        policy: Policy,
        requests: Sequence[Request],
        sampling: Sampling,
        end_ids: Sequence[int],
        progress: Callable[[int], object] | None = None,
    ) -> list[Sample]:
        """As in the socket.

        Raises:
            UserError: if vLLM is absent or of an unknown version, or the policy has no adapter.
        """
        vllm = _vllm()
        settings = [
            vllm.SamplingParams(
                n=1,
                temperature=sampling.temperature,
                top_k=sampling.top_k or -1,
                top_p=sampling.top_p,
                seed=request.seed % (1 << 31),
                max_tokens=min(request.max_new_tokens, sampling.max_new_tokens),
                stop_token_ids=list(end_ids),
                detokenize=False,
            )
            for request in requests
        ]
        prompts = [{"prompt_token_ids": request.prompt_ids} for request in requests]
        with tempfile.TemporaryDirectory() as folder:
            adapter = self._adapter(vllm, policy, folder)
            outputs = self._engine.generate(prompts, settings, lora_request=adapter, use_tqdm=False)
        samples = []
        for output in outputs:
            done = output.outputs[0]
            ids = list(done.token_ids)
            if done.finish_reason == "stop" and (not ids or ids[-1] not in end_ids):
                ids.append(done.stop_reason if isinstance(done.stop_reason, int) else end_ids[0])
            samples.append(cut_at_end(ids, end_ids))
        if progress is not None:
            progress(sum(len(sample.token_ids) for sample in samples))
        return samples

    def _adapter(self, vllm: ModuleType, policy: Policy, folder: str) -> Any:
        """The policy's adapter as vLLM takes it, from a folder; makes the engine at the first call."""
        configs = getattr(policy.model, "peft_config", None)
        if not configs:
            raise UserError(
                "`VLLM` is handed the weights of a LoRA adapter and the policy has none; set `model.policy.lora`, or"
                " use `HFGenerate`."
            )
        if policy.merged:
            raise UserError(
                "`VLLM` loads the base by its name, and here an adapter was merged into it, so it would not generate"
                " with the policy; use `HFGenerate`, or merge the adapter into a folder of its own first (peft's"
                " `merge_and_unload`) and give that as `model.policy.path`."
            )
        config = next(iter(configs.values()))
        rank = next((rank for rank in VLLM_RANKS if rank >= config.r), None)
        if rank is None:
            raise UserError(
                f"`model.policy.lora.r` is {config.r} and `VLLM` takes adapters up to rank {VLLM_RANKS[-1]}; lower it,"
                " or use `HFGenerate`."
            )
        if self._engine is None:
            self._engine = vllm.LLM(
                model=config.base_model_name_or_path,
                enable_lora=True,
                max_lora_rank=rank,
                gpu_memory_utilization=self.gpu_memory_utilization,
                max_model_len=self.max_model_len,
                **self.options,
            )
        policy.model.save_pretrained(folder)
        self._handed_over += 1  # a new id, or the engine would use the adapter it has cached
        request = importlib.import_module("vllm.lora.request").LoRARequest
        return request(f"policy-{self._handed_over}", self._handed_over, folder)


def _vllm() -> ModuleType:
    try:
        module = importlib.import_module("vllm")
    except ImportError as error:
        raise UserError(
            f"`VLLM` needs the package vllm, which cannot be imported ({error}); `pip install vllm`, or use"
            " `HFGenerate`."
        ) from error
    version = module.__version__  # builds for other devices are distributions of other names
    number = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if not VLLM_OLDEST <= number < VLLM_NEWEST:
        raise UserError(
            f"`VLLM` was written for vllm from {'.'.join(map(str, VLLM_OLDEST))} to before"
            f" {'.'.join(map(str, VLLM_NEWEST))} and {version} is installed; install one of those, or use"
            " `HFGenerate`."
        )
    return module
