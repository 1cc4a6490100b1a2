"""Fresh adapters for a model, with PEFT's wrapper around it or without."""

from __future__ import annotations

import dataclasses

from torch import nn

from ..config import LoraConfig
from ..errors import UserError
from ..nn import bnb
from ..nn.inject import inject
from ..nn.state import state_of
from ..nn.walk import carriers
from .model import PeftModel, class_of
from .wrapper import unwrapped


def get_peft_model(
    model: nn.Module,
    peft_config: LoraConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Freeze the model, put a fresh adapter into it (in place) and wrap it.

    Fresh adapters are float32; with ``autocast_adapter_dtype=False`` they have the dtype of their layer. ``revision``
    is the base's on the hub and is noted in the config. Raises ``UserError`` for targets that match nothing, for a
    model that has adapters already, and for what PEFT's ``mixed`` and ``low_cpu_mem_usage`` would do.
    """
    if not isinstance(peft_config, LoraConfig):
        kind = f"{type(peft_config).__module__.split('.', 1)[0]}.{type(peft_config).__name__}"
        raise UserError(f"peft_config is a {kind}; expected deltaw.LoraConfig: import that one from deltaw, too")
    if state_of(unwrapped(model)).configs:
        raise UserError("the model has adapters already; use PeftModel.add_adapter, or delete them first")
    for name, value in (("mixed", mixed), ("low_cpu_mem_usage", low_cpu_mem_usage)):
        if value:
            raise UserError(f"get_peft_model({name}=True) is not supported; leave it out")
    if revision is not None:
        peft_config = dataclasses.replace(peft_config, revision=revision)
    wrapped = class_of(peft_config)(model, peft_config, adapter_name)
    if not autocast_adapter_dtype:
        for _, layer in carriers(wrapped.get_base_model()):
            dtype = next(layer.base_layer.parameters()).dtype
            if dtype.is_floating_point:
                layer.adapters.to(dtype)
    return wrapped


def inject_adapter_in_model(peft_config: LoraConfig, model: nn.Module, adapter_name: str = "default") -> nn.Module:
    """Put a fresh adapter into the model, in place, and return that model itself, without a wrapper."""
    bnb.keep_differentiable(model)
    inject(unwrapped(model), peft_config, adapter_name, trainable=not peft_config.inference_mode)
    return model
