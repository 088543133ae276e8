"""The other side of serve.py, in an environment that has llama-cpp-python and no Inlay: logits and greedy tokens."""

import json
import sys

import llama_cpp

# Weights stay as the file has them: where a machine says that it has AMX and lets no one use it, llama.cpp's repacked
# 4-bit weights end in a segmentation fault, with and without an adapter.
lib = llama_cpp.llama_cpp
default = lib.llama_model_default_params


def settings():
    made = default()
    made.use_extra_bufts = False
    return made


lib.llama_model_default_params = settings
asked = json.load(sys.stdin)
model = llama_cpp.Llama(
    asked["model"], lora_path=asked["lora"], n_ctx=256, n_threads=2, logits_all=True, verbose=False,
    type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32,
)  # fmt: skip
ids, text = asked["ids"], []
model.eval(ids)
logits = model.scores[: len(ids)].tolist()
for _ in range(asked["tokens"]):
    text.append(int(model.scores[model.n_tokens - 1].argmax()))
    model.eval(text[-1:])
print(json.dumps({"logits": logits, "text": text}))
