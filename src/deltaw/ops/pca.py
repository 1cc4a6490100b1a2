"""Principal components of more rows than fit into memory (Ross et al. 2008, incremental PCA).

With S·V what is kept of n rows of mean μ, and a batch X of m rows of mean ν:

    S'·V' = the C leading singular vectors of   [ S·V ; X − ν ; √(nm/(n+m))·(μ − ν) ]

The first block stands for all rows so far, the last one for the way that the mean moves. Kept are C rows, a mean and
two numbers, whatever the number of rows. All but sums of squares is float32.

Shapes: T rows, K columns, C components.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDS, _ROUNDS_AGAIN, _EXTRA = 4, 1, 10
"""Rounds of subspace iteration from nothing, rounds from the last batch's directions, and directions beyond twice those
that are wanted: exact to a few digits."""

_SEED = 42
"""Of the directions that the iteration sets out from. It has its own generator and leaves torch's alone."""


class IncrementalPca:
    """The C leading principal components of rows that come in batches."""

    def __init__(self, num_components: int) -> None:
        self.num_components = num_components
        self.num_rows = 0
        """Rows that the components are of."""
        self.components_CK = self.singular_C = torch.empty(0)
        """Directions, the leading one first, each with its largest entry positive; and their singular values."""
        self.cosines_C = torch.zeros(num_components)
        """Between each component and what it was one batch ago; zero until there are two batches."""
        self._mean_K = torch.empty(0)
        self._spread = 0.0
        self._waiting: list[Tensor] = []

    @property
    def num_waiting(self) -> int:
        """Rows that are held back until there are as many as components."""
        return sum(map(len, self._waiting))

    @property
    def explained_C(self) -> Tensor:
        """The part of the rows' whole variance that lies along each component."""
        return self.singular_C.square() / max(self._spread, torch.finfo(torch.float32).tiny)

    def add(self, x_TK: Tensor) -> None:
        """Take up a batch of any number of rows, of any dtype. Raises ``ValueError`` for infinities and nans."""
        self._waiting.append(x_TK.float())
        if self.num_waiting >= self.num_components:
            x_TK, self._waiting = torch.cat(self._waiting), []
            self._update(x_TK)

    def _update(self, x_TK: Tensor) -> None:
        m, n = len(x_TK), self.num_rows
        mean_K = x_TK.mean(0)
        rows_TK = x_TK - mean_K
        spread = rows_TK.square().sum(dtype=torch.float64).item()
        if not spread < float("inf"):
            raise ValueError("infinities or nans among the rows")
        before_CK = self.components_CK
        if n:
            shift_K = (m * n / (m + n)) ** 0.5 * (self._mean_K - mean_K)
            rows_TK = torch.cat([self.singular_C[:, None] * before_CK, rows_TK, shift_K[None]])
            spread += self._spread + shift_K.square().sum(dtype=torch.float64).item()
            mean_K = self._mean_K + (mean_K - self._mean_K) * (m / (m + n))
        self.singular_C, self.components_CK = leading_directions(rows_TK, self.num_components, before_CK if n else None)
        self._mean_K, self._spread, self.num_rows = mean_K, spread, m + n
        if n:
            self.cosines_C = torch.cosine_similarity(self.components_CK, before_CK)


def leading_directions(rows_TK: Tensor, num_components: int, guess_CK: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The leading singular values [C] and right singular vectors [C, K], each with its largest entry positive.

    By randomised subspace iteration (Halko et al. 2011, algorithm 4.4) where that is less work than an exact SVD;
    from a guess it takes fewer rounds.
    """
    size = 2 * num_components + _EXTRA
    small_CK = rows_TK
    if size < min(rows_TK.shape):
        from_KC = torch.randn(rows_TK.shape[1], size, generator=torch.Generator().manual_seed(_SEED)).to(rows_TK.device)
        if guess_CK is not None:
            from_KC[:, : len(guess_CK)] = guess_CK.T
        q_TC = torch.linalg.qr(rows_TK @ from_KC).Q
        for _ in range(_ROUNDS if guess_CK is None else _ROUNDS_AGAIN):
            q_TC = torch.linalg.qr(rows_TK @ torch.linalg.qr(rows_TK.T @ q_TC).Q).Q
        small_CK = q_TC.T @ rows_TK
    _, s_C, vt_CK = torch.linalg.svd(small_CK, full_matrices=False)
    vt_CK = vt_CK[:num_components]
    signs_C1 = vt_CK.gather(1, vt_CK.abs().argmax(1, keepdim=True)).sign()
    return s_C[:num_components], vt_CK * signs_C1
