"""`inlay serve`: answers by name as `inlay generate` gives them, whole and in pieces; and what is refused."""

import gc
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from types import SimpleNamespace

import pytest
import torch
from helpers import fails
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from inlay import InlayConfig, merge, methods
from inlay.cli import main
from inlay.evaluation.answering import load_answering

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
uvicorn = pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
openai = pytest.importorskip("openai", reason="openai is not installed")

from inlay.evaluation.growing import Growing  # noqa: E402
from inlay.serving.app import MOST, Waiting, create_app  # noqa: E402
from inlay.serving.endpoint import bound, serve_models  # noqa: E402
from inlay.serving.served import load_served  # noqa: E402
from inlay.serving.worker import BusyError, Queued, Worker  # noqa: E402

QUESTION = [{"role": "user", "content": "What is 3 plus one?"}]
CONFIGS = {
    "bone": InlayConfig(method=methods.Bone(r=4), target_modules="all-linear", task_type="CAUSAL_LM"),
    "pissa": InlayConfig(method=methods.PiSSA(r=4), target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    "peft": LoraConfig(r=4, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False),
}


@pytest.fixture(scope="module")
def places(tiny, tmp_path_factory):
    """Three adapters that answer differently, by name."""
    folder = tmp_path_factory.mktemp("adapters")
    for name, config in CONFIGS.items():
        torch.manual_seed(1)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), config)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p += 0.3 * torch.randn_like(p)
        model.save_pretrained(folder / name)
    return [f"{name}={folder / name}" for name in CONFIGS]


@pytest.fixture(scope="module")
def server(places):
    """A running server with its client, and what it serves; it wants a key."""
    served = load_served(places, None, torch.float32)
    worker = Worker(4)
    running = uvicorn.Server(uvicorn.Config("", log_level="critical"))
    running.config.app = create_app(served, worker, "secret", 6, lambda: running.should_exit)
    with bound(0) as opened:
        port = opened.getsockname()[1]
        thread = threading.Thread(target=running.run, kwargs={"sockets": [opened]}, daemon=True)
        worker.start()
        thread.start()
        while not running.started:
            time.sleep(0.01)
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="secret", max_retries=0) as client:
            yield SimpleNamespace(client=client, served=served, worker=worker, port=port)
        running.should_exit = True
        thread.join()
        worker.stop()


@pytest.fixture(scope="module")
def alone(places, tiny):
    """What `inlay generate` answers, by name."""
    found = {}
    for text in [*places, "tiny-llama="]:
        name, _, place = text.partition("=")
        source = load_answering(place or None, None if place else tiny, torch.float32)
        found[name] = source.ask({"prompt": QUESTION}, 6).text
    return found


def test_adapters_share_a_base_and_all_are_listed(server):
    assert list(server.served) == ["bone", "pissa", "peft", "tiny-llama"]
    models = {name: one.source.model for name, one in server.served.items()}
    assert models["bone"] is models["pissa"] is models["tiny-llama"] is not models["peft"]
    assert [model.id for model in server.client.models.list()] == list(server.served)
    assert server.client.models.retrieve("pissa").id == "pissa"


def test_every_name_answers_as_generate_does(server, alone):
    assert len({alone[name] for name in ("bone", "pissa", "tiny-llama")}) == 3
    for name in ("pissa", "tiny-llama", "bone", "peft", "pissa"):
        said = server.client.chat.completions.create(model=name, messages=QUESTION)
        assert (said.choices[0].message.content, said.model) == (alone[name], name)
        assert said.choices[0].finish_reason == "length"
        assert (said.usage.completion_tokens, said.usage.total_tokens) == (6, said.usage.prompt_tokens + 6)


def test_a_stream_brings_the_same_in_pieces(server, alone):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    parts = list(server.client.chat.completions.create(model="bone", messages=QUESTION, **options))
    pieces = [part.choices[0].delta.content or "" for part in parts if part.choices]
    assert "".join(pieces) == alone["bone"]
    assert len([piece for piece in pieces if piece]) > 2
    assert parts[-2].choices[0].finish_reason == "length"
    assert parts[-1].usage.completion_tokens == 6


def test_many_at_once_are_all_answered_as_each_alone(server, alone):
    def ask(i: int) -> bool:
        name = list(server.served)[i % 4]
        said = server.client.chat.completions.create(model=name, messages=QUESTION, temperature=0, top_p=0.5, seed=i)
        return said.choices[0].message.content == alone[name]

    with ThreadPoolExecutor(24) as pool:
        assert all(pool.map(ask, range(48)))


def test_an_answered_request_leaves_nothing_behind(server, monkeypatch):
    """Whole or streamed: no request, no answer and nobody who waits is held, and this test would see if one were."""

    def held(requests: int) -> int:
        for i in range(requests):
            said = server.client.chat.completions.create(model="bone", messages=QUESTION, stream=bool(i % 2))
            if i % 2:
                list(said)
        gc.collect()
        return sum(type(one) in (Queued, Growing, Waiting) for one in gc.get_objects())

    before = held(2)
    assert held(6) <= before
    submit, kept = server.worker.submit, []
    monkeypatch.setattr(server.worker, "submit", lambda job: kept.append(job) or submit(job))
    assert held(6) >= before + 2 * 6


def test_draws_stops_and_limits(server, alone):
    def ask(**options) -> str:
        said = server.client.chat.completions.create(model="bone", messages=QUESTION, **options)
        return said.choices[0].message.content

    assert ask(temperature=1.5, seed=1) == ask(temperature=1.5, seed=1) != ask(temperature=1.5, seed=2)
    middle = alone["bone"][2:4]
    said = server.client.chat.completions.create(model="bone", messages=QUESTION, stop=[middle])
    assert said.choices[0].finish_reason == "stop"
    assert said.choices[0].message.content == alone["bone"][: alone["bone"].index(middle)].strip()
    many = server.client.chat.completions.create(model="bone", messages=QUESTION, max_tokens=10_000)
    assert many.usage.total_tokens <= 256


GOOD = {"model": "bone", "messages": QUESTION, "max_tokens": 1}
BAD = {
    "no JSON": (400, b"{"),
    "a list": (400, b"[]"),
    "too deep": (400, b"[" * 100_000),
    "no model": (400, {"messages": QUESTION}),
    "another model": (404, GOOD | {"model": "gpt-4"}),
    "no messages": (400, {"model": "bone"}),
    "empty messages": (400, GOOD | {"messages": []}),
    "text": (400, GOOD | {"messages": "hello"}),
    "an unknown role": (400, GOOD | {"messages": [{"role": "wizard", "content": "x"}]}),
    "an empty question": (400, GOOD | {"messages": [{"role": "user", "content": ""}]}),
    "no content": (400, GOOD | {"messages": [{"role": "user"}]}),
    "a picture": (400, GOOD | {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}),
    "half a character": (400, b'{"model": "bone", "messages": [{"role": "user", "content": "\\ud800"}]}'),
    "too long": (400, GOOD | {"messages": [{"role": "user", "content": "pub " * 300}]}),
    "no tokens": (400, GOOD | {"max_tokens": 0}),
    "a temperature below 0": (400, GOOD | {"temperature": -1}),
    "no number": (400, b'{"model": "bone", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}'),
    "top_p": (400, GOOD | {"temperature": 1, "top_p": 2}),
    "a seed beyond 64 bits": (400, GOOD | {"temperature": 1, "seed": 2**70}),
    "several answers": (400, GOOD | {"n": 2}),
    "tools": (400, GOOD | {"tools": [{"type": "function", "function": {"name": "f"}}]}),
    "a schema": (400, GOOD | {"response_format": {"type": "json_object"}}),
    "an unknown field": (400, GOOD | {"min_tokens": 3}),
    "an empty stop": (400, GOOD | {"stop": ""}),
    "the template's own": (400, GOOD | {"chat_template_kwargs": {"tokenize": False}}),
    "too large": (413, b" " * (MOST + 1)),
}


def sent(port: int, body: object, **headers: str) -> tuple[int, dict]:
    """The status and the content of an answer."""
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    usual = {"Content-Type": "application/json", "Authorization": "Bearer secret"}
    connection.request("POST", "/v1/chat/completions", content, usual | headers)
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    return answer.status, json.loads(text) if text.startswith(b"{") else {"text": text}


def test_malformed_requests_are_the_clients_mistakes(server):
    for name, (status, body) in BAD.items():
        found, content = sent(server.port, body)
        assert found == status, (name, content)
        assert content["error"]["message"], name
        assert "\n" not in content["error"]["message"]
    assert sent(server.port, GOOD | {"user": "me", "n": 1, "tools": None, "logprobs": False})[0] == 200


def test_only_who_has_the_key_and_the_name_is_answered(server):
    assert sent(server.port, GOOD, Authorization="Bearer other")[0] == 401
    assert sent(server.port, GOOD, Authorization="")[0] == 401
    assert sent(server.port, GOOD, Host="evil.example")[0] == 400
    connection = HTTPConnection("127.0.0.1", server.port, timeout=60)
    for path, status in {"/health": 200, "/v1/models": 401, "/v1/nothing": 404}.items():
        connection.request("GET", path)
        answer = connection.getresponse()
        answer.read()
        assert answer.status == status, path
    connection.close()


def test_what_fails_in_one_batch_does_not_end_the_next(server, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("inlay.serving.worker.grow", lambda *_: 1 / 0)
        assert sent(server.port, GOOD) == (500, {"error": {
            "message": "division by zero", "type": "server_error", "param": None, "code": None}})  # fmt: skip
        status, stream = sent(server.port, GOOD | {"stream": True})
        assert status == 200
        assert b"division by zero" in stream["text"]
        assert stream["text"].endswith(b"data: [DONE]\n\n")
    assert sent(server.port, GOOD)[0] == 200


def test_a_client_that_leaves_ends_its_answer(server, monkeypatch):
    begun, ended = threading.Event(), threading.Event()
    push = "inlay.evaluation.growing.Growing.push"

    def slow(self, token, ends, tokenizer):
        begun.set()
        time.sleep(0.05)
        if self.cancelled():
            ended.set()
            self.ended = "cancelled"
        return bool(self.ended)

    monkeypatch.setattr(push, slow)
    body = json.dumps(GOOD | {"stream": True, "max_tokens": 200}).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        head = ["POST /v1/chat/completions HTTP/1.1", "Host: 127.0.0.1", "Authorization: Bearer secret",
                "Content-Type: application/json", f"Content-Length: {len(body)}", "", ""]  # fmt: skip
        connection.sendall("\r\n".join(head).encode() + body)
        assert b"200 OK" in connection.recv(4096)
        assert begun.wait(20)  # who leaves before is not answered at all
    assert ended.wait(20)


def test_a_full_line_takes_no_more():
    worker = Worker(4, waiting=1)
    job = Queued(None, [], None, None, lambda error: None)  # type: ignore[arg-type]
    worker.submit(job)
    with pytest.raises(BusyError, match="1 requests are waiting"):
        worker.submit(job)


def test_the_check_compares_with_generate(places, monkeypatch):
    monkeypatch.setattr("inlay.serving.endpoint.QUESTIONS", ("Hello!",))
    monkeypatch.setattr("inlay.serving.endpoint.TOKENS", 6)
    lines = []
    assert serve_models([places[0]], port=0, dtype="float32", check=True, done=lines.append)
    assert lines == [f"{name}: 1 of 1 greedy answers are those of inlay generate" for name in ("bone", "tiny-llama")]


@pytest.fixture(scope="module")
def packed(tiny, tmp_path_factory):
    """A GGUF file of the tiny model with an adapter, and a running server of it, which wants a key."""
    pytest.importorskip("xllamacpp", reason="the extra `llama` is not installed")
    from inlay.serving.packed import Packed, create_packed_app

    folder = tmp_path_factory.mktemp("packed")
    config = InlayConfig(method="bone", args={"r": 4}, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), config)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.3 * torch.randn_like(p)
    model.save_pretrained(folder / "bone")
    merge(folder / "bone", folder / "merged", to="gguf", probe=False)
    file = folder / "merged" / "model.gguf"
    running = uvicorn.Server(uvicorn.Config("", log_level="critical"))
    running.config.app = create_packed_app(Packed("mine", str(file), 6, 2), "secret", lambda: running.should_exit)
    with bound(0) as opened:
        port = opened.getsockname()[1]
        thread = threading.Thread(target=running.run, kwargs={"sockets": [opened]}, daemon=True)
        thread.start()
        while not running.started:
            time.sleep(0.01)
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="secret", max_retries=0) as client:
            yield SimpleNamespace(client=client, port=port, file=file, adapter=folder / "bone")
        running.should_exit = True
        thread.join()


def test_llama_cpp_answers_for_a_gguf_file_as_generate_does(packed):
    """Whole, streamed and many at once: the fp32 file's greedy answers are those of the adapter it was merged from."""
    alone = load_answering(str(packed.adapter), None, torch.float32).ask({"prompt": QUESTION}, 6).text
    assert [model.id for model in packed.client.models.list()] == ["mine"]
    whole = packed.client.chat.completions.create(model="mine", messages=QUESTION)
    assert whole.choices[0].message.content.strip() == alone
    assert whole.usage.completion_tokens == 6
    parts = list(packed.client.chat.completions.create(model="mine", messages=QUESTION, stream=True))
    assert "".join(p.choices[0].delta.content or "" for p in parts if p.choices).strip() == alone
    assert len(parts) > 2
    with ThreadPoolExecutor(8) as pool:
        said = list(
            pool.map(lambda _: packed.client.chat.completions.create(model="mine", messages=QUESTION), range(8))
        )
    assert {one.choices[0].message.content.strip() for one in said} == {alone}


def test_a_gguf_file_has_the_key_the_names_and_the_errors_of_the_endpoint(packed, tmp_path):
    def status(method: str, path: str, body: bytes = b"", **headers: str) -> int:
        connection = HTTPConnection("127.0.0.1", packed.port, timeout=60)
        connection.request(method, path, body, {"Authorization": "Bearer secret", **headers})
        with connection.getresponse() as answer:
            answer.read()
        connection.close()
        return answer.status

    assert status("GET", "/health", Authorization="none") == 200
    assert status("GET", "/v1/models", Authorization="none") == 401
    assert status("POST", "/v1/chat/completions", b"{}", Authorization="none") == 401
    assert status("GET", "/v1/models", Host="elsewhere.example") == 400
    assert status("POST", "/v1/chat/completions", b'{"messages": "x"}') == 400
    assert status("POST", "/v1/chat/completions", b"{") in (400, 500)
    assert status("GET", "/slots") == 404
    damaged = tmp_path / "model.gguf"
    with pytest.raises(ValueError, match="does not exist; give a GGUF file"):
        serve_models([str(damaged)], port=0)
    damaged.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ValueError, match=r"cannot be read by llama\.cpp"):
        serve_models([str(damaged)], port=0)


def test_mistakes_come_before_the_models(tiny, places, monkeypatch, tmp_path, capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = str(other.getsockname()[1])
        assert "--port 0 takes any that is free" in fails(capsys, "serve", tiny, "--port", taken)
    assert "ports end at 65535" in fails(capsys, "serve", tiny, "--port", "99999")
    assert "two models are named 'a'" in fails(capsys, "serve", f"a={tiny}", f"a={tiny}", "--port", "0")
    assert "is no name for a model" in fails(capsys, "serve", f"a b={tiny}", "--port", "0")
    assert "does not exist" in fails(capsys, "serve", str(tmp_path / "no-model"), "--port", "0")
    assert "by llama.cpp alone" in fails(capsys, "serve", "model.gguf", "--check")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'inlay[serve]'" in fails(capsys, "serve", tiny)


@pytest.mark.slow
def test_ctrl_c_is_the_normal_end(tiny):
    code = "from inlay.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", f"it={tiny}", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    assert "/v1 serves it (this machine only; Ctrl-C ends)" in line
    asking = HTTPConnection("127.0.0.1", int(line.split(":")[2].split("/")[0]), timeout=60)
    asking.request("GET", "/health")  # at once: who has read the line is not refused
    with asking.getresponse() as answer:
        assert answer.read() == b'{"status":"ok"}'
    asking.close()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "")
    assert err.strip().endswith("stopped")


def test_help_names_the_key(capsys):
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    assert "INLAY_API_KEY" in capsys.readouterr().out
