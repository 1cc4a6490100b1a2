"""Whole runs from a start that is not zero: step 0 is the base, and what is written fits the base as it was."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from deltaw.adapters.peft_format import load_adapter
from deltaw.nn.load import load_base
from deltaw.nn.walk import adapted_layers
from deltaw.train.prepare import prepare
from deltaw.train.run import make_job, run_training

IDS = torch.arange(3, 12)[None]


@pytest.mark.parametrize("start", ["pissa", "olora", "loftq", "orthogonal", "eva"])
def test_what_is_written_is_read_by_peft_on_the_untouched_base(options, tiny_base, start):
    import peft

    given = options(init_lora_weights=start, use_rslora=True)
    untouched = load_base(str(tiny_base), dtype="float32")[0](IDS).logits
    job = make_job(given, prepare(given))
    torch.testing.assert_close(job.language_model.model(IDS).logits, untouched, rtol=0, atol=1e-5)

    summary = run_training(given)
    assert summary["eval_loss_after"] < summary["eval_loss_before"]
    ours, _ = load_base(str(tiny_base), dtype="float32")
    load_adapter(ours, given.out)
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32), given.out
    )
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ours(IDS).logits, untouched, atol=1e-3)
    written = json.loads((given.out / "adapter_config.json").read_text())
    assert (written["init_lora_weights"], written["eva_config"], written["loftq_config"]) == (True, None, {})
    assert written["r"] == (8 if start in ("pissa", "olora", "loftq") else 4)


def test_eva_shares_the_same_ranks_out_and_may_leave_layers_without_any(options):
    given = options(init_lora_weights="eva", r=4)
    model = make_job(given, prepare(given)).language_model.model
    ranks = [layer.adapter("default").rank for _, layer in adapted_layers(model)]
    assert sum(ranks) == 4 * 14 and len(set(ranks)) > 1 and max(ranks) <= 8
