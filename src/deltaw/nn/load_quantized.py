"""Loading in 4 bits without ever holding the dense model: tensor by tensor from the files into codes.

``transformers`` loads; a quantiser registered with it takes each linear layer's weight as it comes from the file, and
puts a ``QuantizedLinear`` in the layer's place. Names, conversions between checkpoints and models, ties and the report
of what is missing stay its own. Files are read by ``pread``, one tensor at a time: of a mapped file every page that was
looked at would stay resident until the last tensor is read.

What is stored in 4 bits already comes through the same door: its parts are gathered under the weight's name.

Embedding and head stay dense unless asked. A table that both share is quantised last, when nothing else is dense any
more; bitsandbytes has no such thing, so that what is saved then is for this project to read.
"""

from __future__ import annotations

import copy
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import UserError
from ..ops.nf4 import Quantized
from ..ops.quantized import Method
from .gguf import unread_tensors
from .quantized import QuantizedEmbedding, QuantizedLinear, QuantizedModule, TiedHead, quantized_modules
from .quantized_format import config_of, deserialize, grouped
from .storage import is_linear
from .walk import embedding_name, head_name

Progress = Callable[[int, int], None]
"""Told (done, total)."""

_MOST_WEIGHTS = 8
"""Weights that a byte of the files may stand for: two in 4 bits, five in GGUF's fewest."""


class _Refused(BaseException):
    """Carries an exception past transformers, which would note it down and read on to the end."""


class _Job(QuantizationConfigMixin):
    """What is to be done while a model loads; transformers takes it for a quantisation's config."""

    def __init__(
        self,
        method: Method | None,
        names: set[str],
        progress: Progress = lambda done, total: None,
    ) -> None:
        self.quant_method: Any = "deltaw"
        self.method = method
        self.names = names
        """Weights that are stored in codes from here on, or may be."""
        self.progress = progress
        self.num_done = 0

    def __deepcopy__(self, memo: object) -> _Job:
        return self  # transformers copies its configs; a screen can't be

    def take(self, name: str, value: Any, model: nn.Module) -> None:
        """Put a weight, dense or in codes, into its layer's place. Raises ``UserError`` for one that does not fit."""
        path = name.removesuffix(".weight")
        layer: Any = model.get_submodule(path)
        if isinstance(value, _Stored):
            shape = layer.weight.shape[::-1] if isinstance(layer, Conv1D) else layer.weight.shape
            quantized = deserialize(name, value.parts, shape)
        else:
            assert self.method is not None
            if value.shape != layer.weight.shape:
                has, wants = list(value.shape), list(layer.weight.shape)
                raise UserError(f"{name}: the file's is {has}, the model's layer {wants}; get a sound copy")
            quantized = quantize_named(name, value.T if isinstance(layer, Conv1D) else value, self.method)
        model.set_submodule(path, QuantizedLinear.of(layer, quantized))
        self.num_done += 1
        self.progress(self.num_done, len(self.names))


class _Take(ConversionOps):
    def __init__(self, job: _Job) -> None:
        self.job = job

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], *, model: nn.Module, missing_keys: set[str], **facts: Any
    ) -> dict[str, Any]:
        """What is left of these values for transformers to put in place."""
        left = {}
        for name, given in input_dict.items():
            value = given[0] if isinstance(given, list) else given
            if name in self.job.names and (self.job.method is not None or isinstance(value, _Stored)):
                try:
                    self.job.take(name, value, model)
                except Exception as error:
                    raise _Refused(error) from error
                missing_keys.discard(name)
            else:
                left[name] = given
        return left


@register_quantizer("deltaw")
class Quantizer(HfQuantizer):
    """Takes linear layers' weights as they come from the files."""

    requires_calibration = False
    quantization_config: _Job

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        return param_name in self.quantization_config.names

    def get_quantize_ops(self) -> ConversionOps:
        return _Take(self.quantization_config)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


class _Stored:
    """A weight's parts in the files, under its name; transformers takes it for a tensor that is still to be read."""

    def __init__(self, parts: Mapping[str, Any]) -> None:
        self.parts = parts

    def __getitem__(self, index: object) -> _Stored:
        return self

    def to(self, **kwargs: object) -> _Stored:
        return self


def load_quantized(
    files: Sequence[Path],
    config: PreTrainedConfig,
    dtype: torch.dtype,
    method: Method | None,
    *,
    head: bool = False,
    progress: Progress = lambda done, total: None,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """(model, transformers' report of what the files lacked), linear layers in 4 bits, all on the CPU.

    ``method``: how to quantise; None: the files hold codes already. ``head``: the output head as well, and the
    embedding where both are one. Raises ``UserError`` that names the tensor for one that isn't finite, or isn't what
    its layer wants.
    """
    config = copy.deepcopy(config)
    for part in (config, config.get_text_config(decoder=True)):
        part.__dict__.pop("quantization_config", None)
    bare = _bare(config, dtype)
    _check_size(bare, files)
    plain, parts = grouped(_tensors(files, bare))
    if parts and method is not None:
        raise UserError(f"{next(iter(parts))} is quantised already; load it without asking for a quantisation")
    job = _Job(method, _names(bare, method, head=head), progress)
    tensors = plain | {name: _Stored(own) for name, own in parts.items()}
    table = f"{embedding_name(bare)}.weight"
    if table in parts:  # stands in for the table until it comes; takes no memory
        tensors[table] = torch.zeros((), dtype=dtype).expand(bare.get_parameter(table).shape)
    elif left := [name for name in parts if not _is_taken(name, job.names)]:
        raise UserError(f"{left[0]}: quantised, where the model has no linear layer; get a sound copy")
    try:
        loaded: Any = type(bare).from_pretrained(
            None, config=config, state_dict=tensors, quantization_config=job, dtype=dtype, output_loading_info=True
        )
    except _Refused as refused:
        raise refused.args[0] from None
    model, report = loaded
    if table in parts:
        _put_table(model, deserialize(table, parts[table], bare.get_parameter(table).shape))
    elif head and method is not None and _is_tied(model):
        _put_table(model, quantize_named(table, model.get_parameter(table), method))
    describe(model)
    return model, report


def quantize_named(name: str, w: Tensor, method: Method) -> Quantized:
    """Raises ``UserError`` that names the tensor for one that isn't finite."""
    try:
        return method.quantize(w.detach())
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def describe(model: PreTrainedModel) -> None:
    """Say in the model's config what its layers are, as config.json shall have it."""
    stored = [m.quantized for _, m in quantized_modules(model)]
    dense = [name for name, m in model.named_modules() if is_linear(m) and not isinstance(m, QuantizedModule)]
    is_foreign = any(isinstance(m, QuantizedEmbedding) for m in model.modules())
    model.config.quantization_config = config_of(stored[0], dense, is_foreign=is_foreign) if stored else None
    quantizer: Any = model.hf_quantizer
    quantizer.quantization_config = _Job(None, set())


def _bare(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)  # type: ignore[no-any-return]


def _check_size(bare: PreTrainedModel, files: Sequence[Path]) -> None:
    """A config may describe any model: no more memory is asked for than the files can fill."""
    num_weights, num_bytes = sum(p.numel() for p in bare.parameters()), sum(path.stat().st_size for path in files)
    if num_weights > _MOST_WEIGHTS * num_bytes:
        raise UserError(
            f"{files[0].parent}: config.json describes {num_weights:,} weights, "
            f"and the files hold {num_bytes:,} bytes; get a sound copy"
        )


def _names(bare: PreTrainedModel, method: Method | None, *, head: bool) -> set[str]:
    """Weights to quantise: as bitsandbytes chooses them; of stored ones, all that may be."""
    linear = {name for name, module in bare.named_modules() if is_linear(module)}
    if method is not None:
        own_head = head_name(bare)
        dense = HfQuantizer.get_modules_to_not_convert(bare, None, list(bare._keep_in_fp32_modules or ()))
        if head and not _is_tied(bare):
            dense = [name for name in dense if name != own_head]
        linear = {name for name in linear if should_convert_module(name, dense)}
    return {f"{name}.weight" for name in linear}


def _is_taken(name: str, names: set[str]) -> bool:
    """Whether some layer may take it: files may have other prefixes than the model."""
    return any(own.endswith(name) or name.endswith(own) for own in names)


def _is_tied(model: PreTrainedModel) -> bool:
    head: Any = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _put_table(model: PreTrainedModel, quantized: Quantized) -> None:
    """The quantised table in the embedding's place, and the head that is tied to it."""
    dense: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    embedding = QuantizedEmbedding(quantized, dense)
    model.set_input_embeddings(embedding)
    model.set_output_embeddings(TiedHead(embedding, head.bias))


def _tensors(files: Sequence[Path], bare: PreTrainedModel) -> dict[str, Any]:
    """All tensors of the files by their names, still to be read."""
    out: dict[str, Any] = {}
    for path in files:
        if path.suffix == ".safetensors":
            file = safe_open(path, framework="pt", backend="pread")
            out |= {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        elif path.suffix == ".gguf":
            out |= unread_tensors(path, bare)
        else:
            out |= torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    return out
