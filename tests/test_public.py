"""The exported names are a promise; importing them costs nothing until one is used."""

import subprocess
import sys

import peft
import pytest

import deltaw
import deltaw.optimizers


def test_the_public_names_are_these():
    assert deltaw.__all__ == [
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
    assert dir(deltaw) == deltaw.__all__


def test_every_public_name_resolves_and_no_other():
    for name in deltaw.__all__:
        assert getattr(deltaw, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = deltaw.nonsense
    assert not hasattr(deltaw, "nonsense")
    assert deltaw.optimizers.create_loraplus_optimizer is deltaw.create_loraplus_optimizer


def test_names_that_peft_has_are_here_or_refused_by_name():
    for name in set(peft.__all__) - set(deltaw.__all__):
        kind = getattr(peft, name)
        if isinstance(kind, type) and name.endswith(("Config", "Model")):
            with pytest.raises(ImportError, match=f"deltaw has no {name}[:;]"):
                getattr(deltaw, name)
    with pytest.raises(ImportError, match="deltaw has no PromptTuningConfig: adapters are low-rank here"):
        from deltaw import PromptTuningConfig  # noqa: F401
    with pytest.raises(ImportError, match="deltaw has no get_layer_status; docs/coming-from-peft"):
        from deltaw import get_layer_status  # noqa: F401


def test_import_and_config_load_neither_torch_nor_transformers():
    script = (
        "import sys, deltaw; deltaw.LoraConfig(r=4, target_modules=['q_proj']); deltaw.UserError;"
        "print([m for m in ('torch', 'transformers', 'regex', 'huggingface_hub') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
