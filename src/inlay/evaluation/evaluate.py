"""How well a model does a task: what it is asked, how its answers are read, and how sure the figure is.

Answers are generated greedily, or, for questions with options, the option is taken that the model finds most likely.
What is read of an answer follows the papers' own scripts; the rule of each task is in its docstring.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from inlay.workbench import data, judge, kinds, overlap
from inlay.workbench.files import write_text
from inlay.workbench.generate import Chat, answer

NUMBER = r"(?:(?<!\d)-\$?|\$-?)?(?:\d[\d,]*(?:\.\d+)?|(?<!\w)\.\d+)"  # the - of 10-12 is none
CHOICES = r"true|false|(?:answer|option|ending|solution)[1-9]"
Scores = list[float]


@dataclass(frozen=True)
class Question:
    """One thing to ask: a conversation, what counts as right, and the options there are, if any."""

    chat: Chat
    wanted: list[str]
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Figure:
    """A task's value with its 95 % interval, over so many examples; of what a user measures neither is known."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    count: int | None = None
    draws: tuple[float, ...] = field(default=(), repr=False)  # its bootstrap: the same examples for every model

    def __str__(self) -> str:
        interval = "" if self.low is None else f"95 % {self.low:.3f} to {self.high:.3f}"
        told = ", ".join(part for part in (interval, f"{self.count} examples" if self.count else "") if part)
        return f"{self.name}: {self.value:.3f}" + (f" ({told})" if told else "")


# -- reading answers ---------------------------------------------------------------------------------------------------


def choice(text: str, options: Sequence[str] = ()) -> str:
    """What LLM-Adapters (arXiv 2304.01933) reads: the first of the question's options; where those are not known, the
    first of true, false, answerN, optionN, endingN, solutionN."""
    found = re.search("|".join(map(re.escape, options)) or CHOICES, text)
    return found.group() if found else ""


def strict_number(text: str) -> str:
    """GSM8K's own form: the number after ####."""
    found = re.search(rf"####\s*({NUMBER})", text)
    return plain_number(found.group(1)) if found else ""


def last_number(text: str) -> str:
    """The last number there is, whatever stands around it."""
    found = re.findall(NUMBER, text)
    return plain_number(found[-1]) if found else ""


def plain_number(text: str) -> str:
    """A number without its dollar, its commas and zeros that say nothing."""
    text = re.sub(r"^(-?)\.", r"\g<1>0.", re.sub(r"[$,]", "", text))
    return text.rstrip("0").rstrip(".") if "." in text else text


def exact(text: str) -> str:
    """All of it, but for space around it."""
    return text.strip()


# -- tasks -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """How records become questions, how answers are read, and how long they may be."""

    name: str
    title: str
    questions: Callable[[list[data.Record]], list[Any]]
    read: dict[str, Callable[..., str]]  # accuracies by their names: of an answer and the options, if there are any
    tokens: int = 32
    whole: tuple[str, ...] = ()  # the names of figures of all answers together
    less: bool = False  # is better

    @property
    def figures(self) -> tuple[str, ...]:
        """The names of its figures."""
        return (*self.read, *self.whole)


def commonsense(records: list[data.Record]) -> list[Question]:
    """LLM-Adapters' form: instruction, input, output, and the option that is right under `answer`."""
    found = []
    for number, row in enumerate(records, 1):
        if not {"instruction", "answer"} <= row.keys():
            raise ValueError(f"row {number}: commonsense needs instruction and answer, not {', '.join(row)}")
        asked = str(row["instruction"]) + (f"\n\n{row['input']}" if row.get("input") else "")
        last = asked.rpartition("Answer format:")[2]
        options = tuple(dict.fromkeys(re.findall(CHOICES, last)))
        found.append(Question([{"role": "user", "content": asked}], [str(row["answer"])], options))
    return found


def gsm8k(records: list[data.Record]) -> list[Question]:
    """GSM8K's form: question, and an answer that ends in #### and a number."""
    found = []
    for number, row in enumerate(records, 1):
        wanted = strict_number(str(row.get("answer", "")))
        if "question" not in row or not wanted:
            raise ValueError(f"row {number}: gsm8k needs question, and an answer that ends in #### and a number")
        found.append(Question([{"role": "user", "content": str(row["question"])}], [wanted]))
    return found


def general(records: list[data.Record]) -> list[Question]:
    """Any form that `inlay train` reads, summaries too; rows with the same prompt are references of one question."""
    found: dict[str, Question] = {}
    for row in data.examples(records, formats={**data.SUMMARIES, **data.FORMATS}):
        if "prompt" not in row:
            raise ValueError("the data has no prompts; --task perplexity is for plain text")
        asked = found.setdefault(json.dumps(row["prompt"]), Question(row["prompt"], []))
        asked.wanted.append(row["completion"][-1]["content"])
    return list(found.values())


def labelled(records: list[data.Record]) -> list[dict[str, Any]]:
    """GLUE's forms: a sentence or a pair, and its label."""
    from inlay.workbench.tasks.classification import convert  # it brings the trainers

    return convert(records, {})


TASKS = (
    Task("commonsense", "accuracy on options, as LLM-Adapters reads them", commonsense, {"accuracy": choice}),
    Task("gsm8k", "accuracy of the number, strict (####) and flexible (the last)", gsm8k,
         {"strict": strict_number, "flexible": last_number}, 512),
    Task("exact", "share of answers that are the reference", general, {"exact match": exact}, 64),
    Task("text", "BLEU, chrF, NIST and ROUGE of answers to their references (E2E and the like)", general, {}, 64,
         tuple(overlap.MEASURES)),
    Task("classification", "of a trained classifier: accuracy, F1, Matthews; of scores, correlations", labelled, {},
         whole=("accuracy", "f1", "matthews", "pearson", "spearman")),
    Task("perplexity", "of plain text, or of the answers", data.examples, {}, whole=("perplexity",), less=True),
)  # fmt: skip


def find(name: str) -> Task:
    """The task of a name; raises a ValueError that lists them."""
    for task in TASKS:
        if task.name == name:
            return task
    raise ValueError(f"task {name!r} is not one of {', '.join(t.name for t in TASKS)}")


def ask(task: Task, records: list[data.Record], by: str) -> list[Any]:
    """What a model is asked, by generation or by likelihood.

    Raises:
        ValueError: the records are not of the task's form, or have no options to choose from by likelihood.
    """
    found = task.questions(records)
    if by == "likelihood":
        if task.name != "commonsense":
            raise ValueError(f"--by likelihood is for questions with options, not for task {task.name}")
        if bare := [i for i, question in enumerate(found, 1) if len(question.options) < 2]:
            raise ValueError(f"row {bare[0]} names no options after 'Answer format:'; leave out --by likelihood")
    return found


# -- asking ------------------------------------------------------------------------------------------------------------


def batches(sizes: list[int], size: int, what: str, console: Console) -> Iterator[list[int]]:
    """Places in batches of similar length, the longest first, so that what does not fit shows at once."""
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    parts = [order[i : i + size] for i in range(0, len(order), size)]
    yield from track(parts, what, console=console, disable=not console.is_terminal)


def generated(model: Any, tokenizer: Any, asked: list[Question], tokens: int, size: int, console: Console) -> list[str]:
    """The answer to each question."""
    said = [""] * len(asked)
    for places in batches([len(str(q.chat)) for q in asked], size, "answers", console):
        answers = answer(model, tokenizer, [asked[i].chat for i in places], tokens)
        for i, text in zip(places, answers, strict=True):
            said[i] = text
    return said


def likeliest(model: Any, tokenizer: Any, asked: list[Question], size: int, console: Console) -> list[str]:
    """The option of each question whose words the model finds most likely, by their mean log-likelihood."""
    texts = [(i, q.chat, f"the correct answer is {o}") for i, q in enumerate(asked) for o in q.options]
    found = losses(model, tokenizer, [(chat, said) for _, chat, said in texts], size, console)
    best: dict[int, tuple[float, str]] = {}
    for (i, _, said), (total, count) in zip(texts, found, strict=True):
        best[i] = min(best.get(i, (math.inf, "")), (total / count, said.rpartition(" ")[2]))
    return [best[i][1] for i in range(len(asked))]


@torch.no_grad()
def losses(
    model: Any, tokenizer: Any, pairs: Sequence[tuple[Chat | str, str]], size: int, console: Console, most: int = 1024
) -> list[tuple[float, int]]:
    """The loss (nats) summed over the tokens of each text after its prompt (a conversation, or a text as it is), and
    how many they are. Of what is longer than `most` tokens the last are taken. What differs in its last token alone,
    as options do, shares a pass."""
    rows = []
    for prompt, text in pairs:
        before = data.prompt_ids(prompt, tokenizer)
        own = tokenizer(text=text, add_special_tokens=False)["input_ids"]
        ids = [*before, *own][-most:]
        rows.append((ids, min(len(own), len(ids) - 1)))
    passes: dict[tuple[int, ...], list[int]] = {}
    for i, (ids, count) in enumerate(rows):
        if count > 0:
            passes.setdefault(tuple(ids[:-1]), []).append(i)
    heads = list(passes)
    found: list[tuple[float, int]] = [(0.0, 0)] * len(rows)
    for places in batches([len(head) for head in heads], size, "losses", console):
        longest = max(len(heads[i]) for i in places)
        ids, mask = (torch.zeros(len(places), longest, dtype=torch.long) for _ in range(2))
        for k, i in enumerate(places):  # padded on the right: what comes after does not reach what came before
            ids[k, : len(heads[i])], mask[k, : len(heads[i])] = torch.tensor(heads[i]), 1
        logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits
        for k, i in [(k, i) for k, place in enumerate(places) for i in passes[heads[place]]]:
            own, count = rows[i]
            slope: Tensor = logits[k, len(own) - count - 1 : len(own) - 1].float()
            want = torch.tensor(own[len(own) - count :], dtype=torch.long, device=slope.device)
            found[i] = cross_entropy(slope, want, reduction="sum").item(), count
    return found


# -- figures -----------------------------------------------------------------------------------------------------------


def share(name: str, right: list[bool]) -> Figure:
    """A share with Wilson's interval."""
    n, p, z = len(right), sum(right) / len(right), 1.96
    middle, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Figure(name, p, (middle - spread) / (1 + z * z / n), (middle + spread) / (1 + z * z / n), n)


def resampled(name: str, count: int, value: Callable[[list[int]], float], draws: int = 200) -> Figure:
    """A value of a whole corpus, with the interval of its bootstrap."""
    draw = random.Random(0)
    again = tuple(value([draw.randrange(count) for _ in range(count)]) for _ in range(draws))
    return Figure(name, value(list(range(count))), *middle(again), count, again)


def middle(values: Iterable[float]) -> tuple[float, float]:
    """Where 95 % of the values of a bootstrap lie."""
    order = sorted(values)
    return order[int(0.025 * len(order))], order[int(0.975 * len(order)) - 1]


def overlaps(said: list[str], questions: list[Question]) -> list[Figure]:
    """Of answers with their references, by every measure that is installed."""
    wanted = [question.wanted for question in questions]
    return [resampled(name, len(said), measure(said, wanted)) for name, measure in overlap.installed().items()]


def evaluate(
    model: Any, tokenizer: Any, task: Task, records: list[data.Record], by: str = "generation", size: int = 8,
    tokens: int | None = None, console: Console | None = None,
) -> tuple[list[Figure], list[dict[str, Any]]]:  # fmt: skip
    """The figures of a model on a task, and each example's part in them.

    Raises:
        ValueError: the records are not of the task's form, or a library is missing.
    """
    console = console or Console(quiet=True)
    questions, was_training, config = ask(task, records, by), model.training, model.config
    if kinds.auto_for(config, None) is AutoModelForImageTextToText:
        raise ValueError("the model sees images, and inlay eval asks in text alone; write a --metric of your own")
    if config.is_encoder_decoder and (task.name == "perplexity" or by == "likelihood"):
        raise ValueError("perplexity and --by likelihood are of causal language models; this one has an encoder")
    model.eval()
    try:
        if task.name == "classification":
            return classification(model, tokenizer, questions, size, console)
        if classifier(model):
            raise ValueError(f"the model is a classifier, which says nothing; --task classification, not {task.name}")
        if task.name == "perplexity":
            return perplexity(model, tokenizer, questions, size, console)
        if by == "likelihood":
            said = likeliest(model, tokenizer, questions, size, console)
        else:
            said = generated(model, tokenizer, questions, tokens or task.tokens, size, console)
    finally:
        model.train(was_training)
    both = list(zip(questions, said, strict=True))
    rows: list[dict[str, Any]] = [
        {"prompt": q.chat[-1]["content"], "wanted": q.wanted, "said": text} for q, text in both
    ]
    figures = []
    for name, read in task.read.items():
        right = [(read(text, q.options) if q.options else read(text)) in q.wanted for q, text in both]
        figures.append(share(name, right))
        for row, ok in zip(rows, right, strict=True):
            row[name] = ok
    return (overlaps(said, questions) if task.name == "text" else figures), rows


def perplexity(
    model: Any, tokenizer: Any, examples: list[data.Record], size: int, console: Console
) -> tuple[list[Figure], list[dict[str, Any]]]:
    """exp of the mean loss over all tokens of plain text, or over those of the answers."""
    pairs = [
        ("", row["text"]) if "text" in row else (row["prompt"], row["completion"][-1]["content"]) for row in examples
    ]
    found = losses(model, tokenizer, pairs, size, console)
    kept = [i for i, (_, count) in enumerate(found) if count]
    if not kept:
        raise ValueError("the texts have a token each, before which there is nothing; give longer ones")

    def value(places: list[int]) -> float:
        own = [found[kept[i]] for i in places]
        return math.exp(min(700.0, sum(total for total, _ in own) / sum(count for _, count in own)))

    rows = [
        {"text": text, "loss": total, "tokens": count} for (_, text), (total, count) in zip(pairs, found, strict=True)
    ]
    return [resampled("perplexity", len(kept), value)], rows


def classifier(model: Any) -> bool:
    """Whether a model, or the base of an adapted one, has a head for labels."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return type(base) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.values()


@torch.no_grad()
def classification(
    model: Any, tokenizer: Any, examples: list[dict[str, Any]], size: int, console: Console
) -> tuple[list[Figure], list[dict[str, Any]]]:
    """Accuracy, F1 and Matthews' correlation as GLUE has them, by the labels that the model was trained on; of scores,
    Pearson's and Spearman's correlation.

    Raises:
        ValueError: the model has no head for labels, or was not trained on one that is asked for.
    """
    from inlay.workbench.tasks.classification import classified, correlated

    if not classifier(model):
        raise ValueError(
            "--task classification is for models trained with task: classification; this one has no labels"
        )
    scores, names = model.config.num_labels == 1, model.config.label2id
    if not scores and (strange := next((row["label"] for row in examples if row["label"] not in names), None)):
        raise ValueError(f"label {strange!r} is not one that the model was trained on: {', '.join(names)}")
    wanted = np.array([float(row["label"]) if scores else names[row["label"]] for row in examples])
    logits = np.zeros((len(examples), model.config.num_labels))
    for places in batches([len(row["text"] + (row["pair"] or "")) for row in examples], size, "labels", console):
        pairs = [(examples[i]["text"], examples[i]["pair"]) for i in places]
        texts, seconds = zip(*pairs, strict=True)
        both = (list(texts),) if seconds[0] is None else (list(texts), list(seconds))
        inputs = tokenizer(*both, truncation=True, padding=True, return_tensors="pt").to(model.device)
        logits[places] = model(**inputs).logits.float().cpu().numpy()
    measure = correlated if scores else classified
    figures = [
        resampled(name, len(examples), lambda places, name=name: measure(logits[places], wanted[places])[name])
        for name in measure(logits, wanted)
    ]
    said = logits[:, 0] if scores else [model.config.id2label[i] for i in logits.argmax(1).tolist()]
    rows = [{**row, "said": float(own) if scores else own} for row, own in zip(examples, said, strict=True)]
    if not scores:
        right = [row["said"] == row["label"] for row in rows]
        figures[0] = share("accuracy", right)
        rows = [{**row, "accuracy": ok} for row, ok in zip(rows, right, strict=True)]
    return figures, rows


def difference(was: Figure, now: Figure, its: list[dict[str, Any]], rows: list[dict[str, Any]]) -> str:
    """What the second of two models does better on the same examples, with the 95 % interval: of a mean over examples
    Student's, of a value of all together that of its bootstrap, with the same draws in both. Empty: not known."""
    first, second = ([row[now.name] for row in own if now.name in row] for own in (its, rows))
    if first and isinstance(first[0], bool | int | float):
        gap = judge.paired(list(map(float, second)), list(map(float, first)))
    elif was.draws and len(was.draws) == len(now.draws) and was.count == now.count:
        gaps = [b - a for a, b in zip(was.draws, now.draws, strict=True)]
        alike = math.isclose(min(gaps), max(gaps)) and any(gaps)
        gap = judge.Difference(now.value - was.value, *((math.nan, math.nan) if alike else middle(gaps)))
    else:
        return ""
    if math.isnan(gap.low):
        return f"{gap.mean:+.3f}, noise is not known: one example, or all differ by the same"
    up, down = (
        ("worse", "better") if any(task.less and now.name in task.whole for task in TASKS) else ("better", "worse")
    )
    verdict = "no difference beyond noise" if gap.low <= 0 <= gap.high else up if gap.low > 0 else down
    return f"{gap.mean:+.3f} ({gap.low:+.3f} to {gap.high:+.3f}), {verdict}"


def write(folder: Path, name: str, figures: list[Figure], rows: list[dict[str, Any]], about: dict[str, Any]) -> None:
    """NAME.json with the figures, and NAME.jsonl with a line for each example."""
    folder.mkdir(parents=True, exist_ok=True)
    told = [{key: value for key, value in vars(f).items() if key != "draws"} for f in figures]
    write_text(
        folder / f"{name}.jsonl", "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    )
    write_text(folder / f"{name}.json", json.dumps({**about, "figures": told}, indent=1))
