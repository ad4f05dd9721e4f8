"""Silence that several threads ask for at once leaves the process as it was."""

import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from client.data import dicom, pictures
from common.quiet import quiet
from tests.client.data.builders import write_picture, write_xray


def test_warnings_are_dropped_and_then_heard_again() -> None:
    with quiet():
        warnings.warn("nothing", stacklevel=1)
    with pytest.warns(UserWarning, match="something"):
        warnings.warn("something", stacklevel=1)


def test_readers_in_threads_leave_the_filters_alone(tmp_path: Path) -> None:
    picture, xray = write_picture(tmp_path / "a.png"), write_xray(tmp_path / "a.dcm")
    before, interval = list(warnings.filters), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(pictures.read_picture, picture) for _ in range(50)]:
                pool.submit(dicom.scan_file, xray)
                done.result()
    finally:
        sys.setswitchinterval(interval)
    assert warnings.filters == before
