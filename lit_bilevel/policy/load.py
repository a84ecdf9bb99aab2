"""Loads a policy: a causal LM folder or hub id, tuned whole or through LoRA, or an adapter on one.

Left out: other adapters than LoRA (prompt-learning ones change the input, which the generation code relies on), and
`trust_remote_code`, and weights that are pickled, unless they are asked for by name.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, cast

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_bilevel.errors import UserError
from lit_bilevel.policy.adapter import Adapter, merge, put_on
from lit_bilevel.policy.causal import check_causal
from lit_bilevel.policy.context import context_of
from lit_bilevel.policy.origin import adapter_of, base_of, origin, tokenizer_path, tunes_adapter
from lit_bilevel.policy.policy import Policy
from lit_bilevel.policy.settings import LoraSettings, PolicySettings
from lit_bilevel.resources import locate

if TYPE_CHECKING:
    from peft import PeftModelForCausalLM
    from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["LoraSettings", "PolicySettings", "checkpoint_activations", "load_policy", "load_tokenizer"]


def load_tokenizer(settings: PolicySettings, path: str | None = None) -> PreTrainedTokenizerBase:
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
    path = tokenizer_path(settings) if path is None else locate(path)
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=settings.trust_remote_code)
    except (OSError, ValueError) as error:
        raise _unloadable("tokenizer", path, error) from error


def context_length(settings: PolicySettings) -> int | None:
    """Positions that the policy was made for; `None` where its configuration does not say, or cannot be read."""
    config = policy_config(settings)
    return None if config is None else context_of(config)


def policy_config(settings: PolicySettings) -> PreTrainedConfig | None:
    """The configuration of the policy; `None` where it cannot be read."""
    from transformers import AutoConfig

    try:
        path = locate(base_of(settings))
        return AutoConfig.from_pretrained(path, trust_remote_code=settings.trust_remote_code)
    except (OSError, ValueError):
        return None  # `load_policy` tells it


def load_policy(settings: PolicySettings, default_dtype: torch.dtype, precision: str = "32-true") -> Policy:
    """The policy, ready to train.

    Args:
        settings: which model.
        default_dtype: what `dtype: auto` means.
        precision: the Trainer's, in which layers of four bits multiply.

    Raises:
        UserError: if there is no causal LM at `settings.path`, or the adapter does not fit it.
    """
    adapter = adapter_of(settings)
    if adapter is not None:
        rank_zero_info(origin(settings, adapter))
    quantized = {} if settings.quantization is None else {"quantization_config": _quantization(settings, precision)}
    dtype = default_dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)
    continues = adapter is not None and settings.adapter != "merge"
    model = load_model(settings, adapter, dtype, **quantized)
    if settings.activation_checkpointing:
        checkpoint_activations(model)
        if continues:
            model.enable_input_require_grads()
    if settings.lora is not None and not continues:
        model = _with_lora(cast("PreTrainedModel", model), settings)
    policy = Policy(model)
    policy.merged = adapter is not None and not continues
    return policy.train()  # `from_pretrained` returns eval mode, and Lightning keeps what it finds


def load_model(
    settings: PolicySettings, adapter: Adapter | None, dtype: torch.dtype, **quantized: BitsAndBytesConfig
) -> PreTrainedModel | PeftModelForCausalLM:
    """The transformers or peft model at `settings.path`, before anything new is put on it.

    Args:
        settings: which model.
        adapter: the one that is there, to be put on its base or merged into it.
        dtype: of the parameters.
        quantized: further arguments of `from_pretrained`.

    Raises:
        UserError: if it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    path = settings.path if adapter is None else adapter.base
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            locate(path),
            dtype=dtype,
            attn_implementation=settings.attn_implementation,
            trust_remote_code=settings.trust_remote_code,
            use_safetensors=None if settings.allow_pickle else True,
            **quantized,
        )
    except (OSError, ValueError, ImportError) as error:  # the last where the package of an attention is missing
        if adapter is not None:
            raise _base_missing(adapter, error) from error
        raise _unloadable("causal language model", path, error) from error
    if settings.quantization is not None:
        keep_backward(model)
    if getattr(model.config, "rescale_every", 0):
        # RWKV divides its parameters in evaluation mode, for float16; in a run they would change between two losses
        model.config.rescale_every = 0
    check_causal(model)
    if adapter is None:
        return model
    continues = settings.adapter != "merge"
    adapted = put_on(model, adapter, continues, settings.allow_pickle)
    return adapted if continues else merge(adapted, adapter)


def checkpoint_activations(model: PreTrainedModel | PeftModelForCausalLM) -> None:
    """Let a transformers model compute its layers again in the backward pass instead of keeping what they gave."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def keep_backward(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from packing 4-bit weights anew, which it does at the first evaluation pass on some CPUs.

    Those are CPUs with AVX512-BF16; layers packed in that way have no backward pass, and say nothing.
    """
    bitsandbytes = importlib.import_module("bitsandbytes")
    for layer in model.modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            layer.support_avx512bf16_for_cpu = False


def _quantization(settings: PolicySettings, precision: str) -> BitsAndBytesConfig:
    if settings.quantization not in ("4bit", "8bit"):
        raise UserError(f"`model.policy.quantization` is {settings.quantization!r}; it must be 4bit, 8bit, or null.")
    if not tunes_adapter(settings):
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
    # its own type, whatever that of the inputs is; in fewer digits than the run's, differences of losses would be noise
    types = {"16-mixed": "float16", "bf16-mixed": "bfloat16", "bf16-true": "bfloat16"}
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=types.get(precision, "float32"),
    )


def _with_lora(model: PreTrainedModel, settings: PolicySettings) -> PeftModelForCausalLM:
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
        return cast("PeftModelForCausalLM", get_peft_model(model, config))
    except ValueError as error:
        raise UserError(f"LoRA does not fit {settings.path}: {error}") from error


def _base_missing(adapter: Adapter, error: Exception) -> UserError:
    said = "".join(f": {line}" for line in str(error).strip().splitlines()[:1])
    return UserError(
        f"the adapter in {adapter.path} is for {adapter.base!r}, which could not be loaded"
        f" ({type(error).__name__}{said}); put that model there, or write where it is into"
        " `base_model_name_or_path` of adapter_config.json"
        " (`model.policy.allow_pickle: true` reads `.bin` files, `trust_remote_code: true` runs code that is there)."
    )


def _unloadable(what: str, path: str, error: Exception) -> UserError:
    said = "".join(f": {line}" for line in str(error).strip().splitlines()[:1])
    return UserError(
        f"no {what} could be loaded from {path!r} ({type(error).__name__}{said});"
        " give `model.policy.path` a folder written by `save_pretrained`, with safetensors, or a hub id"
        " (`model.policy.allow_pickle: true` reads `.bin` files, `trust_remote_code: true` runs code that is there)."
    )
