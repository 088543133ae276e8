"""Vision-language models learn answers to prompts with images, in the form of LLaVA, through trl's SFTTrainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Image, List
from PIL import Image as Picture
from rich.console import Console
from transformers import AutoProcessor

from inlay.data.chat_templates import templated
from inlay.data.chats import chat_cell, conversation, text_cell, turn_by_turn, with_system
from inlay.data.formats import Row, Rules, convert_all, earlier_turns, question_of
from inlay.data.records import Record
from inlay.files.untrusted import regular_file, user_path
from inlay.messages import loading, short
from inlay.recipe.recipe import Recipe
from inlay.training.examples import Examples, announce, measured
from inlay.training.mixture import train_and_heldout
from inlay.training.tasks.instruction import Settings, Task

VISION_FORMATS = {
    "LLaVA": {"messages": ("conversations", "messages"), "images": ("image", "images"), "system": ("system",)},
    "question-answer": {
        "prompt": ("prompt", "question", "instruction"),
        "input": ("input", "context"),
        "answer": ("answer", "completion", "response"),
        "images": ("image", "images"),
        "system": ("system",),
        "history": ("history",),
    },
}

MARK = "<image>"  # where LLaVA's texts have the image; trl puts its own before the first question


class Vision(Task):
    """Train models that see images, which are files beside the data unless their paths are absolute.

    Nothing is truncated: half of an image's tokens are no image, so an example longer than `max_length` is refused.
    """

    def processor(self, recipe: Recipe) -> Any:
        base = recipe.base_model
        with loading(f"the processor of {base.name!r}"):
            made = AutoProcessor.from_pretrained(
                base.resolved, revision=base.revision, trust_remote_code=base.trust_remote_code
            )
        if not hasattr(made, "image_processor"):
            raise ValueError(f"task vision needs a model that sees; {recipe.model!r} has no image processor")
        return made

    def examples(self, recipe: Recipe, tokenizer: Any, console: Console) -> Examples:
        train, held = train_and_heldout(recipe, vision_examples, console, question)
        made = Examples(train, held, measured([length(row, tokenizer) for row in train], recipe))
        announce(made, recipe, console)
        return made

    def settings(self, recipe: Recipe) -> Settings:
        return {"max_length": recipe.max_length, "packing": False, "eval_packing": False}

    def dataset(self, rows: list[Row], tokenizer: Any, recipe: Recipe) -> Dataset:
        return Dataset.from_list(rows).cast_column("images", List(Image()))

    def questions(self, rows: list[Row], count: int) -> list[Row]:
        return [{"input": r, "prompt": question(r), "reference": r["completion"][-1]["content"]} for r in rows[:count]]

    @torch.no_grad()
    def answers(self, model: Any, tokenizer: Any, inputs: list[Any]) -> list[str]:
        was_training, said = model.training, []
        model.eval()
        for row in inputs:
            text = templated(tokenizer, seen(row), tokenize=False, add_generation_prompt=True)
            pictures = [Picture.open(regular_file(Path(p))) for p in row["images"]]
            with_images = tokenizer(images=pictures, text=[text], return_tensors="pt")
            out = model.generate(**with_images.to(model.device), do_sample=False, max_new_tokens=64)
            said += tokenizer.batch_decode(out[:, with_images["input_ids"].shape[1] :], skip_special_tokens=True)
        model.train(was_training)
        return [text.strip() for text in said]

    def shown(self, row: Row, tokenizer: Any, recipe: Recipe) -> str:
        return f"{', '.join(row['images'])} {question(row)} ⟦{row['completion'][-1]['content']}⟧"


def vision_examples(records: list[Record], rules: Rules) -> list[Row]:
    """Return records as {"prompt", "completion", "images"}: one example per assistant turn, all with the images."""
    source = user_path(rules.source)
    folders = (source, source.parent) if source.is_dir() else (source.parent,)

    def row(record: Record, roles: dict[str, str]) -> list[Row]:
        found = record[roles["images"]]
        names = [name for name in (found if isinstance(found, list) else [found]) if isinstance(name, str)]
        beside = next((folder for folder in folders if all((folder / name).is_file() for name in names)), None)
        if not names or beside is None:
            raise ValueError(f"{roles['images']} is {short(found)}; accepted: the path of an image file")
        cells = {role: record[column] for role, column in roles.items()}
        if "messages" in roles:
            turns = chat_cell(cells["messages"], roles["messages"])
        else:
            answer = text_cell(cells["answer"], roles["answer"])
            turns = [{"role": "user", "content": question_of(cells, roles)}, {"role": "assistant", "content": answer}]
        if any(turn.get("weight") for turn in turns):
            raise ValueError("weights other than 0 and 1 are not for task vision; leave them out")
        if any(turn["role"] == "tool" or "tool_calls" in turn for turn in turns):
            raise ValueError("tools are not for task vision; leave out their calls and answers")
        turns = with_system([*earlier_turns(cells, roles), *turns], cells.get("system"), roles.get("system", "system"))
        turns = [turn | {"content": turn["content"].replace(MARK, "").strip()} for turn in turns]
        parts = turn_by_turn(conversation(turns, rules.system))
        return [{**part, "images": [str(beside / name) for name in names]} for part in parts]

    return convert_all(records, rules, VISION_FORMATS, row)


def question(row: Row) -> str:
    """Return the last question of a prompt."""
    return row["prompt"][-1]["content"]


def seen(row: Row) -> list[dict[str, Any]]:
    """Return the prompt as templates of vision models take it: the images before the first question."""
    made, images = [], [{"type": "image"} for _ in row["images"]]
    for turn in row["prompt"]:
        first, images = (images, []) if turn["role"] == "user" else ([], images)
        made.append({"role": turn["role"], "content": [*first, {"type": "text", "text": turn["content"]}]})
    return made


def length(row: Row, tokenizer: Any) -> int:
    """Return an example's text in tokens; what its images add depends on the model."""
    return len(tokenizer.tokenizer(" ".join(t["content"] for t in (*row["prompt"], *row["completion"])))["input_ids"])
