"""How well the audit's score tells patients who were copied from those who were not, and how long it takes.

    python -m deploy.bench.audit_score detect [--data phantoms | t1=NPZ | chest=FOLDER] [--candidates N] [--rounds N]
    python -m deploy.bench.audit_score volumes --data FOLDER
    python -m deploy.bench.audit_score speed [--candidates N] [--among N] [--patients N] [--slices N]

``detect``: candidates are images of fresh patients, who are nobody's, and copies of patients of the training set, each
kind of disguise (``audit_kinds``) of other patients. Positive is a patient who was copied, negative one held out. For
every kind: the area under the ROC curve and the share found at 1 % false alarms, of the audit's score and, at the same
candidates and patients, of two that are in use: the largest correlation of pixels, and the distance to the closest
record. A copy is of one image of its patient, whichever of them. Patients are divided anew each round.

``volumes``: near-duplicates of volumes, in three dimensions, beside volumes of fresh patients.

``speed`` takes as many threads as OMP_NUM_THREADS says.
"""

import argparse
import csv
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import nibabel
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from common.audit.images import normalise
from common.audit.score import compare, prepare_candidates, self_similarity
from common.orientation import SLICE_RANGE
from common.phantom import brain
from deploy.bench.audit_kinds import KINDS

Images = NDArray[np.uint8]
T = TypeVar("T")
Scores = NDArray[np.float32]
OFF = "slice 3 mm off"


@dataclass(frozen=True)
class Person:
    """One patient's images (n, rows, columns), and one 3 mm beside one of them, which the patient does not have."""

    images: Images
    off: Images | None = None


@dataclass(frozen=True)
class Division:
    """One round's patients: ``fresh`` are the generator's honest images, one entry an image."""

    fresh: Images
    training: list[Person]
    held_out: list[Person]


@dataclass(frozen=True)
class Found:
    """Scores of patients that were copied under one kind, and of those held out, by one method."""

    copied: Scores
    held_out: Scores

    @property
    def auc(self) -> float:
        """The probability that a copied patient scores above one held out."""
        ordered = np.sort(self.held_out)
        below, upto = np.searchsorted(ordered, self.copied, "left"), np.searchsorted(ordered, self.copied, "right")
        return float((below + upto).mean() / (2 * len(ordered)))

    @property
    def tpr(self) -> float:
        """The share of copied patients above all but 1 % of those held out."""
        allowed = int(0.01 * len(self.held_out))
        return float((self.copied > np.sort(self.held_out)[-1 - allowed]).mean())


Method = Callable[[Images, Images, NDArray[np.int64]], Scores]


def audit(candidates: Images, images: Images, starts: NDArray[np.int64]) -> Scores:
    """The audit's score of each patient."""
    prepared = prepare_candidates(candidates)
    return compare(prepared, self_similarity(prepared), images, starts).scores


def pixel_correlation(candidates: Images, images: Images, starts: NDArray[np.int64]) -> Scores:
    """The largest correlation of a patient's pixels with a candidate's."""
    return np.asarray(np.maximum.reduceat((_standard(images) @ _standard(candidates).T).max(1), starts[:-1]))


def closest_record(candidates: Images, images: Images, starts: NDArray[np.int64]) -> Scores:
    """Minus the least Euclidean distance of a patient's pixels to a candidate's."""
    ours, theirs = (x.reshape(len(x), -1).astype(np.float32) / 255 for x in (images, candidates))
    squared = (ours**2).sum(1)[:, None] - 2 * ours @ theirs.T + (theirs**2).sum(1)
    return np.asarray(-np.minimum.reduceat(np.sqrt(np.maximum(squared, 0)).min(1), starts[:-1]))


METHODS: dict[str, Method] = {"audit": audit, "pixels": pixel_correlation, "closest record": closest_record}


def _standard(images: Images) -> NDArray[np.float32]:
    flat = images.reshape(len(images), -1).astype(np.float32)
    flat -= flat.mean(1, keepdims=True)
    return np.asarray(flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6))


def detect(
    divide: Callable[[np.random.Generator], Division], rounds: int, seed: int, kinds: Sequence[str] | None = None
) -> dict[str, dict[str, Found]]:
    """Scores by kind and method.

    Args:
        divide: gives the patients of a round.
        rounds: how many.
        seed: of the division and the disguises.
        kinds: all by default.

    Returns:
        What was found, all rounds together.
    """
    copied: dict[tuple[str, str], list[Scores]] = {}
    held_out: dict[str, list[Scores]] = {name: [] for name in METHODS}
    for number in range(rounds):
        rng = np.random.default_rng([seed, number])
        division = divide(rng)
        copies, who = plant(division.training, kinds or [*KINDS, OFF], rng)
        candidates = rng.permutation(np.concatenate([division.fresh, *copies.values()]))
        people = [division.training[k] for kind in who.values() for k in kind] + division.held_out
        images = np.concatenate([person.images for person in people])
        starts = np.cumsum([0, *(len(person.images) for person in people)])
        for name, method in METHODS.items():
            scores = method(candidates, images, starts)
            for kind, part in zip(who, np.split(scores, np.cumsum([len(each) for each in who.values()])), strict=False):
                copied.setdefault((kind, name), []).append(part)
            held_out[name].append(scores[-len(division.held_out) :])
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    names = dict.fromkeys(kind for kind, _ in copied)
    return {
        kind: {name: Found(np.concatenate(copied[kind, name]), np.concatenate(held_out[name])) for name in METHODS}
        for kind in names
    }


def plant(
    training: list[Person], kinds: Sequence[str], rng: np.random.Generator
) -> tuple[dict[str, Images], dict[str, NDArray[np.int64]]]:
    """Copies under each kind, of different patients; and of whom they are, as indices into ``training``."""
    order = rng.permutation(len(training))
    taken = np.stack([person.images[rng.integers(len(person.images))] for person in training])
    others = np.roll(taken[order], 1, axis=0)[np.argsort(order)]
    with_off = [k for k in order if training[k].off is not None]
    kinds = [kind for kind in kinds if kind != OFF or with_off]
    copies, who = {}, {}
    for part, kind in enumerate(kinds):
        mine = order[part :: len(kinds)]
        if kind == OFF:
            mine = np.array([k for k in mine if training[k].off is not None], np.int64)
            copies[kind] = np.stack([training[k].off for k in mine]) if len(mine) else taken[:0]
        else:
            copies[kind] = KINDS[kind](taken, others, rng)[mine]
        who[kind] = mine
    return copies, who


def phantoms(num_candidates: int, num_patients: int = 500, size: int = 64) -> Callable[[np.random.Generator], Division]:
    """Each round other phantoms, a slice each: as many in training as held out, and fresh ones besides."""

    def divide(rng: np.random.Generator) -> Division:
        def draw(count: int) -> tuple[Images, Images]:
            anatomies = brain.draw_anatomies(rng, lesion=rng.random(count) < 0.5)
            heights = rng.uniform(*SLICE_RANGE, count)
            off = heights + rng.choice([-1, 1], count) * 3 / brain.PUBLIC_LOOK.field_of_view_mm[2]
            return render(anatomies, heights), render(anatomies, off)

        def render(anatomies: brain.Anatomy, heights: NDArray[np.float64]) -> Images:
            planes = brain.render_slices(anatomies, [brain.PUBLIC_LOOK] * len(heights), heights, size, rng=rng)
            low, high = brain.percentiles(brain.PUBLIC_LOOK)
            return np.asarray(np.clip((planes - low) / (high - low), 0, 1) * 255).astype(np.uint8)

        training, off = draw(num_patients)
        fresh = [draw(min(250, num_candidates - start))[0] for start in range(0, num_candidates, 250)]
        return Division(
            np.concatenate(fresh)[: max(1, num_candidates - num_patients)],
            [Person(image[None], beside) for image, beside in zip(training, off, strict=True)],
            [Person(image[None]) for image in draw(num_patients)[0]],
        )

    return divide


def real(people: list[Person], fresh_images: int = 4) -> Callable[[np.random.Generator], Division]:
    """Real patients, a third each fresh, in training and held out; of a fresh one at most so many images, far apart."""

    def divide(rng: np.random.Generator) -> Division:
        order = rng.permutation(len(people))
        third = len(people) // 3
        fresh, training, held_out = ([people[k] for k in order[i * third : (i + 1) * third]] for i in range(3))
        apart = [person.images[:: max(1, len(person.images) // fresh_images)] for person in fresh]
        return Division(np.concatenate(apart), training, held_out)

    return divide


def t1(path: Path) -> list[Person]:
    """The axial slices of each subject; every second is kept, so that one left out lies 3 mm beside."""
    with np.load(path) as file:
        images, names = file["x"], np.char.add(np.char.add(file["site"], "/"), file["subject"])
    images = np.rint(normalise(images) * 255).astype(np.uint8)
    people = []
    for name in dict.fromkeys(names.tolist()):
        mine = images[names == name]
        people.append(Person(mine[::2], mine[1 + 2 * (len(mine) // 4)]))
    return people


def chest(folder: Path) -> list[Person]:
    """The pictures of each patient of every site."""
    mine: dict[str, list[Images]] = {}
    for table in sorted(folder.glob("*/images.tsv")):
        with open(table, newline="") as file:
            for row in csv.DictReader(file, delimiter="\t"):
                with Image.open(table.parent / "images" / row["filename"]) as picture:
                    mine.setdefault(row["patient_id"], []).append(np.asarray(picture.convert("L")))
    return [Person(np.rint(normalise(np.stack(images)) * 255).astype(np.uint8)) for images in mine.values()]


def volumes(folder: Path, seed: int) -> str:
    """Near-duplicate volumes: a third of the patients fresh, a third copied, a third held out.

    Args:
        folder: of a BIDS data set with T1-weighted volumes.
        seed: of the division and the disguises: flipped or not, turned by up to 5 degrees, moved by up to 2 voxels,
            gamma, noise 0.03.

    Returns:
        Sensitivity and specificity, at the threshold where the lesser of the two is largest.
    """
    rng = np.random.default_rng(seed)
    paths = sorted(folder.glob("sub-*/**/*_T1w.nii*"))
    people = np.stack([_frame(path) for path in paths])[rng.permutation(len(paths))]
    third = len(people) // 3
    fresh, training, held_out = people[:third], people[third : 2 * third], people[2 * third :]
    copies = np.stack([_near_duplicate(volume, rng) for volume in training])
    images = np.concatenate([training, held_out])
    scores = audit(np.concatenate([fresh, copies]), images, np.arange(len(images) + 1))
    rates = [((scores[:third] > x).mean(), (scores[third:] <= x).mean()) for x in np.concatenate([[-1], scores])]
    sensitivity, specificity = max(rates, key=min)
    return f"{third} copied, {len(held_out)} held out: sensitivity {sensitivity:.4f}, specificity {specificity:.4f}"


def _frame(path: Path) -> Images:
    """Axial slices first, rows anterior to posterior."""
    values = np.asarray(nibabel.nifti1.load(path).dataobj, np.float32)
    scaled = (values * (255 / values.max())).astype(np.uint8)
    return np.ascontiguousarray(scaled.transpose(2, 1, 0)[:, ::-1])


def _near_duplicate(volume: Images, rng: np.random.Generator) -> Images:
    values = volume[:, :, ::-1] if rng.random() < 0.5 else volume
    turned = ndimage.rotate(values.astype(np.float32), rng.uniform(-5, 5), (1, 2), reshape=False, order=1)
    moved = ndimage.shift(turned, rng.uniform(-2, 2, 3), order=1)
    grey = 255 * (moved / 255) ** np.exp(rng.uniform(-0.4, 0.4)) + 255 * 0.03 * rng.standard_normal(moved.shape)
    return np.asarray(np.clip(np.rint(grey), 0, 255), np.uint8)


def table(found: dict[str, dict[str, Found]]) -> str:
    """Markdown: AUC and share found at 1 % false alarms."""
    methods = list(METHODS)
    lines = ["| kind | copies | " + " | ".join(f"{name} AUC | TPR" for name in methods) + " |"]
    lines.append("|---" * (2 + 2 * len(methods)) + "|")
    rows = {kind: [[each[name].auc, each[name].tpr] for name in methods] for kind, each in found.items()}
    counts = {kind: len(each["audit"].copied) for kind, each in found.items()}
    values = np.array(list(rows.values()))
    rows |= {"mean": values.mean(0).tolist(), "worst": values.min(0).tolist()}
    for kind, row in rows.items():
        cells = " | ".join(f"{auc:.3f} | {tpr:.2f}" for auc, tpr in row)
        lines.append(f"| {kind} | {counts.get(kind, '')} | {cells} |")
    return "\n".join(lines)


def speed(num_candidates: int, num_patients: int, slices: int, among: int | None) -> None:
    """Print seconds of each part, wall and CPU of all threads, and the most memory that was resident."""
    rng = np.random.default_rng(0)
    some = phantoms(600, 100)(rng).fresh

    def draw(count: int) -> Images:
        return some[rng.integers(len(some), size=count)] ^ rng.integers(16, size=(count, 64, 64), dtype=np.uint8)

    def clocked(what: str, work: Callable[[], T]) -> T:
        wall, cpu = time.perf_counter(), time.process_time()
        result = work()
        print(f"{what}: {time.perf_counter() - wall:.1f} s, CPU {time.process_time() - cpu:.1f} s", flush=True)
        return result

    candidates, images = draw(num_candidates), draw(num_patients * slices)
    prepared = clocked(f"prepare {num_candidates} candidates", lambda: prepare_candidates(candidates))
    asked = np.arange(num_candidates if among is None else among)
    found = clocked(f"similarity of {len(asked)} of them to the others", lambda: self_similarity(prepared, asked))
    c = np.full(num_candidates, found.mean(), np.float32)
    starts = np.arange(0, len(images) + 1, slices)
    clocked(f"{num_patients} patients, {slices} slices each", lambda: compare(prepared, c, images, starts))
    print(f"resident at most: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one of the benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["detect", "volumes", "speed"])
    parser.add_argument("--data", default="phantoms")
    parser.add_argument("--candidates", type=int, default=2000)
    parser.add_argument("--patients", type=int, default=500)
    parser.add_argument("--slices", type=int, default=12)
    parser.add_argument("--among", type=int, help="speed: similarity of only so many candidates to the others")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*")
    given = parser.parse_args(arguments)
    if given.what == "speed":
        return speed(given.candidates, given.patients, given.slices, given.among)
    if given.what == "volumes":
        print(volumes(Path(given.data), given.seed))
        return None
    name, _, place = given.data.partition("=")
    match name:
        case "phantoms":
            divide = phantoms(given.candidates, given.patients)
        case "t1":
            divide = real(t1(Path(place)))
        case "chest":
            divide = real(chest(Path(place)))
        case _:
            parser.error(f"--data {name}: expected phantoms, t1=NPZ or chest=FOLDER")
    print(table(detect(divide, given.rounds, given.seed, given.kinds)))


if __name__ == "__main__":
    main()
