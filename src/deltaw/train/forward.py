"""The summed loss of a packed micro-batch under a causal language model, by the cheapest way that is right for it.

What is relied on is asked of a model before, with tiny forwards:
  is causal     do tokens see only what comes before them? Otherwise it is refused: there is nothing to predict.
  packs         do examples laid end to end stay apart (to the bit), and count positions from their own start?
                Otherwise each example goes through alone: slower, and right.
  head is plain are the logits just ``head(hidden)``? Then only supervised rows reach the head, in chunks, and no
                logits are kept. Otherwise (capped, scaled or adapted heads) the model's own logits are used, for
                supervised rows only.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..data.pack import Packed, pack
from ..data.render import Tokens
from ..errors import UserError
from ..heap import kept_memory
from ..nn.attention import use_packed_attention
from ..nn.batch import Batch, batch, checkpoint_context
from ..nn.families import LeanLayer, recompute_mlp
from ..nn.storage import frozen_weight, is_linear
from ..nn.walk import adapted_layers
from ..ops.dropout import DropoutKey
from ..ops.loss import frozen_cross_entropy

_RUN = "_gradient_checkpointing_func"
"""Where transformers' layers keep what runs them as a checkpoint."""


@dataclass(frozen=True)
class LanguageModel:
    """A model with what was found out about it."""

    model: PreTrainedModel
    packs: bool
    """Whether examples may lie end to end."""
    has_plain_head: bool
    """Whether logits are ``head(hidden)``, with a frozen head."""
    adapts_head: bool = False
    """Whether adapters stand behind the hidden states. What they do to a row (dropout, whose adapter) goes by its
    number, so that all rows must come to them."""

    def pack(self, examples: Sequence[Tokens], max_tokens: int) -> list[Packed]:
        """Micro-batches for the examples of one optimiser step."""
        return pack(examples, max_tokens if self.packs else 1)

    def loss(self, packed: Packed, dropout: DropoutKey | None = None) -> Tensor:
        """Loss summed over the micro-batch's supervised tokens (scalar, nats), with gradients where they are wanted."""
        facts = Batch(lengths=packed.lengths if self.packs else None, dropout=dropout, counts_changes=True)
        device = self.model.device
        rows_S, targets_S = packed.target_rows_S.to(device), packed.targets_S.to(device)
        inputs = {"input_ids": packed.input_ids_T[None].to(device)}
        if self.packs:  # an example alone counts from 0 by itself, and such models may not take positions
            inputs["position_ids"] = packed.position_ids_T[None].to(device)
        with batch(facts), use_packed_attention(self.model) if self.packs else nullcontext():
            if self.has_plain_head:
                hidden = self.model.base_model(**inputs, use_cache=False).last_hidden_state[0, rows_S]
                head = self.model.get_output_embeddings()
                return frozen_cross_entropy(hidden, frozen_weight(head), targets_S, head.bias)
            logits = _logits(self.model, inputs, rows_S, all_rows=self.adapts_head)
            return F.cross_entropy(logits.float(), targets_S, reduction="sum")


def examine(model: PreTrainedModel) -> LanguageModel:
    """Find out how a causal language model may be used; leaves it as it was.

    Raises ``UserError`` for any other model: one with an encoder, or one whose tokens see those that come after.
    """
    with torch.no_grad():
        _check_causal(model)
        packs, has_plain_head = _packs(model), _has_plain_head(model)
    behind = len([*adapted_layers(model)]) - len([*adapted_layers(model.base_model)])
    return LanguageModel(model=model, packs=packs, has_plain_head=has_plain_head, adapts_head=behind > 0)


@contextmanager
def training_mode(language_model: LanguageModel, *, checkpointing: bool) -> Iterator[None]:
    """Adapters' dropout on, and gradient checkpointing if asked for; the base stays in evaluation mode.

    Checkpointing is selective where layers are lean (``nn/families``): what is large and cheap is computed again. Other
    layers are run again whole.

    The base is frozen, and dropout of its own would only make the run depend on how examples lie in memory.
    Backward belongs in here too: a checkpointed layer runs again then, and must attend as it did the first time.
    """
    model = language_model.model
    model.eval()
    blocks = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)] if checkpointing else []
    selective = [block for block in blocks if isinstance(block, LeanLayer)]
    whole = [block for block in blocks if not isinstance(block, LeanLayer)]
    with (
        kept_memory(),
        use_packed_attention(model) if language_model.packs else nullcontext(),
        recompute_mlp(selective),
        _checkpointed(model, whole) if whole or (checkpointing and not selective) else nullcontext(),
    ):
        try:
            for _, adapted in adapted_layers(model):
                adapted.training = True
            yield
        finally:
            model.eval()


@contextmanager
def _checkpointed(model: PreTrainedModel, layers: Sequence[Any]) -> Iterator[None]:
    """transformers' own checkpointing, of whole layers."""
    model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": checkpoint_context})
    for layer in layers:
        layer.training = True  # without this flag it doesn't checkpoint; children stay in evaluation mode
        layer.__dict__[_RUN] = partial(_run_in_evaluation, layer, layer._gradient_checkpointing_func)
    try:
        yield
    finally:
        model.activation_checkpointing_disable()
        for layer in layers:
            layer.__dict__.pop(_RUN, None)


@contextmanager
def evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    """Without dropout, checkpointing or gradients, inside ``training_mode``; afterwards all is as it was."""
    was = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in was:
            module.training = True


def _run_in_evaluation(
    layer: nn.Module, checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any
) -> Any:
    """A checkpointed run with the layer's own flag down: some layers drop by it themselves (OPT's)."""

    def forward(*args: Any) -> Any:
        was, layer.training = layer.training, False
        try:
            return function(*args)
        finally:
            layer.training = was

    return checkpoint(forward, *args)


def _check_causal(model: PreTrainedModel) -> None:
    what = f"{type(model).__name__} is not a causal language model"
    remedy = "give a decoder such as Llama, Qwen or GPT-2"
    if model.config.is_encoder_decoder:
        raise UserError(f"{what}: it reads its input with an encoder; {remedy}")
    ids = torch.arange(3, 11, device=model.device) % model.config.get_text_config().vocab_size
    other = torch.cat([ids[:-1], ids[:1]])
    one, two = (model(input_ids=i[None], use_cache=False).logits[0, :-1] for i in (ids, other))
    if not _equal_but_for_rounding(one, two, model.dtype):
        raise UserError(f"{what}: its tokens see those that come after them; {remedy}")


def _packs(model: PreTrainedModel) -> bool:
    """Whether a second example is blind to the first, and counts its positions from its own start.

    Two checks that no rounding blurs (where experts are routed, a product's rows depend on all tokens): what the
    second example says has no derivative by the first one's embeddings, exactly none; and an example laid behind its
    own twin comes out as the twin does.
    """
    length = 16
    ids = torch.arange(3, 3 + length, device=model.device) % model.config.get_text_config().vocab_size
    positions = torch.arange(length, device=model.device).repeat(2)
    embedded: list[Tensor] = []

    def watch(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    handle = model.get_input_embeddings().register_forward_hook(watch)
    try:
        with torch.enable_grad(), batch(Batch(lengths=(length, length))), use_packed_attention(model):
            twins = model(input_ids=ids.repeat(2)[None], position_ids=positions[None], use_cache=False).logits[0]
            derivatives = torch.autograd.grad(twins[length:].float().square().sum(), embedded)
    except (ValueError, TypeError, AttributeError):  # attention that can't be exchanged or packed; no position_ids
        return False
    finally:
        handle.remove()
    leaks = any(bool(d[0, :length].any()) for d in derivatives)
    return bool(derivatives) and not leaks and _equal_but_for_rounding(twins[:length], twins[length:], model.dtype)


def _equal_but_for_rounding(one: Tensor, two: Tensor, dtype: torch.dtype) -> bool:
    """Whether logits computed in ``dtype`` are the same; where experts are routed, other tokens change the rounding."""
    tolerance = max(1e-4, 4 * torch.finfo(dtype).eps) * one.abs().max().item()
    return torch.allclose(one, two, rtol=0, atol=tolerance)


def _has_plain_head(model: PreTrainedModel) -> bool:
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Module) or not is_linear(head) or model.base_model is model:
        return False
    if any(p.requires_grad for p in head.parameters()):
        return False
    ids = torch.arange(1, 6, device=model.device)[None] % model.config.get_text_config().vocab_size
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return torch.equal(head(hidden), model(input_ids=ids, use_cache=False).logits)


def _logits(model: PreTrainedModel, inputs: dict[str, Tensor], rows_S: Tensor, *, all_rows: bool) -> Tensor:
    """The model's own logits [S, V] for some rows of a packed batch, of which ``all_rows`` go through the head."""
    if not all_rows and "logits_to_keep" in inspect.signature(model.forward).parameters:
        return model(**inputs, use_cache=False, logits_to_keep=rows_S).logits[0]  # type: ignore[no-any-return]
    return model(**inputs, use_cache=False).logits[0, rows_S]  # type: ignore[no-any-return]
