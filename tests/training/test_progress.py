"""What a person sees while a run trains: the time left, however slow its steps, and that Ctrl-C was heard."""

import io
import os
import signal
from types import SimpleNamespace

import pytest

from inlay.messages import Terminal
from inlay.training.progress import RunProgress
from inlay.training.trainers.stop import HEARD, Stop


@pytest.mark.parametrize("width", [60, 80, 140])
def test_slow_steps_show_the_time_left(tmp_path, width):
    now = [0.0]
    file = io.StringIO()
    console = Terminal(
        file=file, width=width, force_terminal=True, color_system=None, get_time=lambda: now[0], legacy_windows=False
    )
    progress = RunProgress(tmp_path, console)
    state = SimpleNamespace(global_step=0, max_steps=1_200, log_history=[], num_input_tokens_seen=0)
    progress.on_train_begin(None, state, None)
    for step in range(1, 4):
        now[0] += 45.0
        state.global_step = step
        progress.on_log(None, state, None, {"loss": 2.5, "num_tokens": 12_345 * step})
    progress.bar.refresh()
    progress.on_train_end(None, state, None)
    last = [line for line in file.getvalue().replace("\r", "\n").splitlines() if "training" in line][-1]
    assert "3/1200" in last
    assert "14:57:45" in last  # 1,197 steps of 45 seconds
    assert "loss 2.500" in last


def test_the_first_ctrl_c_answers_at_once_and_the_second_stops(capfd):
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        assert capfd.readouterr().err == HEARD.decode()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert capfd.readouterr().err == ""
