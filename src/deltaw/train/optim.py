"""AdamW over float32 masters (Loshchilov & Hutter 2019), gradient clipping, and the course of the learning rate.

Adapters are float32 already and are their own masters. Weights in bfloat16 (full fine-tuning) get a float32 copy that
the optimiser works on: an update of 2e-5 would vanish when added to a bfloat16 weight of one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn


class AdamW:
    """torch's AdamW over masters, with its state as flat named tensors so that it can lie in a safetensors file.

    ``b_ratio``: the learning rate of B factors over that of all others (LoRA+, Hayou et al. 2024, arXiv:2402.12354,
    §4: with one rate for both, features are not learnt efficiently in wide layers).
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, weight_decay: float, b_ratio: float = 1.0) -> None:
        self.parameters = dict(parameters)
        self._masters = {
            name: p if is_own_master(p) else nn.Parameter(self._zeros(p).copy_(p.detach()))
            for name, p in self.parameters.items()
        }
        b = [master for name, master in self._masters.items() if is_b(name)] if b_ratio != 1 else []
        rest = [master for name, master in self._masters.items() if b_ratio == 1 or not is_b(name)]
        groups = [{"params": part, "ratio": ratio} for part, ratio in ((rest, 1.0), (b, b_ratio)) if part]
        self._adamw = self._optimizer(groups, weight_decay)

    def _optimizer(self, groups: list[dict[str, Any]], weight_decay: float) -> torch.optim.Optimizer:
        """What makes the steps."""
        return torch.optim.AdamW(groups, lr=0.0, weight_decay=weight_decay, fused=True)

    def _zeros(self, like: Tensor) -> Tensor:
        """Memory for a moment or a master of this weight, float32."""
        return torch.zeros_like(like, dtype=torch.float32, requires_grad=False)

    def _state_of(self, master: nn.Parameter) -> dict[str, Tensor]:
        """A master's moments and step count, there from its first gradient on, as torch's AdamW would make them."""
        state: dict[str, Tensor] = self._adamw.state[master]
        if not state:
            state["step"] = torch.zeros((), device=master.device)
            state |= {"exp_avg": self._zeros(master), "exp_avg_sq": self._zeros(master)}
        return state

    def gradients(self) -> list[Tensor]:
        """Those that backward has left, in float32."""
        self._collect()
        return [master.grad for master in self._masters.values() if master.grad is not None]

    def clip(self, max_norm: float, *, loss_scale: float = 1.0) -> float:
        """Shorten the gradients to ``max_norm`` (0: never) and return their norm from before; may be inf or nan.

        ``loss_scale``: what the loss was multiplied by before backward; it is taken out first, in float32.
        """
        gradients = self.gradients()
        if not gradients:
            return 0.0
        if loss_scale != 1:
            for gradient in gradients:
                gradient.div_(loss_scale)
        norm = nn.utils.get_total_norm(gradients, foreach=True)
        if max_norm > 0 and torch.isfinite(norm):
            nn.utils.clip_grads_with_norm_(self._masters.values(), max_norm, norm, foreach=True)
        return float(norm)

    def step(self, learning_rate: float) -> None:
        """Update the weights and drop the gradients."""
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate * group["ratio"]
        self._collect()
        for master in self._masters.values():
            if master.grad is not None:
                self._state_of(master)
        self._adamw.step()
        # The fused step changes weights behind torch's back; what is cached by version (DoRA's norm) must see it.
        torch.autograd.graph.increment_version(self._masters.values())
        with torch.no_grad():
            for name, p in self.parameters.items():
                if self._masters[name] is not p:
                    p.copy_(self._masters[name])
        self.drop_gradients()

    def _collect(self) -> None:
        """Move new gradients to their masters, in float32."""
        for name, p in self.parameters.items():
            master = self._masters[name]
            if master is not p and p.grad is not None:
                master.grad, p.grad = p.grad.float(), None

    def drop_gradients(self) -> None:
        for p in (*self.parameters.values(), *self._masters.values()):
            p.grad = None

    def state(self) -> dict[str, Tensor]:
        """All that a resumed run needs beside the weights: moments, step counts, masters that are copies."""
        out = {
            f"{name}/{key}": value
            for name, master in self._masters.items()
            for key, value in (self._state_of(master) if master in self._adamw.state else {}).items()
        }
        out |= {f"{n}/master": m.detach() for n, m in self._masters.items() if m is not self.parameters[n]}
        return out

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of ``state``. Raises ``KeyError`` for a state of other parameters."""
        for key, value in state.items():
            name, _, part = key.rpartition("/")
            master = self._masters[name]
            if part == "master":
                master.data.copy_(value)
            else:
                self._state_of(master)[part].copy_(value)


def learning_rate_at(
    step: int, *, peak: float, warmup: int, total: int, schedule: Literal["constant", "linear", "cosine"]
) -> float:
    """Learning rate of step ``step`` (from 0) of ``total``: a rise over ``warmup`` steps, then the schedule to zero.

    A function of the step alone, so that a resumed run needs no scheduler's state.
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if schedule == "constant":
        return peak
    done = (step - warmup) / max(1, total - warmup)
    return peak * ((1 - done) if schedule == "linear" else (1 + math.cos(math.pi * done)) / 2)


def unmoved(parameters: Sequence[tuple[str, Tensor]]) -> list[str]:
    """Names of the B factors that are still zero: after training, modules that learnt nothing."""
    return [name for name, tensor in parameters if is_b(name) and not tensor.any()]


def is_own_master(parameter: Tensor) -> bool:
    """Whether a weight is updated in place; any other has a float32 copy that is."""
    return parameter.dtype == torch.float32


def is_b(name: str) -> bool:
    """Whether a parameter is the B of a ΔW = s·B·A."""
    return name.endswith("lora_B")
