"""The endpoint's routes: /v1/models, /v1/chat/completions and /health, with OpenAI's errors."""

from __future__ import annotations

import asyncio
import json
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from functools import partial

from fastapi import Depends, FastAPI, HTTPException, Request, params
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from inlay.evaluation.growing import CANCELLED, CUT, Growing, config_of, context_length
from inlay.messages import one_line
from inlay.serving.requests import ChatRequest
from inlay.serving.served import Served
from inlay.serving.worker import BusyError, Queued, Worker

OWN_NAMES = ["127.0.0.1", "localhost"]
MOST = 1 << 23  # bytes of a request
GONE = 499  # what nobody reads: the client has gone


class SizeLimit:
    """Refuse requests whose body is longer than `MOST` bytes."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and count its body."""
        length = dict(scope.get("headers", [])).get(b"content-length", b"0")
        if length.isdigit() and int(length) > MOST:
            await drain(receive)  # or the client would not hear why, while it still sends
            return await refused(413, f"the request has {int(length)} bytes; accepted: {MOST}")(scope, receive, send)
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > MOST:
                raise ValueError(f"the request has more than {MOST} bytes")
            return message

        await self.app(scope, counted, send)


async def drain(receive: Receive) -> None:
    """Read the rest of a request's body and forget it, unless there is no end of it."""
    read = 0
    while read < 8 * MOST:
        message = await receive()
        read += len(message.get("body", b""))
        if not message.get("more_body"):
            return


def refused(status: int, message: str, code: str | None = None) -> JSONResponse:
    """Return an error in OpenAI's form."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": one_line(message), "type": kind, "param": None, "code": code}
    return JSONResponse({"error": error}, status)


def guarded_app(key: str | None) -> tuple[FastAPI, list[params.Depends]]:
    """Return an application with /health, bounds on what is asked by whom, and OpenAI's errors.

    Args:
        key: what clients have to send as their API key; None: nothing.

    Returns:
        The application, and what each further route depends on: the key.
    """
    app = FastAPI(title="inlay serve")
    app.add_middleware(SizeLimit)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=OWN_NAMES)  # no page of another name may ask

    def allowed(request: Request) -> None:
        given = request.headers.get("authorization", "")
        if key is not None and not secrets.compare_digest(given.encode(), f"Bearer {key}".encode()):
            raise HTTPException(401, "the API key is missing or wrong")

    @app.exception_handler(AnyHTTPException)
    async def failed(request: Request, error: AnyHTTPException) -> Response:
        return refused(error.status_code, str(error.detail))

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        return refused(400, f"{where}: {first['msg']}" if where else str(first["msg"]))

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    return app, [Depends(allowed)]


def create_app(
    served: Mapping[str, Served], worker: Worker, key: str | None, tokens: int, stopping: Callable[[], bool]
) -> FastAPI:
    """Return the ASGI application.

    Args:
        served: what answers, by name.
        worker: the thread that answers.
        key: what clients have to send as their API key; None: nothing.
        tokens: of an answer at most, where a request does not say.
        stopping: whether the server is about to end.
    """
    app, allowed = guarded_app(key)
    encoding = threading.Lock()
    began = int(time.time())

    def model_row(name: str) -> dict[str, object]:
        return {"id": name, "object": "model", "created": began, "owned_by": "inlay"}

    def prepared(asked: ChatRequest) -> Queued:
        """Return a request that can be put in line; a ValueError says what is wrong with it."""
        one = served[asked.model]
        sampling = asked.sampling
        with encoding:
            try:
                prompt = one.source.prompt(asked.asked)
            except (TypeError, KeyError, AttributeError) as error:  # a chat template is a program
                raise ValueError(f"the messages do not fit the chat template: {error}") from None
        room = context_length(one.source.model)
        most = asked.max_completion_tokens or asked.max_tokens or tokens
        if room is not None and not config_of(one.source.model).is_encoder_decoder:
            most = min(most, room - len(prompt))
        return Queued(one, prompt, Growing(most, asked.stops), sampling, lambda error: None)

    @app.get("/v1/models", dependencies=allowed)
    async def models() -> dict[str, object]:
        return {"object": "list", "data": list(map(model_row, served))}

    @app.get("/v1/models/{name:path}", dependencies=allowed)
    async def model(name: str) -> dict[str, object]:
        if name not in served:
            raise HTTPException(404, f"model {name!r} is not served; these are: {', '.join(served)}")
        return model_row(name)

    @app.post("/v1/chat/completions", dependencies=allowed)
    async def chat(asked: ChatRequest, request: Request) -> Response:
        if asked.model not in served:
            missing = f"model {asked.model!r} is not served; these are: {', '.join(served)}"
            return refused(404, missing, "model_not_found")
        try:
            job = await run_in_threadpool(prepared, asked)
        except ValueError as error:
            return refused(400, str(error))
        waiting = Waiting(job, asked, stopping)
        try:
            worker.submit(job)
        except BusyError as error:
            return refused(503, str(error))
        if asked.stream:
            return StreamingResponse(waiting.events(request), media_type="text/event-stream")
        return await waiting.whole(request)

    return app


class Waiting:
    """Wait for the answer to one request, in the event loop; the worker's thread tells of it."""

    def __init__(self, job: Queued, asked: ChatRequest, stopping: Callable[[], bool]) -> None:
        self.job = job
        self.asked = asked
        self.gone = False
        self.about = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": asked.model}
        self._pieces: asyncio.Queue[tuple[str, str | None]] = asyncio.Queue()  # a piece, or the end and its error
        loop = asyncio.get_running_loop()

        def tell(piece: str, error: str | None) -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._pieces.put_nowait, (piece, error))

        job.answer.written = partial(tell, error=None)
        job.answer.cancelled = lambda: self.gone or stopping()
        job.ended = partial(tell, "")

    @property
    def reason(self) -> str:
        """Return why the answer ended, in OpenAI's words."""
        return "length" if self.job.answer.ended == CUT else "stop"

    @property
    def usage(self) -> dict[str, int]:
        """Return the tokens of prompt and answer."""
        before, after = len(self.job.prompt), len(self.job.answer.ids)
        return {"prompt_tokens": before, "completion_tokens": after, "total_tokens": before + after}

    def failure(self, error: str) -> JSONResponse | None:
        """Return what the client is told where the answer did not come to its end; None where it did."""
        if not error and self.job.answer.ended not in ("", CANCELLED):
            return None
        return refused(500 if error else 503, error or "the server is stopping")

    async def whole(self, request: Request) -> Response:
        """Return the whole answer."""
        pieces = [piece async for piece in self.pieces(request)]
        if self.gone:
            return Response(status_code=GONE)
        error = pieces[-1][1] or ""
        if failed := self.failure(error):
            return failed
        message = {"role": "assistant", "content": self.job.answer.text}
        choice = {"index": 0, "message": message, "finish_reason": self.reason, "logprobs": None}
        return JSONResponse({**self.about, "object": "chat.completion", "choices": [choice], "usage": self.usage})

    async def pieces(self, request: Request) -> AsyncIterator[tuple[str, str | None]]:
        """Yield the pieces of the answer, with the last one its error, until the client has gone."""
        error = None
        while error is None:
            if await request.is_disconnected():
                self.gone = True
                return
            try:
                piece, error = await asyncio.wait_for(self._pieces.get(), 1.0)
            except TimeoutError:
                continue
            yield piece, error

    async def events(self, request: Request) -> AsyncIterator[str]:
        """Yield the answer as server-sent events, piece by piece."""
        try:
            yield self.event({"role": "assistant", "content": ""})
            failed: JSONResponse | None = None
            async for piece, error in self.pieces(request):
                if piece:
                    yield self.event({"content": piece})
                failed = None if error is None else self.failure(error)
            if self.gone:
                return
            if failed is not None:
                yield f"data: {bytes(failed.body).decode()}\n\n"
            else:
                yield self.event({}, self.reason)
                if self.asked.stream_options and self.asked.stream_options.include_usage:
                    yield self.chunk({"choices": [], "usage": self.usage})
            yield "data: [DONE]\n\n"
        finally:
            self.gone = True

    def event(self, delta: dict[str, str], reason: str | None = None) -> str:
        """Return one event with a part of the answer."""
        return self.chunk({"choices": [{"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}]})

    def chunk(self, more: dict[str, object]) -> str:
        """Return one event."""
        return f"data: {json.dumps({**self.about, 'object': 'chat.completion.chunk', **more})}\n\n"
