"""``target_parameters``: LoRA on bare parameters, such as the fused experts of a mixture-of-experts layer.

    W'_e = W_e + s·B_e·A_e        for every expert e of a parameter [E, N, K] (or [E, K, N]); [N, K] has one

A [E·R, K] holds the experts' A_e one below the other, B [N, R·E] their B_e with the expert running fastest: PEFT's
layout. Which of a three-dimensional parameter's axes are the inputs is said by the module (``is_transposed``).

The plain way runs the module with W' in W's place for the length of its forward, which forms W' and its gradient for
all experts; experts layers take the way of ``nn/experts.py``, which forms neither. The module's own parameters are
never written to. Dropout and DoRA have no meaning where the input isn't at hand, and PEFT has neither here.
"""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..config import LoraConfig
from ..errors import UserError, short
from ..patterns import tails_of
from ..targets import matches_suffix
from .batch import BASE, current_batch
from .experts import Factors, can_route, routed
from .lowrank import Beside, Named, runs

_STARTS: tuple[bool | str, ...] = (True, False, "gaussian")


def parameter_targets(config: LoraConfig, bases: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """Which parameters a config's ``target_parameters`` mean: module name → its parameters, in the module's order.

    ``bases`` are the model's own modules by name; entries are whole names of parameters, or dotted suffixes of them.
    Raises ``UserError`` for entries that match nothing, for parameters that can't be adapted, and for settings that
    have no meaning for them.
    """
    wanted = set(config.target_parameters or ())
    if not wanted:
        return {}
    _check_settings(config)
    every = {f"{n}.{p}": (n, p, w) for n, m in bases.items() for p, w in m.named_parameters(recurse=False)}
    chosen = {key: value for key, value in every.items() if matches_suffix(key, wanted)}
    if missing := sorted(wanted - {tail for key in chosen for tail in tails_of(key)}):
        ends = sorted({".".join(key.split(".")[-2:]) for key, (_, _, w) in every.items() if w.dim() in (2, 3)})
        close = difflib.get_close_matches(missing[0][:200], ends[:10_000], n=6, cutoff=0)
        has = ", ".join(close) or "none that could be adapted"
        raise UserError(f"target_parameters: no parameter is called {short(missing[0])}; this model has {has}")
    for key, (module, _, tensor) in chosen.items():
        if tensor.dim() not in (2, 3) or not tensor.is_floating_point() or not module:
            what = "of the model itself" if not module else f"{tensor.dtype} with shape {tuple(tensor.shape)}"
            raise UserError(f"target_parameters: {key} is {what}; give two- or three-dimensional ones of its modules")
    targets: dict[str, list[str]] = {}
    for module, parameter, _ in chosen.values():
        targets.setdefault(module, []).append(parameter)
    return targets


class ParameterFactors(nn.Module):
    """One adapter of one parameter: A [E·R, K], B [N, R·E]."""

    def __init__(self, a_XK: Tensor, b_NX: Tensor, *, scaling: float, like: ParameterShape) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(a_XK)
        self.lora_B = nn.Parameter(b_NX)
        self.scaling = scaling
        self.like = like

    def by_expert(self) -> Factors:
        """A_e [R, K] and B_e [N, R] of every expert."""
        a_ERK = self.lora_A.view(self.like.experts, -1, self.like.inputs)
        b_ENR = self.lora_B.view(self.like.outputs, -1, self.like.experts).permute(2, 0, 1).contiguous()
        return a_ERK.unbind(), b_ENR.unbind(), self.scaling

    def delta(self) -> Tensor:
        """ΔW in the parameter's own layout, in float32 (float64 where the factors are); differentiable."""
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        a_ERK = self.lora_A.to(dtype).view(self.like.experts, -1, self.like.inputs)
        b_NRE = self.lora_B.to(dtype).view(self.like.outputs, -1, self.like.experts)
        d_ENK = self.scaling * (b_NRE.permute(2, 0, 1) @ a_ERK)
        return (d_ENK.mT if self.like.is_transposed else d_ENK).reshape(self.like.shape)

    def extra_repr(self) -> str:
        rank = self.lora_A.shape[0] // self.like.experts
        return f"{tuple(self.like.shape)}, rank {rank}, scaling={self.scaling:g}"


class ParameterShape:
    """How a parameter's axes are read: E experts, K inputs, N outputs."""

    def __init__(self, module: nn.Module, parameter: str) -> None:
        self.shape = tuple(getattr(module, parameter).shape)
        self.is_transposed = len(self.shape) == 3 and bool(getattr(module, "is_transposed", False))
        self.experts = self.shape[0] if len(self.shape) == 3 else 1
        self.outputs, self.inputs = self.shape[-2:][::-1] if self.is_transposed else self.shape[-2:]

    def of_factors(self, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of A and B."""
        return (self.experts * rank, self.inputs), (self.outputs, rank * self.experts)


class AdaptedParameters(Beside):
    """A module with adapters on some of its own parameters: adapter → parameter → its factors."""

    def __getattr__(self, name: str) -> Any:
        """What the module is asked and doesn't know is the base's; its adapted parameters as adapters make them."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base_layer", "active", "adapters"):  # not set yet
                raise
            names = () if self.active.merged else self.active.names
            return self._weight(name, [n for n in names if n in self.adapters and name in self.adapter(n)])

    def adapter(self, name: str) -> Named:
        adapter = self.adapters[name]
        assert isinstance(adapter, Named)
        return adapter

    def factors(self, name: str) -> Iterator[tuple[str, ParameterFactors]]:
        """(parameter, factors) of one adapter, in the module's own order of parameters."""
        for parameter, _ in self.base_layer.named_parameters(recurse=False):
            if parameter in self.adapter(name):
                yield parameter, self._factors(name, parameter)

    def _factors(self, name: str, parameter: str) -> ParameterFactors:
        factors = self.adapter(name)[parameter]
        assert isinstance(factors, ParameterFactors)
        return factors

    def fresh_adapter(
        self, parameters: Sequence[str], config: LoraConfig, trained: Mapping[str, Tensor] | None = None
    ) -> Named:
        """Factors that were trained, or a start's, on their device in float32 (float64 over a float64 base)."""
        adapter = Named()
        for parameter in parameters:
            name, tensor = f"{self.name}.{parameter}", self.base_layer.get_parameter(parameter)
            like, rank = ParameterShape(self.base_layer, parameter), config.rank_of(name)
            if trained is not None:
                a_XK, b_NX = trained[f"{name}.lora_A"], trained[f"{name}.lora_B"]
            else:
                dtype = torch.promote_types(tensor.dtype, torch.float32)
                fresh = _start(config.init_lora_weights, rank, *like.of_factors(rank))
                a_XK, b_NX = (factor.to(tensor.device, dtype) for factor in fresh)
            adapter[parameter] = ParameterFactors(a_XK, b_NX, scaling=config.scaling_of(name), like=like)
        return adapter

    def merged_layer(self, base: nn.Module, names: Sequence[str]) -> nn.Module:
        """A module that does what ``base`` and these adapters do together, sharing with it what they leave alone."""
        other = copy.copy(base)
        other._parameters = dict(base._parameters)
        for parameter in {p: None for name in names if name in self.adapters for p in self.adapter(name)}:
            total: Tensor = getattr(base, parameter)
            dtype = total.dtype
            for name in names:
                if name in self.adapters and parameter in self.adapter(name):
                    total = total + self._factors(name, parameter).delta()
            other._parameters[parameter] = nn.Parameter(total.detach().to(dtype), requires_grad=False)
        return other

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        parameters = {p for adapter in self.adapters for p in self.adapter(adapter)}
        if can_route(self.base_layer, parameters):
            return self._routed(*args, **kwargs)
        return self._plain(*args, **kwargs)

    def _routed(self, x_TK: Tensor, chosen_TJ: Tensor, weight_TJ: Tensor) -> Any:
        parts = [(rows, name) for rows, name in runs(self.active, x_TK.shape[0]) if name in self.adapters]
        if not parts:
            return self.base_layer(x_TK, chosen_TJ, weight_TJ)
        factors = {name: {p: f.by_expert() for p, f in self.factors(name)} for name in {name for _, name in parts}}
        return routed(self.base_layer, x_TK, chosen_TJ, weight_TJ, parts, factors)

    def _plain(self, *args: Any, **kwargs: Any) -> Any:
        names = self._for_all_rows()
        if not names:
            return self.base_layer(*args, **kwargs)
        parameters = {p: None for name in names for p in self.adapter(name)}
        stand_ins = {p: self._weight(p, [n for n in names if p in self.adapter(n)]) for p in parameters}
        return functional_call(self.base_layer, stand_ins, args, kwargs)

    def _weight(self, parameter: str, names: Sequence[str]) -> Any:
        """One parameter with some adapters' ΔW, in its own dtype; itself where there are none."""
        weight = getattr(self.base_layer, parameter)
        for name in names:
            weight = weight + self._factors(name, parameter).delta().to(weight.dtype)
        return weight

    def _for_all_rows(self) -> tuple[str, ...]:
        """Adapters in use here. Raises ``UserError`` where rows of the batch differ in them."""
        facts = current_batch()
        if self.active.merged or facts is None or facts.adapters is None:
            return tuple(name for _, name in runs(self.active, 1) if name in self.adapters)
        here = {name if name in self.adapters else BASE for name in facts.adapters}
        if len(here) > 1:
            raise UserError(
                f"adapter_names: {self.name} has an adapted parameter (target_parameters), which all rows of a batch "
                "share; give all rows one adapter"
            )
        return tuple(here - {BASE})

    def extra_repr(self) -> str:
        return f"active={list(self.active.names)}"


def _start(init: bool | str, rank: int, shape_a: tuple[int, int], shape_b: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """PEFT's starts of A and B; B is zero for all but ``False``. ``UserError`` for a start that needs a layer."""
    if init not in _STARTS:
        starts = ", ".join(map(repr, _STARTS))
        raise UserError(f"init_lora_weights={init!r} does not go with target_parameters; use one of {starts}")
    a_XK, b_NX = torch.empty(shape_a), torch.zeros(shape_b)
    if init == "gaussian":
        nn.init.normal_(a_XK, std=1 / rank)
    else:
        nn.init.kaiming_uniform_(a_XK, a=math.sqrt(5))
    if init is False:
        nn.init.kaiming_uniform_(b_NX, a=math.sqrt(5))
    return a_XK, b_NX


def _check_settings(config: LoraConfig) -> None:
    """What has no meaning for a bare parameter, PEFT's refusals among it."""
    if config.lora_dropout:
        raise UserError(f"lora_dropout={config.lora_dropout} does not go with target_parameters; set it to 0")
    if config.use_dora:
        raise UserError("use_dora does not go with target_parameters; leave one of the two out")
