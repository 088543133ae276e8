"""Train on a base in 4 bits with TRL's SFTTrainer: python examples/03_sft_4bit.py [MODEL] [STEPS].

It needs bitsandbytes: pip install 'inlay[quantized]'.
"""

import csv
import sys

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

from inlay import InlayConfig, methods
from inlay.models.builtin import data_path, model_dir

name = sys.argv[1] if len(sys.argv) > 1 else str(model_dir())  # a folder or a hub id
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 20
gpu = torch.cuda.is_available()
rows = list(csv.DictReader(data_path().read_text(encoding="utf-8").splitlines()))

four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
trainer = SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained(name, quantization_config=four_bits, dtype=torch.bfloat16),
    args=SFTConfig(
        output_dir="runs/03_sft_4bit", max_steps=steps, per_device_train_batch_size=2, learning_rate=5e-4,
        max_length=256, logging_steps=5, save_strategy="no", report_to="none",
        use_cpu=not gpu, bf16=gpu, dataloader_pin_memory=gpu,
    ),
    train_dataset=Dataset.from_list([{"prompt": row["mr"] + "\n", "completion": row["ref"]} for row in rows]),
    processing_class=AutoTokenizer.from_pretrained(name),
    peft_config=InlayConfig(method=methods.PiSSA(r=8), target_modules="all-linear", task_type="CAUSAL_LM"),
)  # fmt: skip
trainer.train()
trainer.save_model("runs/03_sft_4bit")
