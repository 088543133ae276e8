"""`inlay serve`."""

from __future__ import annotations

import argparse
import os

from inlay.cli.parser import whole_number
from inlay.messages import show_piece, show_text


def serve_command(options: argparse.Namespace) -> None:
    """Serve a base and any number of adapters by name, over OpenAI's chat protocol on 127.0.0.1.

    A request names its model, and /v1/models lists them. Adapters that do not change their base share one in memory.
    Without a temperature a request is answered greedily, as inlay generate does. llama.cpp serves a GGUF file. Ctrl-C
    ends the server.

    example:  inlay serve runs/mine other=runs/builtin-bone --port 8000
    """
    from inlay.messages import quiet
    from inlay.serving.endpoint import serve_models

    quiet()
    key = options.api_key or os.environ.get("INLAY_API_KEY") or None
    equal = serve_models(
        options.models, model=options.model, port=options.port, key=key, tokens=options.tokens,
        batch_size=options.batch_size, dtype=options.dtype, check=options.check, done=show_at_once,
    )  # fmt: skip
    if not equal:
        show_text("inlay: some answers differ", to_stderr=True)
        raise SystemExit(1)


def show_at_once(line: str) -> None:
    """Print a line that whoever started the server may wait for."""
    show_piece(f"{line}\n")


def serve_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the arguments of `inlay serve`."""
    verb.add_argument("models", nargs="+", metavar="[NAME=]MODEL ...",
                      help="run, adapter, hub id, folder, builtin, or a GGUF file")  # fmt: skip
    verb.add_argument("--model", help="base of the adapters (default: the one that each names)")
    verb.add_argument("--port", type=int, default=8000, help="on 127.0.0.1 (default 8000; 0: any that is free)")
    verb.add_argument("--api-key", metavar="KEY", help="what clients have to send (or INLAY_API_KEY; default: nothing)")
    verb.add_argument("--tokens", type=whole_number, default=512, help="of an answer at most, unless a request says "
                      "(default 512)")  # fmt: skip
    verb.add_argument("--batch-size", type=whole_number, default=8, help="requests answered at once (default 8)")
    verb.add_argument("--check", action="store_true", help="compare greedy answers with inlay generate's, and end")
    verb.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
