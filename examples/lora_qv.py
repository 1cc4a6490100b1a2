"""The shortest fine-tuning there is: LoRA on the query and value projections, a plain PyTorch loop.

python examples/lora_qv.py [--model FOLDER] [--data CHATS.jsonl] [--out FOLDER] [--max-steps N]
"""

import json

import torch
from embedded import arguments, chat_file, model_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltaw import LoraConfig, TaskType, get_peft_model

args = arguments(__doc__, steps=20)
folder = model_folder(args.model, args.out)
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)

config = LoraConfig(
    r=8,
    lora_alpha=32,
    target_modules=["q_proj", "v_proj"],
    lora_dropout=0.1,
    bias="none",
    task_type=TaskType.CAUSAL_LM,
)
model = get_peft_model(model, config)
model.print_trainable_parameters()

with open(chat_file(args.data, args.out)) as file:
    chats = [json.loads(line)["messages"] for line in file]
texts = [tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True) for chat in chats]

optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
model.train()
for step in range(args.max_steps):
    batch = texts[step % len(texts)]
    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step + 1}: loss {loss.item():.3f}")

model.save_pretrained(f"{args.out}/lora-qv")
