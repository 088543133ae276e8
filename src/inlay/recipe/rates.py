"""Default learning rates: what `learning_rate: auto` stands for, by method.

One table, which `inlay methods`, `train`, `compare` and the docs read. A rate is for AdamW and a method's usual size.
Measured ones come from the sweeps of the comparisons in docs/results, as `benchmarks/default_rates.py --table` reads
them: E2E on the built-in model, and TREC on a 22M encoder whose new head is trained too, which wants higher rates. A
default is the best rate of the task that is of its kind, rounded to 1, 1.5, 2, 3, 5 or 7. A method outside of the
package names its own rate, as `Method.learning_rate`.
"""

from __future__ import annotations

from dataclasses import dataclass

from inlay.methods import find
from inlay.recipe.peft_methods import is_inlay


@dataclass(frozen=True)
class DefaultRate:
    """Hold a method's default learning rate, and where it is from.

    Attributes:
        value: the rate.
        new_head: the rate where a new head is trained too (labels, reward models); None: the same.
        e2e, trec: the best rates that were measured, where they lay inside their grid.
        source: where the rate is from, if it was not measured so.
    """

    value: float
    e2e: float | None = None
    trec: float | None = None
    source: str = ""
    new_head: float | None = None

    @property
    def origin(self) -> str:
        """Return in words where the rate is from."""
        measured = {"E2E": self.e2e, "TREC": self.trec}
        return self.source or ", ".join(f"{task} {rate:.2g}" for task, rate in measured.items() if rate is not None)


ONE_OF_TWO = "the better of two on E2E, not inside a grid"
UNKNOWN = DefaultRate(5e-4, source="not measured")

# fmt: off
RATES = {
    "lora": DefaultRate(3e-3, 2.7e-3, 3e-3),
    "pissa": DefaultRate(5e-4, 4.7e-4, 1.3e-3, new_head=1.5e-3),
    "milora": DefaultRate(2e-3, 1.8e-3, 4.2e-3, new_head=5e-3),
    "olora": DefaultRate(5e-4, source=ONE_OF_TWO),
    "mica": DefaultRate(3e-3, source=ONE_OF_TWO),
    "kasa": DefaultRate(3e-3, source=ONE_OF_TWO),
    "oplora": DefaultRate(3e-3, source=ONE_OF_TWO),
    "lora_xs": DefaultRate(3e-3, source=ONE_OF_TWO),
    "psoft": DefaultRate(3e-3, source=ONE_OF_TWO),
    "svfit": DefaultRate(0.1, source=ONE_OF_TWO),
    "loldu": DefaultRate(1e-2, source=ONE_OF_TWO),
    "lamda": DefaultRate(5e-4, 5.2e-4, 3.3e-3, new_head=3e-3),
    "dota": DefaultRate(3e-4, 3e-4, 3.1e-3, new_head=3e-3),
    "bone": DefaultRate(5e-4, 4.6e-4, 4.6e-4),
    "bat": DefaultRate(3e-4, 3.8e-4, 1.1e-3, new_head=1e-3),
    "bat_col": DefaultRate(3e-4, source="as bat, whose first step is as long"),
    "mora": DefaultRate(5e-4, source=ONE_OF_TWO),
    "mora_rope": DefaultRate(1.5e-3, source=ONE_OF_TWO),
    "randlora": DefaultRate(1.5e-3, source=ONE_OF_TWO),
    "peanut": DefaultRate(1.5e-3, source=ONE_OF_TWO),
    "hira": DefaultRate(3e-3, source=ONE_OF_TWO),
    "deep_lora": DefaultRate(1e-2, source=ONE_OF_TWO),
    "snell": DefaultRate(1.5e-3, source=ONE_OF_TWO),
    "lorta": DefaultRate(1e-2, source=ONE_OF_TWO),
    "xgblora": DefaultRate(5e-3, source=ONE_OF_TWO),
    "spiel": DefaultRate(1.5e-3, source=ONE_OF_TWO),
    "eva": DefaultRate(1.5e-3, source=ONE_OF_TWO),
    "corda": DefaultRate(5e-4, source=ONE_OF_TWO),
    "lora_null": DefaultRate(3e-3, source=ONE_OF_TWO),
    "lora_ga": DefaultRate(5e-4, source=ONE_OF_TWO),
    "lora_one": DefaultRate(3e-3, source=ONE_OF_TWO),
    "lq_lora": DefaultRate(5e-4, source=ONE_OF_TWO),
    "smt": DefaultRate(1.5e-3, source=ONE_OF_TWO),
    "full": DefaultRate(7e-5, 7.8e-5, 4e-4, new_head=5e-4),
    "peft:dora": DefaultRate(3e-3, 3.8e-3, 3.3e-3),
    "peft:lora": DefaultRate(3e-3, source="as lora"),
    "peft:pissa": DefaultRate(5e-4, source="as pissa"),
    "peft:olora": DefaultRate(5e-4, source="as olora"),
    "peft:miss": DefaultRate(5e-4, source="as bone"),
}
# fmt: on


def default_rate(method: str) -> DefaultRate:
    """Return the default learning rate of a recipe's method: the table's, the one its class names, or a careful one.

    Raises:
        UnknownMethodError: there is no such method.
    """
    if method in RATES:
        return RATES[method]
    rate = find(method).learning_rate if is_inlay(method) else None
    return UNKNOWN if rate is None else DefaultRate(rate, source="as its class says")


def rates_table() -> str:
    """Return the table as Markdown, for docs/methods.md."""
    rows = [
        f"| `{method}` | {rate.value:g} | {rate.new_head or rate.value:g} | {rate.origin} |"
        for method, rate in RATES.items()
    ]
    heads = ["| method | rate | with a new head | best measured, or where it is from |", "|---|---|---|---|"]
    return "\n".join([*heads, *rows])
