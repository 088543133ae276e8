"""A GGUF file behind the endpoint's own routes: llama.cpp's server answers, in this process, to nobody else."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from http.client import HTTPResponse
from pathlib import Path
from typing import Any, cast
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

import xllamacpp as untyped  # type: ignore[import-not-found]
from fastapi import FastAPI, Response
from fastapi import Request as Asked
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse

from inlay.serving.app import guarded_app

xllamacpp: Any = untyped  # compiled, without types
CONTEXT = 8192  # tokens that the answers in progress share; llama.cpp takes the model's own length where it is shorter


class Packed:
    """Hold a GGUF file that llama.cpp has loaded, behind a port and a key that nobody else knows.

    Args:
        name: of the model, as it is listed.
        file: the GGUF file.
        tokens: of an answer at most, where a request does not say.
        together: answers in progress at once.

    Raises:
        ValueError: llama.cpp cannot read the file.
    """

    def __init__(self, name: str, file: str, tokens: int, together: int) -> None:
        self.key = secrets.token_hex(16)
        settings = xllamacpp.CommonParams()
        settings.model.path = str(Path(file).resolve())
        settings.model_alias = {name}
        settings.hostnames, settings.port = ["127.0.0.1"], 0
        settings.api_keys, settings.ui = [self.key], False
        settings.n_ctx, settings.n_predict = CONTEXT, tokens
        settings.n_parallel, settings.kv_unified = together, True
        settings.sampling.temp = 0.0  # without a temperature the likeliest token is taken
        settings.verbosity = 0
        try:
            self.server = xllamacpp.Server(settings)
        except RuntimeError as error:
            raise ValueError(f"{file} cannot be read by llama.cpp: {error}") from None

    def ask(self, path: str, body: bytes) -> HTTPResponse:
        """Return llama.cpp's response to a request; one that refuses it, too."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        request = Request(f"{self.server.listening_address}{path}", body or None, headers)
        try:
            return build_opener(ProxyHandler({})).open(request)
        except HTTPError as refused:
            return cast(HTTPResponse, refused)


def create_packed_app(packed: Packed, key: str | None, stopping: Callable[[], bool]) -> FastAPI:
    """Return the ASGI application.

    Args:
        packed: what answers.
        key: what clients have to send as their API key; None: nothing.
        stopping: whether the server is about to end, which cuts streams off.
    """
    app, allowed = guarded_app(key)

    @app.get("/v1/models", dependencies=allowed)
    @app.post("/v1/chat/completions", dependencies=allowed)
    @app.post("/v1/completions", dependencies=allowed)
    async def forward(asked: Asked) -> Response:
        answer = await run_in_threadpool(packed.ask, asked.url.path, await asked.body())
        return StreamingResponse(lines_of(answer, stopping), answer.status, media_type=answer.headers["Content-Type"])

    return app


def lines_of(answer: HTTPResponse, stopping: Callable[[], bool]) -> Iterator[bytes]:
    """Yield a response line by line; llama.cpp ends an answer whose reader has gone."""
    with answer:
        for line in answer:
            yield line
            if stopping():
                return
