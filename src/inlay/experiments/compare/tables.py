"""Write a comparison's tables (a row per run as CSV, a paper's as Markdown and LaTeX) and the recipe of its best."""

from __future__ import annotations

import csv
import io
from dataclasses import replace

import yaml

from inlay.experiments.compare.outcome import Outcome, Standing, json_value, spread_text
from inlay.recipe.reading import non_defaults

RUN_COLUMNS = """method seed learning_rate steps before after forgetting metric parameters parameters_last seconds
memory""".split()
TEX = str.maketrans({"%": r"\%", "&": r"\&", "#": r"\#", "_": r"\_", "±": r"$\pm$", "−": r"$-$", "→": r"$\to$"})


def runs_csv(outcome: Outcome) -> str:
    """Return the final runs as CSV, one row for each method and seed; empty cells where a run failed or diverged."""
    text = io.StringIO()
    sheet = csv.DictWriter(text, RUN_COLUMNS, lineterminator="\n", extrasaction="ignore")
    sheet.writeheader()
    for name, results in outcome.finals.items():
        for seed, run in zip(outcome.plan.spec.seeds, results, strict=False):
            rate = outcome.sweeps[name].rates[0]
            sheet.writerow(json_value({**(run or {}), "method": name, "seed": seed, "learning_rate": rate}))
    return text.getvalue()


def paper_rows(outcome: Outcome) -> list[list[str]]:
    """Return the table of a paper: a heading, and a row per method that finished, the lowest loss first."""
    metric = [outcome.metric] if outcome.metric else []
    head = ["method", "size", "trained", "rate", "loss", f"− {outcome.plan.reference}", *metric, "verdict"]
    return [head, *(paper_row(row, bool(metric)) for row in outcome.standings() if row.losses)]


def paper_row(row: Standing, scored: bool) -> list[str]:
    """Return one method's cells: means ± standard deviations, and the difference with its interval."""
    score = [spread_text(row.scores)] if scored else []
    trained = f"{row.parameters_last:,.0f}"
    loss, rate = spread_text(row.losses), f"{row.learning_rate:g}"
    return [row.method, row.size, trained, rate, loss, row.difference.shown(), *score, row.word]


def paper_markdown(outcome: Outcome) -> str:
    """Return the table in Markdown."""
    head, *rows = paper_rows(outcome)
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)


def paper_latex(outcome: Outcome) -> str:
    """Return the table in LaTeX, for the package booktabs."""
    head, *rows = [" & ".join(cell.translate(TEX) for cell in line) + r" \\" for line in paper_rows(outcome)]
    begin = rf"\begin{{tabular}}{{{'l' * len(paper_rows(outcome)[0])}}}"
    return "\n".join([begin, r"\toprule", head, r"\midrule", *rows, r"\bottomrule", r"\end{tabular}", ""])


def best_recipe(outcome: Outcome) -> str:
    """Return the recipe of the method with the lowest loss as YAML.

    One of which a run failed or diverged is the last choice, then one whose rate is not tuned.
    """
    rows = [row for row in outcome.standings() if row.losses]
    row = min(rows, key=lambda row: (row.failed > 0, outcome.sweeps[row.method].untuned != ""))
    recipe = next(entry.recipe for entry in outcome.plan.entries if entry.name == row.method)
    recipe = replace(recipe, learning_rate=row.learning_rate, steps=row.steps, output=None, overwrite=False)
    head = f"# the lowest loss of inlay compare, {row.method}: {row.verdict}\n"
    return head + yaml.safe_dump(non_defaults(recipe), sort_keys=False, allow_unicode=True)
