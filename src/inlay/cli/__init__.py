"""The command line: `main` runs a verb; a file per family of verbs, each verb's arguments beside its function."""

from inlay.cli.entry import main

__all__ = ["main"]
