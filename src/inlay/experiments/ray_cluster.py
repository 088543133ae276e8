"""Run trials on a Ray cluster: Ray chooses the machine, and restarts a trial whose machine or worker was lost.

Every machine has Inlay installed, and sees the folder in which the command runs, and whatever it names, under the same
path. A trial is a Ray task with a worker of its own; it reads and writes its folder as a local process would.
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
from inlay.experiments.trial import LOG, TRIAL, Places, trial_process
from inlay.messages import check_installed
from inlay.methods import imports
from inlay.recipe.rewards import reward_places

RETRIES = 3  # how often a trial is started again


@dataclass(frozen=True)
class Cluster:
    """Describe where Ray runs and what a trial gets of it.

    Args:
        address: as `ray.init` takes it; empty: RAY_ADDRESS, or a Ray that is started on this machine.
        cpus: cores of a trial.
        gpus: GPUs of a trial, or a part of one; None: one, if the cluster has any.
    """

    address: str = ""
    cpus: int = 1
    gpus: float | None = None


@contextmanager
def workers(jobs: int | None, cluster: Cluster | None, console: Console) -> Iterator[Workers]:
    """Yield the workers that run trials: local processes, or tasks on a `cluster`.

    Args:
        jobs: trials at a time; None: one locally, on a cluster as many as it has room for.
        cluster: None: this machine.
        console: for messages.

    Raises:
        ValueError: `jobs` is below 1, Ray is not installed, or there is no cluster at the address.
    """
    if cluster is None:
        yield Processes(1 if jobs is None else jobs)
        return
    check_installed("--ray", "ray")
    ray: Any = importlib.import_module("ray")
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
    """Run trials as tasks of the Ray that this process is connected to."""

    def __init__(self, ray: Any, jobs: int | None, cluster: Cluster, console: Console) -> None:
        gpus = float("GPU" in ray.cluster_resources()) if cluster.gpus is None else cluster.gpus
        needs = {"CPU": cluster.cpus, "GPU": gpus}
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        slots = [min(m.get(k, 0) // n for k, n in needs.items() if n) for m in machines]
        room = int(sum(slots))
        self.jobs = max(1, room) if jobs is None else jobs
        if self.jobs < 1:
            raise ValueError(f"jobs: {jobs} is below 1")
        each = f"{cluster.cpus} CPUs and {gpus:g} GPUs for each"
        console.print(f"Ray: {len(machines)} machines, room for {room} trials at a time, {each}")
        if not room:
            console.print("no machine of the cluster has as much free now; trials wait for one", style="yellow")
        # One call per worker process, so that the peak memory is that of one trial.
        self.task = ray.remote(num_cpus=cluster.cpus, num_gpus=gpus, max_retries=RETRIES, max_calls=1)(attempt)
        self.ray = ray
        self.cpus = cluster.cpus

    def begin(self, folder: Path) -> RayTrial:
        """Submit the trial of a folder to Ray."""
        return RayTrial(
            self.ray,
            self.task.remote(str(folder.absolute()), os.getcwd(), self.cpus, imports(), reward_places()),
            folder,
        )


def attempt(folder: str, here: str, threads: int, modules: Places, rewards: Places) -> None:
    """Run a trial in a Ray worker from its beginning, after deleting what an earlier attempt left."""
    os.chdir(here)
    for path in Path(folder).iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != TRIAL:
            path.unlink()
    trial_process(Path(folder), threads, modules, rewards)


class RayTrial:
    """Represent a trial that Ray runs, with the interface of a process that `Runner` uses."""

    def __init__(self, ray: Any, reference: Any, folder: Path) -> None:
        self.ray = ray
        self.reference = reference
        self.folder = folder

    def is_alive(self) -> bool:
        """Return whether the trial waits or runs, at any attempt."""
        return not self.ray.wait([self.reference], timeout=0)[0]

    def join(self, timeout: float) -> None:
        """Wait at most `timeout` seconds for the end of the trial."""
        self.ray.wait([self.reference], timeout=timeout)

    def kill(self) -> None:
        """End the trial without restarting it."""
        self.ray.cancel(self.reference, force=True)

    @property
    def exitcode(self) -> int:
        """Return 0, 1 for the trial's own error, or -9 where its worker was lost; append Ray's message to the log."""
        try:
            self.ray.get(self.reference)
        except self.ray.exceptions.RayError as error:
            with (self.folder / LOG).open("a", encoding="utf-8") as log:
                log.write(f"{error}\n")
            return 1 if isinstance(error, self.ray.exceptions.RayTaskError) else -9
        return 0
