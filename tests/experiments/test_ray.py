"""Trials on Ray: refused in one line where it is not there, and on a cluster of two nodes what one machine finds."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from inlay.cli import main

HERE = Path(__file__).parent.parent
ASKED = {
    "steps": 60, "batch_size": 2, "eval_size": 4, "dtype": "float32", "eval_every": 30,
    "compare": {
        "methods": [{"method": m, "args": {"r": 2}} for m in ("lora", "bone")],
        "learning_rates": [1e-3], "seeds": [0],
        "selection": 4,
    },
}  # fmt: skip


@pytest.fixture
def asked(tiny, records, tmp_path) -> str:
    (tmp_path / "small.yaml").write_text(yaml.safe_dump({"model": tiny, "data": records, **ASKED}))
    return str(tmp_path / "small.yaml")


def test_without_ray_a_line_says_what_to_install(asked, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit) as end:
        main(["compare", asked, "--output", str(tmp_path / "out"), "--ray"])
    assert end.value.code == 2
    assert capsys.readouterr().err == "inlay: --ray needs ray; pip install 'inlay[ray]'\n"


@pytest.mark.parametrize("verb", ["compare", "tune"])
def test_what_is_rays_needs_ray(verb, capsys):
    with pytest.raises(SystemExit) as end:
        main([verb, "any.yaml", "--gpus", "0.5"])
    assert end.value.code == 2
    assert "give --ray too" in capsys.readouterr().err


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(HERE.parent / "src"), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "RAY_USAGE_STATS_ENABLED": "0"}


def numbers(result: dict) -> dict[str, float]:
    return {name: value for name, value in result.items() if not isinstance(value, list | dict)}


@pytest.fixture
def cluster(monkeypatch):
    """Two nodes of one core, as processes of this machine."""
    for key, value in environment().items():
        monkeypatch.setenv(key, value)  # of which the nodes make their workers
    from ray.cluster_utils import Cluster

    made = Cluster()
    for _ in range(2):
        made.add_node(num_cpus=1, num_gpus=0, object_store_memory=100 * 2**20, include_dashboard=False)
    yield made
    made.shutdown()


def worker(log: Path, but: int = 0) -> psutil.Process | None:
    """The process that writes a trial's log."""
    for process in psutil.process_iter():
        try:
            if process.pid != but and any(file.path == str(log) for file in process.open_files()):
                return process
        except psutil.Error:
            continue
    return None


def results(folder: Path) -> dict[str, dict]:
    """What trials found, without what they cost."""
    found = {str(p.parent.relative_to(folder)): json.loads(p.read_text()) for p in folder.rglob("result.json")}
    costs = ("seconds", "seconds_per_step", "memory")
    return {name: {k: v for k, v in result.items() if k not in costs} for name, result in found.items()}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray")
@pytest.mark.filterwarnings("default")  # ray's own
def test_a_killed_worker_s_trial_is_retried_and_the_results_are_those_of_one_machine(asked, cluster, tmp_path):
    """Two nodes, a trial on each; `kill -9` for the worker of one while it trains."""
    command = [sys.executable, "-m", "inlay", "compare", asked, "--output"]
    begun = subprocess.Popen(
        [*command, str(tmp_path / "ray"), "--ray", cluster.address],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(),
    )  # fmt: skip
    lora, bone = (tmp_path / "ray" / "runs" / name / "lr-0.001-seed-0-60-of-60-final" for name in ("lora", "bone"))
    while not ((lora / "metrics.jsonl").exists() and (bone / "log.txt").exists()) and begun.poll() is None:
        time.sleep(0.02)
    killed = worker(lora / "log.txt")
    assert killed is not None, begun.communicate()[0]
    other = worker(bone / "log.txt")
    nodes = {killed.ppid(), other.ppid() if other else 0}
    killed.kill()
    assert not (lora / "result.json").exists()
    assert len(nodes) == 2
    second = None
    while second is None and begun.poll() is None:
        second = worker(lora / "log.txt", but=killed.pid)
    said = begun.communicate(timeout=300)[0]
    assert second is not None, said
    assert begun.returncode == 0, said
    assert "Ray: 2 machines, room for 2 trials at a time" in said
    assert "attempt failed. There are 3 retries remaining" in " ".join(said.split())
    assert "-final failed" not in said
    steps = [json.loads(line)["step"] for line in (lora / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)  # of one attempt
    subprocess.run(
        [*command, str(tmp_path / "here"), "--jobs", "2"], check=True, capture_output=True, env=environment()
    )
    found, expected = results(tmp_path / "ray"), results(tmp_path / "here")
    assert found.keys() == expected.keys()
    for name in found:
        curve, wanted = found[name].pop("curve"), expected[name].pop("curve")
        assert [loss for _, loss in curve] == pytest.approx([loss for _, loss in wanted], rel=1e-5)
        assert numbers(found[name]) == pytest.approx(numbers(expected[name]), rel=1e-5)
        sizes = [[c["size"] for c in r[name].get("changes", {}).values()] for r in (found, expected)]
        assert sizes[0] == pytest.approx(sizes[1], rel=1e-3)
