"""Starts of many weights: what threads and the cache give is what one thread gives, and a seed means the same."""

import copy
import os
import random
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from inlay.files import cache
from inlay.host import compute_starts
from inlay.host.compute_starts import Job, run_jobs, start_of
from inlay.host.config import InlayConfig
from inlay.methods import METHODS
from inlay.methods.milora import MiLoRA
from inlay.methods.pissa import PiSSA
from inlay.models import builtin
from inlay.numerics import linalg


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("INLAY_CACHE", str(tmp_path))
    monkeypatch.setattr(compute_starts, "COSTLY", 0.0)
    return tmp_path / "starts"


def jobs(method, weights, into):
    return [Job(method, tuple(W.shape), lambda W=W: W, lambda p: into.append(p)) for W in weights]


def alone(method, W):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return method.start(W)
    finally:
        torch.set_num_threads(before)


def test_a_start_that_was_kept_is_of_the_same_formula(folder, monkeypatch):
    """Else what an earlier revision kept would go on as the start of this one."""
    W = torch.randn(40, 30)
    before = start_of(PiSSA(r=4), W)
    assert len(list(folder.glob("*.safetensors"))) == 1
    monkeypatch.setattr(PiSSA, "start", lambda self, W, stats=None: {"A": torch.zeros(4, 30), "B": torch.zeros(40, 4)})
    assert start_of(PiSSA(r=4), W)["A"].abs().max() == 0 < before["A"].abs().max()
    assert len(list(folder.glob("*.safetensors"))) == 2


@pytest.mark.parametrize("method", [PiSSA(r=4), MiLoRA(r=4)])
def test_side_by_side_is_one_after_the_other(method, folder, monkeypatch):
    """Bit for bit, in order, on several threads at once, with the process's settings as they were."""
    weights = [torch.randn(420, 400) for _ in range(5)]
    seen, found, real = set(), [], type(method).start
    barrier = threading.Barrier(2, timeout=60)

    def watched(self, W, stats=None):
        if W is not weights[4]:
            barrier.wait()  # passes only if two run at once
        seen.add((threading.current_thread().name, torch.get_num_threads()))
        return real(self, W, stats)

    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # so many run at once
    precision = torch.backends.cuda.matmul.fp32_precision
    monkeypatch.setattr(type(method), "start", watched)
    run_jobs(jobs(method, weights, found))
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    monkeypatch.undo()
    assert len(found) == 5
    for W, p in zip(weights, found, strict=True):
        for k, v in alone(method, W).items():
            assert torch.equal(p[k], v)
    assert {threads for _, threads in seen} == {1}
    assert torch.backends.cuda.matmul.fp32_precision == precision
    assert torch.is_grad_enabled()


def test_what_does_not_fit_beside_another_waits(folder, monkeypatch):
    monkeypatch.setattr(compute_starts.psutil, "virtual_memory", lambda: type("M", (), {"available": 1}))
    running, most, real = [], [], PiSSA.start

    def watched(self, W, stats=None):
        running.append(1)
        most.append(len(running))
        p = real(self, W, stats)
        running.pop()
        return p

    monkeypatch.setattr(PiSSA, "start", watched)
    found = []
    run_jobs(jobs(PiSSA(r=2), [torch.randn(30, 20) for _ in range(4)], found))
    assert max(most) == 1
    assert len(found) == 4


@pytest.mark.parametrize("method", [m.name for m in METHODS if not m.needs])
@pytest.mark.filterwarnings("ignore:dota. the train of:UserWarning")
def test_a_method_says_whether_its_start_draws(method):
    """Every choice of `init` too: what draws must not be kept, nor wait beside others for its turn."""
    kind = {m.name: m for m in METHODS}[method]
    inits = getattr(kind.__dataclass_fields__.get("init"), "metadata", {}).get("choices", (None,))
    for init in inits:
        cut = kind(**({"init": init} if init else {}))
        state = torch.get_rng_state()
        cut.start(torch.randn(48, 64, generator=torch.Generator().manual_seed(0)))
        assert cut.draws is not torch.equal(state, torch.get_rng_state())


def test_a_seed_means_the_same_with_any_number_of_threads(llama, folder):
    made = []
    own = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(3)
        model = get_peft_model(
            copy.deepcopy(llama), InlayConfig(method="lora", args={"r": 2}, target_modules="all-linear")
        )
        made.append({k: v.clone() for k, v in model.state_dict().items() if "inlay_A" in k})
    torch.set_num_threads(own)
    assert made[0].keys() == made[1].keys()
    for k, v in made[0].items():
        assert torch.equal(v, made[1][k])


def test_nothing_is_computed_twice(folder, monkeypatch):
    W, method = torch.randn(60, 50), PiSSA(r=3)
    first = start_of(method, W)
    assert len(list(folder.glob("*.safetensors"))) == 1
    monkeypatch.setattr(linalg, "top_svd", lambda *a: pytest.fail("computed again"))
    again = start_of(method, W.clone())
    assert list(again) == list(first)
    assert all(torch.equal(again[k], first[k]) for k in first)
    monkeypatch.undo()
    monkeypatch.setenv("INLAY_CACHE", str(folder.parent))
    monkeypatch.setattr(compute_starts, "COSTLY", 0.0)
    for other in (W + 1e-6, W.bfloat16().float()):
        start_of(method, other)
    start_of(PiSSA(r=4), W)
    assert len(list(folder.glob("*.safetensors"))) == 4


def test_what_draws_is_not_kept(folder):
    kind = {m.name: m for m in METHODS}["lora"]
    assert not torch.equal(*(start_of(kind(r=2), torch.ones(9, 8))["A"] for _ in range(2)))
    assert not folder.exists()


@pytest.mark.parametrize("damage", ["bit", "cut", "swapped", "empty"])
def test_a_damaged_entry_is_computed_again(folder, damage):
    W, method = torch.randn(60, 50), PiSSA(r=3)
    first = start_of(method, W)
    (file,) = folder.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    if damage == "bit":
        data[-5] ^= 4
    file.write_bytes({"cut": data[:-9], "empty": b""}.get(damage, data))
    if damage == "swapped":
        save_file({k: v + 1 for k, v in load_file(file).items()}, file)
    again = start_of(method, W)
    assert all(torch.equal(again[k], first[k]) for k in first)


@pytest.mark.parametrize("marks", ['["a"]', "5", "[" * 100_000, '{"a": 5}', "null"])
def test_a_cache_entry_with_odd_marks_is_none(marks, folder):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"a": torch.ones(2)}, folder / "k.safetensors", {"fingerprints": marks})
    assert cache.load("starts", "k") is None


def test_a_cache_that_cannot_be_written_costs_time_only(folder):
    folder.parent.joinpath("starts").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="cannot be written"):
        start_of(PiSSA(r=3), torch.randn(60, 50))


def test_a_cache_that_is_read_only_is_read(folder, monkeypatch):
    first = start_of(PiSSA(r=3), torch.ones(60, 50))
    monkeypatch.setattr(cache.os, "utime", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    monkeypatch.setattr(cache, "store", lambda *_: pytest.fail("computed again"))
    assert all(torch.equal(tensor, first[name]) for name, tensor in start_of(PiSSA(r=3), torch.ones(60, 50)).items())


@pytest.mark.parametrize("where", ["/proc/x", "/dev/null/x", "~nobody-at-all/x", "no home"])
def test_whatever_the_name_of_a_cache_its_loss_costs_time_only(where, monkeypatch, tmp_path):
    """A user without a home, as in a container, gets no folder called ~ either."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INLAY_CACHE", where.replace("no home", ""))
    monkeypatch.setattr(builtin, "gguf_path", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(compute_starts, "COSTLY", 0.0)
    monkeypatch.setattr(os.path, "expanduser", str if where == "no home" else os.path.expanduser)
    with pytest.warns(UserWarning, match=r"cannot be written .* name another folder in INLAY_CACHE"):
        start_of(PiSSA(r=3), torch.randn(60, 50))
    with pytest.raises(ValueError, match=r"cannot be written.*; name another folder in INLAY_CACHE"):
        builtin.model_dir()
    assert not any(tmp_path.iterdir())


def test_the_cache_keeps_to_its_size(folder, monkeypatch):
    monkeypatch.setattr(cache, "LIMIT", 20_000)
    for i in range(12):
        start_of(PiSSA(r=4), torch.randn(100, 100, generator=torch.Generator().manual_seed(i)))
    sizes = [file.stat().st_size for file in folder.glob("*")]
    assert 10_000 < sum(sizes) <= 20_000


def test_a_cache_that_many_use_at_once_gives_what_was_stored_or_nothing(folder, monkeypatch):
    """Entries are written, read and pruned at once; a warning (that it cannot be written) would be an error."""
    monkeypatch.setattr(cache, "LIMIT", 30_000)
    values = [torch.full((1000,), float(i)) for i in range(12)]

    def use(seed: int) -> int:
        draw, found = random.Random(seed), 0
        for _ in range(60):
            i = draw.randrange(len(values))
            kept = cache.load("starts", f"key{i}")
            assert kept is None or torch.equal(kept["x"], values[i])
            found += kept is not None
            cache.store("starts", f"key{i}", {"x": values[i]})
        return found

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(use, range(8))) > 0
    assert 0 < len(list(folder.iterdir())) <= 7


def test_what_a_killed_process_left_in_the_cache_goes_in_a_day(folder):
    folder.mkdir(parents=True)
    for name, age in (("old", 2), ("new", 0)):
        (folder / f".{name}.part").touch()
        os.utime(folder / f".{name}.part", (time.time() - age * cache.DAY,) * 2)
    start_of(PiSSA(r=3), torch.randn(60, 50))
    assert [file.name for file in folder.glob(".*")] == [".new.part"]


def test_a_start_that_fails_stops_the_others_and_leaves_the_model_alone(llama, folder):
    with torch.no_grad():
        llama.model.layers[1].self_attn.v_proj.weight[0, 0] = float("nan")
    before = [name for name, _ in llama.named_modules()]
    with warnings.catch_warnings(), pytest.raises(ValueError, match="NaN"):
        get_peft_model(llama, InlayConfig(method="pissa", args={"r": 2}, target_modules="all-linear"))
    assert [name for name, _ in llama.named_modules()] == before
