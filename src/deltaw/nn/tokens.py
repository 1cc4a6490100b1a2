"""``trainable_token_indices``: single rows of an embedding that train, and what is tied to them follows.

    E'[i] = P[slot of i] for the adapter's tokens i, else E[i]        y = E'[ids]        logits = h·E'ᵀ (+ bias)

P [M, H] replaces M rows instead of adding to them (PEFT's rule): after training they are what they are, whatever the
base has in their place, which may be fresh random rows of a resized embedding. A head that shares the embedding's
weight uses the same P, so that a token is read and predicted by one vector. PEFT drops such a head's bias; here it
stays. As in any embedding, the padding token's row gets no gradient from being looked up.

E and E' are never formed: rows are replaced in what was looked up, columns in the logits.

Shapes: T rows of the batch, V vocabulary, H hidden size, M trained tokens, N outputs (H of an embedding, V of a head).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError, short
from .lowrank import Beside, runs
from .merged import twin
from .storage import is_linear


@dataclass(frozen=True, slots=True)
class TokenTarget:
    """Which rows train, and where they are used."""

    indices: tuple[int, ...]
    """Token ids, in the config's order, which is the file's."""
    modules: tuple[str, ...]
    """Names of the modules that use the rows: the one that they are kept under, then those that are tied to it."""


def token_targets(
    given: Sequence[int] | Mapping[str, Sequence[int]] | None,
    bases: Mapping[str, nn.Module],
    embedding: str | None,
) -> list[TokenTarget]:
    """What a config's ``trainable_token_indices`` mean.

    ``bases`` are the model's own modules by name, ``embedding`` names its input embedding, which a plain list means.
    Names mean whatever ends so, as in PEFT. Modules that share the input embedding's weight follow its rows, unless
    the config gives one of them rows of its own. Raises ``UserError`` for names that no embedding or head has, for
    ids that it doesn't have, and for ids that come twice.
    """
    if not given:
        return []
    weights = {name: w for name, module in bases.items() if (w := _weight(module)) is not None}
    wanted: dict[str, tuple[int, ...]] = {}
    for end, indices in given.items() if isinstance(given, Mapping) else [(embedding or "embed_tokens", given)]:
        found = [n for n in weights if n.endswith(end)]
        if not found:
            has = ", ".join(n for n in weights if isinstance(bases[n], nn.Embedding)) or "none"
            raise UserError(f"trainable_token_indices: no embedding is called {short(end)}; this model has {has}")
        for name in found:
            _check_indices(name, indices, len(weights[name]))
            if wanted.setdefault(name, tuple(indices)) != tuple(indices):
                raise UserError(f"trainable_token_indices: {name} is named twice, with other tokens; name it once")
    tied: list[str] = []
    if embedding is not None and embedding in wanted:
        alike = [n for n, w in weights.items() if n != embedding and w is weights[embedding]]
        if all(wanted.get(n, wanted[embedding]) == wanted[embedding] for n in alike):
            tied = alike
    return [
        TokenTarget(indices, (name, *tied) if name == embedding else (name,))
        for name, indices in wanted.items()
        if name not in tied
    ]


def check_apart(rows: Iterable[tuple[str, TokenRows]]) -> None:
    """``UserError`` where two adapters, given with their names, replace the same row of the same module."""
    seen: dict[tuple[str, int], str] = {}
    for adapter, part in rows:
        for module in part.target.modules:
            for index in part.target.indices:
                other = seen.setdefault((module, index), adapter)
                if other != adapter:
                    raise UserError(
                        f"adapters {other!r} and {adapter!r} both replace row {index} of {module} "
                        "(trainable_token_indices); activate one at a time"
                    )


class TokenRows(nn.Module):
    """One adapter's rows P [M, H] with the token ids they stand for."""

    indices: Tensor
    _sorted: Tensor
    _order: Tensor

    def __init__(self, rows_MH: Tensor, target: TokenTarget) -> None:
        super().__init__()
        self.trainable_tokens_delta = nn.Parameter(rows_MH)
        self.target = target
        indices_M = torch.tensor(target.indices, device=rows_MH.device)
        sorted_M, order_M = indices_M.sort()
        for name, values in (("indices", indices_M), ("_sorted", sorted_M), ("_order", order_M)):
            self.register_buffer(name, values, persistent=False)

    def slots(self, ids_T: Tensor) -> tuple[Tensor, Tensor]:
        """(whether an id is one of these tokens, its place in P) for every id; the place means nothing for others."""
        ids_T = ids_T.long().contiguous()
        at_T = torch.searchsorted(self._sorted, ids_T).clamp_max(len(self._sorted) - 1)
        return self._sorted[at_T] == ids_T, self._order[at_T]

    def in_weight(self, weight_VH: Tensor) -> Tensor:
        """E' [V, H]: a copy of E with these rows in it."""
        return weight_VH.index_copy(0, self.indices, self.trainable_tokens_delta.to(weight_VH.dtype))

    def extra_repr(self) -> str:
        return f"{len(self.indices)} tokens"


class TokenLayer(Beside):
    """An ``nn.Embedding``, or a linear head, with some rows replaced by the active adapter's."""

    @property
    def weight(self) -> Tensor:
        """E' as the active adapters make it, for code that looks."""
        weight: Tensor = self.base_layer.weight  # type: ignore[assignment]
        for name in () if self.active.merged else self.active.names:
            if name in self.adapters:
                weight = self.adapter(name).in_weight(weight)
        return weight

    def __getattr__(self, name: str) -> Any:
        """What the layer is asked and doesn't know (``embedding_dim``, ``bias`` …) is the base layer's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":  # not set yet
                raise
            return getattr(self.base_layer, name)

    def adapter(self, name: str) -> TokenRows:
        adapter = self.adapters[name]
        assert isinstance(adapter, TokenRows)
        return adapter

    def fresh_adapter(self, target: TokenTarget, trained: Mapping[str, Tensor] | None = None) -> TokenRows:
        """Rows that were trained, or the base's own to begin with, in float32 (float64 over a float64 base)."""
        if trained is not None:
            return TokenRows(trained[self.name], target)
        weight: Tensor = self.base_layer.weight  # type: ignore[assignment]
        rows_MH = weight.detach()[list(target.indices)]
        return TokenRows(rows_MH.to(torch.promote_types(weight.dtype, torch.float32), copy=True), target)

    def merged_layer(self, base: nn.Module, names: Sequence[str]) -> nn.Module:
        """A plain layer that gives what ``base`` and these adapters do together; at least one must be here."""
        weight: Tensor = base.weight.detach()  # type: ignore[operator]
        for name in names:
            if name in self.adapters:
                weight = self.adapter(name).in_weight(weight).detach()
        return twin(base, weight)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)
        if y.is_leaf and y.requires_grad:  # a hook's doing (enable_input_require_grads); leaves can't change in place
            y = y.clone()
        y_TN = y.reshape(-1, y.shape[-1])
        x_T = x.reshape(y_TN.shape[0], *x.shape[y.dim() - 1 :])
        replace = self._replace_rows if isinstance(self.base_layer, nn.Embedding) else self._replace_columns
        for rows, name in runs(self.active, y_TN.shape[0]):
            if name in self.adapters:
                replace(y_TN[rows], x_T[rows], self.adapter(name))
        return y_TN.view(y.shape)

    def _replace_rows(self, y_TH: Tensor, ids_T: Tensor, adapter: TokenRows) -> None:
        """Into what the base looked up (in place: it is this forward's own)."""
        is_here_T, slot_T = adapter.slots(ids_T)
        indices, padding_idx = adapter.target.indices, self.padding_idx
        padding = indices.index(padding_idx) if padding_idx in indices else None
        new_TH = F.embedding(slot_T, adapter.trainable_tokens_delta, padding_idx=padding).to(y_TH.dtype)
        scale = getattr(self.base_layer, "embed_scale", None)  # Gemma 3 multiplies what it looks up
        y_TH.copy_(torch.where(is_here_T[:, None], new_TH if scale is None else new_TH * scale, y_TH))

    def _replace_columns(self, y_TV: Tensor, h_TH: Tensor, adapter: TokenRows) -> None:
        """Into the base's logits (in place: they are this forward's own)."""
        bias = None if self.bias is None else self.bias[adapter.indices]
        new_TM = F.linear(h_TH, adapter.trainable_tokens_delta.to(h_TH.dtype), bias)
        y_TV.index_copy_(1, adapter.indices, new_TM)

    def extra_repr(self) -> str:
        return f"active={list(self.active.names)}"


def _weight(module: nn.Module) -> nn.Parameter | None:
    """The weight whose rows are tokens, of a module that may have such."""
    if not (isinstance(module, nn.Embedding) or (isinstance(module, nn.Linear) and is_linear(module))):
        return None
    weight = module.get_parameter("weight")
    return weight if weight.is_floating_point() else None  # rows of quantised weights can't be replaced


def _check_indices(name: str, indices: Sequence[int], num_rows: int) -> None:
    bad = [i for i in indices if not 0 <= i < num_rows]
    if bad or len(set(indices)) < len(indices):
        what = f"{bad[0]} is not a row of {name}" if bad else f"a token of {name} comes twice"
        raise UserError(f"trainable_token_indices: {what}; give ids from 0 to {num_rows - 1}, each once")
