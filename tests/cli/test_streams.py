"""Standard streams that are closed, full, unread or of a narrow encoding, in real processes of quick commands."""

import shlex
import subprocess
import sys

import pytest

from inlay.cli import main

INLAY = f"{shlex.quote(sys.executable)} -m inlay"
LONG = "train --help-all"


def in_a_shell(line: str) -> tuple[int, str, str]:
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        (f"{INLAY} {LONG} >&-", 0, ""),
        (f"{INLAY} {LONG} <&- >&- 2>&-", 0, ""),
        (f"{INLAY} {LONG} | true", 0, ""),
        (f"{INLAY} {LONG} > /dev/full", 3, "inlay: the output cannot be written (No space left on device)"),
        (f"PYTHONUNBUFFERED=1 {INLAY} --version > /dev/full", 3, "inlay: the output cannot be written"),
        (f"{INLAY} no-such-verb 2> /dev/full", 2, ""),
        (f"{INLAY} no-such-verb >&- 2>&-", 2, ""),
        (f"PYTHONIOENCODING=ascii {INLAY} {LONG} > /dev/null", 0, ""),
        (f"PYTHONUTF8=0 LC_ALL=C {INLAY} 'ä→' > /dev/null", 2, "inlay: "),
    ],
    ids=map(str, range(9)),
)
def test_a_stream_that_cannot_be_used_ends_no_command(line, code, says):
    found, _, said = in_a_shell(line)
    assert (found, "Traceback" in said, "Exception ignored" in said) == (code, False, False), said
    assert said.startswith(says)
    assert len(said.splitlines()) == bool(says)


def test_what_an_encoding_lacks_is_written_out():
    assert r"\u0394W" in in_a_shell(f"PYTHONIOENCODING=ascii {INLAY} {LONG}")[1]


def test_a_conversation_without_an_input_ends(tiny, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)  # as Python has it where the stream is closed
    monkeypatch.setattr(sys, "__stdin__", None)
    main(["generate", "--model", tiny, "--tokens", "1"])
    assert "an empty line ends the conversation" in capsys.readouterr().err
    sys.stdin.close()
