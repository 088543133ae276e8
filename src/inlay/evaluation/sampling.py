"""How an answer's next token is chosen."""

from __future__ import annotations

from dataclasses import dataclass

import torch

SEEDS = 2**63


@dataclass(frozen=True)
class Sampling:
    """Hold how the next token of an answer is chosen; what is None is the model's own (its generation_config.json).

    Attributes:
        temperature: 0 takes the likeliest token, always; above 0 the logits are divided by it, and a token is drawn.
        top_p: draw among the likeliest tokens that together have this probability.
        top_k: draw among so many of the likeliest tokens; 0: among all.
        repetition_penalty: above 1, tokens that were there before become less likely.
        seed: of the draws; None: another one each time.
    """

    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, value, good, accepted in (
            ("temperature", self.temperature, 0 <= self.temperature <= 100, "0 (greedy) to 100"),
            ("top_p", self.top_p, self.top_p is None or 0 < self.top_p <= 1, "above 0, up to 1"),
            ("top_k", self.top_k, self.top_k is None or 0 <= self.top_k <= 10**6, "0 (all tokens) to a million"),
            ("repetition_penalty", self.repetition_penalty,
             self.repetition_penalty is None or 0 < self.repetition_penalty <= 100, "above 0, up to 100 (1: none)"),
            ("seed", self.seed, self.seed is None or -SEEDS <= self.seed < SEEDS, "a whole number of 64 bits"),
        ):  # fmt: skip
            if not good:
                raise ValueError(f"{name} is {value}; accepted: {accepted}")

    @property
    def options(self) -> dict[str, float | int | bool]:
        """Return the options of transformers' `generate`."""
        options: dict[str, float | int | bool] = {"do_sample": self.temperature > 0}
        given = {"top_p": self.top_p, "top_k": self.top_k, "repetition_penalty": self.repetition_penalty}
        if self.temperature > 0:
            options["temperature"] = self.temperature
        drawn = given if self.temperature > 0 else {"repetition_penalty": self.repetition_penalty}
        return options | {name: value for name, value in drawn.items() if value is not None}

    def start(self) -> None:
        """Set torch's generators to the seed, if there is one."""
        if self.seed is not None:
            torch.manual_seed(self.seed)
