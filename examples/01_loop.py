"""Train an adapter in a loop of your own, with bare torch: python examples/01_loop.py [MODEL] [STEPS]."""

import csv
import sys

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from inlay import InlayConfig, methods
from inlay.models.builtin import data_path, model_dir

name = sys.argv[1] if len(sys.argv) > 1 else str(model_dir())  # a folder or a hub id
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 30
rows = list(csv.DictReader(data_path().read_text(encoding="utf-8").splitlines()))

tokenizer = AutoTokenizer.from_pretrained(name)
base = AutoModelForCausalLM.from_pretrained(name)
model = get_peft_model(base, InlayConfig(method=methods.Bone(r=8), target_modules="all-linear", task_type="CAUSAL_LM"))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4)

for step in range(steps):
    row = rows[step]
    prompt = tokenizer(row["mr"] + "\n", return_tensors="pt").input_ids
    answer = tokenizer(row["ref"] + tokenizer.eos_token, return_tensors="pt", add_special_tokens=False).input_ids
    tokens = torch.cat([prompt, answer], dim=1)
    labels = torch.cat([torch.full_like(prompt, -100), answer], dim=1)  # the loss is over the answer alone
    loss = model(input_ids=tokens, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step + 1}: loss {loss.item():.3f}")

model.save_pretrained("runs/01_loop")
