"""Ctrl-C and SIGTERM: a run ends after the step it is in, with a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from inlay.host import distributed
from inlay.training import checkpoints

HEARD = b"\ninlay: stopping after this step, with a checkpoint; press Ctrl-C again to stop now\n"


class Stop(TrainerCallback):
    """End a run on Ctrl-C or SIGTERM after its step, with a checkpoint; at once on a second one."""

    requested = False

    def __enter__(self) -> Stop:
        here = threading.current_thread() is threading.main_thread()  # elsewhere Python takes no handlers
        self.before = {s: signal.signal(s, self._hear) for s in (signal.SIGINT, signal.SIGTERM) if here}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        if distributed.is_first():  # by the system's own call: the handler may run within a print
            os.write(2, HEARD)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find the best checkpoint where the run folder is now."""
        if state.best_global_step:  # the run folder may have moved
            state.best_model_checkpoint = str(checkpoints.path_of(Path(args.output_dir), state.best_global_step))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Request a checkpoint if any process was told to stop."""
        self.requested = distributed.in_any(self.requested)  # or one would wait for the others in what they do not do
        control.should_save = control.should_save or self.requested
        control.should_log = control.should_log or control.should_save  # so that no mean over steps is cut in two

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the run that was told to stop, now that its checkpoint is written."""
        if self.requested:
            raise KeyboardInterrupt
