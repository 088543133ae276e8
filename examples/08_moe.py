"""Train the experts of a mixture-of-experts model: python examples/08_moe.py [MODEL] [STEPS].

Without MODEL it builds a small Mixtral of random weights, which shows how it works and answers nothing useful.
"""

import sys

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, MixtralConfig

from inlay import InlayConfig, methods

sizes = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 256,
}
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 30
torch.manual_seed(0)
if len(sys.argv) > 1:
    base = AutoModelForCausalLM.from_pretrained(sys.argv[1])
else:
    base = AutoModelForCausalLM.from_config(MixtralConfig(num_key_value_heads=2, num_local_experts=4, **sizes))

tokens = torch.arange(24)[None]
with torch.no_grad():
    before = base(input_ids=tokens).logits
config = InlayConfig(method=methods.PiSSA(r=4), target_modules="all-linear", experts=True, task_type="CAUSAL_LM")
model = get_peft_model(base, config)
with torch.no_grad():
    print(
        "largest difference of the logits at the start:", (model(input_ids=tokens).logits - before).abs().max().item()
    )

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
for step in range(steps):
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step + 1}: loss {loss.item():.3f}")

model.save_pretrained("runs/08_moe")
