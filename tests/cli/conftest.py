"""The command line on a small model, called as a function; what it sets up for a process is undone."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging as transformers_logging

from deltaw.cli import main
from deltaw.config import LoraConfig
from deltaw.data.formats import load_examples

ROWS = [
    {"messages": [{"role": "user", "content": f"Say {word}"}, {"role": "assistant", "content": word}]}
    for word in ("red", "blue", "green and white", "one two three four", "north", "south")
]


@pytest.fixture(autouse=True)
def _a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    log = logging.getLogger("deltaw")
    before = (log.handlers, log.level, log.propagate)
    verbosity, has_bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    with warnings.catch_warnings():
        yield
    log.handlers, log.level, log.propagate = before
    transformers_logging.set_verbosity(verbosity)
    if has_bars:
        transformers_logging.enable_progress_bar()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """``run("eval", "--data", …)`` → (exit code, standard output, standard error)."""

    def call(*args: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Six short chats as a JSONL file."""
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert len(load_examples(path)) == len(ROWS)
    return str(path)


@pytest.fixture(scope="session")
def adapters(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters of the small model that change what it says, in folders of one name."""
    from deltaw.adapters.peft_format import save_adapter
    from deltaw.nn.inject import inject
    from deltaw.nn.load import load_base

    out = {}
    for seed, place in enumerate(("first", "second")):
        model, _ = load_base(tiny_base, dtype="float32")
        torch.manual_seed(seed)
        config = LoraConfig(r=4, lora_alpha=200, target_modules="all-linear", init_lora_weights=False)
        inject(model, config)
        out[place] = save_adapter(model, tmp_path_factory.mktemp(place) / "my adapter (v1.0)")
    return out


@pytest.fixture
def environment() -> dict[str, str]:
    """For processes: offline, one thread."""
    return os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def only_json(text: str) -> Any:
    """Standard output, which must be one JSON value and nothing else, as strictly as JSON is meant."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture(name="only_json")
def _only_json() -> Callable[[str], Any]:
    return only_json
