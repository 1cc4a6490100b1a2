"""Builds the kernels of ``src/deltaw/kernels/csrc`` where a C++ compiler is, once for each instruction set.

Everything else about the package stands in pyproject.toml. The kernels are optional: without a compiler, or on a
processor that none of them suits, the package is plain Python and runs on torch's own operations.
"""

from __future__ import annotations

import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

KERNELS = Path("src/deltaw/kernels")
LEVELS = {
    "x86_64": {
        "avx512bf16": ["-march=x86-64-v4", "-mavx512bf16", "-mprefer-vector-width=512"],
        "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    }
}
# Every sum has its order in the source; only what changes no result is left to the compiler.
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno"]
FLAGS += ["-fno-trapping-math", "-fno-exceptions", "-fno-rtti", "-g0", "-Wall", "-Wno-psabi"]
FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # GCC 12 says so of its own headers
LINK = ["-static-libgcc", "-Wl,-s"]


class BuildKernels(build_ext):
    """One shared library a level, with a plain C interface: nothing of Python in it, so it serves every Python."""

    def build_extension(self, ext: Extension) -> None:
        _remove_libraries(self._built())
        levels = LEVELS.get(platform.machine().lower().replace("amd64", "x86_64"), {})
        for level, flags in levels.items():
            try:
                self._build_level(ext, level, flags)
            except (CompileError, LinkError) as error:  # an older compiler may know one instruction set and not another
                self.warn(f"no kernels for {level}: {error}")

    def _build_level(self, ext: Extension, level: str, flags: list[str]) -> None:
        folder = f"{self.build_temp}/{level}"
        objects = self.compiler.compile(
            ext.sources, output_dir=folder, depends=ext.depends, extra_postargs=FLAGS + flags
        )
        self.compiler.link_shared_object(objects, str(self._built() / f"deltaw_{level}.so"), extra_postargs=LINK)

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path("deltaw/kernels/kernels.so"))

    def get_outputs(self) -> list[str]:
        return [str(path) for path in self._built().glob("deltaw_*.so")]

    def copy_extensions_to_source(self) -> None:
        """For an editable install the libraries lie beside the source."""
        _remove_libraries(KERNELS)
        for path in self.get_outputs():
            self.copy_file(path, str(KERNELS))

    def _built(self) -> Path:
        return Path(self.build_lib, "deltaw", "kernels")


def _remove_libraries(folder: Path) -> None:
    """Those of older sources would be called with this source's arguments: where compiling fails, better none."""
    for path in folder.glob("deltaw_*.so"):
        path.unlink()


class PlatformWheel(bdist_wheel):
    """Kernels depend on the processor and the C library, not on the version of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        *_, tag = super().get_tag()
        has_kernels = any(Path(self.bdist_dir).rglob("deltaw_*.so"))  # what was put together for this wheel, no other
        return "py3", "none", tag if has_kernels else "any"


sources = sorted(str(path) for path in (KERNELS / "csrc").glob("*.cpp"))
headers = sorted(str(path) for path in (KERNELS / "csrc").glob("*.h"))
setup(
    ext_modules=[Extension("deltaw.kernels", sources=sources, depends=headers, optional=True)],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
)
