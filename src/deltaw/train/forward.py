"""The summed loss of a packed micro-batch under a causal language model, by the cheapest way that is right for it.

Two things are asked of a model before they are relied on, each with a tiny forward:
  packs         do examples laid end to end stay apart (to the bit), and count positions from their own start?
                Otherwise each example goes through alone: slower, and right.
  head is plain are the logits just ``head(hidden)``? Then only supervised rows reach the head, in chunks, and no
                logits are kept. Otherwise (capped, scaled or adapted heads) the model's own logits are used, for
                supervised rows only.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..data.pack import Packed, pack
from ..data.render import Tokens
from ..nn.attention import use_packed_attention
from ..nn.batch import Batch, batch, checkpoint_context
from ..nn.inject import adapted_layers
from ..nn.storage import frozen_weight, is_linear
from ..ops.dropout import DropoutKey
from ..ops.loss import frozen_cross_entropy


@dataclass(frozen=True)
class LanguageModel:
    """A model with what was found out about it."""

    model: PreTrainedModel
    packs: bool
    """Whether examples may lie end to end."""
    has_plain_head: bool
    """Whether logits are ``head(hidden)``, with a frozen head."""

    def pack(self, examples: Sequence[Tokens], max_tokens: int) -> list[Packed]:
        """Micro-batches for the examples of one optimiser step."""
        return pack(examples, max_tokens if self.packs else 1)

    def loss(self, packed: Packed, dropout: DropoutKey | None = None) -> Tensor:
        """Loss summed over the micro-batch's supervised tokens (scalar, nats), with gradients where they are wanted."""
        facts = Batch(lengths=packed.lengths if self.packs else None, dropout=dropout)
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
            logits = _logits(self.model, inputs, rows_S)
            return F.cross_entropy(logits.float(), targets_S, reduction="sum")


def examine(model: PreTrainedModel) -> LanguageModel:
    """Find out how a causal language model may be used; leaves it as it was."""
    with torch.no_grad():
        return LanguageModel(model=model, packs=_packs(model), has_plain_head=_has_plain_head(model))


@contextmanager
def training_mode(language_model: LanguageModel, *, checkpointing: bool) -> Iterator[None]:
    """Adapters' dropout on, and gradient checkpointing if asked for; the base stays in evaluation mode.

    The base is frozen, and dropout of its own would only make the run depend on how examples lie in memory.
    Backward belongs in here too: a checkpointed layer runs again then, and must attend as it did the first time.
    """
    model = language_model.model
    model.eval()
    with use_packed_attention(model) if language_model.packs else nullcontext():
        try:
            if checkpointing:
                model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": checkpoint_context})
            for module in model.modules():
                if isinstance(module, GradientCheckpointingLayer):
                    module.training = checkpointing  # this flag alone: children stay in evaluation mode
            for _, layer in adapted_layers(model):
                layer.training = True
            yield
        finally:
            if checkpointing:
                model.activation_checkpointing_disable()
            model.eval()


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


def _packs(model: PreTrainedModel) -> bool:
    """Whether a second example is blind to the first, and counts its positions from its own start.

    Two checks that no rounding blurs, since all rows go through the same products: changing the first example moves
    no bit of the second, and an example laid behind its own twin comes out as the twin does.
    """
    length = 16
    ids = torch.arange(3, 3 + length, device=model.device) % model.config.get_text_config().vocab_size
    positions = torch.arange(length, device=model.device).repeat(2)

    def logits(first: Tensor) -> Tensor:
        tokens = torch.cat([first, ids])[None]
        with batch(Batch(lengths=(length, length))), use_packed_attention(model):
            return model(input_ids=tokens, position_ids=positions[None], use_cache=False).logits[0]  # type: ignore[no-any-return]

    try:
        twins, perturbed = logits(ids), logits(ids.flip(0))
    except (ValueError, TypeError):  # attention that can't be exchanged or packed; a model without position_ids
        return False
    return torch.equal(twins[length:], perturbed[length:]) and torch.allclose(twins[:length], twins[length:], atol=1e-3)


def _has_plain_head(model: PreTrainedModel) -> bool:
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Module) or not is_linear(head) or model.base_model is model:
        return False
    if any(p.requires_grad for p in head.parameters()):
        return False
    ids = torch.arange(1, 6, device=model.device)[None] % model.config.get_text_config().vocab_size
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return torch.equal(head(hidden), model(input_ids=ids, use_cache=False).logits)


def _logits(model: PreTrainedModel, inputs: dict[str, Tensor], rows_S: Tensor) -> Tensor:
    """The model's own logits [S, V] for some rows of a packed batch."""
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        return model(**inputs, use_cache=False, logits_to_keep=rows_S).logits[0]  # type: ignore[no-any-return]
    return model(**inputs, use_cache=False).logits[0, rows_S]  # type: ignore[no-any-return]
