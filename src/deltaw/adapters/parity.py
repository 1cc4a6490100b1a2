"""Prove that a result says what its source says: compare their logits on real text, and refuse what differs too much.

    KL_t = Σ_v p_t(v)·(log p_t(v) − log q_t(v))     p the source's, q the result's next-token distribution at token t
    kept = ⟨result − base, source − base⟩ / ‖source − base‖²     how much of an adapter's effect on logits arrives

A weak adapter that got lost on the way hardly shows in KL; in ``kept`` it does: 1 is all of it, 0 none, 2 twice, −1 a
wrong sign. Where an adapter's effect is below the rounding of 16-bit arithmetic, rounding of the base's own logits,
which stand on both sides, leaves about 0.5.

Every step that changes the form of an adapter or a model (merge, blend, compress, quantise, export) goes the same way:

    ids = reference_ids(tokenizer)
    source_TV = reference_logits(model, ids)                                  before the step
    base_TS = sampled_logits(base, ids)                                       where an adapter's effect is looked at
    parity = parity_of(source_TV, window_logits(model, ids), base_TS=base_TS)     after it
    require(parity, CAST, allow=options.allow_loss, what="merge")
    write_parity(folder, parity, CAST, step="merge")

Text is laid out in windows of ``WINDOW`` tokens, each a context of its own, which begins with whatever the tokenizer
puts before a text (BOS): attention and logits are bounded, and whoever computes logits elsewhere (llama.cpp) needs to
know no more than that. The text is a few thousand characters of prose, dialogue, code and figures in ``reference.txt``.

Memory: one float32 matrix [T, V] for the source (T=512 and V=49,152: 100 MB); the result's logits stream by, a window
at a time, and are compared in float64, a few rows at a time.

Shapes: T tokens, V vocabulary, W tokens of one window, S logits of a sample of the vocabulary.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UserError
from ..files import replace_text

PARITY_NAME = "parity.json"
NUM_TOKENS = 512
WINDOW = 128
_NO_EFFECT = 3e-5
"""‖source − base‖ / ‖base‖ over logits below which there is no effect to look for: some ten times what reordering the
sums of float32 makes. Parts of a blend may cancel."""
_ROWS = 32
"""Rows of logits that are compared at a time: V = 256,000 of them take 65 MB in float64."""


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How far a result's next-token distributions are from its source's, over a text."""

    num_tokens: int
    mean_kl: float
    """Mean over all tokens of KL(source‖result), in nats."""
    max_kl: float
    """The largest of any token."""
    max_logit_difference: float
    equal_greedy: float
    """Share of tokens after which both would go on with the same one."""
    text_sha256: str
    """Of the text that was compared on."""
    dtype: str
    """Number format in which the result computed."""
    kept_effect: float | None = None
    """How much of the adapter's effect on the base's logits arrives (1: all); None where that was not looked at, or
    there is none to speak of."""

    def __str__(self) -> str:
        kept = "" if self.kept_effect is None else f"; {self.kept_effect:.1%} of the adapter's effect arrives"
        return (
            f"KL {self.mean_kl:.2g} nats on average, {self.max_kl:.2g} at most; logits differ by up to "
            f"{self.max_logit_difference:.2g}; {_percent(self.equal_greedy)} of {self.num_tokens:,} greedy tokens "
            f"are equal{kept}"
        )


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """What a kind of step may cost; a bound that is None is none."""

    name: str
    """The kind of step, in words that fit behind "for"."""
    mean_kl: float | None
    max_kl: float | None = None
    max_logit_difference: float | None = None
    equal_greedy: float = 0.0
    """Least share of equal greedy tokens."""
    lost_effect: float = 0.7
    """How far from 1 the kept effect may be."""

    def violations(self, parity: Parity) -> list[str]:
        """What of the figures is beyond what is tolerated, in words; NaN always is."""
        bounds = {
            "mean KL": (parity.mean_kl, self.mean_kl),
            "largest KL": (parity.max_kl, self.max_kl),
            "largest logit difference": (parity.max_logit_difference, self.max_logit_difference),
        }
        out = [
            f"{what} {value:.2g} (tolerated: {'any number' if bound is None else format(bound, 'g')})"
            for what, (value, bound) in bounds.items()
            if not (math.isfinite(value) if bound is None else value <= bound)
        ]
        if not parity.equal_greedy >= self.equal_greedy:
            out.append(
                f"{_percent(parity.equal_greedy)} equal greedy tokens (tolerated: {_percent(self.equal_greedy)})"
            )
        kept = parity.kept_effect
        if kept is not None and not abs(kept - 1) <= self.lost_effect:
            out.append(f"{kept:.1%} of the adapter's effect (tolerated: 100 % ± {100 * self.lost_effect:g})")
        return out


EXACT = Tolerance(
    name="the same arithmetic in float32 in another order",
    mean_kl=1e-6,
    max_kl=1e-4,
    max_logit_difference=1e-2,
    equal_greedy=0.99,
    lost_effect=0.01,
)
"""Merging, ``cat`` and export in float32: rounding, and nothing else."""
CAST = Tolerance(name="weights rounded to 16 bits", mean_kl=0.01, max_kl=1.0, equal_greedy=0.9)
"""Merging into bfloat16 or float16, F16 export, and any comparison of models that compute in 16 bits."""
LOSSY = Tolerance(name="a step that loses something by design", mean_kl=0.1, equal_greedy=0.8)
"""Compressing, pruning and quantising to 4 or 8 bits."""
OTHER = Tolerance(name="a step that is meant to say something else", mean_kl=None, lost_effect=1.0)
"""Blending by a method that is not the weighted sum: figures are told, and must be numbers; the effect of the weighted
sum may come out weaker or stronger, up to twice, but not turned round."""


def tolerance_for(*dtypes: torch.dtype) -> Tolerance:
    """What a step that should lose nothing may cost where numbers of these formats take part."""
    return CAST if any(torch.finfo(dtype).eps > torch.finfo(torch.float32).eps for dtype in dtypes) else EXACT


@cache
def reference_text() -> str:
    """The text that comes with this package."""
    return files(__package__).joinpath("reference.txt").read_text(encoding="utf-8")


def sha256_of_text(text: str | None = None) -> str:
    """Identity of a text; of ``reference_text`` where none is given."""
    return hashlib.sha256((reference_text() if text is None else text).encode()).hexdigest()


def reference_ids(
    tokenizer: PreTrainedTokenizerBase, num_tokens: int = NUM_TOKENS, *, text: str | None = None
) -> Tensor:
    """``num_tokens`` ids [T] (int64) of the text, laid out in windows; fewer where the text is at an end.

    Raises ``UserError`` for fewer than two tokens: there would be nothing to compare.
    """
    content = reference_text() if text is None else text
    body: list[int] = tokenizer(content, add_special_tokens=False)["input_ids"]
    start = _start(tokenizer)
    step = WINDOW - len(start)
    ids = [i for begin in range(0, len(body), step) for i in [*start, *body[begin : begin + step]]][:num_tokens]
    if len(ids) < 2:
        raise UserError(f"{len(ids)} tokens are too few to compare on; give at least two, and a text that has as many")
    return torch.tensor(ids)


def window_logits(model: PreTrainedModel, ids_T: Tensor) -> Iterator[Tensor]:
    """Logits [W, V] in float32 of one window after the other; with whatever adapters are active now.

    The model computes in evaluation mode and without gradients, and is as it was afterwards.
    """
    was_training = model.training
    for ids_W in ids_T.split(WINDOW):
        model.eval()
        try:
            with torch.no_grad():
                logits_WV = model(input_ids=ids_W[None].to(model.device), use_cache=False).logits[0]
        finally:
            model.train(was_training)
        yield logits_WV.float()


def reference_logits(model: PreTrainedModel, ids_T: Tensor) -> Tensor:
    """All windows' logits [T, V], float32, on the CPU."""
    out_TV: Tensor | None = None
    done = 0
    for logits_WV in window_logits(model, ids_T):
        if out_TV is None:
            out_TV = torch.empty(len(ids_T), logits_WV.shape[1])
        out_TV[done : done + len(logits_WV)] = logits_WV
        done += len(logits_WV)
    assert out_TV is not None
    return out_TV


def sampled_logits(model: PreTrainedModel, ids_T: Tensor) -> Tensor:
    """A fixed sample [T, S] of all windows' logits, float32, on the CPU: what ``kept_effect`` needs of the base."""
    parts = [logits_WV[:, _sample(logits_WV.shape[1])].cpu() for logits_WV in window_logits(model, ids_T)]
    return torch.cat(parts)


def parity_of(
    source_TV: Tensor,
    result: Tensor | Iterable[Tensor],
    *,
    base_TS: Tensor | None = None,
    dtype: torch.dtype | str = torch.float32,
    text_sha256: str | None = None,
) -> Parity:
    """Compare logits [T, V] with a result's, whole or as consecutive pieces of rows.

    ``base_TS`` are ``sampled_logits`` of the base without the adapter, for ``kept_effect``. ``dtype`` is the number
    format that the result computed in, ``text_sha256`` the text's where it is not ``reference_text``.
    Raises ``UserError`` where the result has another vocabulary.
    """
    pieces = [result] if isinstance(result, Tensor) else result
    kl_sum, kl_max, far, equal, done = 0.0, 0.0, 0.0, 0, 0
    arrived, effect, whole = 0.0, 0.0, 0.0
    for piece_WV in pieces:
        if piece_WV.shape[1] != source_TV.shape[1]:
            raise UserError(
                f"the source has {source_TV.shape[1]:,} logits a token and the result {piece_WV.shape[1]:,}; "
                "only models with one vocabulary can be compared"
            )
        for result_RV in piece_WV.split(_ROWS):
            source_RV = source_TV[done : done + len(result_RV)]
            kl_R, far_R = _distances(source_RV.double().cpu(), result_RV.double().cpu())
            kl_sum, kl_max = kl_sum + kl_R.sum().item(), _worse(kl_max, kl_R.max().item())
            far = _worse(far, far_R.max().item())
            if base_TS is not None:
                base_RS, on = base_TS[done : done + len(result_RV)].double(), _sample(source_TV.shape[1])
                own_RS, its_RS = ((logits_RV[:, on].double().cpu() - base_RS) for logits_RV in (source_RV, result_RV))
                arrived, effect = arrived + (own_RS * its_RS).sum().item(), effect + own_RS.square().sum().item()
                whole += base_RS.square().sum().item()
            equal += int((source_RV.argmax(-1).cpu() == result_RV.argmax(-1).cpu()).sum())
            done += len(result_RV)
    assert done == len(source_TV), (done, len(source_TV))
    return Parity(
        num_tokens=done,
        mean_kl=kl_sum / done,
        max_kl=kl_max,
        max_logit_difference=far,
        equal_greedy=equal / done,
        text_sha256=text_sha256 or sha256_of_text(),
        dtype=str(dtype).removeprefix("torch."),
        kept_effect=None if effect <= _NO_EFFECT**2 * whole else arrived / effect,
    )


def text_loss(logits: Tensor | Iterable[Tensor], ids_T: Tensor) -> float:
    """Mean loss in nats of each window's next tokens, by the logits of ``reference_logits`` or ``window_logits``."""
    pieces = logits.split(WINDOW) if isinstance(logits, Tensor) else logits
    total, count = 0.0, 0
    for logits_WV, ids_W in zip(pieces, ids_T.split(WINDOW), strict=True):
        total += F.cross_entropy(logits_WV[:-1].cpu(), ids_W[1:], reduction="sum").item()
        count += len(ids_W) - 1
    return total / max(count, 1)


def require(
    parity: Parity, tolerance: Tolerance, *, allow: bool = False, what: str, flag: str = "--allow-loss"
) -> bool:
    """Whether the figures are within the tolerance; ``UserError`` where they aren't, unless it is allowed.

    ``what`` names the step, and ``flag`` says how to allow it, both for the message.
    """
    violations = tolerance.violations(parity)
    if violations and not allow:
        raise UserError(
            f"{what}: the result does not say what its source says: {'; '.join(violations)}, for {tolerance.name} "
            f"({parity}); nothing was kept. {flag} keeps it all the same"
        )
    return not violations


def write_parity(folder: str | Path, parity: Parity, tolerance: Tolerance, **facts: Any) -> Path:
    """Write the figures, what was tolerated and ``facts`` beside a result, atomically; returns the file's path."""
    return write_report(folder, report(parity, tolerance, **facts))


def write_report(folder: str | Path, facts: dict[str, Any]) -> Path:
    """Write what ``report`` gave beside a result, atomically; returns the file's path."""
    path = Path(folder) / PARITY_NAME
    replace_text(path, json.dumps(facts, indent=2, allow_nan=False) + "\n")
    return path


def report(parity: Parity, tolerance: Tolerance, **facts: Any) -> dict[str, Any]:
    """Plain JSON values of what ``write_parity`` writes; a figure that is not finite is null."""
    figures = {k: _finite(v) for k, v in dataclasses.asdict(parity).items()}
    passed = not tolerance.violations(parity)
    return {k: _finite(v) for k, v in facts.items()} | {
        "passed": passed,
        "parity": figures,
        "tolerance": dataclasses.asdict(tolerance),
    }


def without(**facts: Any) -> dict[str, Any]:
    """What ``report`` would be where no logits were compared."""
    return {k: _finite(v) for k, v in facts.items()} | {"passed": None, "parity": None, "tolerance": None}


def _distances(source_RV: Tensor, result_RV: Tensor) -> tuple[Tensor, Tensor]:
    """(KL [R], largest |Δlogit| [R]); an entry that both exclude (−∞) is no difference."""
    p_RV, q_RV = source_RV.log_softmax(-1), result_RV.log_softmax(-1)
    excluded_RV = p_RV == -torch.inf
    kl_R = (p_RV.exp() * (p_RV - q_RV)).masked_fill_(excluded_RV, 0).sum(-1)
    far_R = (source_RV - result_RV).abs_().masked_fill_(source_RV == result_RV, 0).amax(-1)
    return kl_R.clamp_min_(0), far_R


def _sample(vocabulary: int) -> slice:
    """At most 2,047 tokens from all over the vocabulary."""
    return slice(0, vocabulary, max(1, vocabulary // 1024))


def _worse(one: float, other: float) -> float:
    """The larger; NaN where either is."""
    return math.nan if math.isnan(one) or math.isnan(other) else max(one, other)


def _start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a text."""
    whole: list[int] = tokenizer("a")["input_ids"]
    bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    return next((whole[:i] for i in range(len(whole)) if whole[i : i + len(bare)] == bare), [])


def _finite(value: Any) -> Any:
    """JSON knows no other numbers."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _percent(share: float) -> str:
    # 511 of 512 are not 100 %.
    return "100 %" if share == 1 else f"{math.floor(1000 * share) / 10:.1f} %"
