"""The decoder layer of the Llama-shaped families, with as few passes over memory as training needs.

    h' = h + o(attention(rotary(q, k), v))   with q, k, v = projections of norm(h)
    y  = h' + down(act(g)∘u)                 with g, u = projections of norm(h')

The layer of ``transformers`` says the same in some forty operations, most of which read and write all hidden states,
and autograd keeps a tensor at nearly every one. Here each line is two or three nodes: projections of one input are one
(``ops/adapted.py``), and what is a pass away from something kept (the norms, the gated product) is computed again.
Kept are h, h', q, k, v, o, g and u.

A layer becomes lean by its class (``lean``), and is what it was by ``plain``: same modules, same parameters, same
names. Its own forward goes on serving whatever this one doesn't: no gradients wanted, a cache, hooks inside the layer,
trained norms, modules that aren't linear. Both agree, which a test checks for each family.

Left out: families whose layers add other norms (Gemma 2 and 3), fuse their projections (Phi-3), or route experts.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...ops.adapted import Projection, adapted_group
from ...ops.gate import Activation
from ...ops.norm import RmsNorm, rms_norm
from ...ops.rotary import rotary
from ...ops.source import Gated, Itself, Normed
from ..batch import checkpoint_context
from ..linear import AdaptedLinear
from ..storage import frozen_weight, is_linear

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma")
"""Whose ``<family>DecoderLayer`` of ``transformers`` computes what stands above."""

_ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


class LeanLayer:
    """Mixed into a decoder layer's class, before it."""

    recomputes_mlp = False
    """Whether g and u are computed again as well: half of what is kept, for half of the forward products."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As the layer's own: hidden_states [B, T, H] → [B, T, H]."""
        if past_key_values is not None or position_embeddings is None or not _can_be_lean(self, hidden_states):
            general = partial(
                super().forward,  # type: ignore[misc]
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
            return _again(general, hidden_states) if self.recomputes_mlp else general(hidden_states)
        told = {"position_ids": position_ids, "use_cache": use_cache, **kwargs}  # what attention is told besides
        attended = _attend(self, hidden_states, attention_mask, position_embeddings, told)
        h_TH = hidden_states.flatten(0, -2) + attended
        m_TH = _again(partial(_mlp, self), h_TH) if self.recomputes_mlp else _mlp(self, h_TH)
        y_TH: Tensor = h_TH + m_TH
        return y_TH.view_as(hidden_states)


def lean(model: nn.Module) -> None:
    """Let the layers of known families take the lean path wherever they can."""
    for module in model.modules():
        family = _family(type(module))
        if family is not None:
            module.__class__ = _lean_class(type(module))  # type: ignore[arg-type]


def plain(model: nn.Module) -> None:
    """The inverse of ``lean``."""
    for module in model.modules():
        if isinstance(module, LeanLayer):
            module.__class__ = type(module).__mro__[2]


@contextmanager
def recompute_mlp(layers: Sequence[LeanLayer]) -> Iterator[None]:
    """Let these layers compute their MLP's inner values again in backward, instead of keeping them."""
    for layer in layers:
        layer.recomputes_mlp = True
    try:
        yield
    finally:
        for layer in layers:
            del layer.recomputes_mlp


def _again(block: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
    """block(h), of which nothing is kept but h: backward runs it a second time, as it ran in this batch."""
    y: Tensor = checkpoint(block, h, use_reentrant=False, context_fn=_contexts)
    return y


_is_again: ContextVar[bool] = ContextVar("deltaw_is_again", default=False)


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    first, second = checkpoint_context()
    return first, _second_run(second)


@contextmanager
def _second_run(batch: AbstractContextManager[None]) -> Iterator[None]:
    token = _is_again.set(True)
    try:
        with batch:
            yield
    finally:
        _is_again.reset(token)


def _attend(layer: Any, hidden: Tensor, mask: Any, positions: tuple[Tensor, Tensor], told: dict[str, Any]) -> Tensor:
    """The attention block without its residual: [T, H] for all rows of the batch."""
    attention = layer.self_attn
    h_TH = hidden.flatten(0, -2)
    q, k, v = _projected(h_TH, layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj])
    q_TND, k_TGD, v_TGD = (t.unflatten(-1, (-1, attention.head_dim)) for t in (q, k, v))
    if hasattr(attention, "q_norm"):
        q_TND, k_TGD = _head_norm(q_TND, attention.q_norm), _head_norm(k_TGD, attention.k_norm)
    cos_TD, sin_TD = (t.expand(*hidden.shape[:-1], -1).flatten(0, -2) for t in positions)
    q_TND, k_TGD = rotary(q_TND, cos_TD, sin_TD), rotary(k_TGD, cos_TD, sin_TD)
    heads = (t.unflatten(0, hidden.shape[:-1]).transpose(1, 2) for t in (q_TND, k_TGD, v_TGD))
    window = {"sliding_window": _window(layer)} if _window(layer) is not None else {}
    o, _ = _interface(layer)(attention, *heads, mask, dropout=0.0, scaling=attention.scaling, **window, **told)
    (y_TH,) = adapted_group([o.reshape(h_TH.shape[0], -1)], Itself(), [_projection(attention.o_proj, len(h_TH))])
    return y_TH


def _mlp(layer: Any, h_TH: Tensor) -> Tensor:
    """The MLP block without its residual: [T, H]."""
    mlp = layer.mlp
    g_TM, u_TM = _projected(h_TH, layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj])
    source = Gated(_ACTIVATIONS[layer.mlp.config.hidden_act])
    # A second run is for what backward needs, and the block's own result isn't among it.
    down = replace(_projection(mlp.down_proj, len(h_TH)), is_unread=_is_again.get())
    (y_TH,) = adapted_group([g_TM, u_TM], source, [down])
    return y_TH


def _projected(h_TH: Tensor, norm: nn.Module, layers: list[nn.Module]) -> tuple[Tensor, ...]:
    """Projections of norm(h), one node of the graph."""
    return adapted_group([h_TH], Normed(_norm(norm)), [_projection(layer, len(h_TH)) for layer in layers])


def _head_norm(x_TND: Tensor, norm: nn.Module) -> Tensor:
    return rms_norm(x_TND.flatten(0, 1), _norm(norm)).view_as(x_TND)


def _projection(layer: nn.Module, num_rows: int) -> Projection:
    if isinstance(layer, AdaptedLinear):
        return layer.projection(num_rows)
    return Projection(frozen_weight(layer), (), layer.bias)  # type: ignore[arg-type]


def _norm(norm: Any) -> RmsNorm:
    is_gemma = type(norm).__name__.startswith("Gemma")
    return RmsNorm(norm.weight, norm.eps if is_gemma else norm.variance_epsilon, adds_one=is_gemma)


def _window(layer: Any) -> int | None:
    """The layer's sliding window, as its own forward tells the attention."""
    attention = layer.self_attn
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window  # type: ignore[no-any-return]
    return attention.config.sliding_window if _family(type(layer).__mro__[2]) == "Mistral" else None


def _interface(layer: Any) -> Callable[..., tuple[Tensor, Any]]:
    attention = layer.self_attn
    eager = sys.modules[type(attention).__module__].eager_attention_forward
    interface: Callable[..., tuple[Tensor, Any]] = ALL_ATTENTION_FUNCTIONS.get_interface(
        attention.config._attn_implementation, eager
    )
    return interface


def _can_be_lean(layer: Any, hidden: Tensor) -> bool:
    """Whether this forward is one that the lean path computes exactly, with nobody looking inside."""
    attention, mlp = layer.self_attn, layer.mlp
    if not torch.is_grad_enabled() or torch.is_autocast_enabled(hidden.device.type):
        return False
    if not (_is_own(attention, layer) and _is_own(mlp, layer)) or (attention.training and attention.attention_dropout):
        return False
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    if hasattr(attention, "q_norm"):
        norms += [attention.q_norm, attention.k_norm]
    linears = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    linears += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    return (
        mlp.config.hidden_act in _ACTIVATIONS
        and not any(_is_watched(module) for module in [attention, mlp, mlp.act_fn, *norms, *linears])
        and all(_is_own(norm, layer) and _is_frozen(norm, hidden) for norm in norms)
        and all(isinstance(m, AdaptedLinear) or (is_linear(m) and _is_frozen(m, hidden)) for m in linears)
    )


def _is_own(module: nn.Module, layer: nn.Module) -> bool:
    """Whether this is the family's own part: another library may have put its norm or attention in that place."""
    return type(module).__module__ == type(layer).__mro__[2].__module__


def _is_frozen(module: nn.Module, hidden: Tensor) -> bool:
    """Whether nothing but a bias is trained, and the weight is stored as the lean path multiplies by it."""
    if any(p.requires_grad for name, p in module.named_parameters() if name != "bias"):
        return False
    weight = module._parameters.get("weight")
    return weight is None or weight.dtype == hidden.dtype or not weight.is_floating_point()


def _is_watched(module: nn.Module) -> bool:
    """Whether somebody wants to see or change what goes in or out of this very module."""
    return bool(
        _has_any_global_hook()
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _family(kind: type[nn.Module]) -> str | None:
    """The family of a layer of ``transformers`` that isn't lean yet."""
    family = kind.__name__.removesuffix("DecoderLayer")
    is_known = family in FAMILIES and kind.__module__ == _home(family)
    return family if is_known else None


def _home(family: str) -> str:
    return f"transformers.models.{family.lower()}.modeling_{family.lower()}"


@cache
def _lean_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The lean class of a layer's class. Pickles find it here by its name (``__getattr__``)."""
    return type(kind.__name__, (LeanLayer, kind), {"__module__": __name__, "__qualname__": kind.__name__})


def __getattr__(name: str) -> type[nn.Module]:
    family = name.removesuffix("DecoderLayer")
    if family == name or family not in FAMILIES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _lean_class(getattr(importlib.import_module(_home(family)), name))
