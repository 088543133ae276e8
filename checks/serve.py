"""llama.cpp reads what we write: the built-in model with our LoRA, merged and packed, against our own probabilities.

`make serve-check` installs xllamacpp (llama.cpp, compiled) in an environment of its own, which never sees Inlay, and
runs this. At each of 24 tokens that llama.cpp takes, the log-probabilities of its 1,000 likeliest tokens are compared
with ours after the same text. The table is kept in checks/serve.md. Exit status 1 where a row is out of its bound: on
the fp32 file 2 % of what the adapter does to the log-probabilities, and our greedy text; on packed files, where
llama.cpp rounds activations to 8 bits, twice the difference that the published 4-bit base has without an adapter.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import get_peft_model

import inlay
from inlay.messages import quiet
from inlay.models import builtin

SERVER = Path(__file__).parent / "server.py"
PROMPT = "name[Blue Spice], eatType[pub], food[Italian], priceRange[20-25], area[riverside]"
METHODS = {
    "lora": {"r": 8}, "pissa": {"r": 16}, "milora": {"r": 16}, "lamda": {"r": 16}, "bone": {"r": 16},
    "bat": {"r": 16}, "bat_col": {"r": 16}, "dota": {"bond": 8},
}  # fmt: skip
LORA = ("lora", "pissa", "milora", "lamda", "bone")  # those that are a LoRA exactly
PACKED = ("q8_0", "q5_0", "q4_0")  # of the first method
CLOSE, TOKENS, LIKELIEST = 0.02, 24, 1000  # of the adapter's effect; of greedy text; tokens compared at each


def adapted(method: str, folder: Path, moved: float = 0.03) -> torch.nn.Module:
    """An adapter whose updates have the share `moved` of each weight's norm, saved."""
    config = inlay.InlayConfig(method=method, args=METHODS[method], target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(builtin.load_builtin_model(), config).eval()
    torch.manual_seed(0)
    layers = [m for m in model.modules() if hasattr(m, "cuts")]
    with torch.no_grad():
        for layer in layers if moved else ():
            own = [p for p in layer.parameters() if p.requires_grad]
            steps, first = [1e-3 * torch.randn_like(p) for p in own], [p.clone() for p in own]
            for _ in range(8):  # ΔW is not linear in θ
                for p, start, step in zip(own, first, steps, strict=True):
                    p.copy_(start + step)
                more = (moved * layer.matrix().norm() / layer.get_delta_weight("default").norm()).sqrt()
                steps = [step * more for step in steps]
    model.save_pretrained(str(folder))
    return model


@torch.no_grad()
def log_probabilities(model: torch.nn.Module, ids: list[int], answer: dict) -> torch.Tensor:
    """Of the tokens that an answer compares, after the text that led to them, in shape (TOKENS, LIKELIEST)."""
    rows = model(input_ids=torch.tensor([ids + answer["text"][:-1]])).logits[0, len(ids) - 1 :].float()
    return rows.log_softmax(-1).gather(1, torch.tensor(answer["tokens"]))


@torch.no_grad()
def greedy(model: torch.nn.Module, ids: list[int]) -> list[int]:
    made = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False, eos_token_id=None)
    return made[0, len(ids) :].tolist()


def main(python: str, methods: list[str], written: Path) -> int:
    """Make the files, let the server answer, compare, and write the table."""
    quiet()
    ids = builtin.load_builtin_tokenizer().encode(PROMPT)
    rows: list[Row] = []
    plain = builtin.load_builtin_model().eval()

    def check(base: str, adapter: str, ours: torch.nn.Module, file: Path, lora: Path | None = None) -> None:
        answer = serve(python, file, lora, ids)
        mine, start = log_probabilities(ours, ids, answer), log_probabilities(plain, ids, answer)
        error, effect = ((them - mine).abs().max().item() for them in (torch.tensor(answer["logs"]), start))
        same = zip(answer["text"], greedy(ours, ids), strict=True)
        rows.append(Row(base, adapter, error, effect, next((i for i, (a, b) in enumerate(same) if a != b), TOKENS)))
        print(rows[-1], flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        adapted("bone", folder / "zero", moved=0.0)
        inlay.merge(folder / "zero", folder / "base", to="gguf", probe=False)
        bases = {"fp32": folder / "base" / "model.gguf", "4 bits, as published": builtin.gguf_path()}
        for name, file in bases.items():
            check(name, "none", plain, file)
        for method in methods:
            ours = adapted(method, folder / method)
            if method in LORA:
                inlay.export_lora(folder / method, folder / "exported", to="gguf", overwrite=True)
                for name, file in bases.items():
                    check(name, f"{method}, LoRA", ours, file, folder / "exported" / "adapter.gguf")
            inlay.merge(folder / method, folder / "merged", to="gguf", probe=False, overwrite=True)
            check("fp32", f"{method}, merged", ours, folder / "merged" / "model.gguf")
        for kind in PACKED:
            packed = folder / "merged"
            inlay.merge(folder / methods[0], packed, to="gguf", gguf_type=kind, probe=False, overwrite=True)
            read = builtin.load_gguf(packed / "model.gguf").eval()  # what its packed weights stand for
            check(kind, f"{methods[0]}, merged", read, packed / "model.gguf")
    floor = next(row.error for row in rows if row.base not in ("fp32", *PACKED))
    failed = [row for row in rows if not row.good(floor)]
    columns = "base", "adapter", "largest difference", "effect of the adapter", "share", "equal greedy tokens"
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [str(row) for row in rows]
    about = (
        "Log-probabilities of llama.cpp against ours on the built-in model, of the 1,000 likeliest tokens at each "
        "of 24; updates of 3 % of each weight's norm.\n`make serve-check`"
    )
    written.write_text("\n".join([about, "", *lines, ""]))
    print(f"{len(rows)} rows, {len(failed)} out of bounds", *failed, sep="\n")
    return int(bool(failed))


@dataclass(frozen=True)
class Row:
    """One answer of llama.cpp beside ours."""

    base: str
    adapter: str
    error: float
    effect: float
    same: int

    def good(self, floor: float) -> bool:
        if self.base != "fp32":
            return self.error <= 2 * floor
        return self.same == TOKENS and self.error < CLOSE * (self.effect or 1.0)

    def __str__(self) -> str:
        effect = f"{self.effect:.1f} | {self.error / self.effect:.2%}" if self.adapter != "none" else "|"
        return f"| {self.base} | {self.adapter} | {self.error:.1e} | {effect} | {self.same} of {TOKENS} |"


def serve(python: str, model: Path, lora: Path | None, ids: list[int]) -> dict:
    """What llama.cpp answers."""
    asked = {"model": str(model), "lora": str(lora) if lora else None, "ids": ids}
    job = json.dumps({**asked, "tokens": TOKENS, "likeliest": LIKELIEST})
    done = subprocess.run([python, str(SERVER)], input=job, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"llama.cpp ended with status {done.returncode}: {done.stderr[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("python", help="of the environment that has xllamacpp")
    options.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    options.add_argument("--out", type=Path, default=Path(__file__).parent / "serve.md")
    asked = options.parse_args()
    sys.exit(main(asked.python, asked.methods, asked.out))
