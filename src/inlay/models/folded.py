"""Where a folded base and the adapter it was folded for lie."""

from __future__ import annotations

from pathlib import Path

FOLDED = "folded.json"  # in the folder, and in its base, which is not a model without the adapter

START = "start"  # within the folder of a run that folded: the adapter before training


def fold_at(name: str) -> Path | None:
    """The adapter of a fold, if a model's name is the folder of one."""
    adapter = Path(name).expanduser() / "adapter"
    return adapter if (adapter.parent / FOLDED).exists() and (adapter / "adapter_config.json").exists() else None
