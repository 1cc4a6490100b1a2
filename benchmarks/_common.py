"""What all benchmarks share: the machine in words, results as JSON, and the tables in docs/benchmarks.md from them."""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("deltaw", "torch", "transformers", "peft", "trl", "bitsandbytes")


def describe_machine() -> dict[str, object]:
    """Processor, cores, memory, versions, the command and the day."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        "versions": versions,
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "day": datetime.date.today().isoformat(),
    }


def save(name: str, result: dict[str, object], path: Path | None = None) -> None:
    """Keep the raw figures (under ``results/`` unless a path is given) and say where."""
    path = path or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")  # an interrupted run leaves the old figures whole
    beside.write_text(json.dumps(result, indent=2) + "\n")
    beside.replace(path)
    print(f"written: {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far. (getrusage would count its parent's from before the exec.)"""
    return _status("VmHWM")


def rss_bytes() -> int:
    """Resident memory of this process now."""
    return _status("VmRSS")


def environment() -> dict[str, str]:
    """For a process beside others on the same cores: threads that wait spin briefly, then sleep; nothing is fetched."""
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "GOMP_SPINCOUNT": "20000"}
    return quiet | dict(os.environ)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
