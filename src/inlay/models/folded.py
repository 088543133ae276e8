"""Where a folded base lies, and the adapter that it was folded for."""

from __future__ import annotations

from pathlib import Path

from inlay.files.untrusted import user_path

FOLDED = "folded.json"  # in the folder, and in its base, which is not a model without the adapter

START = "start"  # within the folder of a run that folded: the adapter before training


def fold_at(name: str) -> Path | None:
    """Return the folder of a fold's adapter, if a model's name is the folder of a fold."""
    adapter = user_path(name) / "adapter"
    return adapter if (adapter.parent / FOLDED).exists() and (adapter / "adapter_config.json").exists() else None
