"""The package as others get it: built, installed into an empty environment, and used from elsewhere.

The environment is empty but for a path to this one's packages, added last, so that nothing is fetched.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from deltaw import kernels

ROOT = Path(__file__).parents[1]
HERE = Path(sysconfig.get_path("purelib"))
NO_COMPILER = {"CC": "/bin/false", "CXX": "/bin/false"}
LIBRARIES = {f"deltaw/kernels/deltaw_{level}.so" for level in kernels.LEVELS}
can_build = sys.platform == "linux" and shutil.which("c++") is not None and os.uname().machine == "x86_64"
needs_compiler = pytest.mark.skipif(not can_build, reason="no compiler, or no kernels for this processor")
pytestmark = pytest.mark.slow

SMOKE = """
import sys, torch, deltaw
from deltaw import kernels
from transformers import LlamaConfig, LlamaForCausalLM
assert sys.argv[1] in deltaw.__file__, deltaw.__file__
assert (kernels.level() is not None) == (sys.argv[2] == "kernels"), kernels.level()
config = LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
model = deltaw.get_peft_model(LlamaForCausalLM(config), deltaw.LoraConfig(r=2, target_modules="all-linear"))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
ids = torch.arange(3, 30)[None]
losses = []
for _ in range(3):
    losses.append(model(input_ids=ids, labels=ids).loss)
    losses[-1].backward()
    optimizer.step()
    optimizer.zero_grad()
assert losses[-1] < losses[0]
"""


def _run(*command, cwd, **environment):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "DELTAW"))} | environment
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, capture_output=True, text=True, timeout=400, env=env, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def _build(tree, kind, **environment):
    """The one file that is built; ``kind``: wheel or sdist."""
    out = tree / "dist"
    shutil.rmtree(out, ignore_errors=True)
    _run(sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "-o", out, cwd=tree, **environment)
    (built,) = out.iterdir()
    return built


def _environment(path, *packages):
    """An environment of its own with these installed (pip's arguments), and then a way to this one's packages."""
    _run(sys.executable, "-m", "venv", "--without-pip", path, cwd=path.parent)
    python = path / "bin" / "python"
    site = Path(_run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=path).strip())
    tools = path / "tools"  # what builds an editable package, and no deltaw of this environment
    tools.mkdir()
    for tool in [*HERE.glob("setuptools*"), *HERE.glob("_distutils_hack")]:
        (tools / tool.name).symlink_to(tool)
    (site / "tools.pth").write_text(f"{tools}\n")
    install = ["install", "-q", "--no-index", "--no-deps", "--no-build-isolation", *packages]
    _run(sys.executable, "-m", "pip", "--python", python, *install, cwd=path)
    (site / "z_packages.pth").write_text(f"{HERE}\n")
    return python


def _smoke(python, where, has_kernels, cwd):
    offline = dict(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    _run(python, "-c", SMOKE, where, "kernels" if has_kernels else "plain", cwd=cwd, **offline)
    assert "usage" in _run(python.with_name("deltaw"), "--help", cwd=cwd, **offline).lower()


@pytest.fixture
def tree(tmp_path):
    """The sources without anything that was built."""
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "src", tree / "src", ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    return tree


@needs_compiler
def test_a_wheel_has_the_kernels_and_works_elsewhere(tree, tmp_path):
    wheel = _build(tree, "wheel")
    assert wheel.name.endswith("-py3-none-linux_x86_64.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if name.endswith(".so")} == LIBRARIES
    assert not any("csrc" in name for name in names)  # nothing is compiled where it is used
    _smoke(_environment(tmp_path / "venv", wheel), str(tmp_path / "venv"), bool(kernels.usable()), tmp_path)


def test_a_wheel_without_a_compiler_is_plain_python(tree, tmp_path):
    """Also where an earlier build has left its libraries lying about."""
    if can_build:
        _build(tree, "wheel")
        assert list(tree.glob("build/lib*/deltaw/kernels/*.so"))
    wheel = _build(tree, "wheel", **NO_COMPILER)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not any(name.endswith(".so") for name in zipfile.ZipFile(wheel).namelist())
    _smoke(_environment(tmp_path / "venv", wheel), str(tmp_path / "venv"), False, tmp_path)


@needs_compiler
def test_the_source_archive_has_what_a_wheel_is_built_from(tree, tmp_path):
    with tarfile.open(_build(tree, "sdist")) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    sources = {path.name for path in (ROOT / "src/deltaw/kernels/csrc").iterdir()}
    assert {path.name for path in (unpacked / "src/deltaw/kernels/csrc").iterdir()} == sources
    assert not list(unpacked.rglob("*.so"))
    assert set(zipfile.ZipFile(_build(unpacked, "wheel")).namelist()) >= LIBRARIES


@pytest.mark.parametrize("compiler", [pytest.param(True, marks=needs_compiler), False])
def test_an_editable_install_has_the_kernels_beside_the_source(tree, tmp_path, compiler):
    """As ``make setup`` installs it; libraries of older sources never stay."""
    (tree / "src/deltaw/kernels/deltaw_avx512.so").write_bytes(b"old")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ({} if compiler else NO_COMPILER).items():
            patch.setenv(name, value)
        python = _environment(tmp_path / "venv", "-e", tree)
    built = {path.relative_to(tree / "src").as_posix() for path in tree.rglob("src/deltaw/kernels/*.so")}
    assert built == (LIBRARIES if compiler else set())
    _smoke(python, str(tree), compiler and bool(kernels.usable()), tmp_path)
