"""Run by ``test_peft_trainer.py`` in a process of its own: BASE OUT hidden|there OPTIONS → what was seen, as JSON.

The import of the Trainer comes after the first adapted model, as it may in a notebook, and PEFT may be hidden from it.
"""

import json
import sys
from pathlib import Path

BASE, OUT, OPTIONS = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[4])
if sys.argv[3] == "hidden":
    sys.modules["peft"] = None

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

import deltaw  # noqa: E402

SETTINGS = dict(
    num_train_epochs=2,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=3,
    learning_rate=5e-3,
    warmup_steps=1,
    logging_steps=1,
    eval_strategy="epoch",
    save_strategy="epoch",
    report_to="none",
    disable_tqdm=True,
    seed=1,
    use_cpu=True,
)
tokenizer = AutoTokenizer.from_pretrained(BASE)
tokenizer.pad_token = tokenizer.eos_token


def tokenised(i):
    chat = [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"it is {i * 7}"}]
    return tokenizer.apply_chat_template(chat, return_dict=True) | {"number": i, "note": "no model takes this column"}


def adapted():
    torch.manual_seed(0)
    targets = ["q_proj", "v_proj"]
    config = deltaw.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", **OPTIONS.get("lora", {}))
    return deltaw.get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), config)


def loaded(folder):
    return deltaw.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), folder)


data = Dataset.from_list([tokenised(i) for i in range(12)])
model, again = adapted(), adapted()

from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments  # noqa: E402


def trainer(model, out, **more):
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(out), **(SETTINGS | OPTIONS.get("args", {}) | more)),
        train_dataset=data,
        eval_dataset=data.select(range(4)),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )


whole = trainer(model, OUT / "whole")
whole.train()
files = sorted(str(p.relative_to(OUT / "whole")) for p in (OUT / "whole").rglob("*model*") if p.is_file())

trainer(again, OUT / "whole").train(resume_from_checkpoint=str(OUT / "whole" / "checkpoint-2"))
pairs = zip(*(deltaw.get_peft_model_state_dict(m).values() for m in (model, again)), strict=True)
gap = max(float((a - b).abs().max()) for a, b in pairs)

best = None
if not OPTIONS:
    best = trainer(adapted(), OUT / "best", load_best_model_at_end=True)
    best.train()

model.save_pretrained(OUT / "saved")
ids = torch.tensor([data[0]["input_ids"]])
with torch.no_grad():
    logits = model.eval().get_base_model()(input_ids=ids).logits  # the Trainer left autocast on the wrapper
    apart = float((loaded(OUT / "saved")(input_ids=ids).logits - logits).abs().max() / logits.abs().max())

seen = {
    "peft": sys.modules.get("peft") is not None,
    "steps": whole.state.global_step,
    "losses": [event["eval_loss"] for event in whole.state.log_history if "eval_loss" in event],
    "files": files,
    "gap": gap,
    "apart": apart,
    "moved": max(float(p.abs().max()) for n, p in model.named_parameters() if n.endswith("lora_B")),
    "best": best is not None and best.state.best_model_checkpoint is not None,
    "checkpoint": type(loaded(OUT / "whole" / "checkpoint-4")).__name__,
}
print(json.dumps(seen))
