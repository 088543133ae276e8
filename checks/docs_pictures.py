"""Draw the pictures of the docs as SVG, from the list of methods and from measured tables: `make docs-tables`."""

from __future__ import annotations

import csv
import html
from pathlib import Path

from inlay.methods import METHODS

ROOT = Path(__file__).parents[1]
STYLE = """<style>
svg { font-family: -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; }
.card { fill: #ffffff; stroke: #d0d7de; } .ink { fill: #1f2328; } .soft { fill: #59636e; }
.weight { fill: #dfe4ea; stroke: #59636e; } .piece { fill: #1a9a86; stroke: #0b6b5c; }
.off { fill: #f6c667; stroke: #a86a00; }
.line { stroke: #59636e; fill: none; } .dot { fill: #1a9a86; } .bar { stroke: #1a9a86; } .light { fill: #ffffff; }
@media (prefers-color-scheme: dark) {
.card { fill: #161b22; stroke: #3d444d; } .ink { fill: #f0f6fc; } .soft { fill: #9da7b3; }
.weight { fill: #343b44; stroke: #9da7b3; } .line { stroke: #9da7b3; } .dot { fill: #3fc7b0; } .bar { stroke: #3fc7b0; }
}
</style>"""
# The map's boxes: which piece of the weight is trained. A method that is in none of them stands in the last one.
FAMILIES = {
    "Low rank, beside W": "lora deep_lora xgblora oplora",
    "Low rank, from data": "eva lora_ga lora_one lora_null corda lq_lora",
    "Singular vectors of W": "pissa milora mica svfit kasa lora_xs psoft lamda",
    "Other factors of W": "olora loldu dota",
    "Blocks": "bone mora mora_rope smt",
    "W guides its own update": "bat bat_col peanut hira",
    "Shared or random": "lorta randlora",
    "Single entries": "spiel snell",
}


def text(
    x: float, y: float, words: str, kind: str = "ink", size: int = 14, anchor: str = "start", bold: bool = False
) -> str:
    """Return one line of text at `x` and `y`."""
    weight = ' font-weight="600"' if bold else ""
    where = f'x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}"{weight}'
    return f'<text class="{kind}" {where}>{html.escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, kind: str, radius: int = 3) -> str:
    """Return a rectangle."""
    return f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius}"/>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str = "line", width: float = 1.5, more: str = "") -> str:
    """Return a straight line."""
    return f'<line class="{kind}" x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke-width="{width:g}" {more}/>'


def svg(width: int, height: int, title: str, parts: list[str]) -> str:
    """Return a whole picture on a card, which keeps it readable on any page."""
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
    card = box(0.5, 0.5, width - 1, height - 1, "card", 8)
    return "\n".join([head, f"<title>{html.escape(title)}</title>", STYLE, card, *parts, "</svg>"]) + "\n"


def layer() -> str:
    """Draw one adapted layer: W stays, a piece of it is cut out and trained, and the start is subtracted."""
    marker = 'id="a" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto"'
    arrow = f'<defs><marker {marker}><path class="soft" d="M0 0 8 4 0 8z"/></marker></defs>'
    end = 'marker-end="url(#a)"'
    parts = [arrow, text(40, 158, "x", size=22, bold=True), text(678, 158, "y", size=22, bold=True)]
    parts += [
        line(58, 152, 108, 152),
        line(108, 84, 108, 224),
        line(108, 84, 228, 84, more=end),
        line(108, 224, 228, 224, more=end),
    ]
    parts += [box(232, 30, 108, 108, "weight"), text(290, 96, "W", size=24, anchor="middle", bold=True)]
    dashes = 'stroke-dasharray="4 3"'
    parts += [
        f'<rect class="line" x="{x}" y="40" width="{w}" height="{h}" {dashes}/>'
        for x, w, h in ((242, 14, 88), (262, 68, 14))
    ]
    parts += [text(286, 158, "the pretrained weight, never written to", "soft", 13, "middle")]
    parts += [
        box(232, 184, 14, 80, "piece"),
        box(252, 184, 80, 14, "piece"),
        text(262, 230, "θ", size=22, bold=True),
        text(284, 230, "is trained", "soft", 13),
    ]
    parts += [
        text(350, 230, "−", size=24, bold=True),
        box(378, 184, 14, 80, "off"),
        box(398, 184, 80, 14, "off"),
        text(408, 230, "θ₀", size=22, bold=True),
        text(438, 230, "is stored", "soft", 13),
    ]
    parts += [
        text(356, 292, "the piece of W that is re-cut, and the same piece as it was at the start", "soft", 13, "middle")
    ]
    parts += [
        line(344, 84, 596, 84),
        line(502, 224, 596, 224),
        line(596, 84, 596, 138, more=end),
        line(596, 224, 596, 166, more=end),
    ]
    parts += [
        '<circle class="line" cx="596" cy="152" r="13" stroke-width="1.5"/>',
        text(596, 158, "+", size=18, anchor="middle", bold=True),
        line(610, 152, 668, 152, more=end),
    ]
    parts += [
        text(
            360,
            324,
            "y = W x + s (ΔW(θ) − ΔW(θ₀)) x.   At the start θ = θ₀, so the model is exactly the pretrained one.",
            size=14,
            anchor="middle",
        )
    ]
    return svg(720, 344, "One adapted layer: W stays as it is, and a piece cut from it is trained", parts)


def family() -> str:
    """Draw the methods as a map: which piece of the weight each one trains."""
    groups = {title: names.split() for title, names in FAMILIES.items()}
    placed = {name for names in groups.values() for name in names}
    rest = [m.name for m in METHODS if m.name not in placed]
    there = {m.name: m for m in METHODS}
    groups |= {"More": rest} if rest else {}
    parts, columns, width = [], 3, 360
    tops = [56.0] * columns
    for title, names in groups.items():
        column = tops.index(min(tops))
        x, y = 20 + column * (width + 10), tops[column]
        known = [name for name in names if name in there]
        height = 34 + 22 * len(known)
        parts += [
            f'<rect class="weight" x="{x}" y="{y:g}" width="{width}" height="{height}" rx="6"/>',
            text(x + 12, y + 22, title, size=14, bold=True),
        ]
        for row, name in enumerate(known):
            short = there[name].title.partition(": ")[2] or there[name].title
            short = short if len(short) <= 48 else short[:47].rsplit(" ", 1)[0] + " …"
            parts += [
                text(x + 12, y + 44 + 22 * row, name, size=13, bold=True),
                text(x + 88, y + 44 + 22 * row, short, "soft", 11),
            ]
        tops[column] += height + 12
    parts.insert(0, text(20, 34, "Which piece of the weight does a method re-cut?", size=18, bold=True))
    return svg(20 + columns * (width + 10) + 10, int(max(tops)) + 8, "The methods by what they train", parts)


def table(path: str) -> list[dict[str, str]]:
    """Return the rows of a measured table."""
    with (ROOT / path).open(encoding="utf-8", newline="") as rows:
        return list(csv.DictReader(rows))


def evidence() -> str:
    """Draw what was measured of the compared methods: loss and forgetting, and time and memory of a step."""
    compared = {row["method"]: row for row in table("docs/results/e2e/results.csv")}
    steps = {
        r["method"]: r
        for r in table("benchmarks/results/step.csv")
        if (r["model"], r["precision"]) == ("llama", "bf16")
    }
    names = {"peft:dora": "PEFT DoRA"}
    order = [m for m in ("lora", "bone", "pissa", "milora", "bat", "dota", "lamda", "peft:dora") if m in compared]
    zero = {"difference": "0", "difference_low": "0", "difference_high": "0"}
    panels: list[tuple[str, str, dict[str, tuple[float, float, float]]]] = [
        ("Loss, beside LoRA", "95 % interval, 5 seeds", {}),
        ("Forgetting", "± sd of 5 seeds", {}),
        ("Time of a step, × frozen", "median, quartiles", {}),
        ("Peak memory, MiB", "beyond the weights", {}),
    ]
    for name in order:
        row, step = compared[name], steps[names.get(name, name)]
        row = row | (zero if name == "lora" else {})
        panels[0][2][name] = tuple(float(row[k]) for k in ("difference_low", "difference", "difference_high"))
        forgets, sd = float(row["forgetting"]), float(row["forgetting_sd"])
        panels[1][2][name] = (forgets - sd, forgets, forgets + sd)
        panels[2][2][name] = tuple(float(step[k]) for k in ("low", "step", "high"))
        panels[3][2][name] = (float(step["peak_MiB"]),) * 3
    parts, left, width, row_height = [], 110, 180, 28
    parts += [text(98, 88 + row_height * i, name, size=14, anchor="end", bold=True) for i, name in enumerate(order)]
    for i, (title, what, values) in enumerate(panels):
        x0 = left + i * (width + 30)
        low, high = min(v[0] for v in values.values()), max(v[2] for v in values.values())
        low, high = (min(low, 0.0), high) if i < 2 else ((1.0, high) if i == 2 else (300.0, high))

        def at(value: float, low: float = low, high: float = high, x0: int = x0) -> float:
            return x0 + (value - low) / (high - low) * width

        parts += [text(x0, 28, title, size=14, bold=True), text(x0, 46, what, "soft", 12)]
        base = {0: 0.0, 1: 0.0, 2: 1.0, 3: 300.0}[i]
        bottom = 68 + row_height * len(order)
        parts += [line(at(base), 60, at(base), bottom, more='stroke-dasharray="3 3"')]
        parts += [
            text(at(base), bottom + 16, f"{base:g}", "soft", 12, "middle"),
            text(x0 + width, bottom + 16, f"{high:.3g}" if i != 3 else f"{high:.0f}", "soft", 12, "middle"),
        ]
        for row, name in enumerate(order):
            a, b, c = values[name]
            y = 83 + row_height * row
            parts += [line(at(a), y, at(c), y, "bar", 3)] if c > a else []
            parts += [f'<circle class="dot" cx="{at(b):.1f}" cy="{y}" r="5"/>']
    return svg(
        left + 4 * (width + 30) + 6, 68 + row_height * len(order) + 32, "What was measured of eight methods", parts
    )


def pictures() -> dict[Path, str]:
    """Return each picture's file and its text."""
    folder = ROOT / "docs" / "pictures"
    return {folder / "layer.svg": layer(), folder / "methods.svg": family(), folder / "evidence.svg": evidence()}
