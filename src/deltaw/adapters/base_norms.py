"""How large an adapter's change is against the base's weights, which are read from the checkpoint one at a time.

    relative norm = ‖ΔW‖ / ‖W‖        Frobenius

DoRA changes W by more than s·B·A: W′ = c∘(W + s·B·A), row by row, with c_n = m_n/‖W_n + s·B_n·A‖. What it changes W
by is not low-rank, but its norm comes in closed form from one product of W with R columns:

    ‖W′_n − W_n‖² = (c_n − 1)²·‖W_n‖² + 2·(c_n − 1)·c_n·x_n + c_n²·d_n
    x_n = s·Σ_r B_nr·(W·Aᵀ)_nr     d_n = s²·Σ_r (B·A·Aᵀ)_nr·B_nr      ‖W_n + s·B_n·A‖² = ‖W_n‖² + 2·x_n + d_n

No model is loaded: the architecture (on the meta device) says what the modules are, the files hold the weights under
names that differ from the modules' at most in what stands before them (GPT-2's lack ``transformer.``), a tied head's
is the embedding's, and fused experts may lie as one weight for each. Weights in 4 bits (ours, bitsandbytes') are
dequantised. What can't be found by these rules, or isn't in numbers that are known here, has no norm, and is said so.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import UserError
from ..nn.load import skeleton, weights_folder
from ..nn.locate import EMBEDDED, BaseInfo, first_line, locate
from ..nn.quantized_format import deserialize, grouped
from ..nn.walk import embedding_name, head_name, logical_modules
from ..ops.nf4 import dequantize
from ..patterns import tails_of
from .deltas import AdaptedModule

_PLAIN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ENTRIES_AT_A_TIME = 2**22
_PARTS_OF_EXPERTS = {"gate_up_proj": ("gate_proj", "up_proj", "w1", "w3"), "down_proj": ("down_proj", "w2")}


@dataclass(frozen=True, kw_only=True)
class BaseFigures:
    """What one module's weight says of its adapter."""

    base_norm: float
    """‖W‖."""
    change_norm: float
    """‖W′ − W‖: ‖ΔW‖, or for DoRA with its column scale."""
    column_scale: tuple[float, float, float] | None = None
    """Least, median and largest c_n of DoRA; 1 is W's own length of row."""


class BaseWeights:
    """A base's weights by the names of its modules, mapped from its files; a context that closes them."""

    def __init__(self, info: BaseInfo) -> None:
        """Raises ``UserError`` where its files can't be read, or are no safetensors."""
        self.info = info
        folder = weights_folder(info)
        self.model = skeleton(folder)
        self._modules = dict(logical_modules(self.model))
        self._open = ExitStack()
        files: dict[str, Any] = {}
        try:
            for path in sorted(folder.glob("*.safetensors")):
                file = self._open.enter_context(safe_open(path, framework="pt"))
                files |= dict.fromkeys(file.keys(), file)
        except (SafetensorError, OSError) as error:
            self._open.close()
            raise UserError(f"{folder}: its weights can't be read: {first_line(error)}; get a complete copy") from None
        self._files, self._codes = grouped(files)
        if not files:
            raise UserError(f"{folder}: no safetensors in there, and nothing else is read weight by weight")

    def figures(self, module: AdaptedModule) -> BaseFigures | None:
        """The weight's norm and the change's; None where its weight isn't to be found in plain numbers.

        ``module``'s factors must be finite.
        """
        if module.kind == "parameter":
            base_norm = self._norm_of_parameter(module)
            return None if base_norm is None else BaseFigures(base_norm=base_norm, change_norm=module.delta.norm)
        weight = self._weight(module)
        if weight is None:
            return None
        if module.magnitude_N is None:
            return BaseFigures(base_norm=norm_of(weight), change_norm=module.delta.norm)
        return dora_figures(weight, module)

    def _weight(self, module: AdaptedModule) -> Tensor | None:
        """W [N, K] as the factors have it."""
        layer = self._modules.get(module.name)
        name = module.name
        if name == head_name(self.model) and getattr(self.model.config, "tie_word_embeddings", False):
            name = embedding_name(self.model) or name
        weight = self._tensor(f"{name}.weight")
        if weight is None or weight.dim() != 2:
            return None
        w_NK = weight.T if isinstance(layer, nn.Embedding | Conv1D) else weight
        return w_NK if tuple(w_NK.shape) == module.delta.shape else None

    def _norm_of_parameter(self, module: AdaptedModule) -> float | None:
        whole = self._tensor(module.name)
        if whole is not None:
            return norm_of(whole.flatten(1))
        owner, _, parameter = module.name.rpartition(".")
        layers = "|".join(_PARTS_OF_EXPERTS.get(parameter, ()))
        is_part = re.compile(rf"{re.escape(owner)}\.\d+\.({layers})\.weight")
        parts = [self._tensor(key) for key in self._files if layers and is_part.fullmatch(key)]
        expected = module.delta.num_experts * (2 if parameter == "gate_up_proj" else 1)
        if len(parts) != expected:
            return None
        return math.hypot(*(norm_of(part) for part in parts if part is not None))

    def _tensor(self, name: str) -> Tensor | None:
        key = next((key for key in tails_of(name) if key in self._files or key in self._codes), None)
        if key is None:
            return None
        if key in self._codes:
            layer = self._modules.get(name.removesuffix(".weight"))
            parts = {part: file.get_tensor(key + part) for part, file in self._codes[key].items()}
            return None if layer is None else dequantize(deserialize(name, parts, layer.get_parameter("weight").shape))
        tensor: Tensor = self._files[key].get_tensor(key)
        return tensor if tensor.dtype in _PLAIN else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()


def base_at_hand(name: str) -> BaseInfo:
    """The base's files, where they are on this machine already. ``UserError`` where they aren't; nothing is fetched."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        is_here = name.lower() in EMBEDDED or Path(name).expanduser().exists()
        config = None if is_here else try_to_load_from_cache(name, "config.json")
    except (OSError, ValueError, RuntimeError, HFValidationError):  # no path that could be, and no hub id
        is_here, config = False, None
    if is_here:
        return locate(name)
    if not isinstance(config, str):
        raise UserError(f"{name} is not on this machine")
    return dataclasses.replace(locate(str(Path(config).parent)), name=name)


def norm_of(w_NK: Tensor) -> float:
    """Frobenius norm, a few rows at a time."""
    return math.hypot(*(float(torch.linalg.vector_norm(rows, dtype=torch.float64)) for rows in _by_rows(w_NK)))


def dora_figures(w_NK: Tensor, module: AdaptedModule) -> BaseFigures:
    """The figures of a layer with DoRA's column scale, a few rows of W at a time, in float64 but for W·Aᵀ."""
    assert module.magnitude_N is not None
    delta, s = module.delta, module.delta.scaling
    a_RK, b_NR, m_N = delta.a_ERK[0].double(), delta.b_ENR[0].double(), module.magnitude_N.double().flatten()
    aa_RR, a_KR = a_RK @ a_RK.T, a_RK.T.float()
    base, change, scales, done = 0.0, 0.0, [], 0
    for rows_TK in _by_rows(w_NK):
        here = slice(done, done + len(rows_TK))
        done += len(rows_TK)
        w = rows_TK.float()
        own_T, b_TR = w.double().square().sum(1), b_NR[here]
        cross_T = s * (b_TR * (w @ a_KR).double()).sum(1)
        delta_T = s * s * ((b_TR @ aa_RR) * b_TR).sum(1)
        length_T = (own_T + 2 * cross_T + delta_T).clamp_min(0).sqrt()
        c_T = m_N[here] / length_T.masked_fill(length_T == 0, 1)
        moved_T = (c_T - 1).square() * own_T + 2 * (c_T - 1) * c_T * cross_T + c_T.square() * delta_T
        base, change = base + float(own_T.sum()), change + float(moved_T.clamp_min(0).sum())
        scales.append(c_T)
    c_N = torch.cat(scales)
    scale = (float(c_N.min()), float(c_N.median()), float(c_N.max()))
    return BaseFigures(base_norm=base**0.5, change_norm=change**0.5, column_scale=scale)


def _by_rows(w_NK: Tensor) -> Iterator[Tensor]:
    yield from w_NK.split(max(1, _ENTRIES_AT_A_TIME // w_NK.shape[1]))
