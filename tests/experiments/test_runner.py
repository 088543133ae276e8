"""What runs trials counts those that are done, and no others."""

import io
import signal
import threading
import time

import pytest

from inlay.experiments import trial
from inlay.experiments.runner import Runner
from inlay.messages import Terminal


class Trial:
    stop = 4

    def __init__(self, name: str, done: bool) -> None:
        self.name = name
        self.done = done

    def result(self, folder):
        return {"before": 2.0, "after": 1.0, "seconds": 1.0} if self.done else None

    def to_json(self):
        return "{}"


class Endless:
    """A process that only a kill ends; while it runs, the user presses Ctrl-C."""

    exitcode = -9

    def __init__(self) -> None:
        self.killed = threading.Event()
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    def is_alive(self):
        return not self.killed.is_set()

    def join(self, timeout):
        time.sleep(0.01)

    def kill(self):
        self.killed.set()


class Workers:
    jobs = 1

    def begin(self, folder):
        return Endless()


def test_a_trial_that_ctrl_c_ended_is_not_counted(tmp_path):
    console = Terminal(file=io.StringIO(), force_terminal=True, width=80)
    runner = Runner(tmp_path, Workers(), console)
    with pytest.raises(KeyboardInterrupt), runner:
        runner.run([Trial("first", True), Trial("second", False), Trial("third", False)])
    assert runner.bars.tasks[0].completed == 1
    said = console.file.getvalue()
    assert said.index("stopping; ") < said.index("stopped; the same command resumes")
    assert "failed" not in said
    again = Runner(tmp_path, Workers(), console)
    with again:
        again.run([Trial("first", True), Trial("second", True)])
    assert again.bars.tasks[0].completed == 2


def test_a_trial_that_begins_while_ctrl_c_ends_the_others_is_ended_too(tmp_path):
    class Late(Workers):
        def begin(self, folder):
            process = Endless()
            while not runner.ended:
                time.sleep(0.01)
            time.sleep(0.1)  # the others have been ended
            return process

    runner = Runner(tmp_path, Late(), Terminal(file=io.StringIO(), width=80))
    with pytest.raises(KeyboardInterrupt), runner:
        runner.run([Trial("second", False)])


def test_a_trial_ends_with_the_process_that_started_it(monkeypatch):
    class Parent:
        def join(self):
            ends.append("the parent is dead")

    ends = []
    monkeypatch.setattr(trial.multiprocessing, "parent_process", Parent)
    monkeypatch.setattr(trial.os, "_exit", ends.append)
    trial.end_with_parent()
    assert ends == ["the parent is dead", 1]
