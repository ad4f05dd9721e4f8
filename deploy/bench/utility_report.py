"""The utility table in Markdown, and one HTML page with the same table beside what the images look like.

A figure is the mean over seeds and their standard deviation. A cell that is not finished stays empty.
"""

import base64
import hashlib
import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from PIL import Image

from common.files import write_atomically
from common.gan.synthesis import to_gray
from deploy.bench import utility_results
from deploy.bench.measures import Images
from deploy.bench.utility_cells import ALGORITHMS, NOT_PRIVATE, OTHERS, TABLES, WARM_START, Cell, all_cells, recipe
from deploy.bench.utility_results import Result
from server.report.style import STYLE

MARKDOWN, PAGE, GRIDS = "utility.md", "utility.html", "grids"
MISSING = "-"
MEASURES = {
    "frechet": ("Frechet distance on random features, lower is better", 2),
    "frechet_learned": (
        "Frechet distance on features that learned to read anatomy, site or label off other real images; 1 is as far "
        "as real images spread",
        3,
    ),
    "precision": ("Precision: synthetic images that look like patients", 2),
    "recall": ("Recall: patients that synthetic images reach", 2),
    "density": ("Density", 2),
    "coverage": ("Coverage: patients with a synthetic image nearby", 2),
    "accuracy": ("Downstream accuracy: learned from synthetic, tested on real images, mean over classes", 3),
    "shortcut": ("Shortcut control: the same by a classifier of twelve grey-level statistics", 3),
}

Setting = tuple[int, float | None, int]  # patients, epsilon, sites: a row of a table


@dataclass(frozen=True)
class Pivot:
    """One measure of one data set: a row for each setting, a column for each algorithm."""

    data: str
    measure: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def write_report(folder: Path, seeds: int) -> str:
    """Write both files from what is finished, of all three tables. Returns the Markdown."""
    results = current(utility_results.read(folder), seeds)
    tables = pivots(results, seeds)
    text = markdown(tables, results)
    write_atomically(folder / MARKDOWN, text.encode())
    write_atomically(folder / PAGE, _page(folder, tables, results).encode())
    return text


def current(results: Sequence[Result], seeds: int) -> dict[Cell, Result]:
    """The newest result of each cell of the tables, leaving out those made by other settings than today's."""
    known = {cell: recipe(cell) for table in TABLES for cell in all_cells(table, seeds)}
    return {result.cell: result for result in results if known.get(result.cell) == result.recipe}


def pivots(results: dict[Cell, Result], seeds: int) -> list[Pivot]:
    """A table for each measure of each data set that has any result."""
    found = []
    for table in TABLES:
        cells = list(all_cells(table, seeds))
        for data in dict.fromkeys(cell.data for cell in cells):
            own = [cell for cell in cells if cell.data == data]
            measured = {name for cell in own if cell in results for name in results[cell].measures}
            found += [_pivot(data, measure, own, results, seeds) for measure in MEASURES if measure in measured]
    return found


def figure(values: Sequence[float], seeds: int, digits: int) -> str:
    """Mean and spread; how many seeds, when some are missing.

    >>> figure([1.0, 2.0], 2, 1)
    '1.5 ± 0.7'
    >>> figure([1.0], 3, 1), figure([], 3, 1)
    ('1.0 (1 of 3)', '-')
    """
    if not values:
        return MISSING
    text = f"{mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {stdev(values):.{digits}f}"
    return text if len(values) == seeds else f"{text} ({len(values)} of {seeds})"


def markdown(tables: Sequence[Pivot], results: dict[Cell, Result]) -> str:
    """All tables as Markdown text."""
    parts = ["# Utility of the synthetic images\n"]
    for data in dict.fromkeys(table.data for table in tables):
        parts.append(f"## {data}\n")
        for table in (one for one in tables if one.data == data):
            lines = [MEASURES[table.measure][0] + ".\n", _line(table.head), _line(["---"] * len(table.head))]
            parts.append("\n".join([*lines, *(_line(row) for row in table.rows)]) + "\n")
    machines = sorted({str(result.facts.get("machine", "")) for result in results.values()})
    seconds = [sum(result.seconds.values()) for result in results.values()]
    if seconds:
        parts.append(f"{len(seconds)} cells, {mean(seconds):.0f} s each on average, {max(seconds):.0f} s at most, on:")
        parts.append("\n".join(f"- {machine}" for machine in machines) + "\n")
    return "\n".join(parts)


def write_grid(folder: Path, name: str, images: Images) -> None:
    """Keep a grid of images, (rows, columns, size, size) in [-1, 1], as a PNG."""
    rows, columns, size, _ = images.shape
    pixels = to_gray(images).transpose(0, 2, 1, 3).reshape(rows * size, columns * size)
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, format="PNG", optimize=True)
    (folder / GRIDS).mkdir(exist_ok=True)
    write_atomically(_grid(folder, name), buffer.getvalue())


def _pivot(data: str, measure: str, cells: Sequence[Cell], results: dict[Cell, Result], seeds: int) -> Pivot:
    values: dict[tuple[Setting | None, str], list[float]] = defaultdict(list)
    for cell in cells:
        if cell in results and measure in results[cell].measures:
            key = None if cell.is_reference else (cell.patients, cell.epsilon, cell.sites)
            values[key, cell.algorithm].append(results[cell].measures[measure])
    algorithms = [name for name in ALGORITHMS if any(cell.algorithm == name for cell in cells)]
    rows = []
    for setting in settings(cells):
        patients, epsilon, sites = setting
        row = [f"{patients or 'all'}", f"{epsilon:g}", f"{sites}"]
        for name in algorithms:
            key = None if name in (OTHERS, WARM_START) else (patients, None if name == NOT_PRIVATE else epsilon, sites)
            row.append(figure(values[key, name], seeds, MEASURES[measure][1]))
        rows.append(tuple(row))
    return Pivot(data, measure, ("patients", "epsilon", "sites", *algorithms), tuple(rows))


def settings(cells: Sequence[Cell]) -> list[tuple[int, float, int]]:
    """Every (patients, epsilon, sites) with privacy, in order."""
    return sorted({(cell.patients, cell.epsilon, cell.sites) for cell in cells if cell.epsilon is not None})


def _line(entries: Sequence[str]) -> str:
    return f"| {' | '.join(entries)} |"


def _grid(folder: Path, name: str) -> Path:
    return folder / GRIDS / f"{name}.png"


def _page(folder: Path, tables: Sequence[Pivot], results: dict[Cell, Result]) -> str:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    style = STYLE + _STYLE
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    sections = [
        (data, [table for table in tables if table.data == data], _galleries(folder, data, results))
        for data in dict.fromkeys(table.data for table in tables)
    ]
    return environment.from_string(_TEMPLATE).render(
        style=style, style_digest=digest, sections=sections, measures=MEASURES
    )


def _galleries(folder: Path, data: str, results: dict[Cell, Result]) -> list[tuple[str, list[tuple[str, str]]]]:
    """For each setting with a picture of its own: its title and the pictures, real ones and the warm start first."""
    own = [cell for cell in results if cell.data == data and cell.seed == 0]
    first = [("real", f"{data},real")] + [(WARM_START, cell.name) for cell in own if cell.algorithm == WARM_START]
    galleries = []
    for patients, epsilon, sites in settings(own):
        at = {
            cell.algorithm: cell.name
            for cell in own
            if (cell.patients, cell.sites) == (patients, sites) and cell.epsilon in (epsilon, None)
        }
        named = [*first, *((name, at[name]) for name in ALGORITHMS if name in at)]
        title = f"{patients or 'All'} patients, epsilon {epsilon:g}, {sites} site{'s' if sites > 1 else ''}"
        pictures = [(name, _uri(folder, file)) for name, file in named]
        galleries.append((title, [(name, uri) for name, uri in pictures if uri]))
    return galleries


def _uri(folder: Path, name: str) -> str:
    path = _grid(folder, name)
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}" if path.exists() else ""


_STYLE = """
.grids { display: flex; flex-wrap: wrap; gap: 18px; }
.grids figure { margin: 0; }
.grids img { display: block; image-rendering: pixelated; }
td { font-variant-numeric: tabular-nums; white-space: nowrap; }
"""
_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'sha256-{{ style_digest }}'">
<title>Utility of the synthetic images</title>
<style>{{ style | safe }}</style>
</head>
<body>
<main>
<h1>Utility of the synthetic images</h1>
<p class="soft">Mean over seeds and their standard deviation; a cell without a figure was not run. Pictures are of the
first seed; whole rows share a label.</p>
{% for data, tables, galleries in sections %}
<h2>{{ data }}</h2>
{% for table in tables %}
<div class="scroll"><table>
<caption>{{ measures[table.measure][0] }}.</caption>
<thead><tr>{% for name in table.head %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in table.rows %}
<tr>{% for entry in row %}<td>{{ entry }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table></div>
{% endfor %}
{% for title, pictures in galleries %}
<h3 class="next">{{ title }}</h3>
<div class="grids">
{% for name, uri in pictures %}
<figure><img src="{{ uri }}" alt="{{ name }}"><figcaption>{{ name }}</figcaption></figure>
{% endfor %}
</div>
{% endfor %}
{% endfor %}
</main>
</body>
</html>
"""
