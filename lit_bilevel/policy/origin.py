"""What a policy starts from: a model, or the adapter that its folder holds, continued or merged.

Example: with `path: runs/a/policy`, an adapter on `base`, the policy is that adapter tuned further; with `adapter:
merge` and `lora` it is a new adapter on base + old adapter. Left out: loading any of it.
"""

from __future__ import annotations

from lit_bilevel.errors import UserError
from lit_bilevel.policy.adapter import Adapter, differences, find_adapter
from lit_bilevel.policy.settings import PolicySettings
from lit_bilevel.resources import locate


def adapter_of(settings: PolicySettings) -> Adapter | None:
    """The adapter that `settings.path` holds; `None` where that is a whole model.

    Raises:
        UserError: if it cannot be used, or the settings do not say, or contradict, what becomes of it.
    """
    path = locate(settings.path)
    adapter = find_adapter(path)
    if adapter is None:
        if settings.adapter is not None:
            raise UserError(
                f"`model.policy.adapter` is {settings.adapter}, and {path} holds no adapter (no adapter_config.json);"
                " leave it out, or give the folder of an adapter as `model.policy.path`."
            )
        return None
    if settings.lora is not None and settings.adapter is None:
        raise UserError(
            f"{path} holds an adapter of rank {adapter.config.r} on {adapter.base!r}, and `model.policy.lora` asks for"
            " a new one; set `--model.policy.adapter continue --model.policy.lora null` to tune the one that is there,"
            " or `--model.policy.adapter merge` to add it to its base and tune a new one on top."
        )
    different = [] if settings.lora is None else differences(adapter.config, settings.lora)
    if different and settings.adapter == "continue":
        raise UserError(
            f"`model.policy.adapter` is continue, and `model.policy.lora` says other things than the adapter in {path}:"
            f" {'; '.join(different)}; leave `lora` out (`--model.policy.lora null`), or set `--model.policy.adapter"
            " merge`."
        )
    if settings.adapter == "merge" and settings.quantization is not None:
        raise UserError(
            f"`model.policy.adapter` is merge and `model.policy.quantization` is {settings.quantization}, in which"
            " adding an adapter rounds it away; leave one of them out."
        )
    return adapter


def tunes_adapter(settings: PolicySettings) -> bool:
    """Whether an adapter is what is tuned, a new one or one that is continued."""
    return settings.lora is not None or (settings.adapter != "merge" and adapter_of(settings) is not None)


def base_of(settings: PolicySettings) -> str:
    """Folder or hub id of the model itself: `settings.path`, or what the adapter there is for."""
    adapter = adapter_of(settings)
    return settings.path if adapter is None else adapter.base


def tokenizer_path(settings: PolicySettings) -> str:
    """Where the tokenizer is: at `settings.path`, or where an adapter has none, at its base."""
    from transformers.utils import cached_file

    path, adapter = locate(settings.path), adapter_of(settings)
    if adapter is None:
        return path
    own = cached_file(
        path,
        "tokenizer_config.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return locate(adapter.base) if own is None else path


def origin(settings: PolicySettings, adapter: Adapter) -> str:
    """What becomes of the adapter at `settings.path`, in words."""
    rank = f"the adapter in {settings.path} (rank {adapter.config.r}, on {adapter.base})"
    if settings.adapter != "merge":
        return f"{rank} is continued"
    return f"{rank} is merged into its base, which is tuned {'whole' if settings.lora is None else 'by a new adapter'}"
