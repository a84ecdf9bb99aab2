"""Settings of a policy: which model is tuned, and how it is loaded.

Left out: what they mean for a folder that is not there yet; `load` and `origin` look at that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


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
        path: a `from_pretrained` folder or a hub id, of a model or of a LoRA adapter (such as the `policy/` of a run).
        lora: settings of a new adapter; without, the whole model is trained, or the adapter that `path` holds.
        adapter: what becomes of the adapter that `path` holds: `continue` tunes it further (the default where `lora` is
            not set), `merge` adds it to its base, to be tuned whole or, with `lora`, under a new adapter.
        dtype: `auto` is float32, or what `trainer.precision` says for the `*-true` settings.
        attn_implementation: attention of transformers (`sdpa`, `eager`, `flash_attention_2`); by default its choice.
        quantization: `4bit` (NF4) or `8bit` for the frozen base under LoRA (QLoRA, arXiv 2305.14314), by bitsandbytes.
            Layers of four bits multiply in the digits of `trainer.precision`.
        activation_checkpointing: recompute activations in the backward pass to save memory.
        compile: compile the decoder layers with torch.compile; the first steps are slow.
        trust_remote_code: run code that comes with the model. Off, because that code can do anything.
        allow_pickle: also read weights that are not safetensors (`pytorch_model.bin`). Off, as pickles have run code.
    """

    path: str
    lora: LoraSettings | None = None
    adapter: Literal["continue", "merge"] | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    attn_implementation: str | None = None
    quantization: Literal["4bit", "8bit"] | None = None
    activation_checkpointing: bool = False
    compile: bool = False
    trust_remote_code: bool = False
    allow_pickle: bool = False
