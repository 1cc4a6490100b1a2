"""``AutoPeftModel…``: an adapter's folder or hub id alone; the base is the one that its config names."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from torch import nn

from ..config import LoraConfig, TaskType
from ..errors import UserError
from ..nn.load import load_base
from ..nn.locate import EMBEDDED, first_line
from . import stored
from .model import PeftModel, class_of


class AutoPeftModel:
    """The base's class stands in the config (``auto_mapping``), among ``transformers``' classes."""

    task: ClassVar[TaskType | None] = None
    base: ClassVar[Any] = None
    """``transformers``' class that loads the base."""

    def __init__(self) -> None:
        raise UserError(f"{type(self).__name__} is only used as {type(self).__name__}.from_pretrained(adapter)")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: LoraConfig | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load the base that the adapter's config names, put the adapter into it, and wrap it.

        A tokenizer beside the adapter that has more tokens than the base has embeddings resizes them first.
        ``kwargs`` are the base's ``from_pretrained``'s (``dtype``, ``device_map``, ``quantization_config`` …); of the
        hub's, both get ``token`` and the like, and ``revision`` is the adapter's. Raises ``UserError`` for an adapter
        that names no base, or one of another task.
        """
        hub = {k: kwargs[k] for k in stored.HUB_OPTIONS if k in kwargs and k != "subfolder"} | {"revision": revision}
        subfolder = kwargs.pop("subfolder", None)
        adapter = stored.read(pretrained_model_name_or_path, config, subfolder=subfolder, **hub)
        if adapter.config.base_model_name_or_path is None:
            raise UserError(
                f"{pretrained_model_name_or_path}: names no base; load one and use PeftModel.from_pretrained"
            )
        model = _load(cls._base_class(adapter.config), adapter.config, kwargs)
        _resize(model, adapter.path)
        wrapped = class_of(adapter.config)(model)
        stored.load(wrapped.get_base_model(), adapter, adapter_name, is_trainable, as_float32=True)
        return wrapped if is_trainable else wrapped.eval()

    @classmethod
    def _base_class(cls, config: LoraConfig) -> Any:
        if cls.task is not None:
            if config.task_type not in (None, cls.task):
                raise UserError(f"{cls.__name__} is for {cls.task}; the adapter's task_type is {config.task_type}")
            return cls.base
        mapping = config.auto_mapping or {}
        name, library = str(mapping.get("base_model_class")), f"{mapping.get('parent_library')}."
        kind = getattr(transformers, name, None) if library.startswith("transformers.") else None
        if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
            kinds = ", ".join(c.__name__ for c in AutoPeftModel.__subclasses__())
            raise UserError(f"the adapter's config names no class of transformers for its base; use one of {kinds}")
        return kind


class AutoPeftModelForCausalLM(AutoPeftModel):
    """Decoders."""

    task, base = TaskType.CAUSAL_LM, transformers.AutoModelForCausalLM


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """Encoder-decoders."""

    task, base = TaskType.SEQ_2_SEQ_LM, transformers.AutoModelForSeq2SeqLM


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """Encoders with a classification head."""

    task, base = TaskType.SEQ_CLS, transformers.AutoModelForSequenceClassification


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """Encoders with a head on each token."""

    task, base = TaskType.TOKEN_CLS, transformers.AutoModelForTokenClassification


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """Encoders with a head over spans."""

    task, base = TaskType.QUESTION_ANS, transformers.AutoModelForQuestionAnswering


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """Encoders without a head."""

    task, base = TaskType.FEATURE_EXTRACTION, transformers.AutoModel


def _load(kind: Any, config: LoraConfig, options: dict[str, Any]) -> nn.Module:
    name = str(config.base_model_name_or_path)
    if name.lower() in EMBEDDED:
        dtype = options.pop("dtype", options.pop("torch_dtype", None)) or "auto"
        place = options.pop("device_map", None)
        place = next(iter(place.values())) if isinstance(place, dict) and len(place) == 1 else place
        place = "auto" if place is None else f"cuda:{place}" if isinstance(place, int) else place
        options.pop("low_cpu_mem_usage", None)  # how it is loaded, not what
        if options or not isinstance(place, str | torch.device):
            given = ", ".join(options) or "a device_map of several devices"
            raise UserError(f"{name} is an embedded base and takes dtype and one device only; leave {given} out")
        return load_base(name, dtype=dtype, device=place)[0]
    try:
        return kind.from_pretrained(name, revision=config.revision or "main", **options)  # type: ignore[no-any-return]
    except (OSError, ValueError) as error:
        raise UserError(f"the adapter's base {name} can't be loaded: {first_line(error)}") from None


def _resize(model: nn.Module, folder: Path) -> None:
    """Room for the tokens that a tokenizer beside the adapter has added."""
    if not (folder / "tokenizer_config.json").is_file() or not isinstance(model, transformers.PreTrainedModel):
        return
    num_tokens = len(transformers.AutoTokenizer.from_pretrained(folder))
    if num_tokens > len(model.get_input_embeddings().weight):  # type: ignore[arg-type]
        model.resize_token_embeddings(num_tokens)
