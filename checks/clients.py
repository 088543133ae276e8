"""Many clients at once, for a minute: `inlay serve` with a tiny model and two adapters answers all, in flat memory.

Each client asks again as soon as it is answered: whole or streamed, of any of the names, and now and then something
malformed, which has to be answered by 4xx. `make clients` writes checks/clients.md. Exit status 1 where a request
failed, a malformed one did not, or memory grew by more than 64 MiB after the first quarter.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from http.client import HTTPConnection
from pathlib import Path

import psutil
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import inlay
from inlay.messages import quiet
from inlay.models import builtin

GROWTH = 64 * 2**20
MALFORMED = (
    b"{", b"[]", b'{"model": "lora"}', b'{"model": "none", "messages": [{"role": "user", "content": "x"}]}',
    b'{"model": "lora", "messages": [{"role": "user", "content": "x"}], "max_tokens": -1}',
)  # fmt: skip


def models(folder: Path) -> list[str]:
    """A tiny Llama and two adapters of it, saved; what `inlay serve` is told."""
    torch.manual_seed(0)
    tokenizer = builtin.load_builtin_tokenizer()
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**shape, vocab_size=len(tokenizer), max_position_embeddings=512,
                         eos_token_id=tokenizer.eos_token_id)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    for method in ("lora", "bone"):
        settings = inlay.InlayConfig(method=method, args={"r": 4}, target_modules="all-linear", task_type="CAUSAL_LM")
        get_peft_model(LlamaForCausalLM.from_pretrained(folder / "tiny"), settings).save_pretrained(folder / method)
    return [f"{name}={folder / name}" for name in ("tiny", "lora", "bone")]


class Client(threading.Thread):
    """Ask until the time is over."""

    def __init__(self, number: int, port: int, end: float) -> None:
        super().__init__(daemon=True)
        self.draw, self.port, self.end = random.Random(number), port, end
        self.times: list[float] = []
        self.refused, self.failed = 0, []  # type: ignore[var-annotated]

    def run(self) -> None:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=120)
        while time.monotonic() < self.end:
            bad = self.draw.random() < 0.1
            question = [{"role": "user", "content": "pub " * self.draw.randint(1, 60)}]
            body = {"model": self.draw.choice(("tiny", "lora", "bone")), "messages": question, "max_tokens": 16,
                    "stream": self.draw.random() < 0.5}  # fmt: skip
            content = self.draw.choice(MALFORMED) if bad else json.dumps(body).encode()
            started = time.monotonic()
            try:
                connection.request("POST", "/v1/chat/completions", content, {"Content-Type": "application/json"})
                answer = connection.getresponse()
                text = answer.read()
            except OSError as error:
                self.failed.append(repr(error))
                connection.close()
                continue
            if bad and 400 <= answer.status < 500:
                self.refused += 1
            elif bad or answer.status != 200 or b'"error"' in text or (body["stream"] and b"[DONE]" not in text):
                self.failed.append(f"{answer.status} {text[:200]!r}")
            else:
                self.times.append(time.monotonic() - started)
        connection.close()


def main(clients: int, seconds: float, written: Path | None) -> int:
    """Start the server, let the clients ask, and write what happened."""
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "inlay", "serve", *models(Path(folder)), "--port", "0"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        line = server.stdout.readline()  # type: ignore[union-attr]
        if not line:
            print(server.communicate()[1])
            return 1
        port, process = int(line.split(":")[2].split("/")[0]), psutil.Process(server.pid)
        time.sleep(1)
        asking = [Client(number, port, time.monotonic() + seconds) for number in range(clients)]
        for client in asking:
            client.start()
        memory = []
        while any(client.is_alive() for client in asking):
            memory.append(process.memory_info().rss)
            time.sleep(seconds / 60)
        server.send_signal(2)
        server.communicate(timeout=60)
    times = sorted(second for client in asking for second in client.times)
    failed = [line for client in asking for line in client.failed]
    early, late = max(memory[: len(memory) // 4 + 1]), max(memory[len(memory) // 4 + 1 :], default=0)
    rows = {
        "clients, seconds": f"{clients}, {seconds:g}",
        "answered": f"{len(times)} ({len(times) / seconds:.1f} a second)",
        "malformed, answered by 4xx": str(sum(client.refused for client in asking)),
        "failed": str(len(failed)),
        "seconds to an answer: median, 95 %, longest": ", ".join(
            f"{value:.2f}" for value in (statistics.median(times), times[int(0.95 * len(times))], times[-1])
        ),
        "memory: first quarter, later (MiB)": f"{early / 2**20:.0f}, {late / 2**20:.0f}",
        "exit code after Ctrl-C": str(server.returncode),
    }
    lines = [
        "`inlay serve` with a tiny Llama and two adapters, 16 tokens an answer. `make clients`",
        "",
        "| | |",
        "|---|---|",
    ]
    lines += [f"| {name} | {value} |" for name, value in rows.items()]
    print("\n".join([*lines, *failed[:5]]))
    if written:
        written.write_text("\n".join([*lines, ""]))
    return int(bool(failed) or late > early + GROWTH or server.returncode != 0)


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--clients", type=int, default=32)
    options.add_argument("--seconds", type=float, default=60)
    options.add_argument("--out", type=Path, help="where the table is written (default: it is only printed)")
    asked = options.parse_args()
    sys.exit(main(asked.clients, asked.seconds, asked.out))
