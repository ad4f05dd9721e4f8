"""The audit end to end on patients' images: honest generators, useless ones, memorisers, and seeded bugs; one table.

    python -m deploy.bench.audit_bed [--only REGEX] [--seeds N] [--results DIR] [--list]
        [--data t1=NPZ] [--data chest=FOLDER]

Each cell makes candidates, scores every patient, then draws releases: the hold-out's coins of all patients on whom the
candidates do not depend, and the sites' noise, anew each time; and decides. Beside the verdicts stands what pixel
correlation, Meehan's three-sample test, authenticity and the distance to the closest record say of the same images
and coins, which need all images in one place and add no noise. Of other generators than those that know nobody, only
the noise is drawn anew: their releases are not independent of each other.

Run it again to go on: finished cells stay in DIR/cells.jsonl, and a kill costs only the cell in hand. Writes
DIR/audit_bed.md from all that is finished.
"""

import argparse
import json
import os
import re
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np

from common.audit.candidates import FEWEST
from common.audit.verdict import FAIL, NO_RELEASE, PASS
from common.files import locked, write_atomically
from deploy.bench import audit_bed_training
from deploy.bench.audit_bed_images import GENERATORS, setting
from deploy.bench.audit_bed_release import BASELINES, Facts, compare_with_others, judge, score_patients, summary

CELLS, TABLE = "cells.jsonl", "audit_bed.md"
RECIPE = 1
"""Raise this when a setting changes that the cells' figures depend on."""
RELEASES = 50
DATA = ("phantoms", "t1", "chest")
FEWEST_REAL = 100  # real candidates are as many as there are images of a third of the patients


@dataclass(frozen=True)
class Cell:
    """One generator of one data set, and its releases."""

    data: str
    generator: str
    seed: int

    @property
    def name(self) -> str:
        """Names the cell on the command line."""
        return f"{self.data},{self.generator.replace(' ', '-')},seed={self.seed}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the missing cells, then print and write the table. ``arguments``: of the command line by default."""
    given = _options(arguments)
    given.results.mkdir(parents=True, exist_ok=True)
    places = dict(given.data)
    cells = [cell for cell in all_cells(given.seeds) if re.search(given.only, cell.name)]
    if given.list:
        done = read(given.results)
        for cell in cells:
            print(f"{'done' if cell in done else 'missing':8}{cell.name}")
        return
    for number, cell in enumerate(cells):
        if cell in read(given.results):
            continue
        if cell.data != "phantoms" and cell.data not in places:
            print(f"{cell.name}: no --data {cell.data}=PLACE", file=sys.stderr)
            continue
        began = time.monotonic()
        facts = run_cell(cell, places.get(cell.data), given.results, given.releases)
        facts["seconds"] = round(time.monotonic() - began, 1)
        append(given.results, cell, facts)
        print(f"{number + 1}/{len(cells)} {cell.name}: {facts}", file=sys.stderr, flush=True)
    text = table(read(given.results))
    write_atomically(given.results / TABLE, text.encode())
    print(text)


def all_cells(seeds: int) -> Iterator[Cell]:
    """All cells, a whole table with one seed first."""
    for seed in range(seeds):
        for data in DATA:
            for name in GENERATORS:
                yield Cell(data, name, seed)
        for name in audit_bed_training.ROWS:
            yield Cell("phantoms", name, seed)


def run_cell(cell: Cell, place: Path | None, folder: Path, releases: int) -> Facts:
    """One cell's verdicts and figures.

    Args:
        cell: the cell.
        place: of its data; None for phantoms.
        folder: of the results.
        releases: how many.
    """
    if cell.generator in audit_bed_training.ROWS:
        return audit_bed_training.ROWS[cell.generator](cell.seed, releases)
    at = setting(cell.data, place, cell.seed, folder)
    made = GENERATORS[cell.generator](at)
    rng = np.random.default_rng([cell.seed, zlib.crc32(cell.name.encode())])
    fewest = FEWEST if cell.data == "phantoms" else FEWEST_REAL
    scored = score_patients(made.candidates, at.people, fewest)
    verdicts = judge(scored, at.training, made.fixed, at.share, releases, rng)
    facts = summary(verdicts) | {"candidates": len(scored.candidates), "patients": len(at.people)}
    others = compare_with_others(made.candidates, at.people, at.training, made.fixed, at.share, rng)
    return facts | {"baselines": others}


# ---------------------------------------------------------------- finished cells


def append(folder: Path, cell: Cell, facts: Facts) -> None:
    """Add a line, on disk when this returns; several processes may share the folder."""
    line = json.dumps({"cell": asdict(cell), "recipe": RECIPE, "facts": facts})
    with locked(folder / "cells.lock"), (folder / CELLS).open("ab") as file:
        file.write(f"\n{line}\n".encode())  # a line that a kill has cut off spoils no other
        file.flush()
        os.fsync(file.fileno())


def read(folder: Path) -> dict[Cell, Facts]:
    """The newest facts of each finished cell. A line that is cut off is left out."""
    path = folder / CELLS
    found = {}
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
            if entry["recipe"] == RECIPE:
                found[Cell(**entry["cell"])] = dict(entry["facts"])
        except (ValueError, KeyError, TypeError):
            continue
    return found


def table(cells: dict[Cell, Facts]) -> str:
    """Markdown: for each data set a row for each generator, seeds together."""
    parts = ["# The audit's test bed\n"]
    steps = {cell: facts for cell, facts in cells.items() if "white_box" in facts}
    cells = {cell: facts for cell, facts in cells.items() if cell not in steps}
    for data in dict.fromkeys(cell.data for cell in cells):
        parts.append(f"## {data}\n")
        parts.append(f"| generator | seeds | PASS | FAIL | NO RELEASE | p | bound | {' | '.join(BASELINES)} | why |")
        parts.append("|---" * (8 + len(BASELINES)) + "|")
        for name in dict.fromkeys(cell.generator for cell in cells if cell.data == data):
            mine = [facts for cell, facts in cells.items() if (cell.data, cell.generator) == (data, name)]
            parts.append(_row(name, mine))
        parts.append("")
    parts.append(
        "PASS, FAIL, NO RELEASE: releases. p, bound: medians. Baselines: their figure, and the share of releases in "
        "which it calls the generator a copier.\n"
    )
    if steps:
        parts.append("## Seeded bugs, by the white-box audit of a step\n")
        for cell, facts in steps.items():
            parts.append(
                f"| {cell.generator} | {', '.join(facts['white_box']) or 'nothing'} | {facts['movement']:.3g} |"
            )
        parts.append("")
    return "\n".join(parts)


def _row(name: str, mine: list[Facts]) -> str:
    entries = [name, str(len(mine)), *(str(sum(each[what] for each in mine)) for what in (PASS, FAIL, NO_RELEASE))]
    for what, digits in (("p", 3), ("upper_bound", 0)):
        values = [each[what] for each in mine if each[what] is not None]
        entries.append(f"{median(values):.{digits}f}" if values else "-")
    for what in BASELINES:
        pairs = [each["baselines"][what] for each in mine if "baselines" in each]
        value, flagged = (median(pair[k] for pair in pairs) if pairs else None for k in (0, 1))
        entries.append("-" if value is None else f"{value:.2f}, {flagged:.0%}")
    entries.append(next((each["problem"] for each in mine if "problem" in each), ""))
    return "| " + " | ".join(entries) + " |"


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="REGEX", default="", help="cells whose name (see --list) it finds")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--releases", type=int, default=RELEASES)
    parser.add_argument("--results", metavar="DIR", type=Path, default=Path("runs/audit_bed"))
    parser.add_argument("--data", metavar="NAME=PLACE", type=_named_path, action="append", default=[])
    parser.add_argument("--list", action="store_true", help="say which cells are done, and run none")
    return parser.parse_args(arguments)


def _named_path(text: str) -> tuple[str, Path]:
    name, sign, path = text.partition("=")
    if not (name and sign and path):
        raise argparse.ArgumentTypeError(f"expected NAME=PLACE, found {text!r}")
    return name, Path(path)


if __name__ == "__main__":
    main()
