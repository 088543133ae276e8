"""What a client may ask, in OpenAI's form. What would change the answer and is not done here is refused by name."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from inlay.data.chats import Example, chat_cell, template_arguments
from inlay.evaluation.sampling import Sampling

WITHOUT_EFFECT = """user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention
parallel_tool_calls""".split()
NEUTRAL: dict[str, list[JsonValue]] = {  # the values that ask for nothing
    "n": [1],
    "frequency_penalty": [0],
    "presence_penalty": [0],
    "logit_bias": [{}],
    "logprobs": [False],
    "top_logprobs": [0],
    "response_format": [{"type": "text"}],
    "modalities": [["text"]],
    "tools": [[]],
    "tool_choice": ["none", "auto"],
}
Number = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=10**9)]
StopText = Annotated[str, Field(min_length=1, max_length=1000)]


class StreamOptions(BaseModel):
    """Say what a stream holds beside the answer."""

    include_usage: bool = False


class ChatRequest(BaseModel):
    """Hold a request to /v1/chat/completions; OpenAI has no top_k, repetition_penalty and chat_template_kwargs."""

    model_config = ConfigDict(extra="allow")

    model: str
    messages: list[dict[str, JsonValue]]
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: int | None = None
    repetition_penalty: Number | None = None
    seed: int | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    chat_template_kwargs: dict[str, JsonValue] | None = None

    @model_validator(mode="after")
    def check_rest(self) -> ChatRequest:
        """Refuse what is asked beyond these fields and is not done."""
        for name, value in (self.model_extra or {}).items():
            neutral = NEUTRAL.get(name, [])
            if value is not None and name not in WITHOUT_EFFECT and value not in neutral:
                only = f" other than {neutral[0]!r}" if neutral else ""
                raise ValueError(f"{name}{only} is not supported")
        return self

    @property
    def sampling(self) -> Sampling:
        """Return how tokens are chosen; without a temperature the likeliest is taken, as `inlay generate` does.

        Raises:
            ValueError: a value is out of its range.
        """
        settings = (self.top_p, self.top_k, self.repetition_penalty, self.seed)
        chosen = Sampling(self.temperature or 0.0, *settings)
        return chosen if chosen.temperature else Sampling(repetition_penalty=self.repetition_penalty)

    @property
    def stops(self) -> tuple[str, ...]:
        """Return the texts that end the answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def asked(self) -> Example:
        """Return the conversation.

        Raises:
            ValueError: a message cannot be read.
        """
        chat = chat_cell(self.messages, "messages")
        if not chat:
            raise ValueError("messages is empty; accepted: at least one message")
        arguments = template_arguments(self.chat_template_kwargs, "chat_template_kwargs")
        return {"prompt": chat} | ({"chat_template_kwargs": arguments} if arguments else {})
