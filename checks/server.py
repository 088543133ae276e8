"""The other side of serve.py, in an environment that has xllamacpp and no Inlay: greedy tokens and the likeliest."""

import json
import sys
from typing import Any

import xllamacpp as untyped

xllamacpp: Any = untyped  # compiled, without types
asked = json.load(sys.stdin)
settings = xllamacpp.CommonParams()
settings.model.path = asked["model"]
settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(asked["lora"], 1.0)] if asked["lora"] else []
settings.n_ctx, settings.n_parallel, settings.cpuparams.n_threads, settings.port = 256, 1, 2, 0
settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
settings.warmup, settings.verbosity = False, 0
server = xllamacpp.Server(settings)
text, tokens, logs = [], [], []
for _ in range(asked["tokens"]):
    body = {"prompt": asked["ids"] + text, "max_tokens": 1, "temperature": 0, "logprobs": asked["likeliest"]}
    (step,) = server.handle_completions(body)["choices"][0]["logprobs"]["content"]
    tokens.append([one["id"] for one in step["top_logprobs"]])
    logs.append([one["logprob"] for one in step["top_logprobs"]])
    text.append(tokens[-1][0])
print(json.dumps({"text": text, "tokens": tokens, "logs": logs}))
