"""Examples as the trainer sees them, token by token, and an audit of all of them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from inlay.data.formats import Example


def as_plain_text(example: Example) -> Example:
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
        example = as_plain_text(example)
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
        prompt = as_plain_text({"prompt": prompt, "completion": [{"content": ""}]})["prompt"]
    if not isinstance(prompt, str):
        return _ids(prompt, tokenizer, add_generation_prompt=True)
    ids = _ids(prompt, tokenizer)
    ended = ids and ids[-1] == tokenizer.eos_token_id != tokenizer.bos_token_id
    return ids[:-1] if ended and not prompt.endswith(str(tokenizer.eos_token)) else ids


def audit_examples(examples: list[Example], tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> Audit:
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
