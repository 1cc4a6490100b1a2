"""The paged optimiser: the numbers of the plain one, in memory that may be taken away."""

import dataclasses
import errno
import mmap
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from deltaw.errors import UserError
from deltaw.train.optim import AdamW
from deltaw.train.paged import CudaPagedAdamW, PagedAdamW, make_optimizer
from deltaw.train.run import run_training

PAGE_OUT = 21
"""MADV_PAGEOUT (Linux 5.4), which Python has no name for."""


def parameters(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    shapes = {"x.lora_A": (4, 33), "x.lora_B": (65, 4), "norm": (7,), "never": (3, 3)}
    made = {name: nn.Parameter(torch.randn(*shape, generator=g).to(dtype)) for name, shape in shapes.items()}
    made["turned"] = nn.Parameter(torch.randn(5, 6, generator=g).to(dtype).T)
    return made


def advance(optimizer, weights, steps, *, between=lambda: None):
    """So many steps with gradients that depend on the step alone, clipped where they are long."""
    for step in steps:
        g = torch.Generator().manual_seed(step)
        for name, p in weights.items():
            if name != "never":
                p.grad = torch.randn(p.shape, generator=g).to(p.dtype)
        optimizer.clip(3.0)
        optimizer.step(0.01 / (step + 1))
        between()


def assert_same(one, other):
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("given", [dict(weight_decay=0.0), dict(weight_decay=0.1, b_ratio=16.0)], ids=str)
def test_equals_plain_adamw_bit_for_bit(dtype, given, tmp_path):
    ours, theirs = parameters(dtype), parameters(dtype)
    paged, plain = PagedAdamW(ours, folder=tmp_path, **given), AdamW(theirs, **given)
    advance(paged, ours, range(6))
    advance(plain, theirs, range(6))
    assert_same(ours, theirs)
    assert_same(paged.state(), plain.state())
    assert not torch.equal(ours["norm"], parameters(dtype)["norm"]) and "never/exp_avg" not in paged.state()


def test_what_has_left_memory_comes_back_as_it_was(tmp_path):
    def resident() -> int:
        """Kilobytes of the file that are in memory now."""
        text = Path("/proc/self/smaps").read_text()
        parts = [part for part in text.split("VmFlags") if str(tmp_path) in part]
        return sum(int(part.split("Rss:")[1].split()[0]) for part in parts)

    def push_out():
        paged._pages.flush()
        paged._pages.madvise(PAGE_OUT)

    def weights():
        return {"w": nn.Parameter(torch.ones(500, 1000))}

    ours, theirs = weights(), weights()
    paged = PagedAdamW(ours, folder=tmp_path, weight_decay=0.1)
    try:
        push_out()
        advance(paged, ours, range(1))
        before = resident()
        push_out()
    except (OSError, FileNotFoundError) as error:
        pytest.skip(f"pages can't be pushed out here: {error}")
    if resident() > before / 2:
        pytest.skip("this file system keeps pages in memory")
    assert before >= 3900
    advance(paged, ours, range(1, 4), between=push_out)
    advance(AdamW(theirs, weight_decay=0.1), theirs, range(4))
    assert_same(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kinds", [("paged-adamw", "adamw"), ("adamw", "paged-adamw"), ("paged-adamw",) * 2], ids=str)
def test_one_goes_on_where_the_other_stopped(kinds, dtype, tmp_path):
    def made(kind, weights):
        return make_optimizer(kind, weights, folder=tmp_path, weight_decay=0.1, b_ratio=4.0)

    whole, first, second = (parameters(dtype) for _ in range(3))
    advance(AdamW(whole, weight_decay=0.1, b_ratio=4.0), whole, range(6))
    one, two = made(kinds[0], first), made(kinds[1], second)
    advance(one, first, range(3))
    for name, p in second.items():
        p.data.copy_(first[name])
    two.load_state({name: value.clone() for name, value in one.state().items()})
    advance(two, second, range(3, 6))
    assert_same(whole, second)
    with pytest.raises(KeyError):
        two.load_state({"other/exp_avg": torch.zeros(3)})
    with pytest.raises(RuntimeError):
        two.load_state({"norm/exp_avg": torch.zeros(8)})


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(dict(loraplus_lr_ratio=4.0, weight_decay=0.1, lora_dropout=0.1, max_grad_norm=0.1), id="lora"),
        pytest.param(dict(full=True, dtype="bfloat16", learning_rate=1e-4), id="full in bfloat16"),
    ],
)
@pytest.mark.parametrize(("first", "then"), [("adamw", "paged-adamw"), ("paged-adamw", "adamw")])
def test_whole_runs_are_equal_and_resume_each_other(options, tmp_path, run_until, given, first, then):
    plain, parts = options(out=tmp_path / "plain", **given), options(out=tmp_path / "parts", optimizer=first, **given)
    run_training(plain)
    run_until(parts, 3)
    assert run_training(dataclasses.replace(parts, optimizer=then, resume=True))["status"] == "done"
    weights = "model.safetensors" if given.get("full") else "adapter_model.safetensors"
    for name in (weights, "checkpoints/step-00000006/optimizer.safetensors"):
        assert_same(load_file(plain.out / name), load_file(parts.out / name))


_LIMITED = """
import gc, resource, sys
import torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from deltaw.train.paged import make_optimizer

kind, folder = sys.argv[1], Path(sys.argv[2])
weights = {str(i): torch.nn.Parameter(torch.ones(2**21)) for i in range(4)}  # 32 MiB, and as much in gradients

def step(optimizer):
    for p in weights.values():
        p.grad.fill_(0.5)
    grads = [p.grad for p in weights.values()]
    optimizer.clip(1.0)
    optimizer.step(1e-3)
    for p, grad in zip(weights.values(), grads):
        p.grad = grad

for p in weights.values():
    p.grad = torch.ones_like(p)
small = {"w": torch.nn.Parameter(torch.ones(2))}
small["w"].grad = torch.ones(2)
warm = make_optimizer("adamw", small, folder=folder, weight_decay=0.1, b_ratio=1.0)
warm.clip(1.0), warm.step(1e-3)  # whatever torch asks for once
gc.collect()
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")) * 1024
limit = used + 40 * 2**20  # the moments are 64 MiB
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
try:
    torch.ones(2**24 + 2**20)
    print("no limit")
    raise SystemExit
except RuntimeError:
    pass
optimizer = make_optimizer(kind, weights, folder=folder, weight_decay=0.1, b_ratio=1.0)
for _ in range(3):
    step(optimizer)
save_file(optimizer.state(), folder / "state.safetensors")
print("survived", float(weights["3"][-1].detach()), float(optimizer.state()["3/exp_avg"][-1]))
"""


def _limited(kind: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Three steps in a process that may take 40 MiB more, of an optimiser with 64 MiB of moments."""
    command = [sys.executable, "-c", _LIMITED, kind, str(folder)]
    out = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    if "no limit" in out.stdout or not sys.platform.startswith("linux"):
        pytest.skip("this system sets no limit on a process's data (RLIMIT_DATA)")
    return out


def test_survives_a_limit_under_which_the_plain_one_dies(tmp_path):
    plain = _limited("adamw", tmp_path)
    assert plain.returncode == 1 and "can't allocate memory" in plain.stderr, plain
    paged = _limited("paged-adamw", tmp_path)
    assert paged.stdout.startswith("survived"), paged.stderr
    weights = {"3": nn.Parameter(torch.ones(1))}
    plain = AdamW(weights, weight_decay=0.1)
    for _ in range(3):
        weights["3"].grad = torch.full((1,), 0.5)
        for p in weights.values():  # clipped to length 1 over 2²³ equal entries
            p.grad.fill_(2**-11.5)
        plain.step(1e-3)
    assert float(paged.stdout.split()[1]) == pytest.approx(weights["3"].item(), rel=1e-5)
    stored = load_file(tmp_path / "state.safetensors")
    assert len(stored) == 12 and float(stored["3/exp_avg"][-1]) == float(paged.stdout.split()[2])


@pytest.mark.parametrize("killed", [False, True])
def test_nothing_is_left_behind(tmp_path, killed):
    code = (
        "import os, signal, sys, torch\n"
        "from pathlib import Path\n"
        "from deltaw.train.paged import PagedAdamW\n"
        "w = {'w': torch.nn.Parameter(torch.ones(1000))}\n"
        "optimizer = PagedAdamW(w, folder=Path(sys.argv[1]), weight_decay=0.0)\n"
        "assert not os.listdir(sys.argv[1])\n"
        "if sys.argv[2] == 'True': os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path), str(killed)], check=False, timeout=120)
    assert done.returncode == (-9 if killed else 0) and not list(tmp_path.iterdir())


def test_a_full_disk_is_said_before_training(options, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    given = options(optimizer="paged-adamw")
    with pytest.raises(UserError, match=r"--optimizer paged-adamw: .* has no room for 0 MB.*No space left.*--out"):
        run_training(given)
    assert not given.out.exists()


def test_more_than_the_disk_has(tmp_path):
    free = os.statvfs(tmp_path)
    weights = {"w": nn.Parameter(torch.empty(1).expand(free.f_bavail * free.f_frsize // 4))}
    with pytest.raises(UserError, match="has no room for"):
        PagedAdamW(weights, folder=tmp_path, weight_decay=0.0)
    assert os.statvfs(tmp_path).f_bavail > 0.9 * free.f_bavail


@pytest.mark.parametrize("error", [AttributeError(), OSError(errno.EOPNOTSUPP, "no")], ids=["macOS", "not supported"])
def test_where_space_can_t_be_claimed_it_is_compared(tmp_path, monkeypatch, error):
    def refuse(*_):
        raise error

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    ours, theirs = parameters(), parameters()
    advance(PagedAdamW(ours, folder=tmp_path / "not" / "there", weight_decay=0.1), ours, range(2))
    advance(AdamW(theirs, weight_decay=0.1), theirs, range(2))
    assert_same(ours, theirs)
    monkeypatch.setattr(os, "fstatvfs", lambda _: os.statvfs_result((1, 1, 100, 0, 0, 0, 0, 0, 0, 0)))
    with pytest.raises(UserError, match="No space left"):
        PagedAdamW(parameters(), folder=tmp_path, weight_decay=0.1)


def test_without_a_folder_pages_go_where_temporary_files_do(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    optimizer = PagedAdamW(parameters(), weight_decay=0.0)
    assert isinstance(optimizer._pages, mmap.mmap) and str(tmp_path) in Path("/proc/self/maps").read_text()


def test_bitsandbytes_state_goes_by_torch_s_names(monkeypatch):
    """Its paged class needs CUDA's memory; the unpaged one steps on the CPU and keeps the same state."""
    import bitsandbytes.optim

    monkeypatch.setattr(bitsandbytes.optim, "PagedAdamW32bit", bitsandbytes.optim.AdamW32bit)
    whole, first, second = (parameters() for _ in range(3))
    for weights in (whole, first, second):
        del weights["turned"]  # bitsandbytes steps wrongly over weights that aren't contiguous
    advance(AdamW(whole, weight_decay=0.1, b_ratio=4.0), whole, range(6))
    one = CudaPagedAdamW(first, weight_decay=0.1, b_ratio=4.0)
    advance(one, first, range(3))
    two = CudaPagedAdamW(second, weight_decay=0.1, b_ratio=4.0)
    for name, p in second.items():
        p.data.copy_(first[name])
    two.load_state({name: value.clone() for name, value in one.state().items()})
    advance(two, second, range(3, 6))
    for name, p in whole.items():
        torch.testing.assert_close(second[name], p, rtol=1e-5, atol=1e-6)
    assert float(two.state()["norm/step"]) == 6 and two.state().keys() == one.state().keys()


def test_cuda_without_bitsandbytes_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match="pip install bitsandbytes, or --optimizer adamw"):
        make_optimizer("paged-adamw", {"w": nn.Parameter(torch.ones(1, device="meta"))}, folder=None,
                       weight_decay=0.0, b_ratio=1.0)  # fmt: skip
