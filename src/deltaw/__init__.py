"""deltaw: the whole life of a low-rank adapter, ΔW = (α/r)·B·A, beside a frozen base."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters.store import Store
    from .config import LoraConfig, PeftConfig, PeftType, TaskType
    from .errors import UserError
    from .nn.eva import get_eva_state_dict, initialize_lora_eva_weights
    from .nn.load import load_base
    from .peft import (
        AutoPeftModel,
        AutoPeftModelForCausalLM,
        AutoPeftModelForFeatureExtraction,
        AutoPeftModelForQuestionAnswering,
        AutoPeftModelForSeq2SeqLM,
        AutoPeftModelForSequenceClassification,
        AutoPeftModelForTokenClassification,
        LoraModel,
        PeftModel,
        PeftModelForCausalLM,
        PeftModelForFeatureExtraction,
        PeftModelForQuestionAnswering,
        PeftModelForSeq2SeqLM,
        PeftModelForSequenceClassification,
        PeftModelForTokenClassification,
        create_loraplus_optimizer,
        get_peft_model,
        get_peft_model_state_dict,
        inject_adapter_in_model,
        load_peft_weights,
        prepare_model_for_kbit_training,
        set_peft_model_state_dict,
    )
    from .settings import EvaConfig, LoftQConfig

__all__ = [
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "EvaConfig",
    "LoftQConfig",
    "LoraConfig",
    "LoraModel",
    "PeftConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "Store",
    "TaskType",
    "UserError",
    "create_loraplus_optimizer",
    "get_eva_state_dict",
    "get_peft_model",
    "get_peft_model_state_dict",
    "initialize_lora_eva_weights",
    "inject_adapter_in_model",
    "load_base",
    "load_peft_weights",
    "prepare_model_for_kbit_training",
    "set_peft_model_state_dict",
]

_HOMES = {
    "EvaConfig": ".settings",
    "LoftQConfig": ".settings",
    "LoraConfig": ".config",
    "PeftConfig": ".config",
    "PeftType": ".config",
    "Store": ".adapters.store",
    "TaskType": ".config",
    "UserError": ".errors",
    "get_eva_state_dict": ".nn.eva",
    "initialize_lora_eva_weights": ".nn.eva",
    "load_base": ".nn.load",
}
"""Where public names live that are not in ``peft``."""

_OTHER_METHODS = """
    AdaLora Adamss AdaptionPrompt BOFT Beft C3A CPT Cartridge Deft Delora FourierFT Frod Glora Gralora HRA Hira IA3
    LNTuning Lily LoHa LoKr Miss MultitaskPromptTuning OFT OSF Peanut Poly PrefixTuning PromptEncoder PromptLearning
    PromptTuning Psoft Pvera RandLora Road Shadow Shira Supertuning TinyLora TrainableTokens UniLora VBLoRA Velora Vera
    WaveFT XLora
"""
"""Methods of PEFT that aren't LoRA: their ``…Config`` and ``…Model`` are refused by name."""

_OTHER_NAMES = """
    ArrowConfig BdLoraConfig CordaConfig KasaConfig LoraGAConfig LoraRuntimeConfig MontecloraConfig PeftMixedModel
    cast_mixed_precision_params convert_to_lora create_arrow_model get_base_model_state_dict
    get_layer_status get_model_status get_peft_config preprocess_loraga replace_lora_weights_loftq save_as_lora
    set_base_model_state_dict
"""
"""What else PEFT has and this package has not."""


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: ``deltaw --help`` shall not wait for torch."""
    if name in __all__:
        return getattr(importlib.import_module(_HOMES.get(name, ".peft"), __name__), name)
    if name.removesuffix("Config").removesuffix("Model") in _OTHER_METHODS.split():
        raise ImportError(f"deltaw has no {name}: adapters are low-rank here (LoRA, rsLoRA, DoRA); use LoraConfig")
    if name in _OTHER_NAMES.split():
        raise ImportError(f"deltaw has no {name}; docs/coming-from-peft.md says what to use instead")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
