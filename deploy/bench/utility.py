"""How useful the synthetic images are: every algorithm, cohort size, epsilon and number of sites, in one table.

    python -m deploy.bench.utility [--table phantoms] [--only REGEX] [--seeds 3] [--results DIR] [--list]
    python -m deploy.bench.utility --table records --data mnist=mnist.npz --data fashion-mnist=fashion_mnist.npz
    python -m deploy.bench.utility --table real --data chest=FOLDER --data t1=t1_axial_128.npz

Run it again to go on: finished cells stay in DIR/results.jsonl, and a kill costs only the cell in hand. Processes with
different --only may share DIR. Writes DIR/utility.md and DIR/utility.html from all that is finished; what is missing is
shown as missing.
"""

import argparse
import os
import platform
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from common.config import StudyConfig
from common.errors import FederationError
from common.gan.devices import choose_device
from common.gan.synthesis import Synthetic, synthesize
from common.privacy.plan import make_plan
from deploy.bench import utility_data, utility_results
from deploy.bench.measures import (
    Images,
    Labels,
    downstream_accuracy,
    features,
    frechet,
    neighbourhoods,
    shortcut_accuracy,
)
from deploy.bench.utility_cells import OTHERS, TABLES, WARM_START, Cell, all_cells, recipe, study_for
from deploy.bench.utility_data import Data
from deploy.bench.utility_instrument import Instrument
from deploy.bench.utility_report import write_grid, write_report
from deploy.bench.utility_results import Result
from deploy.bench.utility_training import train
from server.warm_start import warm_start

NUM_COMPARED = 2000  # images of each side that distances and neighbourhoods compare, where there are as many
NUM_TAUGHT = {"phantoms": 8000, "records": 20_000, "real": 4000}  # synthetic images that the classifier learns
SYNTHESIS_SEED = 9


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the missing cells of one table, then print and write it. ``arguments``: of the command line by default."""
    options = _options(arguments)
    options.results.mkdir(parents=True, exist_ok=True)
    device = choose_device(options.device)
    paths = dict(options.data)
    cells = [cell for cell in all_cells(options.table, options.seeds) if re.search(options.only, cell.name)]
    done = finished(options.results)
    if options.list:
        for cell in cells:
            print(f"{'done' if (cell, recipe(cell)) in done else 'missing':8}{cell.name}")
        return
    failed = 0
    for number, cell in enumerate(cells):
        if (cell, recipe(cell)) in finished(options.results):
            continue
        if utility_data.needs_path(cell) and cell.data not in paths:
            print(f"{cell.name}: no --data {cell.data}=PATH", file=sys.stderr)
            failed += 1
            continue
        try:
            result = run_cell(cell, paths.get(cell.data), device, options.results)
        except FederationError as error:
            print(f"{cell.name}: {error}", file=sys.stderr)
            failed += 1
            continue
        utility_results.append(options.results, result)
        figures = ", ".join(f"{name} {value:.3f}" for name, value in result.measures.items())
        seconds = sum(result.seconds.values())
        print(f"{number + 1}/{len(cells)} {cell.name}: {figures}; {seconds:.0f} s", file=sys.stderr, flush=True)
    print(write_report(options.results, options.seeds))
    if failed:
        sys.exit(f"{failed} cells failed")


def finished(folder: Path) -> set[tuple[Cell, str]]:
    """Cells with a result, each with the recipe that it was made by."""
    return {(result.cell, result.recipe) for result in utility_results.read(folder)}


def run_cell(cell: Cell, path: Path | None, device: torch.device, folder: Path) -> Result:
    """Train one cell's generator and measure it.

    Args:
        cell: the cell.
        path: its data set's place; None for phantoms.
        device: where to train.
        folder: of the results; the pictures of seed 0 go there.

    Raises:
        FederationError: the cell cannot run: no such data, or no noise is enough.
    """
    began = time.monotonic()
    data = utility_data.load(cell, path)
    study = study_for(cell, {name: site.num_patients for name, site in data.sites.items()})
    loaded = time.monotonic()
    synthetic = _images_of(cell, study, data, device)
    trained = time.monotonic()
    if cell.seed == 0:
        _write_pictures(folder, cell, synthetic, data, study)
    measures = measure(cell, synthetic, data, utility_data.instrument_for(cell, data, folder), device)
    seconds = {"data": loaded - began, "training": trained - loaded, "measures": time.monotonic() - trained}
    return Result(cell, recipe(cell), measures, seconds, _facts(study, data, device))


def measure(
    cell: Cell, synthetic: Synthetic, data: Data, instrument: Instrument, device: torch.device
) -> dict[str, float]:
    """All measures that the data allow."""
    chosen = np.random.default_rng(0).permutation(len(data.test))[:NUM_COMPARED]
    real = features(data.test[chosen])
    fake = features(synthetic.images[:NUM_COMPARED])
    learned = [instrument.features(images) for images in (data.test[chosen], synthetic.images[:NUM_COMPARED])]
    found = {"frechet": frechet(real, fake), "frechet_learned": frechet(*learned)} | neighbourhoods(real, fake)
    if len(np.unique(data.test_labels)) > 1:
        sets = (synthetic.images, synthetic.labels, data.test, data.test_labels)
        found["accuracy"] = downstream_accuracy(*sets, device, epochs=5)
        found["shortcut"] = shortcut_accuracy(*sets)
    return found


def _images_of(cell: Cell, study: StudyConfig, data: Data, device: torch.device) -> Synthetic:
    """Labelled images of the cell's algorithm, in an order in which every part has all labels."""
    count = NUM_TAUGHT[cell.table]
    if cell.algorithm == OTHERS:
        chosen = np.random.default_rng(cell.seed).permutation(len(data.others))[:count]
        return Synthetic(data.others[chosen], data.other_labels[chosen])
    state = warm_start(study, device).state
    if cell.algorithm != WARM_START:
        *_, state = train(study, state, data.sites, device)
    labels = np.arange(count, dtype=np.int64) % study.image.num_classes
    return synthesize(study, state.generator_average, labels, SYNTHESIS_SEED)


def _write_pictures(folder: Path, cell: Cell, synthetic: Synthetic, data: Data, study: StudyConfig) -> None:
    rows = max(4, study.image.num_classes)
    if cell.algorithm == OTHERS:
        mixed = np.random.default_rng(0).permutation(len(data.test))  # of all sites
        write_grid(folder, f"{cell.data},real", _by_label(data.test[mixed], data.test_labels[mixed], rows))
    write_grid(folder, cell.name, _by_label(synthetic.images, synthetic.labels, rows))


def _by_label(images: Images, labels: Labels, rows: int, columns: int = 8) -> Images:
    """The first images of each label, whole rows of one: (rows, columns, size, size)."""
    kinds = np.unique(labels)
    each = -(-rows // len(kinds)) * columns
    chosen = np.concatenate([np.resize(np.flatnonzero(labels == kind)[:each], each) for kind in kinds])
    grid: Images = images[chosen, 0].reshape(-1, columns, *images.shape[2:])
    return grid


def _facts(study: StudyConfig, data: Data, device: torch.device) -> dict[str, object]:
    facts: dict[str, object] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {device.type}, {torch.get_num_threads()} threads",
        "test_images": len(data.test),
        "training_patients": {name: site.num_patients for name, site in data.sites.items()},
    }
    plan = make_plan(study) if data.sites else None
    if plan is not None:
        facts |= {
            "epsilon": plan.epsilon,
            "delta": plan.delta,
            "phases": [
                {
                    "algorithm": phase.algorithm,
                    "sampling_probability": planned.mechanism.sampling_probability,
                    "noise_multiplier": planned.mechanism.noise_multiplier,
                    "steps": planned.mechanism.steps,
                }
                for phase, planned in zip(study.phases, plan.phases, strict=True)
            ],
        }
    return facts


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", choices=TABLES, default="phantoms")
    parser.add_argument("--only", metavar="REGEX", default="", help="cells whose name (see --list) it finds")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", metavar="DIR", type=Path, default=Path("runs/utility"))
    parser.add_argument("--data", metavar="NAME=PATH", type=_named_path, action="append", default=[])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--list", action="store_true", help="say which cells are done, and run none")
    return parser.parse_args(arguments)


def _named_path(text: str) -> tuple[str, Path]:
    name, sign, path = text.partition("=")
    if not (name and sign and path):
        raise argparse.ArgumentTypeError(f"expected NAME=PATH, found {text!r}")
    return name, Path(path)


if __name__ == "__main__":
    main()
