"""Serve models on 127.0.0.1 until Ctrl-C, or ask the server once and compare its answers with `inlay generate`."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.request import ProxyHandler, Request, build_opener

from inlay.evaluation.answering import load_answering
from inlay.evaluation.growing import config_of
from inlay.messages import check_installed, show_text
from inlay.models.loading import dtype_for
from inlay.serving.served import Served, holds_adapter, load_served, named
from inlay.serving.worker import Worker

if TYPE_CHECKING:
    import uvicorn

HOST = "127.0.0.1"
QUESTIONS = ("Hello! Who are you?", "Name three rivers.", "name[Aromi], eatType[coffee shop], area[riverside]")
TOKENS = 32  # of an answer that is compared
GRACE = 5  # seconds that answers in progress have at the end


def serve_models(
    places: Sequence[str],
    *,
    model: str | None = None,
    port: int = 8000,
    key: str | None = None,
    tokens: int = 512,
    batch_size: int = 8,
    dtype: str = "auto",
    check: bool = False,
    done: Callable[[str], object] = show_text,
) -> bool:
    """Serve a base and adapters by name over OpenAI's chat protocol until Ctrl-C.

    Args:
        places: hub ids, folders, run folders, adapter folders, builtin, or one GGUF file; each may be NAME=PLACE.
        model: the base of the adapters; None: the one that each names.
        port: on 127.0.0.1; 0 takes any that is free.
        key: what clients have to send; None: nothing.
        tokens: of an answer at most, where a request does not say.
        batch_size: requests to one model that are answered at once.
        dtype: to compute in: auto, float32, bfloat16 or float16.
        check: ask the server some questions, compare the answers with those of `inlay generate`, and end.
        done: called with each line for a person.

    Returns:
        Whether all answers that `check` compared are equal.

    Raises:
        ValueError: a package is missing, the port is taken, or a model cannot be loaded.
    """
    check_installed("inlay serve", "fastapi", "uvicorn")
    packed = [place for _, place in map(named, places) if Path(place).suffix == ".gguf"]
    if packed and (check or model or len(places) > 1):
        raise ValueError(f"{packed[0]} is served by llama.cpp alone: without other models, --model and --check")
    if packed:
        check_installed("inlay serve of a GGUF file", "xllamacpp")
    with bound(port) as opened:
        address = f"http://{HOST}:{opened.getsockname()[1]}/v1"
        if packed:
            serve_packed(*named(places[0]), opened, address, key, tokens, batch_size, done)
            return True
        import uvicorn

        from inlay.serving.app import create_app

        served = load_served(places, model, dtype_for(dtype))
        worker = Worker(batch_size)
        server = uvicorn.Server(uvicorn.Config("", log_level="warning", timeout_graceful_shutdown=GRACE))
        server.config.app = create_app(served, worker, key, tokens, lambda: server.should_exit)
        worker.start()
        try:
            if check:
                return check_answers_of(served, places, model, dtype, server, opened, address, key, done)
            opened.listen()  # who asks as soon as they read this line waits, and is not refused
            done(f"{address} serves {', '.join(served)} (this machine only; Ctrl-C ends)")
            run_until_stopped(server, opened)
        finally:
            worker.stop()
    return True


@contextmanager
def bound(port: int) -> Iterator[socket.socket]:
    """Take a port of this machine before anything slow.

    Raises:
        ValueError: it is taken.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as opened:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            opened.bind((HOST, port))
        except (OSError, OverflowError) as error:
            reason = error.strerror if isinstance(error, OSError) else "ports end at 65535"
            raise ValueError(f"port {port} cannot be taken ({reason}); --port 0 takes any that is free") from None
        yield opened


def run_until_stopped(server: uvicorn.Server, opened: socket.socket) -> None:
    """Run a server until Ctrl-C, which is the normal way to end."""
    with suppress(KeyboardInterrupt):  # which uvicorn may raise again when it has ended
        server.run(sockets=[opened])
    show_text("stopped", to_stderr=True)


def serve_packed(
    name: str,
    file: str,
    opened: socket.socket,
    address: str,
    key: str | None,
    tokens: int,
    together: int,
    done: Callable[[str], object],
) -> None:
    """Serve a GGUF file by llama.cpp.

    Raises:
        ValueError: the file is not there, or cannot be read.
    """
    if not Path(file).is_file():
        raise ValueError(f"{file} does not exist; give a GGUF file, as inlay merge RUN out --to gguf writes")
    import uvicorn

    from inlay.serving.packed import Packed, create_packed_app

    server = uvicorn.Server(uvicorn.Config("", log_level="warning"))  # whole answers in progress are waited for
    server.config.app = create_packed_app(Packed(name, file, tokens, together), key, lambda: server.should_exit)
    opened.listen()
    done(f"{address} serves {name} by llama.cpp (this machine only; Ctrl-C ends)")
    run_until_stopped(server, opened)


def check_answers_of(
    served: dict[str, Served],
    places: Sequence[str],
    model: str | None,
    dtype: str,
    server: uvicorn.Server,
    opened: socket.socket,
    address: str,
    key: str | None,
    done: Callable[[str], object],
) -> bool:
    """Ask a server for greedy answers, whole and streamed, and return whether `inlay generate` gives the same."""
    running = threading.Thread(target=server.run, kwargs={"sockets": [opened]}, daemon=True)
    running.start()
    while not server.started and running.is_alive():
        time.sleep(0.05)
    own = dict(map(named, places))
    good = True
    for name in served:
        place = own.get(name) or str(config_of(served[name].source.model).name_or_path)
        adapter = place if holds_adapter(place) else None
        source = load_answering(adapter, model if adapter else place, dtype_for(dtype))
        equal = 0
        for question in QUESTIONS:
            wanted = source.ask({"prompt": [{"role": "user", "content": question}]}, TOKENS).text
            equal += all(asked(address, name, question, key, stream) == wanted for stream in (False, True))
        done(f"{name}: {equal} of {len(QUESTIONS)} greedy answers are those of inlay generate")
        good = good and equal == len(QUESTIONS)
    server.should_exit = True
    running.join()
    return good


def asked(address: str, name: str, question: str, key: str | None, stream: bool) -> str:
    """Return the answer of a server to one question."""
    body = {"model": name, "messages": [{"role": "user", "content": question}], "max_tokens": TOKENS, "stream": stream}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = Request(f"{address}/chat/completions", json.dumps(body).encode(), headers)
    with build_opener(ProxyHandler({})).open(request) as answer:
        if not stream:
            return json.load(answer)["choices"][0]["message"]["content"]
        events = [line.removeprefix(b"data: ").strip() for line in answer if line.startswith(b"data: ")]
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events if event != b"[DONE]"]
    return "".join(delta.get("content", "") for delta in deltas)
