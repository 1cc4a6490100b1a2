"""``transformers``' own Trainer over our ``PeftModel``: checkpoints hold the adapter alone and can be resumed from.

Each case runs in a process of its own, with PEFT there and with PEFT hidden: the Trainer asks for PEFT's class when
it is imported, and never again.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CASE = Path(__file__).parent / "peft_trainer_case.py"


def run(base: Path, out: Path, peft: str, **options: object) -> dict:
    command = [sys.executable, CASE, base, out, peft, json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("peft", ["hidden", "there"])
def test_checkpoints_hold_the_adapter_alone_and_resume(tiny_base, tmp_path, peft):
    seen = run(tiny_base, tmp_path, peft)
    assert seen["peft"] is (peft == "there")
    assert seen["steps"] == 4 and len(seen["losses"]) == 2 and seen["losses"][1] < seen["losses"][0]
    assert seen["files"] == ["checkpoint-2/adapter_model.safetensors", "checkpoint-4/adapter_model.safetensors"]
    assert seen["moved"] > 0 and seen["gap"] == 0
    assert seen["apart"] == 0 and seen["best"]
    assert seen["checkpoint"] == "PeftModelForCausalLM"


def test_under_autocast_with_checkpointing_and_a_start_that_is_not_zero(tiny_base, tmp_path):
    args = {"bf16": True, "gradient_checkpointing": True, "label_smoothing_factor": 0.1}
    seen = run(tiny_base, tmp_path, "hidden", args=args, lora={"init_lora_weights": "pissa"})
    assert seen["losses"][1] < seen["losses"][0] and seen["gap"] == 0
    assert seen["apart"] < 1e-5
