"""The command line: `main` runs a verb; a file per family of verbs, each verb's arguments beside its function.

A verb imports what it does when it runs: help and mistakes in flags would wait seconds for torch and transformers.
"""

from inlay.cli.entry import main

__all__ = ["main"]
