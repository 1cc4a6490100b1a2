"""Which kernels are loaded, on whose threads; that they keep to their memory, and give the same bits on any threads."""

import ctypes
import mmap
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from deltaw import kernels
from deltaw.errors import UserError
from deltaw.ops import nf4
from deltaw.ops.adapted import Projection, Segment, adapted_group
from deltaw.ops.dropout import DropoutKey, kept
from deltaw.ops.frozen import DenseWeight
from deltaw.ops.gate import gate, gate_backward
from deltaw.ops.loss import _to_gradient, frozen_cross_entropy
from deltaw.ops.norm import RmsNorm, rms_norm
from deltaw.ops.quantized import multiply
from deltaw.ops.rotary import _rotate, rotary
from deltaw.ops.source import Normed

PAGE = mmap.PAGESIZE
needs_kernels = pytest.mark.skipif(not kernels.usable(), reason="no kernels for this processor, or none built")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def _choose(monkeypatch, value):
    monkeypatch.setenv("DELTAW_KERNELS", value)
    for choice in (kernels.level, kernels.library, kernels.function):
        choice.cache_clear()


@pytest.fixture(autouse=True)
def _fresh():
    yield
    for choice in (kernels.level, kernels.library, kernels.function):
        choice.cache_clear()


# --- which are loaded ---


@pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("c++") is None or not sys.platform.startswith("linux"),
    reason="nothing to compile with, or for",
)
def test_all_levels_are_built_where_a_compiler_is():
    assert all(kernels._path(name).is_file() for name in kernels.LEVELS)


def test_the_best_one_is_taken_unless_another_is_asked_for(monkeypatch):
    for value, expected in [
        ("", next(iter(kernels.usable()), None)),
        ("off", None),
        *((n, n) for n in kernels.usable()),
    ]:
        _choose(monkeypatch, value)
        assert kernels.level() == expected
        assert (kernels.library() is None) == (kernels.function("gate_f32", "pppii") is None) == (expected is None)


@pytest.mark.parametrize("value", ["avx9", "OFF", "0"])
def test_an_unknown_level_is_refused_by_name(monkeypatch, value):
    _choose(monkeypatch, value)
    with pytest.raises(UserError, match=f"DELTAW_KERNELS='{value}': expected one of .*off on this machine"):
        kernels.level()


def test_a_level_that_this_processor_does_not_have(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    _choose(monkeypatch, "")
    assert kernels.usable() == () and kernels.level() is None
    _choose(monkeypatch, "avx512")
    with pytest.raises(UserError, match="expected one of off on this machine"):
        kernels.level()


def test_a_package_without_libraries_is_plain_python(monkeypatch, tmp_path):
    monkeypatch.setattr(kernels, "_path", lambda name: tmp_path / f"deltaw_{name}.so")
    _choose(monkeypatch, "")
    assert kernels.level() is None and kernels.find("gate", "pppii", torch.zeros(1)) is None
    assert torch.equal(gate(torch.zeros(3), torch.ones(3), "silu"), torch.zeros(3))


@needs_kernels
def test_who_has_a_kernel():
    for dtype in (torch.float32, torch.bfloat16):
        assert kernels.find("gate", "pppii", torch.zeros(1, dtype=dtype)) is not None
    for dtype in (torch.float16, torch.float64, torch.int64):
        assert kernels.find("gate", "pppii", torch.zeros(1, dtype=dtype)) is None
    assert kernels.find("gate", "pppii", torch.zeros(1, device="meta")) is None


@needs_kernels
def test_one_openmp_runtime_in_the_process():
    """A second pool of threads would spin against torch's. In a process of its own: other packages bring theirs."""
    code = (
        "import torch; from deltaw import kernels; from deltaw.ops.gate import gate; "
        "gate(torch.randn(512, 512), torch.randn(512, 512), 'silu'); assert kernels.level(); "
        "names = ('libgomp', 'libomp', 'libiomp'); "
        "print({l.split()[-1] for l in open('/proc/self/maps') if any(n in l for n in names)})"
    )
    env = os.environ | {"OMP_NUM_THREADS": "2"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True, env=env)
    paths = eval(out.stdout)
    assert len(paths) == 1 and Path(torch.__file__).parent in Path(next(iter(paths))).parents


# --- what they do with memory ---


class _Guarded:
    """Tensors that end, to the byte, where a page begins that nobody may touch."""

    def __init__(self):
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.mapped = []

    def __call__(self, tensor):
        size = tensor.numel() * tensor.element_size()
        pages = (size + PAGE - 1) // PAGE + 1
        memory = mmap.mmap(-1, (pages + 1) * PAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for page in (start, start + pages * PAGE):  # one in front as well
            assert self.libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), 0) == 0
        self.mapped.append((memory, start, pages))
        if not size:
            return tensor.clone()
        raw = torch.frombuffer(memory, dtype=torch.uint8, offset=pages * PAGE - size, count=size)
        return raw.view(tensor.dtype).view(tensor.shape).copy_(tensor)

    def guards_allocations(self, monkeypatch):
        """What operations allocate for their results is guarded, too."""
        monkeypatch.setattr(torch, "empty_like", lambda t, **how: self(torch.zeros(t.shape, dtype=t.dtype)))
        monkeypatch.setattr(
            torch.Tensor, "new_empty", lambda t, *s, dtype=None: self(torch.zeros(*s, dtype=dtype or t.dtype))
        )
        monkeypatch.setattr(torch, "empty", lambda *s, dtype=None, device=None: self(torch.zeros(*s, dtype=dtype)))

    def release(self):
        for _, start, pages in self.mapped:
            for page in (start, start + pages * PAGE):
                self.libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), 3)


@pytest.fixture
def guarded(monkeypatch):
    if not sys.platform.startswith("linux"):
        pytest.skip("guard pages by mprotect")
    guard = _Guarded()
    with monkeypatch.context() as patch:
        guard.guards_allocations(patch)
        yield guard
    guard.release()


def test_guard_pages_do_guard():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_kernels as t, torch; "
        "x = t._Guarded()(torch.zeros(5)); print(x.sum().item(), flush=True); "
        "import ctypes; ctypes.string_at(x.data_ptr() + int(sys.argv[2]), 1); print('read')"
    )
    for offset, dies in [(19, False), (20, True)]:
        command = [sys.executable, "-c", code, str(Path(__file__).parent), str(offset)]
        out = subprocess.run(command, capture_output=True, timeout=100, check=False)
        assert out.stdout.startswith(b"0.0") and (b"read" not in out.stdout) == dies, out.stderr[-300:]


def _rand(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@DTYPES
def test_no_kernel_touches_what_is_not_its_own(level, guarded, dtype):
    for size in (1, 2, 15, 16, 17, 31, 32, 33, 65):
        x, y, z = (guarded(_rand(3, size, dtype=dtype)) for _ in range(3))
        for norm in (
            RmsNorm(guarded(_rand(size, dtype=dtype)), 1e-5),
            RmsNorm(guarded(_rand(size, dtype=dtype)), 1e-5, True),
        ):
            _, r = norm.forward(x)
            norm.backward(y, x, guarded(r))
        for activation in ("silu", "gelu_tanh"):
            gate(x, y, activation)
            gate_backward(x, y, z, activation)
        heads = guarded(_rand(3, 2, 2 * size, dtype=dtype))
        cos, sin = (guarded(_rand(3, 2 * size, dtype=dtype)) for _ in range(2))
        for transposed in (False, True):
            _rotate(heads, cos, sin, transposed=transposed)
            _rotate(heads[:, 1:], cos, sin, transposed=transposed)
        mask = DropoutKey(1, 2).mask(0.3, "m", 5)
        bits = guarded(mask.draw(3, size))
        kept(x, bits)
        kept(x, bits, onto=y)
        targets = guarded(torch.tensor([0, size - 1, size // 2]))
        for needs_grad in (False, True):
            _to_gradient(x, targets, torch.float32, needs_grad)


@DTYPES
@pytest.mark.parametrize("double", [False, True])
def test_no_4_bit_kernel_touches_what_is_not_its_own(level, guarded, double, dtype):
    def guard(q):
        s = q.scales
        fields = dict(codes=guarded(s.codes), absmax=guarded(s.absmax), offset=s.offset) if double else None
        scales = nf4.QuantizedScales(**fields) if double else guarded(s)
        return nf4.Quantized(
            packed=guarded(q.packed), scales=scales, shape=q.shape, dtype=q.dtype, block_size=q.block_size
        )

    for size in (1, 31, 64, 65, 300):
        nf4.quantize(guarded(_rand(size, dtype=dtype)), double=double)
    for block in (32, 64, 128, 256):
        for shape in [(1, 1), (3, 5), (1, 31), (2, 33), (1, 129), (5, 250)]:
            nf4.dequantize(guard(nf4.quantize(_rand(*shape), block_size=block, double=double)), dtype)
        for rows, shape in [(1, (1, 256)), (3, (17, 256)), (8, (5, 768))]:
            q = guard(nf4.quantize(_rand(*shape), block_size=block, double=double))
            nf4.nf4_kernel.multiply(guarded(_rand(rows, shape[1], dtype=dtype)), q, nf4.codebooks("nf4"))


# --- the same bits on any threads ---


def _everything(dtype, seed=0):
    """A step's worth of kernels, large enough for several threads: results and gradients."""
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(70, 576, generator=g).to(dtype).requires_grad_()
    norm = RmsNorm(torch.randn(576, generator=g).to(dtype), 1e-5)
    heads, cos, sin = (torch.randn(*s, generator=g).to(dtype) for s in ((70, 9, 64), (70, 64), (70, 64)))
    q = nf4.quantize(torch.randn(128, 576 // 64 * 128, generator=g), double=True)
    few = torch.randn(3, 1152, generator=g).to(dtype)
    y = rms_norm(h, norm)
    z = rotary(heads, cos, sin)
    p = gate(y.detach(), h.detach(), "silu")
    parts = [y, z, p, *gate_backward(p, y.detach(), h.detach(), "gelu_tanh"), *torch.autograd.grad(y.sum(), h)]
    logits = torch.randn(40, 999, generator=g).to(dtype)
    parts += [_to_gradient(logits, torch.arange(40), torch.float32, True), logits]
    parts += [nf4.dequantize(q, dtype), multiply(few, q)]
    bits = DropoutKey(seed, 2).mask(0.3, "m", 5).draw(70, 576)
    parts += [bits, kept(h.detach(), bits), kept(h.detach(), bits, onto=p.clone())]
    return [t.detach() for t in parts]


@DTYPES
def test_threads_change_no_bit(level, dtype):
    was, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(_everything(dtype))
    finally:
        torch.set_num_threads(was)
    for other in results[1:] if level != "off" else []:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@DTYPES
def test_pythons_threads_do_not_disturb_each_other(level, dtype):
    """A kernel lets go of the interpreter: others run meanwhile, on threads of their own, with memory of their own."""
    expected = [_everything(dtype, seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda i: _everything(dtype, i % 4), range(24)))
    for i, result in enumerate(got):
        assert all(torch.equal(a, b) for a, b in zip(result, expected[i % 4], strict=True))


def test_groups_and_losses_from_many_threads(level):
    def step(seed):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(33, 128, generator=g).requires_grad_()
        a, b = (torch.randn(*s, generator=g).requires_grad_() for s in ((4, 128), (40, 4)))
        p = Projection(DenseWeight(torch.randn(40, 128, generator=g)), (Segment(slice(0, 33), a, b, 1.0),))
        y, z = adapted_group([x], Normed(RmsNorm(torch.ones(128), 1e-5)), [p, p])
        head = DenseWeight(torch.randn(50, 40, generator=g))
        loss = frozen_cross_entropy(y + z, head, torch.arange(33))
        return [loss.detach(), *torch.autograd.grad(loss, [x, a, b])]

    expected = [step(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for i, result in enumerate(pool.map(lambda i: step(i % 4), range(24))):
            assert all(torch.equal(a, b) for a, b in zip(result, expected[i % 4], strict=True))
