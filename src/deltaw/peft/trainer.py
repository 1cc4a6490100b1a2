"""How ``transformers``' Trainer recognises our ``PeftModel``, so that it saves adapters alone and resumes from them.

The Trainer asks ``isinstance(model, PeftModel)`` for PEFT's class. Where PEFT is loaded, ``PeftModel.__class__``
answers that. Where PEFT isn't installed, the Trainer's two modules have no such class to ask for, and ours takes its
place under the names that they would have imported.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec

_MODULES = ("transformers.trainer_utils", "transformers.trainer")


def introduce(kind: type) -> None:
    """Make ``kind`` the Trainer's class of adapted models where PEFT isn't installed; done once, kept as it is."""
    from transformers.utils.import_utils import is_peft_available

    if is_peft_available() or find_spec("accelerate") is None:  # without accelerate there is no Trainer
        return
    for name in _MODULES:
        module = importlib.import_module(name)
        vars(module).update(PeftModel=kind, PeftMixedModel=kind, is_peft_available=lambda: True)
