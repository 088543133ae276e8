"""Ollama's Modelfile of a merged model: its chat template in Go's language, where it ends, how it draws, its system.

A chat template is a program, and Ollama's language is another one. What is written here is what most are: a text before
and after each message by its role, and one where the answer begins. These texts are read off the template by rendering
chats with it, and only written where they give back what the template gives.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from transformers import GenerationConfig, PreTrainedTokenizerBase

from inlay.messages import printable

MARK = "\N{BLACK SQUARE}%s\N{BLACK SQUARE}"
ROLES = ("system", "user", "assistant")
CHATS = (
    ("user",), ("system", "user"), ("user", "assistant", "user"),
    ("system", "user", "assistant", "user", "assistant", "user"),
)  # fmt: skip


def modelfile(
    file: str, tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig, system: str | None = None
) -> str:
    """Return a Modelfile.

    Args:
        file: the GGUF file beside it.
        tokenizer: whose chat template and end are written.
        generation: the model's own settings; where they do not draw, neither does Ollama, as `inlay generate`.
        system: the system message; None: the one that the chat template puts in itself, if any.
    """
    lines = [f"FROM ./{file}"]
    around = message_texts(tokenizer)
    if around is None and tokenizer.chat_template is not None:
        lines.append("# No TEMPLATE: this chat template is more than texts around messages; the file holds it.")
    if around is not None:
        texts, begin, own = around
        branches = [
            f'{{{{ if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{behind}{{{{ end }}}}'
            for role, (before, behind) in texts.items()
        ]
        roles = "".join(branches)
        lines.append(f'TEMPLATE """{{{{ range .Messages }}}}{roles}{{{{ end }}}}{begin}"""')
        system = own if system is None else system
    if system and '"""' not in system:
        lines.append(f'SYSTEM """{printable(system)}"""')
    lines += [f"PARAMETER stop {json.dumps(text, ensure_ascii=False)}" for text in ends(tokenizer, generation)]
    drawn = {"temperature": generation.temperature, "top_p": generation.top_p, "top_k": generation.top_k}
    chosen: dict[str, object] = {**drawn} if generation.do_sample else {"temperature": 0}
    chosen["repeat_penalty"] = generation.repetition_penalty
    lines += [f"PARAMETER {name} {value}" for name, value in chosen.items() if value is not None]
    return "\n".join([*lines, ""])


def ends(tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig) -> list[str]:
    """Return the tokens that end an answer, as text."""
    given = generation.eos_token_id
    ids: list[int] = [given] if isinstance(given, int) else list(given or ())
    tokens = [tokenizer.eos_token, *(tokenizer.convert_ids_to_tokens(ids) if ids else ())]
    return list(dict.fromkeys(str(token) for token in tokens if token))


def message_texts(
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[dict[str, tuple[str, str]], str, str] | None:
    """Return the texts around messages by role, the text before an answer, and the template's own system message.

    None where there is no chat template, it does more than that, or Go's language would read the texts as its own.
    """
    if tokenizer.chat_template is None:
        return None
    try:
        wanted = {roles: rendered(tokenizer, roles) for roles in CHATS}
        parts = split_at_marks(wanted[CHATS[-1]], len(CHATS[-1]))
        again = split_at_marks(wanted[CHATS[0]], 1)
        alone = split_at_marks(rendered(tokenizer, ("assistant", "user")), 2)
    except Exception:  # a template is a program, and fails as it likes
        return None
    # P_s s (S_s P_u) u (S_u P_a) a (S_a P_u) u (S_u P_a) a (S_a P_u) u (S_u G): where one ends shows with another chat
    whole_end = parts[-1]
    end = str(tokenizer.eos_token)
    first = after(end, ending_in_common([parts[1], parts[3], again[0]]))  # P_u: what stands before each user's message
    answered = parts[2]  # S_u P_a
    texts = {}
    before_answer = after(end, ending_in_common([answered, alone[0]]))
    texts["assistant"] = (before_answer, parts[3].removesuffix(first))
    texts["user"] = (first, answered.removesuffix(before_answer))
    texts["system"] = (parts[0], parts[1].removesuffix(first))
    if not whole_end.startswith(texts["user"][1]):
        return None
    begin = whole_end.removeprefix(texts["user"][1])
    own = again[0].removesuffix(first)
    if own and not (own.startswith(parts[0]) and own.endswith(texts["system"][1])):
        return None
    inner = own[len(parts[0]) : len(own) - len(texts["system"][1])] if own else ""
    for roles, text in wanted.items():
        made = "".join(f"{texts[role][0]}{MARK % i}{texts[role][1]}" for i, role in enumerate(roles)) + begin
        head = own if roles[0] != "system" else ""
        if head + made != text:
            return None
    said = "".join([begin, inner, *(text for pair in texts.values() for text in pair)])
    return None if "{{" in said or '"""' in said or printable(said) != said else (texts, begin, inner)


def rendered(tokenizer: PreTrainedTokenizerBase, roles: Sequence[str]) -> str:
    """Return a chat of these roles in the chat template, without the token that llama.cpp puts before every text."""
    chat = [{"role": role, "content": MARK % i} for i, role in enumerate(roles)]
    text = str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    adds = list(tokenizer(text="x")["input_ids"])[:1] == [tokenizer.bos_token_id]
    return text.removeprefix(str(tokenizer.bos_token)) if adds else text


def after(end: str, text: str) -> str:
    """Return what follows the last `end` in `text`, and the new lines behind it, which are of the message before."""
    rest = text.rpartition(end)[2]
    return text if rest == text else rest.lstrip("\n")


def split_at_marks(text: str, count: int) -> list[str]:
    """Return the texts before, between and after the marks, which have to be there once each and in order."""
    parts = []
    for i in range(count):
        before, mark, text = text.partition(MARK % i)
        if not mark or MARK % i in text:
            raise ValueError("the template repeats or drops a message")
        parts.append(before)
    return [*parts, text]


def common_end(first: str, second: str) -> str:
    """Return the longest text that both end with."""
    count = 0
    while count < min(len(first), len(second)) and first[-1 - count] == second[-1 - count]:
        count += 1
    return first[len(first) - count :]


def ending_in_common(texts: Sequence[str]) -> str:
    """Return the longest text that all end with."""
    found = texts[0]
    for text in texts[1:]:
        found = common_end(found, text)
    return found
