"""Train LaMDA with transformers' Trainer: python examples/02_trainer.py [MODEL] [STEPS].

LaMDA freezes a part of what it trains on the way. The callback `Schedule` does that at the right steps; methods that
train the same tensors from beginning to end need no callback.
"""

import csv
import sys

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from inlay import InlayConfig, Schedule, methods
from inlay.models.builtin import data_path, model_dir

name = sys.argv[1] if len(sys.argv) > 1 else str(model_dir())  # a folder or a hub id
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 30
gpu = torch.cuda.is_available()
rows = list(csv.DictReader(data_path().read_text(encoding="utf-8").splitlines()))

tokenizer = AutoTokenizer.from_pretrained(name)


def example(row: dict[str, str]) -> dict[str, list[int]]:
    """Return the tokens of one row, of which the answer alone is learned."""
    prompt = tokenizer(row["mr"] + "\n").input_ids
    answer = tokenizer(row["ref"] + tokenizer.eos_token, add_special_tokens=False).input_ids
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


base = AutoModelForCausalLM.from_pretrained(name)
config = InlayConfig(method=methods.LaMDA(r=8), target_modules="all-linear", task_type="CAUSAL_LM")
trainer = Trainer(
    get_peft_model(base, config),
    TrainingArguments(
        output_dir="runs/02_trainer", max_steps=steps, per_device_train_batch_size=2, learning_rate=1.5e-3,
        logging_steps=5, save_strategy="no", report_to="none", weight_decay=0.0,
        use_cpu=not gpu, dataloader_pin_memory=gpu,
    ),
    train_dataset=[example(row) for row in rows],
    data_collator=DataCollatorForSeq2Seq(tokenizer),
    callbacks=[Schedule()],
)  # fmt: skip
trainer.train()
trainer.model.save_pretrained("runs/02_trainer")
