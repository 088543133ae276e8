"""Train on preferences with TRL's DPOTrainer: python examples/04_dpo.py [MODEL] [STEPS].

The chosen answer describes the restaurant that was asked for, the rejected one describes another. The adapter that is
switched off serves as the reference model, so that memory holds one model only.
"""

import csv
import sys

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from inlay import InlayConfig, methods
from inlay.models.builtin import data_path, model_dir

name = sys.argv[1] if len(sys.argv) > 1 else str(model_dir())  # a folder or a hub id
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 10
gpu = torch.cuda.is_available()
rows = list(csv.DictReader(data_path().read_text(encoding="utf-8").splitlines()))
pairs = [
    {"prompt": row["mr"] + "\n", "chosen": row["ref"], "rejected": other["ref"]}
    for row, other in zip(rows, rows[1:] + rows[:1], strict=True)
]

trainer = DPOTrainer(
    model=AutoModelForCausalLM.from_pretrained(name),
    args=DPOConfig(
        output_dir="runs/04_dpo", max_steps=steps, per_device_train_batch_size=2, learning_rate=3e-4, max_length=256,
        logging_steps=2, save_strategy="no", report_to="none", use_cpu=not gpu, bf16=gpu, dataloader_pin_memory=gpu,
    ),
    train_dataset=Dataset.from_list(pairs),
    processing_class=AutoTokenizer.from_pretrained(name),
    peft_config=InlayConfig(method=methods.Bat(r=8), target_modules="all-linear", task_type="CAUSAL_LM"),
)  # fmt: skip
trainer.train()
trainer.save_model("runs/04_dpo")
