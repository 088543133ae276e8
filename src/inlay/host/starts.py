"""Starts of many weights: side by side on the cores of a CPU, and none computed twice.

Each decomposition has one core to itself: its products are too thin to share, and so its digits do not depend on how
many cores there are. One that took long is kept in the cache, under the content of its weight and the method.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import psutil
import torch
from torch import Tensor

from inlay import cache, linalg
from inlay._version import __version__
from inlay.method import Method, Params

COSTLY = 0.01  # seconds from which on a start is kept
COPIES = 8  # fp32 copies of its weight that a decomposition holds, at most


class Job(NamedTuple):
    """A start to compute: `read` gives W (out × in) in fp32, `done` takes θ₀; `stats`: what its method asked to see."""

    method: Method
    read: Callable[[], Tensor]
    done: Callable[[Params], None]
    stats: Params | None = None


@torch.no_grad()
def compute(jobs: Iterable[Job]) -> None:
    """Do the jobs. The caller's thread reads weights and takes results in order, as far ahead as cores and memory go.

    A start that draws random numbers waits for its turn, so that a seed means the same everywhere.
    """
    cores = torch.get_num_threads()
    waiting: deque[tuple[Job, Future[Params]]] = deque()

    def finish(most: int) -> None:
        while len(waiting) > most:
            job, future = waiting.popleft()
            job.done(future.result())

    pool = ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,))
    # Precision is a setting of the process: threads that each set it and put it back would leave it wrong.
    with linalg.full_precision(torch.device("cpu")), pool:
        try:
            for job in jobs:
                W = job.read()
                if W.device.type != "cpu" or job.method.draws:
                    finish(0)
                    job.done(start(job.method, W, job.stats))
                    continue
                room = psutil.virtual_memory().available // (COPIES * W.nbytes + 1)
                finish(max(0, min(cores, room) - 1))
                waiting.append((job, pool.submit(start, job.method, W, job.stats)))
            finish(0)
        finally:
            for _, future in waiting:
                future.cancel()


def start(method: Method, W: Tensor, stats: Params | None = None) -> Params:
    """method.start(W, stats), or what it was when it was last computed of the same weight alone."""
    if method.draws or stats:
        return method.start(W, stats)
    about = f"{method!r} {W.device.type} {__version__} {torch.__version__}"
    key = f"{hashlib.sha256(about.encode()).hexdigest()[:16]}-{cache.fingerprint(W)}"
    if (found := cache.load("starts", key)) is not None:
        return {name: tensor.to(W.device) for name, tensor in found.items()}
    began = time.perf_counter()
    made = method.start(W)
    if time.perf_counter() - began > COSTLY:
        cache.store("starts", key, made)
    return made
