"""One thread that answers, a batch at a time; what comes meanwhile waits in line."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from inlay.evaluation.growing import Growing, grow
from inlay.evaluation.sampling import Sampling
from inlay.messages import first_line
from inlay.serving.served import Served

WAITING = 1024  # requests in line at most


class BusyError(Exception):
    """Say that no more requests are taken, as too many wait or the endpoint is stopping."""


@dataclass(eq=False)
class Queued:
    """Hold one request: who answers what, and whom to tell.

    Attributes:
        served: the model that answers.
        prompt: its tokens.
        answer: which tells of every new piece itself.
        sampling: how its tokens are chosen.
        ended: called when the answer has ended, with the error's line, or an empty text where there was none.
    """

    served: Served
    prompt: list[int]
    answer: Growing
    sampling: Sampling
    ended: Callable[[str], object]

    def goes_with(self, other: Queued) -> bool:
        """Return whether two requests may be answered in one batch: one model, and draws of nobody's own seed."""
        return self.served is other.served and self.sampling == other.sampling and self.sampling.seed is None


class Worker:
    """Answer requests in a thread: the oldest, and those behind it that can go in one batch with it.

    Args:
        size: requests of a batch at most.
        waiting: requests in line at most.
    """

    def __init__(self, size: int, waiting: int = WAITING) -> None:
        self.size = size
        self.most = waiting
        self.stopping = False
        self._line: deque[Queued] = deque()
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="answers", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self) -> None:
        """Answer nobody any more, and wait until the batch in progress has seen it."""
        with self._news:
            self.stopping = True
            self._news.notify()
        self._thread.join()

    def submit(self, job: Queued) -> None:
        """Put a request in line.

        Raises:
            BusyError: the line is full, or the endpoint is stopping.
        """
        with self._news:
            if self.stopping or len(self._line) >= self.most:
                raise BusyError("the server is stopping" if self.stopping else f"{self.most} requests are waiting")
            self._line.append(job)
            self._news.notify()

    def _run(self) -> None:
        while jobs := self._take():
            error = ""
            try:
                self._answer(jobs)
            except Exception as raised:  # of one batch: the next ones are answered
                error = first_line(raised)
            for job in jobs:
                job.ended(error)

    def _take(self) -> list[Queued]:
        """Wait for requests and return those of the next batch; none when the endpoint stops."""
        with self._news:
            self._news.wait_for(lambda: self._line or self.stopping)
            if self.stopping:
                for job in self._line:
                    job.ended("the server is stopping")
                self._line.clear()
                return []
            first = self._line.popleft()
            jobs = [first, *[job for job in self._line if job.goes_with(first)][: self.size - 1]]
            self._line = deque(job for job in self._line if job not in jobs)
            return jobs

    def _answer(self, jobs: list[Queued]) -> None:
        wanted = [job for job in jobs if not job.answer.cancelled()]
        if not wanted:
            return
        first = wanted[0]
        source = first.served.source
        devices = list(range(torch.cuda.device_count()))
        with first.served.active(), torch.random.fork_rng(devices, enabled=first.sampling.seed is not None):
            first.sampling.start()
            prompts, answers = [job.prompt for job in wanted], [job.answer for job in wanted]
            grow(source.model, source.tokenizer, prompts, answers, first.sampling)
