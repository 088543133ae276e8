"""Chat templates: programs of the model's that make text of messages, and what they do not take."""

from __future__ import annotations

import functools
import json
import re
from typing import Any

from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template

from inlay.data.chats import Message
from inlay.files.untrusted import LENGTH, read_regular, regular_file, user_path
from inlay.messages import first_line

REASONING = ("reasoning_content", "reasoning", "thinking")  # keys of an answer's thoughts, as templates name them
OWN_TEMPLATE = "chat_template: FILE gives it one of your own"


class TemplateError(ValueError):
    """Report a chat template, which is a program, that fails for a conversation."""


def templated(tokenizer: Any, chat: list[Message], **options: Any) -> Any:
    """Return a conversation in the model's chat template.

    Raises:
        TemplateError: the template fails.
    """
    template = template_text(options.get("chat_template") or tokenizer.chat_template)
    chat = for_template(chat, template)
    if [message["role"] for message in chat[:2]] == ["system", "user"] and refuses_system(tokenizer, template):
        chat = [{**chat[1], "content": f"{chat[0]['content']}\n\n{chat[1]['content']}"}, *chat[2:]]
    try:
        try:
            return tokenizer.apply_chat_template(chat, **options)
        except TypeError:  # templates that join arguments to text (DeepSeek-V3's) take them as text only
            return tokenizer.apply_chat_template(list(map(with_text_arguments, chat)), **options)
    except Exception as error:
        raise TemplateError(f"the model's chat template does not take this example: {first_line(error)}") from error


@functools.lru_cache(maxsize=16)
def refuses_system(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Return whether a chat template fails for a system message before a user's, as Gemma's, and not for the latter."""
    user = {"role": "user", "content": "x"}
    try:
        tokenizer.apply_chat_template([user], chat_template=template, tokenize=False)
    except Exception:  # it fails for another reason, of which there are as many as templates
        return False
    try:
        tokenizer.apply_chat_template(
            [{"role": "system", "content": "y"}, user], chat_template=template, tokenize=False
        )
    except Exception:  # as its `raise_exception` says
        return True
    return False


def for_template(chat: list[Message], template: str) -> list[Message]:
    """Return the messages of `chat` as the template takes them.

    Inlay's own marks are removed. A developer's message becomes the system's, and an answer's reasoning gets another
    name, where the template does not know theirs.
    """
    made: list[Message] = []
    for message in chat:
        message = {key: value for key, value in message.items() if key != "weight"}
        if message["role"] == "developer" and not mentions(template, "developer"):
            message["role"] = "system"
            if made and made[-1]["role"] == "system":
                message["content"] = f"{made.pop()['content']}\n\n{message['content']}"
        for name in REASONING:
            other = next((known for known in REASONING if mentions(template, known)), name)
            if name in message and not mentions(template, name):
                message[other] = message.pop(name)
        made.append(message)
    return made


def with_text_arguments(message: Message) -> Message:
    """Return a message whose calls have their arguments as JSON text."""
    if "tool_calls" not in message:
        return message
    functions = [call["function"] for call in message["tool_calls"]]
    texts = [f | {"arguments": json.dumps(f["arguments"], ensure_ascii=False)} for f in functions]
    calls = [call | {"function": text} for call, text in zip(message["tool_calls"], texts, strict=True)]
    return message | {"tool_calls": calls}


def template_text(template: Any) -> str:
    """Return a chat template's text; of one with named variants, all of them."""
    return "\n".join(template.values()) if isinstance(template, dict) else str(template)


@functools.lru_cache(maxsize=256)
def mentions(template: str, word: str) -> bool:
    """Return whether a chat template has a word, and so may read a key of that name."""
    return re.search(rf"\b{re.escape(word)}\b", template) is not None


def read_template(source: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the chat template in a file, or, by the name "training", trl's for training a tokenizer's family.

    Raises:
        ValueError: there is none, or it is too long.
    """
    if source == "training":
        if (found := training_template(tokenizer)) is None:
            raise ValueError(
                "chat_template: trl has none for training this model, or needs none; give a file of your own"
            )
        return found
    path = regular_file(user_path(source))
    if not path.is_file():
        raise ValueError(f"chat_template: {source} is no file; accepted: one in Jinja, or training")
    try:
        text = read_regular(path, LENGTH + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"chat_template: {source} cannot be read: {first_line(error)}") from None
    if len(text) > LENGTH or not text.strip():
        raise ValueError(f"chat_template: {source} has {len(text):,} characters; accepted: 1 to {LENGTH:,}")
    return text


def training_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the template that trl has for training the family of a tokenizer's, if it has one."""
    if tokenizer.chat_template is None:
        return None
    return _training_template(tokenizer, template_text(tokenizer.chat_template))


@functools.lru_cache(maxsize=2)
def _training_template(tokenizer: PreTrainedTokenizerBase, template: str) -> str | None:
    try:
        return get_training_chat_template(tokenizer)
    except Exception:  # trl knows none, or its probes fail in this template, which is a program
        return None
