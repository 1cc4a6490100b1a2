"""``PeftModel`` and its classes by task over this project's functions: a thin layer that holds nothing of its own."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from ..adapters.peft_format import Receipt
from ..config import LoraConfig, TaskType
from ..errors import UserError
from ..nn import bnb
from ..nn.batch import checkpoint_context
from ..nn.inject import activate, inject
from . import stored, trainer, vocabulary
from .rows import rows
from .wrapper import LoraModel, Wrapper, unwrapped


class PeftModel(Wrapper):
    """A model with adapters, under PEFT's method names."""

    _inner = "base_model"
    heads: tuple[str, ...] = ()
    """Fresh heads that are trained whole for this class's task, by PEFT's names."""

    def __init__(self, model: nn.Module, peft_config: LoraConfig | None = None, adapter_name: str = "default") -> None:
        """Wrap a model; with a config, freeze it and put a fresh adapter into it first, in place.

        Raises ``UserError`` for targets that match nothing or can't be adapted.
        """
        super().__init__()
        model = unwrapped(model)
        bnb.keep_differentiable(model)
        if peft_config is not None:
            config = _with_heads(peft_config, model, self.heads)
            inject(model, config, adapter_name, trainable=not config.inference_mode)
        self.base_model = LoraModel(model)
        trainer.introduce(PeftModel)

    @property  # type: ignore[misc]
    def __class__(self) -> type[Any]:
        """To ``isinstance`` also PEFT's class, where PEFT is loaded: ``transformers`` and TRL ask for that one."""
        theirs = getattr(sys.modules.get("peft"), "PeftModel", None)
        return theirs if isinstance(theirs, type) else type(self)

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        return _blank, (type(self),), self.__dict__

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: LoraConfig | None = None,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = True,
        **kwargs: Any,
    ) -> PeftModel:
        """Put an adapter from a folder or hub id into the model and wrap it, by the class of its task.

        ``config`` stands in for the folder's own. The rest is as in ``load_adapter``. Raises ``UserError`` for an
        adapter that doesn't fit.
        """
        adapter = stored.read(model_id, config, **kwargs)
        kind = cls if cls is not PeftModel else class_of(adapter.config)
        wrapped = kind(model)
        stored.load(wrapped.get_base_model(), adapter, adapter_name, is_trainable, autocast_adapter_dtype)
        return wrapped if is_trainable else wrapped.eval()

    def get_base_model(self) -> nn.Module:
        model = self.base_model.model
        assert isinstance(model, nn.Module)
        return model

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The model's forward; ``adapter_names`` gives each item of the batch its adapter (``"__base__"``: none)."""
        with rows(self.get_base_model(), adapter_names):
            return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The model's ``generate``; ``adapter_names`` as in ``forward``."""
        with rows(self.get_base_model(), adapter_names):
            return self.base_model.generate(*args, **kwargs)

    def add_adapter(self, adapter_name: str, peft_config: LoraConfig) -> None:
        """Add a fresh adapter beside those there are; the active one stays active."""
        super().add_adapter(adapter_name, _with_heads(peft_config, self.get_base_model(), self.heads))

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = True,
        **kwargs: Any,
    ) -> Receipt:
        """Add a stored adapter beside those there are; the active one stays active. Returns what was applied.

        A name that is there already gets the stored values in place, as ``transformers``' Trainer wants it when it
        resumes; then the stored adapter must have its settings. Adapters keep the dtype they came in, but one that
        will train is float32 unless ``autocast_adapter_dtype`` is false. Files are memory-mapped whatever
        ``low_cpu_mem_usage`` says. Of ``kwargs``, the hub's (``subfolder``, ``revision``, ``token`` …) find the files;
        those that place a base (``device_map``, ``torch_dtype`` …) have no say: adapters go where their layers are.
        """
        model = self.get_base_model()
        adapter = stored.read(model_id, None, **kwargs)
        if adapter_name in self.peft_config:
            return stored.overwrite(model, adapter, adapter_name)
        before = self.active_adapters
        receipt = stored.load(model, adapter, adapter_name, is_trainable, autocast_adapter_dtype)
        activate(model, before)
        if not is_trainable and self.training:
            self.eval()
        return receipt

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: bool | str = "auto",
        is_main_process: bool = True,
        **kwargs: Any,
    ) -> None:
        """Write PEFT's two files; adapters other than ``default`` go into a subfolder of their name, as in PEFT.

        Where the base's vocabulary was resized, its embeddings are written with the adapter, unless
        ``save_embedding_layers`` is false. Nothing is written where ``is_main_process`` is false. Raises
        ``UserError`` for names that the model doesn't have, for ``safe_serialization=False`` and for arguments that
        aren't known.
        """
        if not safe_serialization:
            raise UserError("safe_serialization=False: adapters are written as safetensors only; leave it out")
        given = [name for name, value in kwargs.items() if value is not None]
        if given:
            raise UserError(f"save_pretrained({given[0]}=…) is not supported; leave it out")
        if not is_main_process:
            return
        for name in selected_adapters or list(self.peft_config):
            folder = Path(save_directory) if name == "default" else Path(save_directory) / name
            vocabulary.save(self.get_base_model(), folder, name, save_embedding_layers)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str = "Upload adapter",
        create_pr: bool = False,
    ) -> Any:
        """Make the hub repository where there is none, and upload what ``save_pretrained`` writes."""
        from huggingface_hub import HfApi

        hub = HfApi(token=token)
        repo_id = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return hub.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                commit_message=commit_message,
                create_pr=create_pr,
            )

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """The model's own, with recomputation that sees the ``adapter_names`` of its forward.

        With ``use_reentrant``, which needs an input that requires a gradient, the embeddings' output gets one.
        """
        checkpointing(self.get_base_model(), activation_checkpointing_kwargs, **kwargs)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """The older name of ``activation_checkpointing_enable``."""
        checkpointing(self.get_base_model(), gradient_checkpointing_kwargs, **kwargs)


class PeftModelForCausalLM(PeftModel):
    """``CAUSAL_LM``."""


class PeftModelForSeq2SeqLM(PeftModel):
    """``SEQ_2_SEQ_LM``."""


class PeftModelForSequenceClassification(PeftModel):
    """``SEQ_CLS``: the classification head trains whole."""

    heads = ("classifier", "score")


class PeftModelForTokenClassification(PeftModel):
    """``TOKEN_CLS``: the classification head trains whole."""

    heads = ("classifier", "score")


class PeftModelForQuestionAnswering(PeftModel):
    """``QUESTION_ANS``: the head over spans trains whole."""

    heads = ("qa_outputs",)


class PeftModelForFeatureExtraction(PeftModel):
    """``FEATURE_EXTRACTION``."""


_CLASSES: dict[TaskType, type[PeftModel]] = {
    TaskType.CAUSAL_LM: PeftModelForCausalLM,
    TaskType.SEQ_2_SEQ_LM: PeftModelForSeq2SeqLM,
    TaskType.SEQ_CLS: PeftModelForSequenceClassification,
    TaskType.TOKEN_CLS: PeftModelForTokenClassification,
    TaskType.QUESTION_ANS: PeftModelForQuestionAnswering,
    TaskType.FEATURE_EXTRACTION: PeftModelForFeatureExtraction,
}


def class_of(config: LoraConfig) -> type[PeftModel]:
    """The class for a config's task; the plain one where it names none."""
    return _CLASSES[TaskType(config.task_type)] if config.task_type else PeftModel


def checkpointing(model: nn.Module, options: dict[str, Any] | None, **kwargs: Any) -> None:
    """Turn on activation checkpointing of a ``transformers`` model in a way that remembers facts about the batch."""
    given = {"use_reentrant": False} | (options or {})
    if given["use_reentrant"]:
        model.enable_input_require_grads()  # type: ignore[operator]
    else:
        given.setdefault("context_fn", checkpoint_context)
    model.activation_checkpointing_enable(given, **kwargs)  # type: ignore[operator]


def _with_heads(config: LoraConfig, model: nn.Module, heads: Sequence[str]) -> LoraConfig:
    """The config with the task's fresh heads among ``modules_to_save``."""
    found = [name for name in heads if isinstance(getattr(model, name, None), nn.Module)]
    if not found:
        return config
    return dataclasses.replace(config, modules_to_save=sorted({*(config.modules_to_save or ()), *found}))


def _blank(kind: type[PeftModel]) -> PeftModel:
    """An object without content, for pickle to fill: its own way asks ``__class__``, which may name PEFT's."""
    return kind.__new__(kind)
