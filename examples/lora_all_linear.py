"""LoRA on all seven projections of every layer, with answers alone supervised and B learning faster than A (LoRA+).

python examples/lora_all_linear.py [--model FOLDER] [--data CHATS.jsonl] [--out FOLDER] [--max-steps N]
"""

import json

import torch
from embedded import arguments, chat_file, model_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltaw import LoraConfig, create_loraplus_optimizer, get_peft_model

args = arguments(__doc__, steps=20)
folder = model_folder(args.model, args.out)
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)

config = LoraConfig(
    r=16,
    lora_alpha=32,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    lora_dropout=0.05,
    bias="none",
    task_type="CAUSAL_LM",
)
model = get_peft_model(model, config)
model.print_trainable_parameters()


def tokenised(chat: list[dict[str, str]]) -> dict[str, torch.Tensor]:
    """Ids of a conversation, and labels that leave out everything before the last answer."""
    ids = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)["input_ids"]
    asked = tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
    labels = ids.clone()
    labels[:, : len(asked)] = -100
    return {"input_ids": ids, "labels": labels}


with open(chat_file(args.data, args.out)) as file:
    examples = [tokenised(json.loads(line)["messages"]) for line in file]

optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=2e-4, loraplus_lr_ratio=16)
model.train()
for step in range(args.max_steps):
    loss = model(**examples[step % len(examples)]).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step + 1}: loss {loss.item():.3f}")

model.save_pretrained(f"{args.out}/lora-all-linear")
