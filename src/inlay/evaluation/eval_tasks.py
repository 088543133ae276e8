"""The tasks of `inlay eval`: how records become questions and how answers are read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from inlay.data.chats import Example, answer_text, turn_by_turn
from inlay.data.formats import FORMATS, SUMMARIES, Rules, convert_records
from inlay.data.labelled import labelled_examples
from inlay.data.preferences import preference_examples
from inlay.data.readers import Record
from inlay.evaluation.generate import Chat
from inlay.evaluation.text_overlap import MEASURES

NUMBER = r"(?:(?<!\d)-\$?|\$-?)?(?:\d[\d,]*(?:\.\d+)?|(?<!\w)\.\d+)"  # the - of 10-12 is none
CHOICES = r"true|false|(?:answer|option|ending|solution)[1-9]"


@dataclass(frozen=True)
class Question:
    """Hold one thing to ask: a conversation, what counts as right, and the options there are, if any."""

    chat: Chat
    wanted: list[str]
    options: tuple[str, ...] = ()
    about: Example = field(default_factory=dict)  # tools and arguments of the chat template

    @property
    def prompt(self) -> Example:
        """Return the prompt with all that the chat template gets."""
        return {"prompt": self.chat, **self.about}


def choice(text: str, options: Sequence[str] = ()) -> str:
    """Return the first of the question's options that `text` names, as LLM-Adapters (arXiv 2304.01933) reads answers.

    Where the options are not known, it is the first of true, false, answerN, optionN, endingN, solutionN.
    """
    match = re.search("|".join(map(re.escape, options)) or CHOICES, text)
    return match.group() if match else ""


def strict_number(text: str) -> str:
    """Return the number after ####, GSM8K's own form."""
    match = re.search(rf"####\s*({NUMBER})", text)
    return plain_number(match.group(1)) if match else ""


def last_number(text: str) -> str:
    """Return the last number in a text, whatever stands around it."""
    numbers = re.findall(NUMBER, text)
    return plain_number(numbers[-1]) if numbers else ""


def plain_number(text: str) -> str:
    """Return a number without its dollar sign, its commas and needless zeros."""
    text = re.sub(r"^(-?)\.", r"\g<1>0.", re.sub(r"[$,]", "", text))
    return text.rstrip("0").rstrip(".") if "." in text else text


def exact(text: str) -> str:
    """Return the whole text, without the space around it."""
    return text.strip()


@dataclass(frozen=True)
class EvalTask:
    """Define how records become questions, how answers are read, and how long they may be."""

    name: str
    title: str
    questions: Callable[[list[Record]], list[Any]]
    read: dict[str, Callable[..., str]]  # accuracies by their names: of an answer and the options, if there are any
    tokens: int = 32
    whole: tuple[str, ...] = ()  # the names of figures of all answers together
    less: bool = False  # is better

    @property
    def figures(self) -> tuple[str, ...]:
        """Return the names of the task's scores."""
        return (*self.read, *self.whole)


def commonsense(records: list[Record]) -> list[Question]:
    """Read LLM-Adapters' form: instruction, input, output, and the right option under `answer`."""
    questions = []
    for number, row in enumerate(records, 1):
        if not {"instruction", "answer"} <= row.keys():
            raise ValueError(f"row {number}: commonsense needs instruction and answer, not {', '.join(row)}")
        text = str(row["instruction"]) + (f"\n\n{row['input']}" if row.get("input") else "")
        options = tuple(dict.fromkeys(re.findall(CHOICES, text.rpartition("Answer format:")[2])))
        questions.append(Question([{"role": "user", "content": text}], [str(row["answer"])], options))
    return questions


def gsm8k(records: list[Record]) -> list[Question]:
    """Read GSM8K's form: question, and an answer that ends in #### and a number."""
    questions = []
    for number, row in enumerate(records, 1):
        wanted = strict_number(str(row.get("answer", "")))
        if "question" not in row or not wanted:
            raise ValueError(f"row {number}: gsm8k needs question, and an answer that ends in #### and a number")
        questions.append(Question([{"role": "user", "content": str(row["question"])}], [wanted]))
    return questions


def general(records: list[Record]) -> list[Question]:
    """Read any form that `inlay train` reads, and summaries; rows with one prompt are references of one question."""
    questions: dict[str, Question] = {}
    for example in convert_records(records, formats={**SUMMARIES, **FORMATS}):
        if "prompt" not in example:
            raise ValueError("the data has no prompts; --task perplexity is for plain text")
        for row in turn_by_turn(example):
            about = {key: value for key, value in row.items() if key not in ("prompt", "completion")}
            key = json.dumps([row["prompt"], about])
            question = questions.setdefault(key, Question(row["prompt"], [], about=about))
            question.wanted.append(answer_text(row["completion"][-1]))
    return list(questions.values())


def texts_or_answers(records: list[Record]) -> list[Example]:
    """Read any form that `inlay train` reads, a chat turn by turn."""
    examples = convert_records(records)
    return [part for example in examples for part in ([example] if "text" in example else turn_by_turn(example))]


def labelled(records: list[Record]) -> list[dict[str, Any]]:
    """Read GLUE's forms: a sentence or a pair, and its label."""
    return labelled_examples(records, Rules(strict=False, unlabelled=""))  # the model knows which labels are classes


def pairs(records: list[Record]) -> list[Example]:
    """Read the forms of task preference: a prompt, and a chosen and a rejected answer."""
    return preference_examples(records)


EVAL_TASKS = (
    EvalTask("commonsense", "accuracy on options, as LLM-Adapters reads them", commonsense, {"accuracy": choice}),
    EvalTask("gsm8k", "accuracy of the number, strict (####) and flexible (the last)", gsm8k,
         {"strict": strict_number, "flexible": last_number}, 512),
    EvalTask("exact", "share of answers that are the reference", general, {"exact match": exact}, 64),
    EvalTask("text", "BLEU, chrF, NIST and ROUGE of answers to their references (E2E and the like)", general, {}, 64,
         tuple(MEASURES)),
    EvalTask("classification", "of a trained classifier: accuracy, F1, Matthews; of scores, correlations", labelled, {},
         whole=("accuracy", "f1", "matthews", "pearson", "spearman")),
    EvalTask("reward", "of a reward model: how often, and by how much, chosen answers score above rejected", pairs, {},
         whole=("reward accuracy", "margin")),
    EvalTask("perplexity", "of plain text, or of the answers", texts_or_answers, {}, whole=("perplexity",), less=True),
)  # fmt: skip


def find_eval_task(name: str) -> EvalTask:
    """Return the task of a name, or raise a ValueError that lists the tasks."""
    for task in EVAL_TASKS:
        if task.name == name:
            return task
    raise ValueError(f"task {name!r} is not one of {', '.join(t.name for t in EVAL_TASKS)}")


def questions_for(task: EvalTask, records: list[Record], by: str) -> list[Any]:
    """Return the questions that a model is asked, by generation or by likelihood.

    Raises:
        ValueError: the records are not of the task's form, or have no options to choose from by likelihood.
    """
    questions = task.questions(records)
    if by == "likelihood":
        if task.name != "commonsense":
            raise ValueError(f"--by likelihood is for questions with options, not for task {task.name}")
        if bare := [i for i, question in enumerate(questions, 1) if len(question.options) < 2]:
            raise ValueError(f"row {bare[0]} names no options after 'Answer format:'; leave out --by likelihood")
    return questions
