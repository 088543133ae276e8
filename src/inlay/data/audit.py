"""An audit of examples before the first step: what a tokenizer and a chat template make of what the records say."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase

from inlay.data.chat_templates import (
    OWN_TEMPLATE,
    REASONING,
    TemplateError,
    mentions,
    refuses_system,
    template_text,
    templated,
    training_template,
)
from inlay.data.chats import Example, Message, is_learned, learned_turns
from inlay.data.render import Sequence, Span, decoded, encode_example, sequences
from inlay.messages import short

KNOWN_KEYS = {"role", "content", "tool_calls", "weight", *REASONING}  # of messages; what becomes of others is tried
THOUGHT = "<think>"
SYSTEM_FIRST = (["system", "user"], ["developer", "user"])
TRIED = 50  # conversations in which a key may show that the template reads it


@dataclass
class Audit:
    """Hold what a tokenizer and a `max_length` make of a data set; `cut` counts the `masked` ones too."""

    total: int  # sequences
    cut: int  # answers that lose tokens
    masked: int  # answers that lose all
    shifted: int  # sequences, as `Sequence.shifted`
    longest: int  # sequence, in tokens
    mean_tokens: float
    answer_tokens: int
    answers: int = 0
    largest_token: int = 0
    most_learned: int = 0  # answer tokens in one sequence
    notes: list[str] = field(default_factory=list)  # what a person should know before training
    sequences: list[Example] = field(default_factory=list)  # the examples, those that are learned turn by turn as turns

    def count(self, one: Sequence, limit: int) -> None:
        """Add a sequence."""
        length = len(one.ids)
        self.total += 1
        self.cut += sum(stop > limit for _, stop in one.spans)
        self.masked += sum(start >= limit for start, _ in one.spans)
        self.shifted += one.shifted
        self.longest = max(self.longest, length)
        self.mean_tokens += (length - self.mean_tokens) / self.total
        learned = sum(min(stop, limit) - min(start, limit) for start, stop in one.spans)
        self.answer_tokens += learned
        self.most_learned = max(self.most_learned, learned)
        self.answers += len(one.spans)
        self.largest_token = max(self.largest_token, *one.ids, 0)


def audit_examples(
    examples: list[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    stops: frozenset[int] = frozenset(),
) -> Audit:
    """Render all examples, count them, and compare what is learned with what the records say.

    `stops` are the tokens that end the model's answers, beside the tokenizer's end token.

    Raises:
        ValueError: tools, their calls or their answers are not in what the chat template makes.
    """
    findings, found = Findings(tokenizer, stops), Audit(0, 0, 0, 0, 0, 0.0, 0)
    for example in examples:
        try:
            parts = sequences(example, tokenizer)
            encoded = [encode_example(part, tokenizer) for part in parts]
        except TemplateError as error:
            findings.refuse(example, error)
            continue
        if isinstance(example.get("prompt"), list):
            findings.look_at(example, parts, encoded)
        found.sequences += parts
        for one in encoded:
            found.count(one, max_length or len(one.ids))
    found.shifted -= findings.shifted  # what the template drops shifts the rest
    found.notes = findings.notes()
    return found


class Findings:
    """Count what a chat template does to conversations."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: frozenset[int]) -> None:
        self.tokenizer, self.template = tokenizer, template_text(tokenizer.chat_template)
        self.counts: Counter[str] = Counter()
        self.conversations = self.answers = self.shifted = 0
        self.dropped = self.strange_end = self.reworded = self.refused = ""  # the first of each
        self.tried: Counter[str] = Counter()
        self.read: dict[str, bool] = {}  # keys of messages and arguments of the template: whether it reads them
        added = tokenizer.added_tokens_decoder
        end: Any = tokenizer.eos_token_id
        self.stops = stops | {end}
        self.ends = {i for i, token in added.items() if token.special} | self.stops

    def refuse(self, example: Example, error: TemplateError) -> None:
        """Count a conversation for which the chat template fails."""
        self.conversations += 1
        self.counts["refused"] += 1
        begins = next((m["content"] for m in example["prompt"] if m["role"] == "user"), "")
        self.refused = self.refused or f"the one that begins with {short(begins)}: {error}"

    def look_at(self, example: Example, parts: list[Example], encoded: list[Sequence]) -> None:
        """Compare a conversation with the sequences that are made of it."""
        self.conversations += 1
        chat = example["prompt"] + example["completion"]
        self.counts.update(shape(chat, learned_turns(example)[-1]))
        self.counts["turn by turn"] += len(parts) > 1
        self.counts["training template"] += encoded[0].trained
        self.counts["reworded"] += any(one.reworded for one in encoded)
        self.counts["system first"] += [m["role"] for m in chat[:2]] in SYSTEM_FIRST and refuses_system(
            self.tokenizer, self.template
        )
        self.counts["developer"] += any(m["role"] == "developer" for m in chat) and not mentions(
            self.template, "developer"
        )
        for part, one in zip(parts, encoded, strict=True):
            before = self.counts["dropped"]
            for span, place in zip(one.spans, learned_turns(part), strict=True):
                self.look_at_answer(one.ids, span, (part["prompt"] + part["completion"])[place])
            self.shifted += one.shifted and self.counts["dropped"] > before
            self.reworded = self.reworded or one.reworded
        self.look_at_context(parts[-1], encoded[-1])

    def look_at_answer(self, ids: list[int], span: Span, message: Message) -> None:
        """Count whether all of an answer is in the tokens that are learned, and one end after it."""
        learned = ids[slice(*span)]
        text = squeezed(decoded(learned, self.tokenizer))
        if decoded(ids[: span[0]][-8:], self.tokenizer).rstrip().endswith(THOUGHT):
            text = THOUGHT + text  # with which some templates end a prompt
        self.answers += 1
        missing = next((piece for piece in pieces(message) if not self.holds(text, piece)), None)
        if missing is not None:
            self.counts["dropped"] += 1
            self.dropped = self.dropped or missing
        self.counts["calls"] += not all(self.holds_json(text, piece) for piece in call_pieces(message))
        words = [token for token in learned if decoded([token], self.tokenizer).strip()]
        self.counts["no end"] += not words or words[-1] not in self.ends
        self.counts["two ends"] += len(words) > 1 and words[-1] == words[-2] and words[-1] in self.ends
        if words and words[-1] in self.ends - self.stops:
            self.counts["strange end"] += 1
            self.strange_end = self.strange_end or decoded(words[-1:], self.tokenizer)

    def look_at_context(self, example: Example, one: Sequence) -> None:
        """Count whether what is not learned is there: messages, calls, tools, and what else the template is given."""
        chat = (example["prompt"] + example["completion"])[: learned_turns(example)[-1] + 1]
        text = squeezed(decoded(one.ids, self.tokenizer))
        for role in ("system", "user", "tool"):
            own = [m for m in chat if m["role"] in (role, "developer" if role == "system" else role)]
            self.counts[role] += not all(self.holds(text, m["content"]) for m in own)
        context = [m for m in chat if not is_learned(m)]
        self.counts["calls"] += not all(self.holds_json(text, p) for m in context for p in call_pieces(m))
        self.counts["two starts"] += len(one.ids) > 1 and one.ids[0] == one.ids[1] == self.tokenizer.bos_token_id
        if example.get("tools"):
            self.counts["with tools"] += 1
            self.counts["tools"] += self.text(example, chat) == self.text(example | {"tools": None}, chat)
        for key in {key for message in chat for key in message} - KNOWN_KEYS:
            self.try_key(key, example, chat, [{k: v for k, v in m.items() if k != key} for m in chat])
        for key in example.get("chat_template_kwargs") or ():
            rest = {k: v for k, v in example["chat_template_kwargs"].items() if k != key}
            self.try_key(f"chat_template_kwargs {key}", example, chat, chat, rest)

    def try_key(
        self, key: str, example: Example, chat: list[Message], less: list[Message], arguments: Any = None
    ) -> None:
        """See whether a key makes a difference, in the first conversations that have it."""
        if self.read.get(key) or self.tried[key] >= TRIED:
            return
        self.tried[key] += 1
        arguments = example.get("chat_template_kwargs") if arguments is None else arguments
        without = self.text(example | {"chat_template_kwargs": arguments}, less)
        self.read[key] = without != self.text(example, chat)

    def text(self, example: Example, chat: list[Message]) -> str | None:
        """Return messages in the template, and their prompt alone; None where it fails."""
        about = {"tokenize": False, "tools": example.get("tools"), **(example.get("chat_template_kwargs") or {})}
        try:
            whole = templated(self.tokenizer, chat, **about)
            return str(whole) + str(templated(self.tokenizer, chat[:-1], add_generation_prompt=True, **about))
        except ValueError:
            return None

    def holds(self, text: str, piece: str) -> bool:
        """Return whether a text has a piece, but for whitespace and for what the tokenizer makes of the piece."""
        if squeezed(piece) in text:
            return True
        ids = self.tokenizer(text=piece, add_special_tokens=False)["input_ids"]
        return squeezed(decoded(ids, self.tokenizer)) in text

    def holds_json(self, text: str, piece: str) -> bool:
        """Return whether a text has a piece as it is, or as JSON writes it."""
        written = [json.dumps(piece, ensure_ascii=ascii)[1:-1] for ascii in (False, True)]
        return any(squeezed(one) in text for one in written) or self.holds(text, piece)

    def notes(self) -> list[str]:
        """Return what was found, a line each, with the way out.

        Raises:
            ValueError: tools, their calls or their answers are lost.
        """
        n, all_ = self.counts, f"of {self.conversations} conversations"
        own = OWN_TEMPLATE
        if training_template(self.tokenizer) is not None:
            own += "; chat_template: training is trl's for this model"
        if self.refused:
            raise ValueError(f"{n['refused']} {all_} cannot be rendered, first {self.refused}; {own}")
        for what, key in (("tools", "tools"), ("calls of tools", "calls"), ("answers of tools", "tool")):
            if n[key]:
                less = "; --ignore tools trains without them" if key == "tools" else ""
                raise ValueError(f"the chat template does not show the {what} in {n[key]} {all_}; {own}{less}")
        if bad := [key for key in ("tools",) if self.read.get(key) is False]:
            raise ValueError(f"the chat template does not read the key {bad[0]!r} of messages; {own}")
        unread = sorted(key for key, read in self.read.items() if not read)
        answers = f"of {self.answers} answers"
        none = self.tokenizer.chat_template is None
        why = "the model has no chat template" if none else "the chat template rewrites earlier turns"
        kept = "leaves out the {} in {} " + f"{all_}; {own}"
        lines = {
            "turn by turn": f"{n['turn by turn']} {all_} are learned turn by turn: {why}",
            "training template": f"{n['training template']} {all_} are rendered in the template that trl has for "
            "training this model, which leaves earlier turns as they were answered",
            "dropped": f"the chat template drops part of {n['dropped']} {answers} "
            f"(such as {short(self.dropped)}); {own}",
            "no end": f"no end token follows {n['no end']} {answers}, so that the model does not learn to stop; {own}",
            "two ends": f"{n['two ends']} {answers} end twice; take the end token out of the records",
            "two starts": f"{n['two starts']} {all_} begin with {self.tokenizer.bos_token} twice; take it out of the "
            "records or of the chat template",
            "strange end": f"{n['strange end']} {answers} end with {self.strange_end}, which is not the tokenizer's "
            f"end token {self.tokenizer.eos_token}: whatever generates has to stop there",
            "reworded": f"in {n['reworded']} {all_} the prompt alone ends with {short(self.reworded)}, which is not "
            "before the learned answer; chat_template_kwargs or reasoning_content in the records may change that",
            "system": "the chat template " + kept.format("system message", n["system"]),
            "user": "the chat template " + kept.format("user's message", n["user"]),
            "system first": f"the system message begins the first user's in {n['system first']} {all_}: the chat "
            "template takes none of its own",
            "developer": f"the developer's message is the system message in {n['developer']} {all_}: the chat template "
            "has no such role",
            "users": f"in {n['users']} {all_} two user messages follow each other; both are kept",
            "first": f"in {n['first']} {all_} the assistant speaks first; that is context, not learned",
            "rest": f"in {n['rest']} {all_} there are messages after the last answer; nothing is learned from them",
        }
        found = [line for key, line in lines.items() if n[key]]
        return [*found, f"not used: keys {', '.join(unread)}"] if unread else found


def shape(chat: list[Message], last: int) -> list[str]:
    """Return what is odd in the order of messages, of which the one at `last` is the last that is learned."""
    roles = [message["role"] for message in chat]
    found = ["users"] if ("user", "user") in pairwise(roles) else []
    found += ["first"] if next(role for role in roles if role not in ("system", "developer")) == "assistant" else []
    return found + (["rest"] if last < len(chat) - 1 else [])


def pieces(message: Message) -> Iterator[str]:
    """Yield the texts that an answer is made of, its calls apart."""
    yield from (str(message[key]) for key in ("content", *REASONING) if message.get(key))


def call_pieces(message: Message) -> Iterator[str]:
    """Yield the names, keys and texts of a message's calls."""
    for call in message.get("tool_calls", []):
        yield call["function"]["name"]
        yield from leaves(call["function"]["arguments"])


def leaves(value: Any) -> Iterator[str]:
    """Yield the keys and the texts and numbers of a value, as JSON has them."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from leaves(inner)
    elif isinstance(value, str | int | float) and not isinstance(value, bool):
        yield str(value)


def squeezed(text: str) -> str:
    """Return a text without whitespace."""
    return "".join(text.split())
