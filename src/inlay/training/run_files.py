"""The files that a finished run leaves in its folder."""

from __future__ import annotations

import json

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from inlay.files.atomic import new_folder, write_text
from inlay.inspection.change_plots import draw_change_plots
from inlay.inspection.changes import CHANGES, WeightChange, changes, changes_as_data
from inlay.inspection.inspect_adapter import changes_of_fold
from inlay.models.model_classes import SEQUENCE, find_model_class
from inlay.models.stored_weights import Weights
from inlay.recipe.recipe import Recipe
from inlay.reports.model_card import model_card
from inlay.reports.result import Result
from inlay.reports.run_page import page_title, run_page, samples_text
from inlay.reports.run_plots import run_figures
from inlay.training.tasks import TASKS

PAGE = "report.html"  # what a run writes last


def write_run(result: Result, model: PeftModel | PreTrainedModel, state: dict[str, Tensor] | None = None) -> None:
    """The adapter (or the whole model) with its card, the samples, the plots and the report; `state`: what to save of a
    model that is sharded."""
    kept = result.folder / result.recipe.kept
    marker = "adapter_config.json" if isinstance(model, PeftModel) else "config.json"
    with new_folder(kept, overwrite=True, marker=marker) as part:
        if isinstance(model, PeftModel):  # DPO may keep another adapter as the reference
            model.save_pretrained(str(part), state_dict=state, selected_adapters=["default"])
            if result.recipe.chat_template is not None:
                TASKS[result.recipe.task].processor(result.recipe).save_pretrained(str(part))
        else:
            model.save_pretrained(str(part), state_dict=state)
            TASKS[result.recipe.task].processor(result.recipe).save_pretrained(str(part))
        if find_model_class(result.recipe.task).peft == SEQUENCE:
            model.config.save_pretrained(str(part))  # the labels
        (part / "README.md").write_text(model_card(result), encoding="utf-8")
    (result.folder / "plots").mkdir(exist_ok=True)
    found: dict[str, WeightChange] = {}
    if isinstance(model, PeftModel) and getattr(model.peft_config["default"], "folded", False):
        found = changes_of_fold(kept)
    elif state is None:  # a sharded model has no weights here to compare
        found = changes(model, lambda: weights_of(result.recipe))
    drawn = draw_change_plots(run_figures(result, found, page_title(result)), result.folder / "plots")
    if found:
        write_text(result.folder / CHANGES, json.dumps(changes_as_data(found), indent=1))
    write_text(result.folder / "samples.md", samples_text(result))
    write_text(result.folder / PAGE, run_page(result, drawn, found))


def weights_of(recipe: Recipe) -> Weights:
    """What the checkpoint of a recipe's model stores."""
    return Weights(recipe.model, recipe.revision, recipe.trust_remote_code, find_model_class(recipe.task).auto)
