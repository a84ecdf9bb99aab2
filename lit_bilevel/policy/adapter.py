"""LoRA adapters in a policy folder: finds them, puts them on their base again, or merges them into it.

A run that tunes an adapter leaves one in its `policy/`, and so do peft and TRL. A folder with `adapter_config.json` has
no model of its own: the model is the base that this file names, plus the adapter. Example: `runs/a/policy` has an
adapter on `meta-llama/Llama-3.2-1B`; continued, its own matrices are tuned on; merged, base + adapter become the model
that is tuned whole, or that a new adapter is put on.

Left out: other adapters than LoRA, and several adapters in one folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lit_bilevel.errors import UserError
from lit_bilevel.resources import locate

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModelForCausalLM
    from transformers import PreTrainedModel

    from lit_bilevel.policy.settings import LoraSettings

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
MODELS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
BASE = "base"
"""Folder inside an exported `policy/` with the model that its adapter is for, where that is nowhere else."""


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk or on the hub.

    Args:
        path: where it is.
        base: folder or hub id of the model that it is for.
        config: peft's `LoraConfig` of it.
    """

    path: str
    base: str
    config: LoraConfig


def find_adapter(path: str) -> Adapter | None:
    """The adapter in a folder or of a hub id; `None` where there is none.

    Raises:
        UserError: for an adapter of another kind, without weights or without a base, or one beside a whole model.
    """
    if not _has_adapter(path):
        return None
    from peft import LoraConfig, PeftConfig

    try:
        config = PeftConfig.from_pretrained(path)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"the `adapter_config.json` of {path} cannot be read ({type(error).__name__}: {error})."
        ) from error
    if type(config) is not LoraConfig:
        raise UserError(
            f"{path} holds an adapter of the kind {getattr(config.peft_type, 'value', config.peft_type)}, and only LoRA"
            " is read; merge it into its base with peft's `merge_and_unload` where that can be done, and give that"
            " folder as `model.policy.path`."
        )
    folder = Path(path)
    if folder.is_dir():
        _refuse_content(folder)
    base = config.base_model_name_or_path
    if folder.is_dir() and (folder / BASE).is_dir() and not Path(base or "").exists():
        base = str(folder / BASE)  # the folder was moved since it was written
    if not base:
        raise UserError(
            f"the adapter in {path} does not say which model it is for; write `base_model_name_or_path` into its"
            " adapter_config.json."
        )
    if _has_adapter(locate(base)):
        raise UserError(
            f"the adapter in {path} is for {base!r}, which holds an adapter itself; merge that one into its base with"
            " peft's `merge_and_unload`, and name the result in adapter_config.json."
        )
    return Adapter(path, base, config)


def _has_adapter(path: str) -> bool:
    from transformers.utils.peft_utils import find_adapter_config_file

    try:
        return find_adapter_config_file(path) is not None
    except OSError:  # neither a folder nor the form of a hub id; who loads it says so
        return False


def _refuse_content(folder: Path) -> None:
    if both := [name for name in MODELS if (folder / name).exists()]:
        raise UserError(
            f"{folder} holds an adapter (adapter_config.json) and a whole model ({both[0]}), and only one can be meant;"
            " move the other one to a folder of its own."
        )
    if not any((folder / name).is_file() for name in WEIGHTS):
        raise UserError(
            f"{folder} has an adapter_config.json and no weights ({' or '.join(WEIGHTS)}); copy them there."
        )


def put_on(model: PreTrainedModel, adapter: Adapter, trainable: bool, allow_pickle: bool) -> PeftModelForCausalLM:
    """The model with the adapter's values, by peft.

    Args:
        model: the base.
        adapter: which one.
        trainable: whether the adapter is tuned further.
        allow_pickle: also read weights that are not safetensors.

    Raises:
        UserError: if the adapter does not fit the model, or its weights are pickled and may not be.
    """
    from peft import PeftModelForCausalLM

    folder = Path(adapter.path)
    if not allow_pickle and folder.is_dir() and not (folder / WEIGHTS[0]).is_file():
        raise UserError(
            f"the adapter in {adapter.path} is pickled ({WEIGHTS[1]}), and pickles can run code; save it as"
            " safetensors, or set `model.policy.allow_pickle: true`."
        )
    adapter.config.inference_mode = not trainable
    try:
        made = PeftModelForCausalLM(model, adapter.config)
        loaded = made.load_adapter(adapter.path, "default", is_trainable=trainable, torch_device="cpu")
    except (RuntimeError, ValueError, OSError) as error:  # the first where a matrix has another shape
        raise _misfit(adapter, str(error).strip().splitlines()[-1].strip()) from error
    wrong = [*loaded.missing_keys, *loaded.unexpected_keys]
    if wrong:  # peft would leave new matrices at their random start
        raise _misfit(adapter, f"{len(wrong)} entries have no counterpart, the first is {wrong[0]!r}")
    return made


def _misfit(adapter: Adapter, reason: str) -> UserError:
    return UserError(
        f"the adapter in {adapter.path} does not fit its base {adapter.base!r}: {reason}; give the model that it was"
        " trained on as `base_model_name_or_path` of its adapter_config.json."
    )


def merge(model: PeftModelForCausalLM, adapter: Adapter) -> PreTrainedModel:
    """A model that an adapter was put on, with the adapter added to its parameters.

    Raises:
        UserError: if input and output embeddings are one tensor, and the adapter changes only one of its roles.
    """
    whole = model.merge_and_unload(safe_merge=True)
    config, inner = whole.config.get_text_config(), (whole.get_input_embeddings(), whole.get_output_embeddings())
    touched = {name.split(".")[-1] for name in (*(adapter.config.modules_to_save or ()), *_targets(adapter.config))}
    ends = {name.split(".")[-1] for name, module in whole.named_modules() if any(module is one for one in inner)}
    if getattr(config, "tie_word_embeddings", False) and touched & ends:
        raise UserError(
            f"the adapter in {adapter.path} changes {', '.join(sorted(touched & ends))}, and input and output"
            f" embeddings of {adapter.base} are one tensor, so it cannot be merged; `continue` it."
        )
    return whole.requires_grad_(True)  # peft froze it under the adapter


def _targets(config: LoraConfig) -> tuple[str, ...]:
    targets = config.target_modules
    return (targets,) if isinstance(targets, str) else tuple(targets or ())


def differences(config: LoraConfig, lora: LoraSettings) -> list[str]:
    """What `model.policy.lora` says that an adapter is not: `["r is 16 and the adapter has 4"]`."""
    pairs: dict[str, tuple[object, object]] = {
        "r": (lora.r, config.r),
        "alpha": (lora.alpha, config.lora_alpha),
        "dropout": (lora.dropout, config.lora_dropout),
    }
    if not isinstance(lora.target_modules, str) and not isinstance(config.target_modules, str):
        pairs["target_modules"] = (sorted(lora.target_modules), sorted(config.target_modules or ()))
    return [f"`{name}` is {asked} and the adapter has {has}" for name, (asked, has) in pairs.items() if asked != has]
