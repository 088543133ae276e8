"""What tests of several rooms use."""

from __future__ import annotations

import pytest

from inlay.cli import main


def fails(capsys, *arguments: str) -> str:
    """The one line of a user's mistake."""
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    err = capsys.readouterr().err
    assert stop.value.code == 2, err
    assert err.startswith("inlay: ")
    assert len(err.strip().splitlines()) == 1
    return err
