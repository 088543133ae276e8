"""Write the files that a finished run leaves in its folder."""

from __future__ import annotations

import json
from pathlib import Path

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from inlay.files.atomic import new_folder, write_text
from inlay.files.untrusted import read_regular
from inlay.host.config import InlayConfig
from inlay.inspection.change_plots import draw_change_plots
from inlay.inspection.changes import CHANGES, WeightChange, changes, changes_as_data
from inlay.inspection.figures import plot_text
from inlay.inspection.inspect_adapter import changes_of_fold
from inlay.models.adapters import CONFIG
from inlay.models.base import BaseModel
from inlay.models.builtin import FOLDER, MODEL, model_dir
from inlay.models.model_classes import SEQUENCE, find_model_class
from inlay.models.stored_weights import Weights
from inlay.recipe.recipe import Recipe
from inlay.reports.model_card import model_card
from inlay.reports.result import Result
from inlay.reports.run_page import page_title, run_page, samples_text
from inlay.reports.run_plots import run_figures
from inlay.training.tasks import TASKS

PAGE = "report.html"  # written last
State = dict[str, Tensor]


def write_trained(recipe: Recipe, folder: Path, model: PeftModel | PreTrainedModel, state: State | None) -> None:
    """Write the adapter (or the whole model) into a run folder, as soon as it is trained.

    Args:
        recipe: of the run.
        folder: of the run.
        model: that was trained.
        state: the state dict to save of a model that is sharded.
    """
    marker = "adapter_config.json" if isinstance(model, PeftModel) else "config.json"
    with new_folder(folder / recipe.kept, overwrite=True, marker=marker) as part:
        if isinstance(model, PeftModel):  # DPO may hold another adapter as the reference
            model.save_pretrained(str(part), state_dict=state, selected_adapters=["default"])
            name_builtin_base(part)
            if recipe.chat_template is not None:
                TASKS[recipe.task].processor(recipe).save_pretrained(str(part))
        else:
            model.save_pretrained(str(part), state_dict=state)
            TASKS[recipe.task].processor(recipe).save_pretrained(str(part))
        if find_model_class(recipe.task).peft == SEQUENCE:
            model.config.save_pretrained(str(part))  # holds the labels


def name_builtin_base(folder: Path) -> None:
    """Let the adapter in a folder name the built-in model as such, not by where this machine keeps it."""
    file = folder / CONFIG
    if not file.is_file():
        return
    values = json.loads(read_regular(file))
    named = values.get("base_model_name_or_path")
    if isinstance(named, str) and Path(named).name.startswith(FOLDER) and named == str(model_dir()):
        write_text(file, json.dumps({**values, "base_model_name_or_path": MODEL}, indent=2, sort_keys=True))


def write_page(result: Result, base: BaseModel, model: PeftModel | PreTrainedModel, whole: bool) -> None:
    """Write the model card, the samples, the plots and the report of a run whose adapter is saved.

    Args:
        result: of the run.
        base: of the run.
        model: that was trained.
        whole: whether this process holds whole weights, which are compared with the base's.
    """
    write_text(result.folder / result.recipe.kept / "README.md", model_card(result))
    (result.folder / "plots").mkdir(exist_ok=True)
    changed: dict[str, WeightChange] = {}
    config = model.peft_config["default"] if isinstance(model, PeftModel) else None
    if isinstance(config, InlayConfig) and config.folded:
        changed = changes_of_fold(result.folder / result.recipe.kept)
    elif whole:
        products = 4 * result.base_parameters * result.tokens  # at least: forward, and backward through activations
        changed = changes(model, lambda: weights_of(result.recipe, base), products)
    plots = draw_change_plots(run_figures(result, changed, plot_text(page_title(result))), result.folder / "plots")
    if changed:
        write_text(result.folder / CHANGES, json.dumps(changes_as_data(changed), indent=1))
    write_text(result.folder / "samples.md", samples_text(result))
    write_text(result.folder / PAGE, run_page(result, plots, changed))


def weights_of(recipe: Recipe, base: BaseModel) -> Weights:
    """Return what the checkpoint of a recipe's model stores."""
    return base.weights(find_model_class(recipe.task).auto)
