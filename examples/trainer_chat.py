"""``transformers``' Trainer over a JSON lines file of chats; its checkpoints hold the adapter alone.

    python examples/trainer_chat.py [--model FOLDER] [--data CHATS.jsonl] [--out FOLDER] [--max-steps N]

Run again with the same ``--out`` and more steps, it goes on from the last checkpoint.
"""

from pathlib import Path

from datasets import load_dataset
from embedded import arguments, chat_file, model_folder
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from deltaw import LoraConfig, TaskType, get_peft_model

args = arguments(__doc__, steps=-1)
folder = model_folder(args.model, args.out)
tokenizer = AutoTokenizer.from_pretrained(folder)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", lora_dropout=0.05, task_type=TaskType.CAUSAL_LM)
model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
model.print_trainable_parameters()


def tokenised(example: dict) -> dict:
    """The template's own tokens, once, and a label for each; the collator pads both."""
    ids = tokenizer.apply_chat_template(example["messages"], truncation=True, max_length=512, return_dict=True)
    return {**ids, "labels": ids["input_ids"]}


data = load_dataset("json", data_files=chat_file(args.data, args.out), split="train").map(tokenised)
data = data.train_test_split(test_size=0.1, seed=0)

trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=f"{args.out}/trainer",
        num_train_epochs=2,
        max_steps=args.max_steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=5e-4,
        warmup_steps=2,
        logging_steps=1,
        eval_strategy="epoch",
        save_strategy="epoch",
        report_to="none",
    ),
    train_dataset=data["train"],
    eval_dataset=data["test"],
    data_collator=DataCollatorForSeq2Seq(tokenizer),
    processing_class=tokenizer,
)
trainer.train(resume_from_checkpoint=any(Path(args.out, "trainer").glob("checkpoint-*")))
print(trainer.evaluate())
model.save_pretrained(f"{args.out}/adapter")
tokenizer.save_pretrained(f"{args.out}/adapter")
