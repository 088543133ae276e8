"""Start `inlay train --num-processes N` through accelerate, and report which process failed."""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from inlay.files.untrusted import regular_file
from inlay.host.distributed import launched
from inlay.messages import show_text

PLAIN = "{compute_environment: LOCAL_MACHINE, distributed_type: MULTI_GPU, num_machines: 1, mixed_precision: 'no'}\n"

LAUNCHER = "INLAY_LAUNCHER"  # the process that starts the others, for these


def launch(arguments: Sequence[str], count: int, config: str | None) -> int:
    """Run `inlay` with these arguments in `count` processes, and return the exit code.

    Args:
        arguments: of the command line.
        count: of processes.
        config: a YAML file of accelerate's (recipes/distributed has some); None: DDP.

    Raises:
        ValueError: the file does not exist, or accelerate refuses it.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser

    if config is not None and not regular_file(Path(config)).is_file():
        raise ValueError(f"launch_config {config} does not exist; recipes/distributed has some to start from")
    launcher_flags = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    for flag in ("--num-processes", "--launch-config"):
        launcher_flags.add_argument(flag)
    rest = launcher_flags.parse_known_args(list(arguments))[1]
    # Otherwise each process would use all cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
    os.environ[LAUNCHER] = str(os.getpid())
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it would repeat the error at length
    with tempfile.TemporaryDirectory() as folder:
        if config is None:  # without a file accelerate would use the user's own default
            config = f"{folder}/ddp.yaml"
            Path(config).write_text(PLAIN, encoding="utf-8")
        flags = ["--config_file", config, "--num_processes", str(count), "--main_process_port", "0"]
        try:
            launch_command(launch_command_parser().parse_args([*flags, "-m", "inlay", *rest]))
        except ChildFailedError as error:
            return failed(dict(error.failures))
        except SignalException:
            return 130
    return 0


def end_with_launcher() -> None:
    """End this process within a second after the one that launched it was killed, so that it does not hold the lock."""
    launcher = os.environ.get(LAUNCHER)
    parent = os.getppid()
    if launcher is None or not launched():
        return

    def watch() -> None:
        while os.getppid() == parent and psutil.pid_exists(int(launcher)):
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def failed(failures: dict[int, ProcessFailure]) -> int:
    """Return the exit code of a run, after printing which process ended it where it could not do so itself."""
    signalled = {rank: failure for rank, failure in failures.items() if failure.exitcode < 0}
    rank, first = next(iter((signalled or failures).items()))
    if not signalled:
        codes = {failure.exitcode for failure in failures.values()}
        return next((code for code in (2, 130, 3, 1) if code in codes), first.exitcode)
    hint = "a run that has checkpoints can be resumed with inlay train --resume RUN"
    show_text(
        f"inlay: process {rank} was ended by {first.signal_name()}, and the others with it; {hint}", to_stderr=True
    )
    return 1
