"""Memory that a step frees stays with the process, where it is asked to keep it."""

import os
import platform

import psutil
import pytest
import torch

from inlay.training.freed_memory import SETTINGS, keep_freed_memory

SIZE = 1 << 28  # bytes, more than glibc ever keeps by itself

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or torch.cuda.is_available(), reason="of glibc on a CPU")


def keeps(ask):
    """Whether a process of its own, which may ask for it, keeps most of a large tensor's memory."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    try:
        if ask:
            keep_freed_memory()
        before = psutil.Process().memory_info().rss
        torch.ones(SIZE // 4)
        os._exit(psutil.Process().memory_info().rss - before > SIZE // 2)
    finally:
        os._exit(2)


@glibc
def test_freed_memory_is_kept_where_that_is_asked(monkeypatch):
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    assert not keeps(ask=False)
    assert keeps(ask=True)


@glibc
@pytest.mark.parametrize("name", SETTINGS)
def test_what_the_environment_says_of_memory_is_left_alone(monkeypatch, name):
    monkeypatch.setenv(name, "x")
    assert not keep_freed_memory()
