"""Compiled kernels, where there are any for this processor: a fast way beside torch's own operations, never the only.

The sources in ``csrc`` are compiled when the package is built, once for each instruction set, into libraries with a
plain C interface; which one is loaded is decided here, when first asked. Nobody above needs to know whether there are
any: ``find`` gives a function or None, and whoever asks has a plain twin to fall back on.

``DELTAW_KERNELS`` chooses one level by name (``avx512bf16``, ``avx512``), or ``off``.

Left out: processors without AVX-512. The same source compiled for AVX2 was slower than torch's own operations, since
its vectors of 16 floats don't fit that processor's registers; they take the plain ways.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError

LEVELS = ("avx512bf16", "avx512")
"""Best first."""

_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
_ARGUMENT = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float, "d": ctypes.c_double}

Kernel = Callable[..., None]


def find(name: str, signature: str, tensor: Tensor) -> Kernel | None:
    """The kernel ``deltaw_<name>_<dtype>`` for tensors like this one; None: take the plain way.

    ``signature``: a letter an argument: p a tensor's address (None: a null pointer), i an int64, f a float, d a double.
    """
    if tensor.device.type != "cpu" or tensor.dtype not in _SUFFIX:
        return None
    return function(f"{name}_{_SUFFIX[tensor.dtype]}", signature)


@cache
def function(name: str, signature: str) -> Kernel | None:
    """The kernel ``deltaw_<name>``, or None where no library is loaded."""
    loaded = library()
    if loaded is None:
        return None
    kernel = getattr(loaded, f"deltaw_{name}")
    kernel.argtypes = [_ARGUMENT[letter] for letter in signature]
    kernel.restype = None
    return kernel  # type: ignore[no-any-return]


@cache
def level() -> str | None:
    """Which instruction set's kernels are used; None: none.

    Raises ``UserError`` for a level asked for in the environment that isn't built, or that this processor can't run.
    """
    wanted = os.environ.get("DELTAW_KERNELS", "")
    if wanted == "off":
        return None
    names = usable()
    if wanted and wanted not in names:
        raise UserError(f"DELTAW_KERNELS={wanted!r}: expected one of {', '.join([*names, 'off'])} on this machine")
    return wanted or next(iter(names), None)


def usable() -> tuple[str, ...]:
    """The levels that are built and that this processor runs, best first."""
    return tuple(name for name in LEVELS if _path(name).is_file() and _can_run(name))


@cache
def library() -> ctypes.CDLL | None:
    """The loaded library, on torch's threads; None where there is none for this processor."""
    name = level()
    if name is None:
        return None
    loaded = ctypes.CDLL(str(_path(name)))
    _share_threads(loaded)
    return loaded


def _path(name: str) -> Path:
    return Path(__file__).with_name(f"deltaw_{name}.so")


def _can_run(name: str) -> bool:
    if torch.backends.cpu.get_cpu_capability() != "AVX512":  # heeds ATEN_CPU_CAPABILITY, as all of torch does
        return False
    return name == "avx512" or _has_flag("avx512_bf16")


def _has_flag(flag: str) -> bool:
    try:
        return flag in Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
    except OSError:
        return False


def _share_threads(loaded: ctypes.CDLL) -> None:
    """Hand torch's OpenMP runtime to the kernels; without one that we know they run on the calling thread."""
    runtime = _openmp()
    if runtime is None:
        return
    names = ("GOMP_parallel", "omp_get_max_threads", "omp_get_thread_num", "omp_get_num_threads", "omp_in_parallel")
    try:
        addresses = [ctypes.cast(getattr(runtime, name), ctypes.c_void_p) for name in names]
    except AttributeError:
        return
    loaded.deltaw_use_threads(*addresses)


def _openmp() -> ctypes.CDLL | None:
    """The OpenMP runtime that lies in this process already: torch's own."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    paths = dict.fromkeys(line.split(maxsplit=5)[-1] for line in maps.splitlines() if ".so" in line)
    home = str(Path(torch.__file__).parent)
    found = [path for path in paths if Path(path).name.startswith(("libgomp", "libiomp5", "libomp"))]
    found.sort(key=lambda path: not path.startswith(home))
    return ctypes.CDLL(found[0]) if found else None
