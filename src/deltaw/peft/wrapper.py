"""PEFT's two modules around a model, so that paths through them are PEFT's.

    PeftModel.base_model        LoraModel, as in PEFT
    PeftModel.base_model.model  the model itself, its layers adapted in place (``nn.inject``)

Everything that the two are asked and don't know (``config``, ``device``, ``get_input_embeddings`` …) is the model's.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .switching import Switching

_ABSENT = {
    "get_layer_status": "read peft_config and active_adapters",
    "get_model_status": "read peft_config and active_adapters",
    "create_or_update_model_card": "no card is written",
    "set_requires_grad": "use set_adapter with inference_mode",
    "get_prompt": "adapters are low-rank here",
    "convert_to_lora": "convert with PEFT and load the result",
    "save_as_lora": "convert with PEFT and load the result",
}
"""PEFT's methods that are not here, and what to do instead."""


class Wrapper(Switching, nn.Module):
    """A module around one other: what it doesn't know is the inner one's."""

    _inner: str

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == self._inner:  # not set yet: nn.Module's own __init__ is still running
                raise
            if name in _ABSENT:
                raise AttributeError(f"deltaw's PeftModel has no {name}: {_ABSENT[name]}") from None
            return getattr(getattr(self, self._inner), name)


class LoraModel(Wrapper):
    """What stands between PEFT's wrapper and the model, so that paths through it are PEFT's."""

    _inner = "model"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        """The adapted model itself."""

    def get_base_model(self) -> nn.Module:
        return self.model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, whichever of the wrappers was given."""
    return model.get_base_model() if isinstance(model, Wrapper) else model
