"""Trials on a Ray cluster: Ray chooses the machine, and begins a trial again whose machine or worker was lost.

Every machine has Inlay installed, and sees the folder that the command is given in, and whatever it names, under the
same path. A trial is a task of Ray's with a worker of its own; it reads and writes its folder as a process here would.
"""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from inlay.experiments.runner import Processes, Workers
from inlay.experiments.trial import LOG, TRIAL, trial_process

RETRIES = 3  # how often a trial is begun again


@dataclass(frozen=True)
class Cluster:
    """Where Ray runs and what a trial gets of it.

    Args:
        address: as `ray.init` takes it; empty: what RAY_ADDRESS says, or a Ray that is started on this machine.
        cpus: cores of a trial.
        gpus: GPUs of a trial, or a part of one; None: one, if the cluster has any.
    """

    address: str = ""
    cpus: int = 1
    gpus: float | None = None


@contextmanager
def workers(jobs: int | None, cluster: Cluster | None, console: Console) -> Iterator[Workers]:
    """What runs trials: processes of this machine (one at a time, unless `jobs` says more), or a cluster, where
    without `jobs` there are as many at a time as it has room for.

    Raises:
        ValueError: `jobs` is below 1, Ray is not installed, or there is no cluster at the address.
    """
    if cluster is None:
        yield Processes(1 if jobs is None else jobs)
        return
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError:
        raise ValueError("--ray needs Ray; pip install 'inlay[ray]'") from None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(cluster.address or None, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ValueError(f"ray: {cluster.address or 'a local Ray'} cannot be reached: {error}") from None
    try:
        yield RayWorkers(ray, jobs, cluster, console)
    finally:
        ray.shutdown()


class RayWorkers:
    """Trials as tasks of the Ray that this process is connected to."""

    def __init__(self, ray: Any, jobs: int | None, cluster: Cluster, console: Console) -> None:
        has = ray.cluster_resources()
        gpus = float("GPU" in has) if cluster.gpus is None else cluster.gpus
        asked = {"CPU": cluster.cpus, "GPU": gpus}
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        fits = [min(m.get(k, 0) // n for k, n in asked.items() if n) for m in machines]
        room = int(sum(fits))
        self.jobs = max(1, room) if jobs is None else jobs
        if self.jobs < 1:
            raise ValueError(f"jobs: {jobs} is below 1")
        each = f"{cluster.cpus} CPUs and {gpus:g} GPUs for each"
        console.print(f"Ray: {len(machines)} machines, room for {room} trials at a time, {each}")
        if not room:
            console.print("no machine of the cluster has so much now; trials wait for one", style="yellow")
        # One call and no more, so that a trial's peak memory is its own.
        self.task = ray.remote(num_cpus=cluster.cpus, num_gpus=gpus, max_retries=RETRIES, max_calls=1)(attempt)
        self.ray, self.cpus = ray, cluster.cpus

    def begin(self, folder: Path) -> RayTrial:
        """Give Ray the trial of a folder."""
        return RayTrial(self.ray, self.task.remote(str(folder.absolute()), os.getcwd(), self.cpus), folder)


def attempt(folder: str, here: str, threads: int) -> None:
    """What a worker of Ray's does: a trial from its beginning, whatever an earlier attempt left."""
    os.chdir(here)
    for left in Path(folder).iterdir():
        if left.is_dir():
            shutil.rmtree(left)
        elif left.name != TRIAL:
            left.unlink()
    trial_process(Path(folder), threads)


class RayTrial:
    """A trial that Ray runs, with what `Runner` asks of a process."""

    def __init__(self, ray: Any, reference: Any, folder: Path) -> None:
        self.ray, self.reference, self.folder = ray, reference, folder

    def is_alive(self) -> bool:
        """Whether it waits or runs, at whichever attempt."""
        return not self.ray.wait([self.reference], timeout=0)[0]

    def join(self, timeout: float) -> None:
        """Wait for its end, so many seconds at most."""
        self.ray.wait([self.reference], timeout=timeout)

    def kill(self) -> None:
        """End it, and do not begin it again."""
        self.ray.cancel(self.reference, force=True)

    @property
    def exitcode(self) -> int:
        """0, 1 for an error of its own, -9 where its worker was lost; what Ray says of it goes into its log."""
        try:
            self.ray.get(self.reference)
        except self.ray.exceptions.RayError as error:
            with (self.folder / LOG).open("a", encoding="utf-8") as log:
                log.write(f"{error}\n")
            return 1 if isinstance(error, self.ray.exceptions.RayTaskError) else -9
        return 0
