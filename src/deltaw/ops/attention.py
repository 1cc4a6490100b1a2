"""Causal attention over examples that lie end to end, each seeing itself only.

Per example of length L, head by head, with s = the model's scaling:

    S = s·q·kᵀ  (softcapped if the model does)      P = softmax(S where j ≤ i and i - j < window)      o = P·v

No T × T mask is ever built: an example's rows are multiplied with its own keys and no others, so nothing can leak.
Query rows go in blocks: the keys after a block are never touched, and the scores held are one block's. Backward
computes P again from q, k and v (FlashAttention, Dao et al. 2022, §3.1), with dS = P∘(dP - rowsum(dO∘O)), so that
what is saved grows with T and not with L².

Where there are kernels for the tensors' dtype (``kernels/csrc/attention.cpp``), they do the same in smaller blocks,
with scores and their softmax in float32; softcapped scores, other dtypes and other devices go through torch.

Shapes: T tokens, N query heads, G key/value heads (N a multiple of G: grouped-query attention, Ainslie et al. 2023),
D head size (v's and o's may be another), L rows of one example. Left out: attention dropout (the base is frozen and
runs as in evaluation), and attention in both directions.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..kernels import Kernel, find

BLOCK_ROWS = 128
"""Query rows at a time: most of the scores that causality hides are skipped, and products stay large enough."""


@dataclass(frozen=True, slots=True)
class Masking:
    """What a query may see beyond causality, and how scores are bent."""

    scaling: float
    """Factor on q·kᵀ."""
    window: int | None = None
    """Sliding window: a query sees itself and the ``window - 1`` keys before it."""
    softcap: float | None = None
    """Scores become softcap·tanh(score/softcap) (Gemma 2)."""


def packed_attention(q_NTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, lengths: Sequence[int], masking: Masking) -> Tensor:
    """o [T, N, D] for examples of ``lengths`` laid end to end; differentiable in q, k and v.

    Raises ``ValueError`` where the lengths don't add up to T.
    """
    if sum(lengths) != q_NTD.shape[1]:
        raise ValueError(f"examples of {sum(lengths)} tokens in all, in a batch of {q_NTD.shape[1]}")
    o_TND: Tensor = _PackedAttention.apply(q_NTD, k_GTD, v_GTD, tuple(lengths), masking)  # type: ignore[no-untyped-call]
    return o_TND


def packed_attention_reference(
    q_NTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, lengths: Sequence[int], masking: Masking
) -> Tensor:
    """The plain twin: the whole T × T score matrix under a block-diagonal causal mask."""
    repeat = q_NTD.shape[0] // k_GTD.shape[0]
    k_NTD, v_NTD = k_GTD.repeat_interleave(repeat, 0), v_GTD.repeat_interleave(repeat, 0)
    scores = q_NTD @ k_NTD.transpose(1, 2) * masking.scaling
    if masking.softcap is not None:
        scores = masking.softcap * torch.tanh(scores / masking.softcap)
    example = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    age = torch.arange(len(example))[:, None] - torch.arange(len(example))
    seen = (example[:, None] == example) & (age >= 0)
    if masking.window is not None:
        seen &= age < masking.window
    p = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return (p @ v_NTD).transpose(0, 1)


def attention(
    q_NTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, lengths: Sequence[int], masking: Masking
) -> tuple[Tensor, Tensor | None]:
    """(o [T, N, D], what ``attention_backward`` wants to know of the softmax); not differentiable by itself.

    q, k and v may have any strides; o is contiguous.
    """
    call = _KernelCall.of(q_NTD, k_GTD, v_GTD, lengths, masking)
    o_TND = q_NTD.new_empty(q_NTD.shape[1], q_NTD.shape[0], v_GTD.shape[-1])
    if call is not None:
        return o_TND, call.forward(q_NTD, k_GTD, v_GTD, o_TND)
    num_heads, groups = q_NTD.shape[0], k_GTD.shape[0]
    for rows, keys in _blocks(lengths, masking.window):
        p, _ = _probabilities(_fold(q_NTD[:, rows], groups), k_GTD[:, keys], rows, keys, masking)
        o_TND[rows] = _unfold(p @ v_GTD[:, keys], num_heads).transpose(0, 1)
    return o_TND, None


def attention_backward(
    do_TND: Tensor,
    q_NTD: Tensor,
    k_GTD: Tensor,
    v_GTD: Tensor,
    o_TND: Tensor,
    softmax: Tensor | None,
    lengths: Sequence[int],
    masking: Masking,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), shaped like q, k and v and contiguous as [T, heads, D], from what ``attention`` took and gave."""
    dq_NTD, dk_GTD, dv_GTD = (
        t.new_empty(t.shape[1], t.shape[0], t.shape[2]).transpose(0, 1) for t in (q_NTD, k_GTD, v_GTD)
    )
    call = None if softmax is None else _KernelCall.of(q_NTD, k_GTD, v_GTD, lengths, masking)
    if call is not None and softmax is not None:
        call.backward(do_TND, q_NTD, k_GTD, v_GTD, o_TND, softmax, dq_NTD, dk_GTD, dv_GTD)
        return dq_NTD, dk_GTD, dv_GTD
    num_heads, groups = q_NTD.shape[0], k_GTD.shape[0]
    dk_GTD.zero_()
    dv_GTD.zero_()
    for rows, keys in _blocks(lengths, masking.window):
        q, k, v = _fold(q_NTD[:, rows], groups), k_GTD[:, keys], v_GTD[:, keys]
        do = _fold(do_TND[rows].transpose(0, 1), groups)
        o = _fold(o_TND[rows].transpose(0, 1), groups)
        p, bend = _probabilities(q, k, rows, keys, masking)
        dv_GTD[:, keys] += p.transpose(1, 2) @ do
        minus_delta = (do * o).sum(-1, keepdim=True).neg_()
        ds = torch.baddbmm(minus_delta, do, v.transpose(1, 2)).mul_(p)
        if bend is not None:
            ds.mul_(bend)
        dq_NTD[:, rows] = _unfold(ds @ k, num_heads)
        dk_GTD[:, keys] += ds.transpose(1, 2) @ q
    return dq_NTD.mul_(masking.scaling), dk_GTD.mul_(masking.scaling), dv_GTD


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_NTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, lengths: tuple[int, ...], masking: Masking
    ) -> Tensor:
        o_TND, softmax = attention(q_NTD, k_GTD, v_GTD, lengths, masking)
        ctx.lengths, ctx.masking = lengths, masking
        ctx.save_for_backward(q_NTD, k_GTD, v_GTD, o_TND, softmax)
        return o_TND

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_NTD, k_GTD, v_GTD, o_TND, softmax = ctx.saved_tensors
        of_inputs = attention_backward(grads[0], q_NTD, k_GTD, v_GTD, o_TND, softmax, ctx.lengths, ctx.masking)
        return *of_inputs, None, None


@dataclass(frozen=True, slots=True)
class _KernelCall:
    """What the kernels take beside the tensors; see the end of ``attention.cpp``."""

    sizes: Any
    """T, N, G, D, D of v, window, tasks that share a key/value head."""
    examples: Any
    """First token and length of each, the longest first: the last to finish should be short."""
    scaling: float
    scratch_bytes: tuple[int, int]
    """Forward's and backward's."""

    @staticmethod
    def of(q_NTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, lengths: Sequence[int], masking: Masking) -> _KernelCall | None:
        """None: through torch."""
        if masking.softcap is not None or not q_NTD.dtype == k_GTD.dtype == v_GTD.dtype or q_NTD.shape[1] == 0:
            return None
        if find("attention", "ppppppppifp", q_NTD) is None:
            return None
        shape = q_NTD.shape[1], q_NTD.shape[0], k_GTD.shape[0], q_NTD.shape[2], v_GTD.shape[2]
        return _kernel_call(q_NTD.dtype, shape, tuple(lengths), masking, torch.get_num_threads())

    def forward(self, q_NTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, o_TND: Tensor) -> Tensor:
        """Writes o; gives each row's largest score (times log2 e) and the inverse of its sum [N, T, 2]."""
        kernel = find("attention", "ppppppppifp", q_NTD)
        assert kernel is not None
        softmax_NT2 = q_NTD.new_empty(q_NTD.shape[0], q_NTD.shape[1], 2, dtype=torch.float32)
        inputs = [_with_rows(t) for t in (q_NTD, k_GTD, v_GTD)]
        self._run(kernel, [*inputs, o_TND.transpose(0, 1)], [*inputs, o_TND, softmax_NT2], self.scratch_bytes[0])
        return softmax_NT2

    def backward(
        self,
        do_TND: Tensor,
        q_NTD: Tensor,
        k_GTD: Tensor,
        v_GTD: Tensor,
        o_TND: Tensor,
        softmax_NT2: Tensor,
        dq_NTD: Tensor,
        dk_GTD: Tensor,
        dv_GTD: Tensor,
    ) -> None:
        """Writes dq, dk and dv."""
        kernel = find("attention_backward", "ppppppppppppifp", q_NTD)
        assert kernel is not None
        upstream = (o_TND.transpose(0, 1), do_TND.transpose(0, 1))
        inputs = [_with_rows(t) for t in (q_NTD, k_GTD, v_GTD, *upstream)]
        outputs = [dq_NTD, dk_GTD, dv_GTD]
        self._run(kernel, inputs + outputs, [*inputs, softmax_NT2, *outputs], self.scratch_bytes[1])

    def _run(self, kernel: Kernel, strided: list[Tensor], tensors: list[Tensor], scratch_bytes: int) -> None:
        strides = [stride for t in strided for stride in (t.stride(1), t.stride(0))]
        scratch = torch.empty(scratch_bytes, dtype=torch.uint8)
        addresses = [t.data_ptr() for t in tensors]
        count = len(self.examples) // 2
        kernel(*addresses, self.sizes, _int64s(strides), self.examples, count, self.scaling, scratch.data_ptr())


@lru_cache(maxsize=64)
def _kernel_call(
    dtype: torch.dtype, shape: tuple[int, ...], lengths: tuple[int, ...], masking: Masking, num_threads: int
) -> _KernelCall:
    """Scratch is each thread's own, hence their number."""
    _, num_heads, groups, *_ = shape
    window = masking.window or max(lengths)
    work = [length * min(length, window) for length in lengths]
    # Few large tasks are cut by query heads. The threads have no say in it: they must not change any bit.
    parts = num_heads // groups if groups * sum(work) < 8 * max(work) else 1
    firsts = [sum(lengths[:i]) for i in range(len(lengths))]
    examples = sorted(((length, first) for first, length in zip(firsts, lengths, strict=True) if length), reverse=True)
    sizes = _int64s([*shape, window, parts])
    scratch_bytes = _int64s([0, 0])
    count_scratch = find("attention_scratch", "ppi", torch.empty(0, dtype=dtype))
    assert count_scratch is not None
    count_scratch(scratch_bytes, sizes, examples[0][0])
    flat = [number for length, first in examples for number in (first, length)]
    return _KernelCall(sizes, _int64s(flat), masking.scaling, (scratch_bytes[0], scratch_bytes[1]))


def _int64s(numbers: Sequence[int]) -> Any:
    return (ctypes.c_int64 * len(numbers))(*numbers)


def _with_rows(x: Tensor) -> Tensor:
    """x whose rows are contiguous, as they nearly always are."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _blocks(lengths: Sequence[int], window: int | None) -> Iterator[tuple[slice, slice]]:
    """(query rows, keys they may see) for every block of every example; keys are the fewest that suffice."""
    first = 0
    for length in lengths:
        for start in range(first, first + length, BLOCK_ROWS):
            stop = min(start + BLOCK_ROWS, first + length)
            oldest = first if window is None else max(first, start - window + 1)
            yield slice(start, stop), slice(oldest, stop)
        first += length


def _probabilities(q: Tensor, k: Tensor, rows: slice, keys: slice, masking: Masking) -> tuple[Tensor, Tensor | None]:
    """P [G, N/G·L, keys] in q's dtype, and the softcap's derivative where there is one.

    The mask is what the product of q and k is added to: filling scores afterwards costs as much as the product. Softmax
    sums in float32 whatever its input.
    """
    num_rows = rows.stop - rows.start
    mask = _mask(num_rows, keys.stop - keys.start, masking.window, q.dtype, q.device).repeat(q.shape[1] // num_rows, 1)
    if masking.softcap is None:
        return torch.baddbmm(mask, q, k.transpose(1, 2), alpha=masking.scaling).softmax(-1), None
    scores = (q @ k.transpose(1, 2)).to(torch.promote_types(q.dtype, torch.float32))
    tanh = scores.mul_(masking.scaling / masking.softcap).tanh_()
    bend = (1 - tanh * tanh).to(q.dtype)
    return tanh.mul_(masking.softcap).add_(mask).softmax(-1).to(q.dtype), bend


@lru_cache(maxsize=64)
def _mask(num_rows: int, num_keys: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[rows, keys]: 0 where a row sees a key, −∞ where the key comes later or is too old for the window.

    The last row stands at the last key. A model's layers ask for the same masks one after the other.
    """
    age = torch.arange(num_keys - num_rows, num_keys, device=device)[:, None] - torch.arange(num_keys, device=device)
    hidden = age < 0 if window is None else (age < 0) | (age >= window)
    with torch.inference_mode(False):  # kept for forwards that may want gradients
        return torch.zeros(num_rows, num_keys, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))


def _fold(x_NLD: Tensor, groups: int) -> Tensor:
    """[N, L, D] → [G, N/G·L, D]: the query heads of a group lie under each other, and share one product."""
    return x_NLD.reshape(groups, -1, x_NLD.shape[-1])


def _unfold(x_GMD: Tensor, num_heads: int) -> Tensor:
    """The inverse of ``_fold``."""
    return x_GMD.reshape(num_heads, -1, x_GMD.shape[-1])
