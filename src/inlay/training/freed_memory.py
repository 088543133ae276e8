"""Let a training process keep the memory that a step frees for the next one."""

from __future__ import annotations

import ctypes
import os
import platform

import torch

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # of glibc's malloc.h
LARGEST_INT = 2**31 - 1
SETTINGS = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "LD_PRELOAD")


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed until the process ends, and return whether it does.

    Each step frees and takes the same gigabytes. By default large blocks go back to the system in between, which clears
    each of their pages before it hands them out again. Nothing is changed on a GPU, with another C library, or where
    the environment says how memory is allocated.
    """
    if torch.cuda.is_available() or platform.libc_ver()[0] != "glibc" or any(map(os.environ.get, SETTINGS)):
        return False
    set_option = ctypes.CDLL(None).mallopt
    return all(set_option(option, value) for option, value in ((MMAP_MAX, 0), (TRIM_THRESHOLD, LARGEST_INT)))
