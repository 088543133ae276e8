"""Starts of many weights: side by side on the cores of a CPU and in the processes of a run, and none computed twice.

Each decomposition has one core to itself: its products are too thin to share, and so its digits do not depend on how
many cores there are. One that took long is kept in the cache, under the content of its weight and the method.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import psutil
import torch
from accelerate import PartialState
from torch import Tensor

from inlay._version import __version__
from inlay.files import cache
from inlay.host import distributed
from inlay.method import Method, Params
from inlay.numerics import linalg

COSTLY = 0.01  # seconds from which on a start is kept
COPIES = 8  # fp32 copies of its weight that a decomposition holds, at most
_sharing = False


class Job(NamedTuple):
    """Describe a start to compute: `read` gives W, of `shape` (out, in), in fp32; `done` takes θ₀.

    `stats`: what its method has seen. `seed`: of what it draws; None: torch's generator draws.
    """

    method: Method
    shape: tuple[int, int]
    read: Callable[[], Tensor]
    done: Callable[[Params], None]
    stats: Params | None = None
    seed: int | None = None


@contextmanager
def shared_starts() -> Iterator[None]:
    """Let each process of a run compute its share of the starts in this block, and give the others what it computed.

    Every process must adapt the same model. Nothing does so by default: a process that adapts a model alone would wait
    for ever.
    """
    global _sharing
    before, _sharing = _sharing, distributed.process_count() > 1
    try:
        yield
    finally:
        _sharing = before


@torch.no_grad()
def run_jobs(jobs: Iterable[Job]) -> None:
    """Compute the starts of `jobs`. The caller's thread reads weights and takes results in order, as memory allows.

    A start that draws random numbers waits for its turn, so that a seed means the same everywhere.
    """
    cores = torch.get_num_threads()
    ranks, rank = (distributed.process_count(), PartialState().process_index) if _sharing else (1, 0)
    waiting: deque[tuple[Job, int, Future[Params] | None]] = deque()

    def finish(most: int) -> None:
        while len(waiting) > most:
            job, owner, future = waiting.popleft()
            take(job, future and future.result(), owner)

    def take(job: Job, start: Params | None, owner: int) -> None:
        if ranks > 1:
            start = distributed.broadcast_tensors(blank_start(job) if start is None else start, owner)
        assert start is not None
        job.done(start)

    pool = ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,))
    # Precision is a setting of the process: threads that each set it and put it back would leave it wrong.
    with linalg.full_precision(torch.device("cpu")), pool:
        try:
            for number, job in enumerate(jobs):
                if job.method.draws:  # in every process, so that their generators stay in step
                    finish(0)
                    take(job, drawn_start(job), 0)
                    continue
                owner = number % ranks
                if owner == 0:
                    room = psutil.virtual_memory().available // (COPIES * 4 * job.shape[0] * job.shape[1] + 1)
                    finish(ranks * max(0, min(cores, room) - 1))
                future = None
                if owner == rank:
                    W = on_device(job.read())
                    if W.device.type == "cpu":
                        future = pool.submit(start_of, job.method, W, job.stats)
                    else:
                        if ranks == 1:
                            finish(0)
                        future = Future()
                        future.set_result(start_of(job.method, W, job.stats))
                waiting.append((job, owner, future))
            finish(0)
        finally:
            for _, _, future in waiting:
                if future:
                    future.cancel()


def drawn_start(job: Job) -> Params:
    """Compute a start that draws; with a seed on the CPU, so that it is the same on every device."""
    if job.seed is None:
        return start_of(job.method, on_device(job.read()), job.stats)
    W, before = job.read(), torch.default_generator.get_state()
    torch.default_generator.manual_seed(job.seed)
    try:
        return start_of(job.method, W.cpu(), job.stats)
    finally:
        torch.default_generator.set_state(before)


def on_device(W: Tensor) -> Tensor:
    """Return a weight where this process computes: a model that is to be sharded still lies on the CPU."""
    return W.to(PartialState().device) if _sharing else W


def blank_start(job: Job) -> Params:
    """Return empty tensors for a start that another process computes."""
    shapes = job.method.start(torch.empty(job.shape, device="meta"))
    return {name: torch.empty_like(shape, device=PartialState().device) for name, shape in shapes.items()}


def start_of(method: Method, W: Tensor, stats: Params | None = None) -> Params:
    """Return `method.start(W, stats)`, from the cache where it was computed of the same weight alone before."""
    if method.draws or stats:
        return method.start(W, stats)
    code = type(method).start.__code__  # two revisions of one version may start differently
    formula = hashlib.sha256(f"{code.co_code.hex()} {code.co_names}".encode()).hexdigest()
    place = method.place if method.shared else None
    about = f"{method!r} {formula} {place} {W.device.type} {__version__} {torch.__version__}"
    key = f"{hashlib.sha256(about.encode()).hexdigest()[:16]}-{cache.fingerprint(W)}"
    if (cached := cache.load("starts", key)) is not None:
        return {name: tensor.to(W.device) for name, tensor in cached.items()}
    began = time.perf_counter()
    start = method.start(W)
    if time.perf_counter() - began > COSTLY:
        cache.store("starts", key, start)
    return start
