"""What each process of tests/training/test_distributed.py does: the runs that a JSON file lists, one by one."""

import gc
import json
import os
import signal
import sys
from pathlib import Path

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from rich.console import Console

from inlay.host import compute_starts, distributed
from inlay.messages import quiet
from inlay.recipe.recipe import Recipe
from inlay.training.progress import RunProgress
from inlay.training.train import train, unfinished

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT", "FSDP_OFFLOAD_PARAMS": "false",
}  # fmt: skip
CONFIG = str(Path(sys.argv[1]).with_name("zero3"))
ZERO3 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": CONFIG}
ENGINES = {"ddp": {}, "fsdp2": FSDP2, "zero3": ZERO3}
os.environ["DS_ACCELERATOR"] = "cpu"
rank, computed, compute = int(os.environ["RANK"]), [], compute_starts.start_of
quiet()


def counted(method, W, stats=None):
    computed.append(method.name)
    return compute(method, W, stats)


def at_step(step: int | None, what) -> None:
    """Do something once, when a step begins."""

    def once(self, args, state, control, model=None, **kwargs):
        if state.global_step == step:
            what(model)

    RunProgress.on_step_begin = once


def spoil(model) -> None:
    """NaN in one gradient of one process, through a layer's output: FSDP2 passes by hooks on parameters."""

    def hook(layer, args, output):
        output.register_hook(lambda slope: slope * float("nan")) if output.requires_grad else None

    next(m for n, m in model.named_modules() if n.endswith("layers.1.mlp.down_proj")).register_forward_hook(hook)


compute_starts.start_of = counted
PartialState(cpu=True)  # one group for all runs: torch's store remembers the addresses of the first
for number, run in enumerate(json.loads(Path(sys.argv[1]).read_text())):
    computed.clear()
    gc.collect()  # while a trainer lives on, transformers takes its ZeRO-3 for that of the next model
    for key in (*FSDP2, *ZERO3):
        os.environ.pop(key, None)
    os.environ.update(ENGINES[run["engine"]])
    at_step(None, None)
    if rank == run.get("rank", 1):
        if "interrupt" in run:
            at_step(run["interrupt"], lambda _: os.kill(os.getpid(), signal.SIGINT))
        if "spoil" in run:
            at_step(run["spoil"], spoil)
    said = "done"
    AcceleratorState._reset_state()
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU
    distributed.allow_sharding(PartialState())
    recipe = Recipe(**run["recipe"])
    if resume := run.get("resume", False):
        recipe = unfinished(Path(str(recipe.output)), {"accumulation": recipe.accumulation})
    try:  # what fails, fails in both, and both go on with the next run
        train(recipe, Console(quiet=True), resume=resume)
    except (ValueError, KeyboardInterrupt, distributed.Elsewhere) as error:
        said = f"{type(error).__name__}: {error}"
    about = {"said": said, "starts": len(computed)}
    Path(sys.argv[1]).with_name(f"{number}-{rank}.json").write_text(json.dumps(about))
