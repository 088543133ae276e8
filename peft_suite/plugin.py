"""A pytest plugin: PEFT's tests see our configs where they list their own; what sees none of them does not run."""

from __future__ import annotations

import re
from collections import Counter, defaultdict

import pytest
import torch
from _pytest.mark import Mark

from inlay.host.layer import InlayLinear
from peft_suite import known
from peft_suite.cases import LISTS, WRITTEN_OUT, InPlaceOfLora

ours: set[str] = set()  # tests that got our configs
counts: defaultdict[str, Counter[str]] = defaultdict(Counter)  # per file, how many tests went how
reasons: Counter[str] = Counter()

jobs = InlayLinear.jobs


def jobs_with_data(layer: InlayLinear, name: str, like: str | None = None, stats: list | None = None):
    """What is to be computed for a start. PEFT's tests give data to none of its methods that want some before the first
    use, and take its weights alone; ours has nothing to fall back on, so it sees random numbers.
    """
    method = layer.cuts[name].method
    if method.needs and not stats:
        rows = layer.out_features if method.needs == "gradients" else 64
        drawn = torch.randn(rows, layer.in_features, generator=torch.Generator().manual_seed(0))
        stats = [method.observe({}, drawn.to(layer.get_base_layer().weight.device))]
    return jobs(layer, name, like, stats)


class Everything(defaultdict):
    """PEFT's tests go online for a model id that they have not seen yet: they have seen them all."""

    def __contains__(self, key: object) -> bool:
        return True


def pytest_collection(session: pytest.Session) -> None:
    from tests import testing_common, testing_utils  # PEFT's: we run in a folder that has them

    InlayLinear.jobs = jobs_with_data
    testing_utils._HUB_MODEL_ACCESSES = Everything(int)
    testing_common._skip_if_conv1d_not_supported = lambda *_: None  # asks for PEFT's types by name; ours supports it


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Put our configs in the place of PEFT's."""
    marks = metafunc.definition.own_markers
    for i, mark in enumerate(marks):
        for name, cases in LISTS.get(metafunc.definition.path.name, {}).items():
            if mark.name == "parametrize" and mark.args[1] is getattr(metafunc.module, name):
                marks[i] = Mark("parametrize", (mark.args[0], cases), mark.kwargs, _ispytest=True)
                ours.add(metafunc.definition.nodeid)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Function]) -> None:
    run, leave = [], []
    for item in items:
        if re.search(WRITTEN_OUT.get(item.path.name, "$^"), item.nodeid):
            item.module.LoraConfig = InPlaceOfLora
            ours.add(item.nodeid.partition("[")[0])
        why = known.find(known.LEFT_OUT, item.nodeid)
        if item.nodeid.partition("[")[0] not in ours:
            why = why or "builds no config of ours"
        if why:
            counts[item.path.name]["left out"] += 1
            reasons[why] += 1
            leave.append(item)
            continue
        if why := known.find(known.FAILS, item.nodeid):
            item.add_marker(pytest.mark.xfail(reason=why))
        run.append(item)
    config.hook.pytest_deselected(items=leave)
    items[:] = run


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        outcome = "known" if hasattr(report, "wasxfail") and report.skipped else report.outcome
        counts[report.nodeid.partition("::")[0].rpartition("/")[2]][outcome] += 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    columns = ("passed", "failed", "skipped", "known", "left out")
    counts["total"] = sum(counts.values(), Counter())
    terminalreporter.write_sep("=", "PEFT's tests on Inlay's configs")
    terminalreporter.write_line(f"{'':36}" + "".join(f"{c:>10}" for c in columns))
    for name, count in counts.items():
        terminalreporter.write_line(f"{name:36}" + "".join(f"{count[c]:10}" for c in columns))
