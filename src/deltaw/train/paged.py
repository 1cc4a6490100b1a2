"""Optimiser state that may leave memory (QLoRA, Dettmers et al. 2023, §3: paged optimisers).

AdamW touches its moments once a step, in one pass; all the rest of the step they lie idle: 8 bytes a trained weight,
12 where a bfloat16 weight has a float32 master beside it. They are kept here where the operating system may take them
out of memory and bring them back without being asked.

    on the CPU     pages of a file that is mapped and shared, ``PagedAdamW``: the arithmetic is AdamW's, bit for bit
    on CUDA        bitsandbytes' PagedAdamW32bit, in the driver's unified memory (not measured: no GPU was at hand)

The file lies on the disk that the run is written to: a page that memory has no room for is written there and read
again when the next step comes to it. It has no name (O_TMPFILE, or unlinked as soon as it is open), so that whatever
ends the process, kill -9 and a lost machine among it, gives its space back. All of that space is claimed before
training, since a disk that fills up under a mapping kills a process without a word.

Left out: gradients and weights, which a step needs all along; leaving what is not needed to swap, which most machines
that train don't have.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import tempfile
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import UserError
from .optim import AdamW, is_own_master

_ALIGNED = 16
"""Entries (64 bytes) that a tensor's place in the file is a multiple of: a cache line."""


def make_optimizer(
    kind: Literal["adamw", "paged-adamw"],
    parameters: Mapping[str, nn.Parameter],
    *,
    folder: Path | None,
    weight_decay: float,
    b_ratio: float,
) -> AdamW:
    """The optimiser that ``--optimizer`` names. ``folder``: where pages go; need not exist yet (None: TMPDIR).

    Raises ``UserError`` where the pages have no room, and on CUDA where bitsandbytes is missing.
    """
    if kind == "adamw":
        return AdamW(parameters, weight_decay=weight_decay, b_ratio=b_ratio)
    if any(p.device.type != "cpu" for p in parameters.values()):
        return CudaPagedAdamW(parameters, weight_decay=weight_decay, b_ratio=b_ratio)
    return PagedAdamW(parameters, folder=folder, weight_decay=weight_decay, b_ratio=b_ratio)


class PagedAdamW(AdamW):
    """``AdamW`` whose moments, and masters that are copies, are pages of a file.

    What a checkpoint holds is the same, so that a run may go on with the one where it stopped with the other.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        folder: Path | None = None,
        weight_decay: float,
        b_ratio: float = 1.0,
    ) -> None:
        size = sum((2 if is_own_master(p) else 3) * _room(p) for p in parameters.values())
        self._pages = _mapped(4 * size, folder)
        self._file = torch.frombuffer(self._pages, dtype=torch.float32)
        self._end = 0
        super().__init__(parameters, weight_decay=weight_decay, b_ratio=b_ratio)

    def _zeros(self, like: Tensor) -> Tensor:
        """The file's next free part; a file begins as zeros. In the weight's own layout, as ``torch.zeros_like``."""
        part = self._file[self._end : self._end + like.numel()]
        self._end += _room(like)
        return part.as_strided(like.shape, torch.empty_like(like, device="meta").stride(), part.storage_offset())


class CudaPagedAdamW(AdamW):
    """bitsandbytes' paged AdamW, its state under torch's names. Small tensors (below 100,000 entries) aren't paged."""

    def _optimizer(self, groups: list[dict[str, Any]], weight_decay: float) -> torch.optim.Optimizer:
        try:
            library: Any = import_module("bitsandbytes.optim")
        except ImportError:
            raise UserError(
                "--optimizer paged-adamw on CUDA is bitsandbytes', which is not installed; pip install bitsandbytes, "
                "or --optimizer adamw"
            ) from None
        made: torch.optim.Optimizer = library.PagedAdamW32bit(groups, lr=0.0, weight_decay=weight_decay)
        return made

    def _state_of(self, master: nn.Parameter) -> dict[str, Tensor]:
        optimizer: Any = self._adamw
        state = optimizer.state[master]
        if not state:
            places = {id(p): (group, i, j) for i, group in enumerate(optimizer.param_groups)
                      for j, p in enumerate(group["params"])}  # fmt: skip
            group, i, j = places[id(master)]
            optimizer.init_state(group, master, i, j)
        return {"step": torch.tensor(float(state["step"])), "exp_avg": state["state1"], "exp_avg_sq": state["state2"]}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        super().load_state(state)
        for key, value in state.items():
            name, _, part = key.rpartition("/")
            if part == "step":
                self._adamw.state[self._masters[name]]["step"] = int(value)


def _room(tensor: Tensor) -> int:
    """Entries that a tensor takes in the file."""
    return math.ceil(tensor.numel() / _ALIGNED) * _ALIGNED


def _mapped(num_bytes: int, folder: Path | None) -> mmap.mmap:
    """Zeros in a file without a name, shared with the disk; gone with the last of its users."""
    where = Path(tempfile.gettempdir()) if folder is None else folder.absolute()
    where = next(path for path in (where, *where.parents) if path.is_dir())
    try:
        with tempfile.TemporaryFile(dir=where) as file:
            _claim(file.fileno(), max(num_bytes, mmap.PAGESIZE))
            return mmap.mmap(file.fileno(), max(num_bytes, mmap.PAGESIZE))
    except OSError as error:
        raise UserError(
            f"--optimizer paged-adamw: {where} has no room for {num_bytes / 1e6:,.0f} MB of optimiser state "
            f"({error.strerror}); free some, give another --out, or --optimizer adamw"
        ) from None


def _claim(file: int, num_bytes: int) -> None:
    """Make the file so long, its space on the disk its own. Raises ``OSError`` where there isn't so much."""
    disk = os.fstatvfs(file)  # asked first: to claim all of a disk and fail would starve others meanwhile
    if num_bytes > disk.f_bavail * disk.f_frsize:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    try:
        os.posix_fallocate(file, 0, num_bytes)
    except (AttributeError, OSError) as error:
        # macOS has no such call, and some file systems can't do it: the space is there now, if not for sure later.
        if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.truncate(file, num_bytes)
