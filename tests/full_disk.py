"""A disk that is full after so many flushes."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest

MESSAGE = "No space left on device"


def at_each_flush(monkeypatch: pytest.MonkeyPatch, most: int) -> Iterator[int]:
    """0, 1, 2 …: while the caller handles n, os.fsync succeeds n times and then fails. Fails the test at `most`."""
    real, left = os.fsync, 0

    def fsync(handle: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, MESSAGE)
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    for allowed in range(most):
        left = allowed
        yield allowed
    pytest.fail("never succeeded")
