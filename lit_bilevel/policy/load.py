"""Loading a policy: a causal LM folder or hub id, tuned whole or through LoRA.

Left out: other adapters than LoRA (prompt-learning ones change the input, which the generation code relies on), and
`trust_remote_code`, and weights that are pickled, unless they are asked for by name.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn

from lit_bilevel.errors import UserError
from lit_bilevel.policy.causal import check_causal
from lit_bilevel.policy.context import context_of
from lit_bilevel.policy.policy import Policy
from lit_bilevel.resources import located


@dataclass(frozen=True)
class LoraSettings:
    """A low-rank adapter (arXiv 2106.09685), by peft.

    Args:
        r: rank.
        alpha: scale; the adapter counts alpha / r.
        dropout: dropout on the adapter's input.
        target_modules: names of the layers to adapt, or `all-linear`.
    """

    r: int = 16
    alpha: int = 16
    dropout: float = 0.0
    target_modules: list[str] | str = "all-linear"


@dataclass(frozen=True)
class PolicySettings:
    """Which model is tuned, and how it is loaded.

    Args:
        path: a `from_pretrained` folder or a hub id.
        lora: adapter settings; without, the whole model is trained.
        dtype: `auto` is float32, or what `trainer.precision` says for the `*-true` settings.
        attn_implementation: attention of transformers (`sdpa`, `eager`, `flash_attention_2`); by default its choice.
        quantization: `4bit` (NF4) or `8bit` for the frozen base under LoRA (QLoRA, arXiv 2305.14314), by bitsandbytes.
        activation_checkpointing: recompute activations in the backward pass to save memory.
        compile: compile the decoder layers with torch.compile; the first steps are slow.
        trust_remote_code: run code that comes with the model. Off, because that code can do anything.
        allow_pickle: also read weights that are not safetensors (`pytorch_model.bin`). Off, as pickles have run code.
    """

    path: str
    lora: LoraSettings | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    attn_implementation: str | None = None
    quantization: Literal["4bit", "8bit"] | None = None
    activation_checkpointing: bool = False
    compile: bool = False
    trust_remote_code: bool = False
    allow_pickle: bool = False


def load_tokenizer(settings: PolicySettings, path: str | None = None) -> Any:
    """The policy's tokenizer, or that at another path.

    Raises:
        UserError: if there is none.
    """
    from transformers import AutoTokenizer

    if settings.trust_remote_code:
        rank_zero_warn(
            f"`model.policy.trust_remote_code` is ON: program code from {settings.path!r} runs on this machine with"
            " your rights and can read, change and send whatever you can. Turn it off unless you have read that code."
        )
    try:
        place = located(path or settings.path)
        return AutoTokenizer.from_pretrained(place, trust_remote_code=settings.trust_remote_code)
    except (OSError, ValueError) as error:
        raise _unloadable("tokenizer", path or settings.path, error) from error


def context_length(settings: PolicySettings) -> int | None:
    """Positions that the policy was made for; `None` where its configuration does not say, or cannot be read."""
    config = policy_config(settings)
    return None if config is None else context_of(config)


def policy_config(settings: PolicySettings) -> Any | None:
    """The configuration of the policy; `None` where it cannot be read."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(located(settings.path), trust_remote_code=settings.trust_remote_code)
    except (OSError, ValueError):
        return None  # `load_policy` tells it


def load_policy(settings: PolicySettings, default_dtype: torch.dtype) -> Policy:
    """The policy, ready to train.

    Args:
        settings: which model.
        default_dtype: what `dtype: auto` means.

    Raises:
        UserError: if there is no causal LM at `settings.path`, or the adapter does not fit it.
    """
    from transformers import AutoModelForCausalLM

    quantized = {} if settings.quantization is None else {"quantization_config": _quantization(settings)}
    dtype = default_dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            located(settings.path),
            dtype=dtype,
            attn_implementation=settings.attn_implementation,
            trust_remote_code=settings.trust_remote_code,
            use_safetensors=None if settings.allow_pickle else True,
            **quantized,
        )
    except (OSError, ValueError, ImportError) as error:  # the last where the package of an attention is missing
        raise _unloadable("causal language model", settings.path, error) from error
    if getattr(model.config, "rescale_every", 0):
        # RWKV divides its parameters in evaluation mode, for float16; in a run they would change between two losses
        model.config.rescale_every = 0
    check_causal(model)
    if settings.activation_checkpointing:
        checkpoint_activations(model)
    if settings.lora is not None:
        model = _with_lora(model, settings)
    return Policy(model).train()  # `from_pretrained` returns eval mode, and Lightning keeps what it finds


def checkpoint_activations(model: Any) -> None:
    """Let a transformers model compute its layers again in the backward pass instead of keeping what they gave."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _quantization(settings: PolicySettings) -> Any:
    if settings.lora is None:
        raise UserError(
            f"`model.policy.quantization` is {settings.quantization} and there is no adapter, but quantized parameters"
            " cannot be tuned; set `model.policy.lora`."
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"`model.policy.quantization` is {settings.quantization}, which needs bitsandbytes; install"
            " `lit-bilevel[gpu]`, or leave it out."
        )
    from transformers import BitsAndBytesConfig

    if settings.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="bfloat16"
    )


def _with_lora(model: Any, settings: PolicySettings) -> Any:
    from peft import LoraConfig, get_peft_model

    lora = settings.lora
    assert lora is not None
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )
    if settings.activation_checkpointing:
        model.enable_input_require_grads()
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"LoRA does not fit {settings.path}: {error}") from error


def _unloadable(what: str, path: str, error: Exception) -> UserError:
    said = "".join(f": {line}" for line in str(error).strip().splitlines()[:1])
    return UserError(
        f"no {what} could be loaded from {path!r} ({type(error).__name__}{said});"
        " give `model.policy.path` a folder written by `save_pretrained`, with safetensors, or a hub id"
        " (`model.policy.allow_pickle: true` reads `.bin` files, `trust_remote_code: true` runs code that is there)."
    )
