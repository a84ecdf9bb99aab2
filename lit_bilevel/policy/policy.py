"""The policy: a causal LM that returns the NLL of response tokens, and nothing else.

Only response positions go through the output layer. Where the model's logits are not what `head.py` knows to compute
from the decoder's last hidden states (an adapted output layer, say), the model's own logits at all positions are used.

Left out: attention masks. Sequences are padded on the right and attention is causal, so no response token sees padding;
packed ones are kept apart by the model, from their positions, which is tried once before it is relied upon.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lit_bilevel.errors import UserError
from lit_bilevel.losses import (
    OutputLayer,
    logits_nll,
    logits_nll_and_entropy,
    token_nll,
    token_nll_and_entropy,
)
from lit_bilevel.objectives.base import Objective
from lit_bilevel.policy.head import Shape, head_shape
from lit_bilevel.policy.isolation import is_isolated, refusal
from lit_bilevel.problem import Values
from lit_bilevel.types import Batch

if TYPE_CHECKING:
    from peft import LoraModel, PeftModelForCausalLM
    from transformers import PreTrainedModel


class Predictions(NamedTuple):
    """What a policy says of predicted tokens.

    Args:
        nll_K: NLL of each, in nats.
        entropy_K: entropy of its prediction, in nats.
        hidden_KD: last hidden state before it; `None` where the output layer is not known.
    """

    nll_K: Tensor
    entropy_K: Tensor
    hidden_KD: Tensor | None


class Policy(nn.Module):
    """The model that is tuned.

    Args:
        model: a transformers causal LM, or a peft model around one.
    """

    def __init__(self, model: PreTrainedModel | PeftModelForCausalLM):
        super().__init__()
        self.model = model
        self.head_shape: Shape | None = head_shape(self.causal_lm)
        self.has_dropout = _has_dropout(self)
        self.compiled = False
        self.merged = False
        """Whether an adapter was merged into the base, which then is nowhere on disk."""
        self.isolated = False
        """Whether packed sequences were found not to see each other."""
        self.decoder: Callable[..., list[list[int]]] | None = None
        """How it generates, once that was tried."""

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The transformers model, with adapters in place but without peft's wrapper."""
        if hasattr(self.model, "get_base_model"):
            return cast("PreTrainedModel", cast("PeftModelForCausalLM", self.model).get_base_model())
        return cast("PreTrainedModel", self.model)

    def trainable(self) -> list[nn.Parameter]:
        """The parameters that are tuned, in a fixed order."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    @property
    def precise(self) -> bool:
        """Whether every parameter, also of a frozen base, is in float32 or better, so losses keep their digits."""
        return all(parameter.dtype in (torch.float32, torch.float64) for parameter in self.parameters())

    def layers(self) -> list[nn.Module]:
        """The decoder layers, by the name that the model gives their class; none where it gives no name."""
        # the name that transformers itself uses to keep a layer on one device
        names = set(getattr(self.causal_lm, "_no_split_modules", None) or ())
        return [module for module in self.modules() if type(module).__name__ in names]

    def forward(self, batch: Batch, temperature: float = 1.0) -> Tensor:
        """NLL in nats of each predicted token, [K]; logits are divided by the temperature.

        Raises:
            UserError: for a packed batch, if the model does not keep its sequences apart.
        """
        outputs_K = self._predicting(batch)
        if (layer := self._output_layer()) is None:
            return logits_nll(outputs_K, batch.target_K, temperature)
        return token_nll(outputs_K, layer, batch.target_K, temperature)

    def predictions(self, batch: Batch) -> Predictions:
        """What the policy says of each predicted token, without a graph.

        Raises:
            UserError: as a call does.
        """
        with torch.no_grad():
            outputs_K = self._predicting(batch)
            if (layer := self._output_layer()) is None:
                return Predictions(*logits_nll_and_entropy(outputs_K, batch.target_K), None)
            return Predictions(*token_nll_and_entropy(outputs_K, layer, batch.target_K), outputs_K)

    def _predicting(self, batch: Batch) -> Tensor:
        """[K, …] outputs at the positions before the predicted tokens."""
        if batch.packing is not None and not self.isolated:
            self._check_isolation()
        return _select(self.outputs, batch)

    def _output_layer(self) -> OutputLayer | None:
        """The output layer; `None` where it is not known and outputs are logits."""
        if self.head_shape is None:
            return None
        head = self.causal_lm.get_output_embeddings()
        return OutputLayer(head.weight, head.bias, *self.head_shape)

    def losses(self, objective: Objective, batch: Batch) -> Tensor:
        """Loss of each example under an objective, [B], with a graph where gradients are recorded."""
        batch = self.prepare(objective, batch)
        return objective.losses(self(batch), batch)

    def prepare(self, objective: Objective, batch: Batch) -> Batch:
        """The batch with the reference's token losses, where the objective needs them and they are not there yet.

        They depend on no tuned value, so they hold for all passes of a step.
        """
        if not objective.needs_reference or batch.reference_K is not None:
            return batch
        with self.evaluating(), self.without_adapter():
            return replace(batch, reference_K=self(batch))

    def outputs(self, ids_ST: Tensor, offset_ST: Tensor | None = None) -> Tensor:
        """Last hidden states, [S, T, D]; where the output layer is not known, logits, [S, T, V].

        Args:
            ids_ST: token ids.
            offset_ST: position of each token in its sequence, where a row holds several.
        """
        # no mask and no cache: with either, transformers lets packed sequences see each other
        positions = {} if offset_ST is None else {"position_ids": offset_ST}
        if self.head_shape is None:
            return self.causal_lm(input_ids=ids_ST, use_cache=False, **positions).logits
        return self.causal_lm.get_decoder()(input_ids=ids_ST, use_cache=False, **positions).last_hidden_state

    @property
    def takes_any_length(self) -> bool:
        """Whether attention has a kernel for sequences of different lengths in one row."""
        return "flash" in (self.causal_lm.config._attn_implementation or "")

    def _check_isolation(self) -> None:
        """On the device that the policy is on, which is why it is not done when it is loaded."""
        model = self.causal_lm
        with self.evaluating():
            rows, device = 1 if self.takes_any_length else 2, next(self.parameters()).device
            self.isolated = is_isolated(self.outputs, model.config.get_text_config().vocab_size, rows, device)
        if not self.isolated:
            raise refusal(type(model).__name__, model.config._attn_implementation)

    def uncompiled(self) -> AbstractContextManager:
        """Run layers as they are written, for passes that compiled ones cannot make."""
        return torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()

    @contextmanager
    def as_written(self) -> Iterator[None]:
        """No compiled layers and no fused attention, which have neither tangents nor second derivatives."""
        with self.uncompiled(), sdpa_kernel(SDPBackend.MATH):
            yield

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Dropout off and no graph; every submodule's mode comes back as it was, also on exceptions.

        Not inference mode: tensors that it makes cannot be used in a backward pass later. Autocast forgets the casts
        it made here, for they carry no gradient and would be reused by the training pass.
        """
        # every module's own mode: frozen parts may be in evaluation mode during training
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            with torch.no_grad(), self.uncompiled():
                yield
        finally:
            for module, training in modes:
                module.training = training
            torch.clear_autocast_cache()

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """The model that the adapter was put on, also while the tuned values are substituted."""
        # peft's own layers; `model.disable_adapter()` would look at every parameter each time
        adapted = cast("LoraModel", cast("PeftModelForCausalLM", self.model).base_model)
        adapted.disable_adapter_layers()
        try:
            yield
        finally:
            adapted.enable_adapter_layers()

    def check_reference(self) -> None:
        """Refuse a policy that is not its own start once its adapter is switched off.

        Raises:
            UserError: saying why.
        """
        remedy = "; tune a LoRA adapter (`model.policy.lora`) on a model without one, or use the objective `SFT`."
        if not hasattr(self.model, "peft_config"):
            raise UserError(f"the objective needs a reference, and the policy has no adapter to switch off{remedy}")
        other = [name for name, parameter in self.named_parameters() if parameter.requires_grad != ("lora_" in name)]
        if other:
            raise UserError(f"without its adapter the policy is not the reference, because of {other[0]!r}{remedy}")

    @contextmanager
    def substituted(self, values: Values) -> Iterator[None]:
        """Evaluate at other values of the trainable parameters; the old ones come back bit for bit, also on exceptions.

        Parameters swap storage, so nothing is computed and no rounding can happen; those that are spread over processes
        are copied instead, for what is gathered later comes from their own storage. Autocast forgets its casts of the
        other values.
        """
        parameters = self.trainable()
        kept = [parameter.data.clone() if _is_sharded(parameter) else parameter.data for parameter in parameters]
        try:
            _exchange(parameters, values)
            yield
        finally:
            _exchange(parameters, kept)


def _is_sharded(parameter: Tensor) -> bool:
    return hasattr(parameter, "full_tensor")


def _exchange(parameters: Sequence[Tensor], values: Values) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        if _is_sharded(parameter):
            parameter.data.to_local().copy_(value.data.to_local())  # type: ignore[attr-defined]
        else:
            parameter.data = value
    torch.clear_autocast_cache()


def _select(call: Callable[..., Tensor], batch: Batch) -> Tensor:
    """[K, …] outputs of `call` at the positions before the predicted tokens, part by part or packed."""
    if (packing := batch.packing) is not None:
        return call(packing.input_ids_PW, packing.offset_PW).flatten(0, 1)[packing.position_K]
    width, first, outputs = batch.input_ids_ST.shape[1], 0, []
    for part in batch.parts:
        position_K = batch.position_K[first : first + part.predicted]
        if len(batch.parts) > 1:
            position_K = (position_K // width - part.start) * part.width + position_K % width
        output = call(batch.input_ids_ST[part.start : part.stop, : part.width])
        outputs.append(output.flatten(0, 1)[position_K])
        first += part.predicted
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _has_dropout(policy: Policy) -> bool:
    """Whether a forward pass in training mode draws random numbers."""
    config = policy.causal_lm.config.get_text_config().to_dict()
    rates = [value for key, value in config.items() if re.search("drop|noise", key) and isinstance(value, float)]
    return any(rate > 0 for rate in rates) or any(isinstance(m, nn.Dropout) and m.p > 0 for m in policy.modules())
