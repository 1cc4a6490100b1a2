"""QLoRA on a base that ``transformers`` loads in 4 bits with bitsandbytes (pip install bitsandbytes).

python examples/qlora_bitsandbytes.py [--model FOLDER] [--data CHATS.jsonl] [--out FOLDER] [--max-steps N]
"""

import json

import torch
from embedded import arguments, chat_file, model_folder
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from deltaw import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training

args = arguments(__doc__, steps=20)
folder = model_folder(args.model, args.out)
tokenizer = AutoTokenizer.from_pretrained(folder)
quantization = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization)
model = prepare_model_for_kbit_training(model)

config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", lora_dropout=0.05, task_type="CAUSAL_LM")
model = get_peft_model(model, config)
model.print_trainable_parameters()

with open(chat_file(args.data, args.out)) as file:
    chats = [json.loads(line)["messages"] for line in file]

optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=5e-4)
model.train()
for step in range(args.max_steps):
    chat = tokenizer.apply_chat_template(chats[step % len(chats)], return_tensors="pt", return_dict=True)
    loss = model(**chat, labels=chat["input_ids"]).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step + 1}: loss {loss.item():.3f}")

model.save_pretrained(f"{args.out}/qlora")

# The adapter is merged into a base that isn't quantised: rounding the sum to 4 bits would lose most of it.
dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
merged = PeftModel.from_pretrained(dense, f"{args.out}/qlora").merge_and_unload()
merged.save_pretrained(f"{args.out}/qlora-merged")
tokenizer.save_pretrained(f"{args.out}/qlora-merged")
