"""The exported names are a promise; importing them costs nothing until one is used."""

import subprocess
import sys

import pytest

import deltaw


def test_the_public_names_are_these():
    assert sorted(deltaw.__all__) == [
        "LoraConfig",
        "PeftConfig",
        "PeftModel",
        "TaskType",
        "UserError",
        "get_peft_model",
        "load_base",
    ]
    assert dir(deltaw) == deltaw.__all__


def test_every_public_name_resolves_and_no_other():
    for name in deltaw.__all__:
        assert getattr(deltaw, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = deltaw.nonsense


def test_import_and_config_load_neither_torch_nor_transformers():
    script = (
        "import sys, deltaw; deltaw.LoraConfig(r=4, target_modules=['q_proj']); deltaw.UserError;"
        "print([m for m in ('torch', 'transformers', 'regex', 'huggingface_hub') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
