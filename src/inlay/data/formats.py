"""Training data: any common record format in, what trl's SFTTrainer takes out, and what it will make of it.

`read` gets records from a file, a folder, a hub or the built-in slice; `examples` recognises their format and makes
them trl's; `split` holds some out; `render` and `audit` show the very tokens that will be trained on. Whatever is wrong
with a user's data is a one-line ValueError that says where.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from inlay.workbench.read import Record, read, short  # noqa: F401 (read is part of this room)

Example = dict[str, Any]
Formats = dict[str, dict[str, tuple[str, ...]]]

# Format -> role -> the columns that can play it, the preferred one first; of the formats the first that fits is taken.
# Recognition, error messages and docs all come from this table.
FORMATS: Formats = {
    "chat": {"messages": ("messages",)},
    "ShareGPT": {"messages": ("conversations",)},
    "instruction": {
        "prompt": ("instruction",),
        "input": ("input", "context"),
        "answer": ("output", "response", "answer"),
    },
    "prompt-completion": {"prompt": ("prompt",), "answer": ("completion", "response", "answer")},
    "question-answer": {"prompt": ("question",), "answer": ("answer",)},
    "E2E": {"prompt": ("mr",), "answer": ("ref",)},
    "text": {"text": ("text",)},
}
SUMMARIES: Formats = {
    "XSum": {"prompt": ("document",), "answer": ("summary",)},
    "CNN/DailyMail": {"prompt": ("article",), "answer": ("highlights",)},
    "summary": {"prompt": ("text", "dialogue"), "answer": ("summary",)},
}
ROLES = ("prompt", "input", "answer", "messages", "text")
SPEAKERS = {"human": "user", "gpt": "assistant"}


def accepted(formats: Formats = FORMATS) -> str:
    """The record formats in one line, for error messages and docs; brackets hold what is optional."""
    one = {"input": "[{}]"}
    parts = {
        n: " + ".join(one.get(role, "{}").format("|".join(c)) for role, c in f.items()) for n, f in formats.items()
    }
    return ", ".join(f"{name} ({part})" for name, part in parts.items())


def examples(
    records: list[Record],
    columns: dict[str, str] | None = None,
    system: str | None = None,
    formats: Formats = FORMATS,
) -> list[Example]:
    """Records of one format as trl's conversational prompt and completion, or as {"text": ...} for plain text.

    `columns` maps roles (prompt, input, answer, messages, text) to columns, over the recognised ones; a mapped prompt
    is the whole prompt, unless an input is mapped too. A chat becomes one example per assistant turn: trl takes the
    loss over a completion with any chat template, but its `assistant_only_loss` needs one with generation markers,
    which few have. Newlines around an answer are dropped: they would merge with the template's own into tokens that
    the model never sees when it answers.
    """

    def convert(record: Record, roles: dict[str, str]) -> list[Example]:
        if system is not None and "text" in roles:
            raise ValueError("a system message needs a prompt to stand before; plain text has none")
        return _convert(record, roles, system)

    return convert_all(records, columns or {}, formats, convert)


def convert_all(
    records: list[Record],
    columns: dict[str, str],
    formats: Formats,
    convert: Callable[[Record, dict[str, str]], list[Example]],
) -> list[Example]:
    """Records of one of some formats, each by `convert`, which also gets role -> column.

    Raises:
        ValueError: there are none, no format fits them, or rows are at fault: the first two, and how many.
    """
    if not records:
        raise ValueError("found no records; accepted: at least one")
    roles = recognise(list(records[0]), columns, formats)
    found, faults = [], []
    for number, record in enumerate(records, start=1):
        try:
            missing = [column for role, column in roles.items() if column not in record and role != "input"]
            if missing:
                raise ValueError(f"no column {missing[0]!r} as in row 1, but {short(', '.join(record))}")
            found += convert(record, roles)
        except ValueError as error:
            faults.append(f"row {number}: {error}")
    if faults:
        raise ValueError(faults[0] + (f" ({len(faults)} rows at fault, next {faults[1]})" if len(faults) > 1 else ""))
    return found


def recognise(found: list[str], mapped: dict[str, str], formats: Formats = FORMATS) -> dict[str, str]:
    """Role -> column by the first format that fits, the user's mapping laid over it."""
    listed = ", ".join(map(short, found))
    known = list(dict.fromkeys(role for format in formats.values() for role in format))
    known.sort(key=lambda role: ROLES.index(role) if role in ROLES else len(ROLES))
    for role, column in mapped.items():
        if role not in known:
            raise ValueError(f"columns: found the role {role!r}; accepted: {', '.join(known)}")
        if column not in found:
            raise ValueError(f"columns: {role} is mapped to {column!r}, which is not among the columns {listed}")
    for format in formats.values():
        names = format | {role: (column,) for role, column in mapped.items()}
        if "prompt" in mapped and "input" not in mapped:
            names.pop("input", None)
        chosen = {role: next((c for c in candidates if c in found), None) for role, candidates in names.items()}
        strange = mapped.keys() - format.keys() - ({"input"} if "prompt" in format else set())
        if not strange and all(column or role == "input" for role, column in chosen.items()):
            return {role: column for role, column in chosen.items() if column}
    raise ValueError(
        f"no record format fits the columns {listed}; accepted: {accepted(formats)}; or map them: "
        f"{{{known[0]}: ..., {known[1]}: ...}}"
    )


def _convert(record: Record, roles: dict[str, str], system: str | None) -> list[Example]:
    cells = {role: record.get(column) for role, column in roles.items()}
    if "text" in roles:
        return [{"text": string(cells["text"], roles["text"])}]
    if "messages" in roles:
        return turns(messages(cells["messages"], roles["messages"]), system)
    prompt, answer = cells["prompt"], cells["answer"]
    if isinstance(prompt, list):  # trl's own form: the turns so far, and the next
        tail = answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]
        return turns(messages(prompt + tail, roles["prompt"]), system)[-1:]
    question = string(prompt, roles["prompt"])
    extra = cells.get("input")
    if extra is not None and str(extra).strip():
        question += "\n\n" + string(extra, roles["input"])
    answer = string(answer, roles["answer"])
    return turns([{"role": "user", "content": question}, {"role": "assistant", "content": answer}], system)


def string(cell: Any, name: str) -> str:
    """A cell that has to be text; raises a ValueError that says what it is."""
    if isinstance(cell, str) and cell.strip():
        if any("\ud800" <= c <= "\udfff" for c in cell):  # JSON can write it, no tokenizer reads it
            raise ValueError(f"{name} is {short(cell)}, with half of a surrogate pair; accepted: text")
        return cell
    found = "empty" if cell is None or isinstance(cell, str) else f"the {type(cell).__name__} {short(cell)}"
    raise ValueError(f"{name} is {found}; accepted: text")


def messages(cell: Any, name: str) -> list[dict[str, str]]:
    """A cell that has to be a chat, OpenAI's or ShareGPT's, as {"role", "content"}; else a ValueError."""
    if not isinstance(cell, list) or not all(isinstance(turn, dict) for turn in cell):
        raise ValueError(f"{name!r} is {short(cell)}; accepted: a list of messages")
    made: list[dict[str, str]] = []
    for place, turn in enumerate(cell, start=1):
        speaker = turn.get("role", turn.get("from"))
        role = SPEAKERS.get(str(speaker), speaker)
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"message {place} is by {speaker!r}; accepted: system, user, assistant, human, gpt")
        before = made[-1]["role"] if made else None
        if (role == "system" and before) or (role == "assistant" and before != "user"):
            wanted = "system only as the first, assistant after user"
            raise ValueError(f"message {place} is by {role}, after {before or 'none'}; accepted: {wanted}")
        content = string(turn.get("content", turn.get("value")), f"message {place}")
        made.append({"role": role, "content": content})
    return made


def turns(chat: list[dict[str, str]], system: str | None) -> list[Example]:
    """A chat as one prompt and completion for each of the assistant's turns."""
    if system is not None and chat and chat[0]["role"] != "system":
        chat = [{"role": "system", "content": system}, *chat]
    chat = [m | {"content": m["content"].strip("\r\n")} if m["role"] == "assistant" else m for m in chat]
    ends = [i for i, message in enumerate(chat) if message["role"] == "assistant"]
    if not ends:
        raise ValueError("no assistant message; accepted: at least one to learn from")
    return [{"prompt": chat[:i], "completion": [chat[i]]} for i in ends]


def split(
    examples: list[Example], eval_size: int | float, seed: int | None, key: Callable[[Example], str] | None = None
) -> tuple[list[Example], list[Example]]:
    """Train and held-out parts, in file order: `eval_size` rows, or that share of them, drawn by `seed`.

    Examples with the same `key` (by default the first question: all turns of a chat) stay together, so that none is on
    both sides; the held-out part may come out a little smaller for it. With seed None the last rows are held out: the
    built-in data is ordered for that.
    """
    total = len(examples)
    if eval_size < 0 or (isinstance(eval_size, float) and eval_size >= 1):
        raise ValueError(f"eval_size is {eval_size}; accepted: a number of rows, or a share below 1.0")
    size = max(1, int(eval_size * total)) if 0 < eval_size < 1 else int(eval_size)
    if size >= total:
        raise ValueError(f"eval_size {eval_size} leaves none of {total} examples to train on; accepted: a smaller one")
    keys = list(map(key or _first_question, examples))
    groups: dict[str, list[int]] = {}
    for i, same in enumerate(keys):
        groups.setdefault(same, []).append(i)
    order = [list(range(total - size, total))] if seed is None else list(groups.values())
    random.Random(seed).shuffle(order)
    held: set[int] = set()
    for group in order:
        if len(held) + len(group) <= size:
            held.update(group)
    train_keys = {keys[i] for i in range(total) if i not in held}
    if (size and not held) or any(keys[i] in train_keys for i in held):
        raise ValueError(f"{size} of {total} examples cannot be held out: prompts repeat, {len(groups)} are distinct")
    return [examples[i] for i in range(total) if i not in held], [examples[i] for i in sorted(held)]


def _first_question(example: Example) -> str:
    if "text" in example or isinstance(example["prompt"], str):
        return example.get("text") or example["prompt"]
    return next(m["content"] for m in example["prompt"] if m["role"] == "user")


def plain(example: Example) -> Example:
    r"""As strings, for a tokenizer without a chat template: "### Instruction:\n{prompt}\n\n### Response:\n", answer."""
    if "text" in example or isinstance(example["prompt"], str):
        return example
    heads = {"system": "{}\n\n", "user": "### Instruction:\n{}\n\n### Response:\n", "assistant": "{}\n\n"}
    prompt = "".join(heads[m["role"]].format(m["content"]) for m in example["prompt"])
    return {"prompt": prompt, "completion": example["completion"][0]["content"]}


@dataclass(frozen=True)
class Rendered:
    """One example as SFTTrainer trains on it: the ids it keeps, their text, and what `max_length` cuts off."""

    prompt: str
    answer: str
    prompt_ids: list[int]
    answer_ids: list[int]
    length: int  # in tokens, before the cut
    cut: int  # answer tokens lost to it
    shifted: bool  # the prompt alone has other tokens than before its answer, so the model answers from another start


@dataclass(frozen=True)
class Audit:
    """What a tokenizer and a `max_length` make of a data set; `cut` counts the `masked` ones too, which trl drops."""

    total: int
    cut: int
    masked: int
    shifted: int
    longest: int
    mean_tokens: float
    answer_tokens: int


def render(example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> Rendered:
    """As SFTTrainer._prepare_dataset does it: the answer starts where the prompt's own tokens and the whole's differ.

    Where the tokenizer has no chat template, conversations are rendered as `plain` writes them.
    """
    if tokenizer.chat_template is None:
        example = plain(example)
    if "text" in example:
        before, whole = [], _ids(_ended(example["text"], tokenizer), tokenizer)
    elif isinstance(example["prompt"], str):
        before = _ids(example["prompt"], tokenizer)
        whole = _ids(example["prompt"] + _ended(example["completion"], tokenizer), tokenizer)
    else:
        before = _ids(example["prompt"], tokenizer, add_generation_prompt=True)
        whole = _ids(example["prompt"] + example["completion"], tokenizer)
    start = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, whole, strict=False)))
    prompt_ids, answer_ids = whole[:max_length][:start], whole[:max_length][start:]
    return Rendered(
        prompt=str(tokenizer.decode(prompt_ids, clean_up_tokenization_spaces=False)),
        answer=str(tokenizer.decode(answer_ids, clean_up_tokenization_spaces=False)),
        prompt_ids=prompt_ids,
        answer_ids=answer_ids,
        length=len(whole),
        cut=len(whole) - start - len(answer_ids),
        shifted=start < len(before),
    )


def _ended(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    end = str(tokenizer.eos_token)
    return text if text.endswith(end) else text + end


def _ids(value: str | list[dict[str, str]], tokenizer: Any, **options: Any) -> list[int]:
    if isinstance(value, str):
        return tokenizer(text=value)["input_ids"]
    return templated(tokenizer, value, tokenize=True, return_dict=True, **options)["input_ids"]


def templated(tokenizer: Any, chat: list[dict[str, Any]], **options: Any) -> Any:
    """A conversation in the model's chat template, which is a program and fails as programs do."""
    try:
        return tokenizer.apply_chat_template(chat, **options)
    except Exception as error:
        raise ValueError(f"the model's chat template does not take this example: {error}") from error


def prompt_ids(prompt: str | list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A prompt as `render` has it before its answer: with what the tokenizer or the chat template puts before it, and
    without the end that some tokenizers put after every text."""
    if not isinstance(prompt, str) and tokenizer.chat_template is None:
        prompt = plain({"prompt": prompt, "completion": [{"content": ""}]})["prompt"]
    if not isinstance(prompt, str):
        return _ids(prompt, tokenizer, add_generation_prompt=True)
    ids = _ids(prompt, tokenizer)
    ended = ids and ids[-1] == tokenizer.eos_token_id != tokenizer.bos_token_id
    return ids[:-1] if ended and not prompt.endswith(str(tokenizer.eos_token)) else ids


def audit(examples: list[Example], tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> Audit:
    """Counts over all examples, to be looked at before the first step."""
    all_ = [render(example, tokenizer, max_length) for example in examples]
    return Audit(
        total=len(all_),
        cut=sum(one.cut > 0 for one in all_),
        masked=sum(not one.answer_ids for one in all_),
        shifted=sum(one.shifted for one in all_),
        longest=max(one.length for one in all_),
        mean_tokens=sum(one.length for one in all_) / len(all_),
        answer_tokens=sum(len(one.answer_ids) for one in all_),
    )
