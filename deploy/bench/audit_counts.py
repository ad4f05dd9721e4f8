"""How often the audit's verdict is wrong, by counts alone: thousands of releases, without an image.

    python -m deploy.bench.audit_counts [--clean N] [--planted N] [--patients N ...] [--classes N ...] [--shares H ...]
        [--sites K/M ...] [--epsilons TRAINING/HELD_OUT] [--copies N]

For every setting: the share of clean releases that are not PASS (for any reason, and by p), for each profile of scores;
and the share of releases with so many memorised patients whose p prevents PASS. Profiles (share of patients in each
bin):

``usual``  as measured on phantoms, MRI and X-ray; memorised patients in the highest bin, or a fifth of them one lower;
``near``   a good generator: every tail has patients in it;
``lump``   one patient in twenty is as near as a copy would be, trained on or not (a scanner with images all alike);
``blurry`` all patients far below: memorised ones are in the fourth bin, where clean ones are rare.
"""

import argparse
import itertools
import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from common.audit.bins import NUM_BINS, REFERENCE
from common.audit.counts import NUM_GROUPS, AuditCounts, CountNoise
from common.audit.excess import Group
from common.audit.power import LEVEL
from common.audit.verdict import PASS, Verdict, decide

PROFILES: dict[str, tuple[float, ...]] = {
    "usual": REFERENCE,
    "near": (0.01, 0.02, 0.02, 0.25, 0.4, 0.22, 0.07, 0.01),
    "lump": (0.05, 0.1, 0.25, 0.3, 0.2, 0.05, 0.0, 0.05),
    "blurry": (0.7, 0.28, 0.0198, 0.0002, 0.0, 0.0, 0.0, 0.0),
}
PLACES: dict[str, tuple[str, dict[int, float]]] = {
    "usual, highest bin": ("usual", {7: 1.0}),
    "usual, a fifth one lower": ("usual", {7: 0.8, 6: 0.2}),
    "blurry, fourth bin": ("blurry", {3: 1.0}),
}
CANARIES = 128


def draw_counts(
    patients: int,
    profile: Sequence[float],
    classes: Sequence[float],
    share: float,
    noise: CountNoise,
    rng: np.random.Generator,
    memorised: dict[int, int] | None = None,
) -> AuditCounts:
    """Opened counts of a release whose patients all toss the hold-out's coin.

    Args:
        patients: of all sites, trained on or held out; those memorised besides.
        profile: (bins,) share of clean patients in each bin.
        classes: share of each class.
        share: chance to be held out.
        noise: of the counts.
        rng: of everything.
        memorised: how many patients in training are in which bin for no other reason.
    """
    cells = np.outer(np.asarray(classes) / np.sum(classes), np.asarray(profile) / np.sum(profile))
    everybody = rng.multinomial(patients, cells.ravel()).reshape(cells.shape)
    training = rng.binomial(everybody, 1 - share)
    half_a = rng.binomial(everybody - training, 0.5)
    counts = np.stack([training, half_a, everybody - training - half_a]).astype(np.int64)
    for where, number in (memorised or {}).items():
        counts[0, :, where] += rng.multinomial(number, cells.sum(1))
    for group in range(NUM_GROUPS):
        counts[group] += Group(noise.epsilon(group), noise.shape).draw(cells.shape, rng).astype(np.int64)
    return AuditCounts(counts, _canaries(profile, rng))


def _canaries(profile: Sequence[float], rng: np.random.Generator) -> NDArray[np.int64]:
    included = rng.random(CANARIES) < 0.5
    bins = rng.choice(len(profile), CANARIES, p=np.asarray(profile) / np.sum(profile))
    rows = [np.bincount(bins[coin], minlength=len(profile)) for coin in (included, ~included)]
    return np.stack(rows).astype(np.int64)


def judge(
    number: int,
    patients: int,
    place: str,
    num_classes: int,
    share: float,
    noise: CountNoise,
    rng: np.random.Generator,
    memorised: dict[int, float] | None = None,
    copies: int = 0,
) -> list[Verdict]:
    """Verdicts on so many releases; ``memorised`` says which share of the copies is in which bin."""
    verdicts = []
    for _ in range(number):
        placed = rng.multinomial(copies, list(memorised.values())).tolist() if memorised else []
        counts = draw_counts(
            patients,
            PROFILES[place],
            [1.0] * num_classes,
            share,
            noise,
            rng,
            {where: int(each) for where, each in zip(memorised or {}, placed, strict=True)},
        )
        verdicts.append(
            decide(
                counts,
                edges=range(1, NUM_BINS),
                noise=noise,
                certified_epsilon=3.0,
                delta=1e-5,
                training_patients=round((1 - share) * patients),
                held_out_patients=round(share * patients),
                source=rng.bytes,
                simulations=2000,
                with_power=False,
            )
        )
    return verdicts


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one line for each setting and profile."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clean", type=int, default=2000)
    parser.add_argument("--planted", type=int, default=400)
    parser.add_argument("--patients", type=int, nargs="*", default=[500, 1000, 2000, 5000, 10000])
    parser.add_argument("--classes", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--shares", type=float, nargs="*", default=[0.2, 0.3])
    parser.add_argument("--sites", nargs="*", default=["3/2"], help="sites in the sum / sites that surely add noise")
    parser.add_argument("--epsilons", default="0.5/2")
    parser.add_argument("--copies", type=int, default=30)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "big"))
    given = parser.parse_args(arguments)
    rng = np.random.default_rng(given.seed)
    training, held_out = (float(each) for each in given.epsilons.split("/"))
    settings = itertools.product(given.sites, given.classes, given.shares, given.patients)
    print(f"seed {given.seed}, epsilon {training:g} / {held_out:g}, {given.copies} copies")
    for sites, num_classes, share, patients in settings:
        total, noisy = (int(each) for each in sites.split("/"))
        noise = CountNoise(training, held_out, total, noisy)
        line = [f"{sites} sites, {num_classes} classes, {share:g} held out, {patients} patients"]
        for name in PROFILES if given.clean else ():
            found = judge(given.clean, patients, name, num_classes, share, noise, rng)
            refused = np.mean([each.outcome != PASS for each in found])
            by_p = np.mean([each.p is not None and each.p <= LEVEL for each in found])
            line.append(f"{name}: {refused:.2%} not PASS, {by_p:.2%} by p")
        for place, (name, where) in PLACES.items() if given.planted else ():
            found = judge(given.planted, patients, name, num_classes, share, noise, rng, where, given.copies)
            by_p = np.mean([each.p is not None and each.p <= LEVEL for each in found])
            missed = np.mean([each.outcome == PASS for each in found])
            line.append(f"{place}: found by p {by_p:.1%}, {missed:.1%} PASS")
        print("; ".join(line), flush=True)


if __name__ == "__main__":
    main()
