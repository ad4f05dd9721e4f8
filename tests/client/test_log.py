"""Each site's log holds its own records only, even when sites are threads of one process."""

import logging
import threading
from pathlib import Path

import pytest

from client.log import FILE_NAME, logger, site_log


def text(folder: Path) -> str:
    path = folder / FILE_NAME
    return path.read_text() if path.exists() else ""


def test_records_go_to_the_sites_file_inside_the_block_only(tmp_path: Path) -> None:
    logger.info("before")
    with site_log(tmp_path) as log:
        log.info("inside")
    logger.info("after")
    assert text(tmp_path).endswith("INFO inside\n")
    assert text(tmp_path).count("\n") == 1


def test_two_sites_in_two_threads_do_not_mix(tmp_path: Path) -> None:
    barrier = threading.Barrier(2)

    def work(name: str) -> None:
        with site_log(tmp_path / name):
            for number in range(20):
                barrier.wait()
                logging.getLogger("synthward.site").info("patient of %s %d", name, number)
            barrier.wait()

    for name in ("north", "south"):
        (tmp_path / name).mkdir()
    threads = [threading.Thread(target=work, args=(name,)) for name in ("north", "south")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, other in (("north", "south"), ("south", "north")):
        assert text(tmp_path / name).count(f"patient of {name}") == 20
        assert other not in text(tmp_path / name)


def test_nothing_reaches_the_processs_own_log(tmp_path: Path) -> None:
    heard: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    listener = Listener()
    logging.getLogger().addHandler(listener)
    try:
        with site_log(tmp_path) as log:
            log.error("patient-7")
    finally:
        logging.getLogger().removeHandler(listener)
    assert heard == []
    assert "patient-7" in text(tmp_path)


def test_the_handler_is_gone_after_an_error(tmp_path: Path) -> None:
    before = list(logger.handlers)
    with pytest.raises(RuntimeError), site_log(tmp_path):
        raise RuntimeError
    assert logger.handlers == before
