"""Byte sources for tests only: seeded, short, failing, counted."""

import os

import numpy as np

from common.privacy.sampling import ByteSource


def seeded(seed: int) -> ByteSource:
    """A source that gives the same bytes in every run; statistics with it are either right or wrong for good."""
    return np.random.default_rng(seed).bytes


def short(count: int) -> bytes:
    return os.urandom(max(count - 1, 0))


def failing(count: int) -> bytes:
    raise OSError("no randomness")


class Counted:
    """Counts the bytes asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, count: int) -> bytes:
        self.asked.append(count)
        return os.urandom(count)
