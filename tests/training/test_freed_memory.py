"""Memory that a step frees stays with the process, where it is asked to keep it."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from inlay.training.freed_memory import SETTINGS, keep_freed_memory

SIZE = 1 << 28  # bytes, more than glibc ever keeps by itself

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or torch.cuda.is_available(), reason="of glibc on a CPU")


ASK = f"""
import psutil, torch
from inlay.training.freed_memory import keep_freed_memory

def kept():
    before = psutil.Process().memory_info().rss
    torch.ones({SIZE} // 4)
    return psutil.Process().memory_info().rss - before > {SIZE} // 2

print(kept(), keep_freed_memory(), kept())
"""


@glibc
def test_freed_memory_is_kept_where_that_is_asked():
    """In a process of its own, whose heap has nothing free yet."""
    clean = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    told = subprocess.run([sys.executable, "-c", ASK], env=clean, capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["False", "True", "True"]


@glibc
@pytest.mark.parametrize("name", SETTINGS)
def test_what_the_environment_says_of_memory_is_left_alone(monkeypatch, name):
    monkeypatch.setenv(name, "x")
    assert not keep_freed_memory()
