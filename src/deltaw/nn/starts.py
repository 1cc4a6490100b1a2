"""Where training starts: one function an initialiser, chosen by PEFT's ``init_lora_weights``.

    True                A uniform in ±1/√K, B zero
    "gaussian"          A normal with deviation 1/r, B zero
    False               both random (for tests)
    "orthogonal"        both random, with B·A zero all the same
    "pissa"             the r leading singular vectors of W;  "pissa_niter_16": found in 16 rounds of subspace iteration
    "olora"             the leading r columns and rows of W's QR factors
    "loftq"             the r leading singular vectors of what quantising W has lost, or would lose
    "eva"               the leading singular vectors of the layer's inputs (``nn/eva.py``); until it has seen any, True

Step 0 is the base model, and no start changes the base. Where B·A isn't zero at the start (PiSSA, OLoRA, LoftQ) PEFT
takes s·B·A off the weight, once and for all adapters. Here the adapter keeps a frozen copy (A₀, B₀) and is
s·(B·A − B₀·A₀): the same function of A and B, beside a base that others share.

LoftQ on a quantised base is the one start that means not to begin at that base: W_q + s·B·A is nearer to the W that
was quantised. Nothing is subtracted then, and the adapter belongs to that very base (``nn/quantized_base.py``).

Random factors are drawn in float32 from torch's generator, on the CPU, so that a seed means the same everywhere;
"pissa_niter_…" draws where the weight is. Factorisations are float32, on the weight's device.

Shapes: W [N, K], A [R, K], B [N, R].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import LoraConfig
from ..errors import UserError
from ..ops.frozen import FrozenWeight
from ..ops.nf4 import dequantize, quantize
from ..ops.quantized import QuantizedWeight
from ..settings import LoftQConfig
from .bnb import BnbWeight


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Site:
    """What a start may know of the place that it makes an adapter for."""

    name: str
    """The module's name, for messages."""
    weight: FrozenWeight
    """W [N, K]; an embedding's is its table transposed, [hidden, vocabulary]."""
    rank: int
    scaling: float
    """s of ΔW = s·B·A."""
    original: Callable[[], Tensor] | None = None
    """Reads W [N, K] as it was before the base was quantised, or raises ``UserError`` where nobody knows it."""


class Factors(NamedTuple):
    """A [R, K] and B [N, R] in float32."""

    a_RK: Tensor
    b_NR: Tensor
    is_subtracted: bool = False
    """Whether B·A is not zero and has to be taken off again: the adapter is s·(B·A − B₀·A₀)."""


Start = Callable[[Site], Factors]


def start_for(config: LoraConfig) -> Start:
    """The initialiser of linear layers that a config names."""
    name = config.init_lora_weights
    if isinstance(name, str) and name.startswith("pissa_niter_"):
        return partial(pissa, iterations=int(name.removeprefix("pissa_niter_")))
    if name == "loftq":
        settings = config.loftq_config
        assert isinstance(settings, LoftQConfig)  # the config's own check made it one
        return partial(loftq, bits=settings.loftq_bits, rounds=settings.loftq_iter)
    return _BY_NAME[name]


def embedding_start_for(config: LoraConfig) -> Start:
    """The initialiser of embeddings: one for all names but ``False``, as in PEFT."""
    return random if config.init_lora_weights is False else embedding


def kaiming(site: Site) -> Factors:
    """A uniform in ±1/√K, B zero: the reference implementation's start and PEFT's default."""
    return Factors(_uniform(site.rank, site.weight.in_features), _no_b(site))


def gaussian(site: Site) -> Factors:
    """A normal with deviation 1/r, B zero (Hu et al. 2021, §4.1, with PEFT's deviation)."""
    return Factors(torch.randn(site.rank, site.weight.in_features) / site.rank, _no_b(site))


def random(site: Site) -> Factors:
    """Both factors as fresh linear layers would be: for tests, where B = 0 would prove nothing."""
    a_RK = _uniform(site.rank, site.weight.in_features)
    return Factors(a_RK, _uniform(site.weight.out_features, site.rank))


def embedding(site: Site) -> Factors:
    """A zero, B normal: PEFT's start for embeddings."""
    return Factors(torch.zeros(site.rank, site.weight.in_features), torch.randn(site.weight.out_features, site.rank))


def orthogonal(site: Site) -> Factors:
    """Both factors random, B·A zero: each takes half the rows of one orthogonal matrix.

    With Q [R, R] orthogonal, A = Q₁ᵀ·X and B = Yᵀ·Q₂ for Q's even rows Q₁ and odd rows Q₂: B·A = Yᵀ·(Q₂·Q₁ᵀ)·X = 0,
    up to rounding. X and Y are normal with PEFT's deviation 1/10. Raises ``UserError`` for an odd rank.
    """
    half, odd = divmod(site.rank, 2)
    if odd:
        raise UserError(f"init_lora_weights='orthogonal' needs an even rank, and {site.name} has {site.rank}; change r")
    q_RR, _ = torch.linalg.qr(torch.randn(site.rank, site.rank))
    x_KH = torch.randn(site.weight.in_features, half)
    y_HN = torch.randn(half, site.weight.out_features)
    return Factors((x_KH @ q_RR[0::2]).T.contiguous() / 10, y_HN.T @ q_RR[1::2] / 10)


def pissa(site: Site, *, iterations: int | None = None) -> Factors:
    """W's leading singular vectors and values, shared out between the factors (Meng et al. 2024, eqs. 2–3).

    With W = U·S·Vᵀ: A = √(Sᵣ/s)·Vᵣᵀ and B = Uᵣ·√(Sᵣ/s), so that s·B·A is W's best approximation of rank r.
    Exact, or by ``iterations`` rounds of randomised subspace iteration (their §A.2; Halko et al. 2011).
    """
    if site.scaling <= 0:
        raise UserError(f"init_lora_weights='pissa' needs a positive lora_alpha; {site.name} has none: change alpha")
    w_NK = _dense(site, "pissa")
    if iterations is None:
        u_NR, s_R, vt_RK = _leading(w_NK, site.rank)
    else:
        u_NR, s_R, v_KR = torch.svd_lowrank(w_NK, q=site.rank, niter=iterations)
        vt_RK = v_KR.T
    root_R = (s_R / site.scaling).sqrt()
    return Factors(root_R[:, None] * vt_RK, u_NR * root_R, is_subtracted=True)


def olora(site: Site) -> Factors:
    """With W = Q·R: A is R's first r rows, B is Q's first r columns (Büyükakyüz 2024, algorithm 1)."""
    q_NM, r_MK = torch.linalg.qr(_dense(site, "olora"))
    return Factors(r_MK[: site.rank].clone(), q_NM[:, : site.rank].clone(), is_subtracted=True)


def loftq(site: Site, *, bits: int = 4, rounds: int = 1) -> Factors:
    """What quantising W would lose, as far as rank r can hold it (Li et al. 2023, algorithm 1).

    From B·A = 0, in turn: Q = quantised(W − B·A), then B·A = the best approximation of W − Q of rank r. As in PEFT the
    factors do not allow for s: they make good the loss where α = r.

    Where W itself stays dense, nothing is lost and the start is subtracted like any other: what is left of LoftQ is
    where A and B set out from. Over a quantised base see ``_loftq_of_loss``.
    """
    if is_quantised(site.weight):
        return _loftq_of_loss(site, bits, rounds)
    w_NK = _dense(site, "loftq")
    target_NK = w_NK
    for last in range(rounds):
        residual_NK = w_NK - _quantised(target_NK, bits)
        u_NR, s_R, vt_RK = _leading(residual_NK, site.rank)
        a_RK, b_NR = s_R.sqrt()[:, None] * vt_RK, u_NR * s_R.sqrt()
        if last < rounds - 1:
            target_NK = w_NK - b_NR @ a_RK
    return Factors(a_RK, b_NR, is_subtracted=True)


def _loftq_of_loss(site: Site, bits: int, rounds: int) -> Factors:
    """What quantising W has lost: s·B·A is the best approximation of W − W_q of rank r, so that W_q + s·B·A ≈ W.

    One round of algorithm 1, whose others would quantise the base anew, which others share. Raises ``UserError`` where
    W can't be read again, and for settings that mean another base.
    """
    if bits != 4 or rounds != 1:
        raise UserError(
            f"init_lora_weights='loftq': {site.name} is quantised already, and stays as it is; loftq_bits={bits} and "
            f"loftq_iter={rounds} would quantise it anew: expected 4 and 1, or a base loaded without quantisation"
        )
    assert site.original is not None, site.name
    if site.scaling <= 0:
        raise UserError(f"init_lora_weights='loftq' needs a positive lora_alpha; {site.name} has none: change alpha")
    w_NK = _dense(site, "loftq")
    lost_NK = site.original().to(w_NK.device, torch.float32) - w_NK
    u_NR, s_R, vt_RK = _leading(lost_NK, site.rank)
    root_R = (s_R / site.scaling).sqrt()
    return Factors(root_R[:, None] * vt_RK, u_NR * root_R)


def is_quantised(weight: FrozenWeight) -> bool:
    """Whether a weight is not what was published but what is left of it in a few bits."""
    return isinstance(weight, QuantizedWeight | BnbWeight)


def blank(site: Site, *, is_subtracted: bool = False) -> Factors:
    """Zeros, to be filled from a file."""
    return Factors(torch.zeros(site.rank, site.weight.in_features), _no_b(site), is_subtracted)


def blank_for(config: LoraConfig) -> Start:
    """Zeros of the shapes that the config's start makes, at none of its cost."""
    start = str(config.init_lora_weights).partition("_")[0]
    if start == "loftq":
        return lambda site: blank(site, is_subtracted=not is_quantised(site.weight))
    return partial(blank, is_subtracted=start in ("pissa", "olora"))


_BY_NAME: dict[bool | str, Start] = {
    True: kaiming,
    False: random,
    "gaussian": gaussian,
    "orthogonal": orthogonal,
    "pissa": pissa,
    "olora": olora,
    "eva": kaiming,
}


def _uniform(rows: int, columns: int) -> Tensor:
    """Uniform in ±1/√columns, as the weight of a fresh linear layer."""
    weight = torch.empty(rows, columns)
    return nn.init.kaiming_uniform_(weight, a=math.sqrt(5))


def _no_b(site: Site) -> Tensor:
    return torch.zeros(site.weight.out_features, site.rank)


def _dense(site: Site, start: str) -> Tensor:
    """W in float32 (never to be changed in place). ``UserError`` where it can't be factored to the rank asked for."""
    most = min(site.weight.out_features, site.weight.in_features)
    if site.rank > most:
        raise UserError(
            f"init_lora_weights={start!r}: {site.name} is {site.weight.out_features} × {site.weight.in_features} and "
            f"has no rank {site.rank}; give r or rank_pattern {most} at most there, or leave the module out"
        )
    w_NK = site.weight.dequantize().detach().float()
    if not w_NK.isfinite().all():
        raise UserError(f"init_lora_weights={start!r}: the weight of {site.name} holds infinities or nans")
    return w_NK


def _leading(w_NK: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular vectors and values: U [N, R], S [R], Vᵀ [R, K]."""
    u_NM, s_M, vt_MK = torch.linalg.svd(w_NK, full_matrices=False)
    return u_NM[:, :rank], s_M[:rank], vt_MK[:rank]


def _quantised(w_NK: Tensor, bits: int) -> Tensor:
    """W as it comes back from ``bits``-bit weights: NF4 or NF2 in blocks of 64, or INT8 with a scale a row."""
    if bits < 8:
        return dequantize(quantize(w_NK, f"nf{bits}"))
    half = w_NK.half()  # bitsandbytes' 8-bit weights are quantised from float16
    scale_N = half.abs().amax(1, keepdim=True).float()
    return (half * (127 / scale_N.clamp(min=1e-8))).round() * scale_N / 127
