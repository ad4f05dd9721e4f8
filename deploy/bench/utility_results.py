"""Finished cells on disk: one JSON line each, appended whole, so that a kill loses the cell in hand and no other."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.files import locked
from deploy.bench.utility_cells import Cell, to_json

FILE_NAME = "results.jsonl"


@dataclass(frozen=True)
class Result:
    """One finished cell.

    Args:
        cell: which.
        recipe: of the settings it was made by (``utility_cells.recipe``).
        measures: by name; one that the data do not have, such as accuracy without labels, is left out.
        seconds: of training, and of measuring.
        facts: what else the reader may want: noise multipliers, epsilon, delta, machine.
    """

    cell: Cell
    recipe: str
    measures: dict[str, float]
    seconds: dict[str, float]
    facts: dict[str, Any]


def append(folder: Path, result: Result) -> None:
    """Add a line, on disk when this returns; several processes may share the folder.

    A line that a kill has cut off is ended first, so that it spoils no other.
    """
    line = json.dumps(
        {
            "cell": to_json(result.cell),
            "recipe": result.recipe,
            "measures": result.measures,
            "seconds": result.seconds,
            "facts": result.facts,
        },
        allow_nan=False,
    )
    path = folder / FILE_NAME
    with locked(folder / "results.lock"), path.open("a+b") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else f"\n{line}"
        file.write(f"{line}\n".encode())  # append mode: at the end, in one write
        file.flush()
        os.fsync(file.fileno())


def read(folder: Path) -> list[Result]:
    """All finished cells, in the order in which they were finished. A line that is cut off is left out."""
    path = folder / FILE_NAME
    if not path.exists():
        return []
    found = []
    for line in path.read_bytes().splitlines():
        try:
            entry = json.loads(line)
            found.append(
                Result(Cell(**entry["cell"]), entry["recipe"], entry["measures"], entry["seconds"], entry["facts"])
            )
        except (ValueError, KeyError, TypeError):
            continue
    return found
