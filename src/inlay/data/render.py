"""Examples as tokens: what a model reads of them, and which of it is learned."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from inlay.data.chat_templates import OWN_TEMPLATE, template_text, templated, training_template
from inlay.data.chats import Example, Message, learned_turns, turn_by_turn

IGNORED = -100  # the label of a token that is not learned
Encode = Callable[..., list[int]]  # messages, and whether the answer's beginning follows, as tokens
Span = tuple[int, int]


@dataclass(frozen=True)
class Sequence:
    """Hold an example as tokens, and the spans of them that are learned."""

    ids: list[int]
    spans: list[Span]
    shifted: bool = False  # a prompt's last tokens merge with its answer's first: the model answers from another start
    reworded: str = ""  # what the template puts at a prompt's end and not before the answer that is learned
    trained: bool = False  # in the template that trl has for training, not in the model's own


@dataclass(frozen=True)
class Rendered:
    """Hold one example as the model is trained on it, truncated at `max_length`."""

    ids: list[int]
    labels: list[int]  # the ids that are learned, IGNORED for the rest
    spans: list[Span]  # of the answers, before the cut
    length: int  # in tokens, before the cut
    cut: int  # learned tokens lost to it
    shifted: bool  # as a sequence's
    weights: list[float]  # of the spans

    @property
    def prompt_ids(self) -> list[int]:
        """Return the tokens before the first answer."""
        return self.ids[: self.spans[0][0]]

    @property
    def token_weights(self) -> list[float]:
        """Return the weight of each token; 1 where nothing is learned."""
        made = [1.0] * self.length
        for (start, stop), weight in zip(self.spans, self.weights, strict=True):
            made[start:stop] = [weight] * (stop - start)
        return made[: len(self.ids)]

    @property
    def answer_ids(self) -> list[int]:
        """Return the tokens that are learned."""
        return [token for token in self.labels if token != IGNORED]

    def marked(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """Return the text, with what is learned in ⟦⟧."""
        parts, end = [], 0
        for start, stop in self.spans:
            parts += [decoded(self.ids[end:start], tokenizer), f"⟦{decoded(self.ids[start:stop], tokenizer).rstrip()}⟧"]
            end = stop
        return "".join(parts)


def render(example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> Rendered:
    """Return an example as the model is trained on it; as `encode_example`."""
    found = encode_example(example, tokenizer)
    end = len(found.ids) if max_length is None else min(max_length, len(found.ids))
    labels = [IGNORED] * len(found.ids)
    for start, stop in found.spans:
        labels[start:stop] = found.ids[start:stop]
    cut = sum(max(0, stop - max(start, end)) for start, stop in found.spans)
    return Rendered(
        found.ids[:end], labels[:end], found.spans, len(found.ids), cut, found.shifted, answer_weights(example)
    )


def answer_weights(example: Example) -> list[float]:
    """Return the weights of an example's learned answers: how much each of their tokens counts."""
    if "text" in example or isinstance(example["prompt"], str):
        return [1.0]
    chat = example["prompt"] + example["completion"]
    return [float(chat[place].get("weight", 1)) for place in learned_turns(example)]


def encode_example(example: Example, tokenizer: PreTrainedTokenizerBase) -> Sequence:
    """Return an example as tokens. An answer starts where the tokens of its prompt alone and of the whole differ.

    Where the tokenizer has no chat template, conversations are rendered as `as_plain_text` writes them.

    Raises:
        ValueError: it is a conversation whose answers cannot be learned in one sequence; see `sequences`.
    """
    if tokenizer.chat_template is None:
        example = as_plain_text(example)
    if "text" in example:
        ids = encode_text(example["text"], tokenizer)
        return Sequence(ids, [(0, len(ids))])
    if isinstance(example["prompt"], str):
        before = encode(example["prompt"], tokenizer)
        ids = encode_text(example["prompt"] + example["completion"], tokenizer)
        start = common(before, ids)
        return Sequence(ids, [(start, len(ids))], start < len(before))
    found = in_one_sequence(example, tokenizer)
    if found is None:
        raise ValueError("the chat template rewrites earlier turns, so this conversation is learned turn by turn")
    return found


def sequences(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Return the sequences that an example is learned as.

    A conversation is one sequence where all its answers can be learned in it exactly as each alone would be; otherwise
    it is learned turn by turn. Any other example is one sequence.
    """
    if "text" in example or isinstance(example["prompt"], str) or len(learned_turns(example)) == 1:
        return [example]
    whole = tokenizer.chat_template is not None and in_one_sequence(example, tokenizer) is not None
    return [example] if whole else turn_by_turn(example)


def in_one_sequence(example: Example, tokenizer: PreTrainedTokenizerBase) -> Sequence | None:
    """Return a conversation up to its last answer, with all its answers.

    Each answer is compared with what it is alone, at the end of the turns so far. None where no template gives all of
    them: neither the tokenizer's own, whose earlier turns stay as they are while the chat goes on, or which marks the
    answers ({% generation %}), nor the one that trl has for training this family of models.
    """
    chat, ends = example["prompt"] + example["completion"], learned_turns(example)
    alone = [encode_turn(encoder(example, tokenizer), chat, end, tokenizer) for end in ends]
    about = prompt_ends(alone, tokenizer)
    if spans := stable_spans(alone):
        return Sequence(alone[-1].ids, spans, *about)
    answers = [turn.answer for turn in alone]
    training = training_template(tokenizer)
    if training is not None:
        again = [encode_turn(encoder(example, tokenizer, training), chat, end, tokenizer) for end in ends]
        spans = stable_spans(again)
        if spans and [turn.answer for turn in again] == answers:
            return Sequence(again[-1].ids, spans, *about, trained=True)
    for template in (tokenizer.chat_template, training):
        if template is not None and re.search(r"{%-?\s*generation\b", template_text(template)):
            found = marked_answers(example, tokenizer, template, answers)
            if found:
                return Sequence(*found, *about, trained=template is training)
    return None


@dataclass(frozen=True)
class Turn:
    """Hold a chat up to one of its answers, as tokens."""

    ids: list[int]
    start: int  # of the answer
    lost: list[int]  # tokens of the prompt alone that are not before the answer

    @property
    def answer(self) -> list[int]:
        """Return the tokens of the answer."""
        return self.ids[self.start :]


def encode_turn(encode: Encode, chat: list[Message], end: int, tokenizer: PreTrainedTokenizerBase) -> Turn:
    """Return a chat up to the answer at `end`, which starts where its tokens and those of its prompt alone differ.

    Where they differ before the last question already, as in templates that put the system message there while there is
    no answer yet, it starts where those of two answers differ.
    """
    before, ids = encode(chat[:end], add_generation_prompt=True), encode(chat[: end + 1])
    start = common(before, ids)
    lost = before[start:]
    if lost:
        other = encode([*chat[:end], {"role": "assistant", "content": "\N{BLACK SQUARE}"}])
        again = decoded(ids[start : common(ids, other)], tokenizer).strip()
        if again and decoded(lost, tokenizer).strip().endswith(again):
            start = common(ids, other)
    return Turn(ids, start, lost)


def prompt_ends(turns: list[Turn], tokenizer: PreTrainedTokenizerBase) -> tuple[bool, str]:
    """Return whether a prompt's last tokens merge with its answer's first, and what else a prompt alone ends with."""
    shifted, reworded = False, ""
    for turn in turns:
        if turn.lost:
            lost = decoded(turn.lost, tokenizer)
            merges = decoded(turn.answer, tokenizer).startswith(lost)
            shifted, reworded = shifted or merges, reworded or ("" if merges else lost)
    return shifted, reworded


def stable_spans(turns: list[Turn]) -> list[Span] | None:
    """Return the spans of answers up to the last one; None unless the tokens of every turn begin those of the next."""
    whole = turns[-1].ids
    spans = []
    end = 0
    for turn in turns:
        if whole[: len(turn.ids)] != turn.ids or turn.start < end:
            return None
        end = len(turn.ids)
        spans.append((turn.start, end))
    return spans


def marked_answers(
    example: Example, tokenizer: PreTrainedTokenizerBase, template: Any, answers: list[list[int]]
) -> tuple[list[int], list[Span]] | None:
    """Return the tokens of a conversation and the spans of its answers as the template marks them.

    None is returned unless the spans are the given answers, apart from whitespace before them and from what only the
    end of a chat has after them.
    """
    chat, ends = example["prompt"] + example["completion"], learned_turns(example)
    chat = chat[: ends[-1] + 1]
    try:
        encode = encoder(example, tokenizer, template, return_assistant_tokens_mask=True)
        found: Any = encode(chat, whole=True)
    except ValueError:
        return None
    ids, runs = list(found["input_ids"]), runs_of(found["assistant_masks"])
    places = [i for i, message in enumerate(chat) if message["role"] == "assistant"]
    if len(runs) != len(places):
        return None
    spans = [runs[places.index(end)] for end in ends]
    spans = [(first_word(ids, start, stop, tokenizer), stop) for start, stop in spans]
    for (start, stop), answer in zip(spans, answers, strict=True):
        own = answer[first_word(answer, 0, len(answer), tokenizer) :]
        rest = tokenizer.decode(own[stop - start :], skip_special_tokens=True)
        if start == stop or own[: stop - start] != ids[start:stop] or str(rest).strip():
            return None
    return ids, spans


def runs_of(mask: list[int]) -> list[Span]:
    """Return the runs of ones in a mask."""
    edges = [i for i, (a, b) in enumerate(zip([0, *mask], [*mask, 0], strict=True)) if a != b]
    return list(zip(edges[::2], edges[1::2], strict=True))


def first_word(ids: list[int], start: int, stop: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the place of the first token that is no whitespace."""
    return next((i for i in range(start, stop) if decoded(ids[i : i + 1], tokenizer).strip()), stop)


def encoder(example: Example, tokenizer: PreTrainedTokenizerBase, template: Any = None, **options: Any) -> Encode:
    """Return what puts messages of an example into tokens, with its tools and its arguments of the chat template."""
    about = {"tools": example.get("tools"), **(example.get("chat_template_kwargs") or {})}
    if template is not None:
        about["chat_template"] = template

    def encode(messages: list[Message], whole: bool = False, **more: Any) -> Any:
        found = templated(tokenizer, messages, tokenize=True, return_dict=True, **about, **options, **more)
        return found if whole else found["input_ids"]

    return encode


def as_plain_text(example: Example) -> Example:
    r"""Return "### Instruction:\n{prompt}\n\n### Response:\n" and the answer, for a tokenizer without a chat template.

    Raises:
        ValueError: it has tools or calls, which only a template can show.
    """
    if "text" in example or isinstance(example["prompt"], str):
        return example
    heads = {"system": "{}\n\n", "user": "### Instruction:\n{}\n\n### Response:\n", "assistant": "{}\n\n"}
    heads["developer"] = heads["system"]
    chat = [*example["prompt"], *example["completion"]]
    if example.get("tools") or any(m["role"] not in heads or "tool_calls" in m for m in chat):
        raise ValueError(f"tools need a chat template, and this model has none; {OWN_TEMPLATE}")
    prompt = "".join(heads[m["role"]].format(m["content"]) for m in example["prompt"])
    return {"prompt": prompt, "completion": example["completion"][0]["content"]}


def prompt_ids(prompt: str | list[Message] | Example, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens of a prompt as `render` has them before its answer.

    They begin with what the tokenizer or the chat template puts before a prompt, and lack the end that some tokenizers
    put after every text. `prompt` may be an example, with its tools and the rest.
    """
    about: Example = {} if isinstance(prompt, str | list) else prompt
    given: str | list[Message] = prompt if isinstance(prompt, str | list) else prompt["prompt"]
    if isinstance(given, list) and tokenizer.chat_template is not None:
        return encoder(about, tokenizer)(given, add_generation_prompt=True)
    nothing = [{"role": "assistant", "content": ""}]
    text = (
        given if isinstance(given, str) else as_plain_text({**about, "prompt": given, "completion": nothing})["prompt"]
    )
    ids = encode(text, tokenizer)
    ended = ids and ids[-1] == tokenizer.eos_token_id != tokenizer.bos_token_id
    return ids[:-1] if ended and not text.endswith(str(tokenizer.eos_token)) else ids


def encode_text(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return a text to learn as tokens, with one end, which it may have already."""
    end, bare = str(tokenizer.eos_token), text.rstrip()
    ids = encode(text if bare.endswith(end) else text + end, tokenizer)
    again = bare.endswith(end) and bare != text and ids[-1] == tokenizer.eos_token_id
    return ids[:-1] if again else ids


def encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return a text as tokens. Where it begins or ends with what the tokenizer puts there, that is there once."""
    ids = list(tokenizer(text=text)["input_ids"])
    first, last = tokenizer.bos_token_id, tokenizer.eos_token_id
    while len(ids) > 1 and ids[0] == ids[1] == first:
        ids = ids[1:]
    while len(ids) > 1 and ids[-1] == ids[-2] == last:
        ids = ids[:-1]
    return ids


def decoded(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return tokens as text, as they are."""
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def common(first: list[int], second: list[int]) -> int:
    """Return how many tokens two sequences begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
