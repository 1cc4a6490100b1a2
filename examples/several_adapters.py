"""Several adapters over one base: load, switch, mix in one batch, merge one for good and save a plain model.

    python examples/several_adapters.py [--model FOLDER] [--out FOLDER]

The two adapters are made on the spot, with random weights: what they say is noise, each its own.
"""

import torch
from embedded import arguments, model_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltaw import LoraConfig, PeftModel, get_peft_model

args = arguments(__doc__, steps=0)
folder = model_folder(args.model, args.out)
tokenizer = AutoTokenizer.from_pretrained(folder)

for seed, name in enumerate(("legal", "medical")):
    torch.manual_seed(seed)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    made = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    made.save_pretrained(f"{args.out}/{name}")

base = AutoModelForCausalLM.from_pretrained(folder)
model = PeftModel.from_pretrained(base, f"{args.out}/legal", adapter_name="legal")
model.load_adapter(f"{args.out}/medical", adapter_name="medical")

inputs = tokenizer(["The capital of France is"] * 3, return_tensors="pt")


def say(**options: object) -> list[str]:
    """What the model goes on with, greedily."""
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.eos_token_id, **options)
    return tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :])


legal = say()
model.set_adapter("medical")
medical = say()
model.set_adapter("legal")
assert say() == legal
with model.disable_adapter():
    plain = say()
mixed = say(adapter_names=["legal", "medical", "__base__"])
assert mixed == [legal[0], medical[0], plain[0]]
print("legal:", legal[0], "\nmedical:", medical[0], "\nbase:", plain[0])

with torch.no_grad():
    before = model(**inputs).logits
merged = model.merge_and_unload()
merged.save_pretrained(f"{args.out}/merged")
tokenizer.save_pretrained(f"{args.out}/merged")

again = AutoModelForCausalLM.from_pretrained(f"{args.out}/merged")
with torch.no_grad():
    apart = (again(**inputs).logits - before).abs().max().item()
print(f"merged, saved and loaded: logits apart by {apart:.1e}")
assert apart < 1e-2
