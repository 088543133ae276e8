"""The live page: what is read of runs that grow, and that it is served to this machine alone."""

import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
from helpers import fails

from inlay.cli import main
from inlay.training import live_page
from inlay.training.live_page import Follower, own_name_only

pytest.importorskip("tensorboard", reason="TensorBoard is not installed")


HERE = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def grow(folder: Path, *rows: dict) -> None:
    """Add to a run's metrics, as `inlay train` does."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text("method: bone\n")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def test_the_page_begins_with_the_loss():
    """TensorBoard shows the groups of plots in the order of their names."""
    assert min(live_page.NAMES.values()).startswith("loss/")


def written(events: Path, run: str, tag: str = "loss/training") -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(events / run)).Reload()
    return [(e.step, e.value) for e in found.Scalars(tag)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what TensorBoard brings along
def test_runs_are_followed_as_they_grow(tmp_path):
    runs, events = tmp_path / "runs", tmp_path / "events"
    grow(runs / "old", {"step": 0, "eval_loss": 4.0}, {"step": 1, "loss": 3.0, "seconds": 1.0})
    grow(runs / "tune" / "runs" / "trial-000", {"step": 1, "loss": 5.0})
    (runs / "old" / "checkpoints" / "step-1").mkdir(parents=True)
    (runs / "old" / "checkpoints" / "step-1" / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
    follower = Follower(runs, events)
    follower.look()
    assert {p.parent.relative_to(runs).as_posix() for p in follower.known} == {"old", "tune/runs/trial-000"}
    assert written(events, "old") == [(1, 3.0)]
    assert written(events, "old", "loss/held out") == [(0, 4.0)]
    with (runs / "old" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "loss": 2.5, "seconds": 2.0}\n{"step": 3, "lo')
    grow(runs / "new", {"step": 1, "loss": 3.5})
    follower.look()
    assert written(events, "old") == [(1, 3.0), (2, 2.5)]  # no half line
    with (runs / "old" / "metrics.jsonl").open("a") as file:
        file.write('ss": 2.0, "seconds": 3.0}\n')
    follower.look()
    follower.look()
    assert written(events, "old") == [(1, 3.0), (2, 2.5), (3, 2.0)]
    assert written(events, "new") == [(1, 3.5)]
    part = runs / "old" / "part"
    part.write_text('{"step": 2, "loss": 2.25, "seconds": 2.0}\n')
    part.replace(runs / "old" / "metrics.jsonl")  # it went on from a checkpoint
    follower.look()
    assert written(events, "old")[-1] == (2, 2.25)
    for run in follower.known.values():
        run.writer.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what TensorBoard brings along
def test_a_damaged_line_is_said_and_left_out(tmp_path, capsys):
    runs, events = tmp_path / "runs", tmp_path / "events"
    grow(runs / "a", {"loss": 2.0}, {"step": 1, "loss": None})
    with (runs / "a" / "metrics.jsonl").open("a") as file:
        file.write('{broken\n[3]\n{"step": 2, "loss": 2.5}\n')
    grow(runs / "b", {"step": 1, "loss": 3.0})
    follower = Follower(runs, events)
    follower.look()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 4
    assert all(line.startswith(f"note: {runs}/a/metrics.jsonl: ") for line in said)
    assert (written(events, "a"), written(events, "b")) == ([(2, 2.5)], [(1, 3.0)])
    for run in follower.known.values():
        run.writer.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_no_run_of_a_folder_ends_the_page(tmp_path, capsys):
    """A number of 400 digits, deep JSON, a recipe that is no text, links, pipes: each run is there, with its error."""
    runs, events = tmp_path / "runs", tmp_path / "events"
    secret = tmp_path / "secret.yaml"
    secret.write_text("token: 12345\n")
    (tmp_path / "rows.jsonl").write_text('{"step": 1, "loss": 9.0}\n')
    for name in ("digits", "deep", "bytes", "linked", "rows", "pipe", "good"):
        grow(runs / name, {"step": 1, "loss": 3.0})
    (runs / "digits" / "metrics.jsonl").write_text(
        f'{{"step": {"9" * 400}, "loss": 1}}\n{{"step": 2, "loss": {"9" * 400}}}\n'
    )
    (runs / "deep" / "metrics.jsonl").write_text("[" * 100_000 + "\n")
    (runs / "bytes" / "recipe.yaml").write_bytes(b"method: \xff\xfe\n")
    for path, target in (
        (runs / "linked" / "recipe.yaml", secret),
        (runs / "rows" / "metrics.jsonl", tmp_path / "rows.jsonl"),
    ):
        path.unlink()
        path.symlink_to(target)
    (runs / "pipe" / "recipe.yaml").unlink()
    os.mkfifo(runs / "pipe" / "recipe.yaml")
    follower = Follower(runs, events)
    follower.look()
    follower.look()
    said = capsys.readouterr().err
    assert {p.parent.name for p in follower.known} == {"digits", "deep", "bytes", "linked", "rows", "pipe", "good"}
    assert {p.parent.name for p, run in follower.known.items() if run.error} == {"bytes", "linked", "rows", "pipe"}
    assert all(said.count(f"{runs}/{name} cannot be read") == 1 for name in ("bytes", "linked", "rows", "pipe"))
    assert max(map(len, said.splitlines())) < 500
    for name in ("good", "bytes", "linked"):
        assert written(events, name) == [(1, 3.0)]
    for run in follower.known.values():
        run.writer.close()
    kept = b"".join(path.read_bytes() for path in events.rglob("*") if path.is_file())
    assert b"12345" not in kept
    assert b"can't decode byte 0xff" in kept


def test_the_page_answers_to_its_own_name_alone():
    """Else a site whose name points to this machine could read the runs of who visits it."""
    answered = []
    app = own_name_only(lambda environ, start: answered.append(environ["HTTP_HOST"]) or [b"runs"])
    heard = []
    for host in (
        "127.0.0.1:6006",
        "localhost:6006",
        "LOCALHOST:6006",
        "evil.example:6006",
        "127.0.0.1",
        "127.0.0.1:80",
        "",
    ):
        app({"HTTP_HOST": host, "SERVER_PORT": "6006"}, lambda status, headers: heard.append(status))
    app({"SERVER_PORT": "6006"}, lambda status, headers: heard.append(status))
    assert answered == ["127.0.0.1:6006", "localhost:6006", "LOCALHOST:6006"]
    assert heard == ["403 Forbidden"] * 5


def test_a_folder_that_is_not_there_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["ui", str(tmp_path / "none")])
    assert stop.value.code == 2
    assert "is not a folder" in capsys.readouterr().err


def get(url: str):
    with urllib.request.urlopen(url, timeout=60) as answer:
        return answer.read()


@pytest.mark.slow
def test_the_page_shows_a_run_that_grows_to_this_machine_alone(tmp_path):
    runs = tmp_path / "runs"
    grow(runs / "old", {"step": 1, "loss": 3.0, "seconds": 1.0})
    command = [sys.executable, "-m", "inlay", "ui", str(runs), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        url = re.search(r"http://127\.0\.0\.1:\d+/", process.stdout.readline())[0]
        assert b"<title>" in get(url)
        with pytest.raises(urllib.error.HTTPError) as refused:
            get(urllib.request.Request(url, headers={"Host": f"evil.example:{url.split(':')[2].strip('/')}"}))
        assert refused.value.code == 403
        grow(runs / "old", {"step": 2, "loss": 2.0, "seconds": 2.0})
        grow(runs / "new", {"step": 1, "loss": 4.0, "seconds": 1.0})
        shown = {}
        for _ in range(60):
            time.sleep(0.5)
            shown = {run: list(tags) for run, tags in json.loads(get(url + "data/plugin/scalars/tags")).items()}
            if len(shown) == 2:
                values = json.loads(get(url + "data/plugin/scalars/scalars?run=old&tag=loss/training"))
                if len(values) == 2:
                    break
        assert shown == {"old": ["loss/training"], "new": ["loss/training"]}
        assert [value[1:] for value in values] == [[1, 3.0], [2, 2.0]]
        mine = psutil.Process(process.pid)
        opened = [c for p in (mine, *mine.children(recursive=True)) for c in p.net_connections()]
        sockets = [c for c in opened if c.status == "LISTEN"]
        assert sockets
        assert {c.laddr.ip for c in sockets} <= HERE
        assert {c.raddr.ip for c in opened if c.raddr} <= HERE
        process.send_signal(2)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("port", ["-1", "65536", "99999999"])
def test_a_port_that_is_none_is_refused(port, tmp_path, capsys):
    assert f"port {port} is none of 0 to 65535" in fails(capsys, "ui", str(tmp_path), "--port", port)
