"""A hospital's own look at an audit: the patients that come closest to a synthetic image, beside that image.

**Guarantee.** The page is written into the site's folder, readable by its owner only. It is made of files that lie
there already, and talks to nobody; no message between site and coordinator has a field for any of it.
"""

import io
import json
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client import audit_pairs, audit_plan
from client.accountant import open_ledger
from client.audit_pairs import Pairs, load_pairs
from client.data import slices
from client.data.slices import PreparedCohort
from client.enrolled import ENROLLED_FILE, HELD_OUT, PREPARED, TRAINING
from client.settings import SiteSettings
from common.audit import score
from common.audit.images import normalise
from common.audit.plan import load_signed_plan
from common.errors import LedgerError, SiteError
from common.files import write_atomically
from deploy import inspection_page
from server.report import charts
from server.report.render import data_uri, render

PAGE_FILE = "closest-pairs.html"
NUM_BARS = 24
SAME = 0.01
"""Similarities nearer than this are those of the same two images: devices differ by less."""
PLAY = 2
"""Pixels by which a shift may be refined."""
SHOWN_BY = 2.0
"""The difference is shown so many times as bright: white is half of the range of greys."""

Image = NDArray[np.float32]


@dataclass(frozen=True)
class Overlay:
    """A patient's image laid over a candidate, (64, 64) in [0, 1].

    Args:
        patient: as it is, but for its size and range of greys.
        laid: turned, scaled, moved and flipped as the audit compared it; 0 where it does not reach.
        candidate: brightness and contrast fitted to the patient's, as correlations know neither.
        difference: between these two; 0 where the patient's image does not reach.
    """

    patient: Image
    laid: Image
    candidate: Image
    difference: Image


@dataclass(frozen=True)
class Pair:
    """One of the closest pairs, as the page shows it.

    Args:
        patient: the id.
        image: which of the patient's images, from 1.
        num_images: how many the patient has.
        candidate: its place among the audited images, from 0.
        similarity, score: of the pair.
        held_out_above: patients who were never trained on and score as high.
        moved: how the patient's image was laid over the candidate, in words.
        fate: what this site does with the candidate, in words.
        shows: whether that is because it shows a patient.
        pictures: title and data URI of each.
    """

    patient: str
    image: int
    num_images: int
    candidate: int
    similarity: float
    score: float
    held_out_above: int
    moved: str
    fate: str
    shows: bool
    pictures: tuple[tuple[str, str], ...]


def inspect(folder: Path) -> Path:
    """Write a page for each study that was audited at a site, into that study's folder. Returns the newest audit's.

    Args:
        folder: the site's own, with ``site.toml``.

    Raises:
        SiteError: it is no site's folder, nothing was audited there, or the images that were compared are gone or
            have changed since.
    """
    settings = SiteSettings.load(folder)
    audited = sorted(folder.glob(f"studies/*/{audit_pairs.FOLDER}/{audit_pairs.FILE_NAME}"), key=_time, reverse=True)
    if not audited:
        raise SiteError(
            f"{settings.name} has compared no synthetic images with its patients: there is nothing to inspect.",
            "The coordinator asks for it with `synthward audit RUN`, after training.",
        )
    pages = []
    for path in audited:
        pages.append(_write(settings, path.parent.parent))
        print(pages[-1])
    print("It shows patients. Look at it here, and do not pass it on.")
    return pages[0]


def _time(path: Path) -> float:
    return path.stat().st_mtime


def _write(settings: SiteSettings, folder: Path) -> Path:
    """The page of one study, whose folder this is."""
    pairs, training, held_out = _read(settings, folder)
    plan = load_signed_plan(folder / audit_plan.FILE_NAME).plan
    shows, dropped = int(pairs.matched.sum()), int(pairs.dropped.sum())
    page = render(
        inspection_page.PAGE,
        site=settings.name,
        study=_study_name(settings, plan.study_digest),
        digest=plan.study_digest,
        time=datetime.fromtimestamp(_time(folder / audit_pairs.FOLDER / audit_pairs.FILE_NAME), UTC),
        plan=plan,
        training=training.num_patients,
        held_out=held_out.num_patients,
        candidates=len(pairs.matched),
        num_shows=shows,
        num_decoys=dropped - shows,
        chart=_histogram(pairs),
        pairs=list(_pairs(pairs, training, folder)),
        page_file=PAGE_FILE,
    )
    path = folder / audit_pairs.FOLDER / PAGE_FILE
    write_atomically(path, page.encode(), mode=0o600)
    return path


# ---------------------------------------------------------------- what the site has kept


def _read(settings: SiteSettings, folder: Path) -> tuple[Pairs, PreparedCohort, PreparedCohort]:
    """What was compared, and with whom. Raises SiteError when it cannot be read."""
    try:
        pairs = load_pairs(folder)
        prepared = settings.folder / PREPARED / str(json.loads((folder / ENROLLED_FILE).read_bytes())["prepared"])
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        raise SiteError(
            f"What {settings.name} has kept of its audit in {folder} is damaged.", "Restore the folder from a copy."
        ) from None
    training, held_out = (slices.reopen(prepared, name=name) for name in (TRAINING, HELD_OUT))
    if (len(pairs.training_scores), len(pairs.held_out_scores)) != (training.num_patients, held_out.num_patients):
        raise _others(folder)
    return pairs, training, held_out


def _others(folder: Path) -> SiteError:
    return SiteError(
        f"The prepared images of this site are no longer those that were audited in {folder}.",
        "Put the data back as they were at the audit and enrol again, or restore the site's folder from a copy.",
    )


def _study_name(settings: SiteSettings, digest: str) -> str:
    """From the ledger, which knows every private study; "" for others."""
    with suppress(LedgerError):
        return next(
            (line.study_name for line in open_ledger(settings.folder).lines() if line.study_digest == digest), ""
        )
    return ""


# ---------------------------------------------------------------- pairs


def _pairs(pairs: Pairs, training: PreparedCohort, folder: Path) -> Iterator[Pair]:
    closest: dict[int, int] = {}  # of each candidate, which pair
    for k in np.argsort(-pairs.sims, kind="stable").tolist():
        closest.setdefault(int(pairs.candidates[k]), k)
    for k in range(len(pairs.patients)):
        patient, image, candidate = (int(each[k]) for each in (pairs.patients, pairs.images, pairs.candidates))
        first, last = training.starts[patient : patient + 2]
        if not first <= image < last:
            raise _others(folder)
        pixels, shown = np.asarray(training.images[image, 0]), pairs.candidate_images[k]
        if abs(_similarity(pixels, shown) - float(pairs.sims[k])) > SAME:
            raise _others(folder)
        transform = refined(pixels, shown, pairs.transforms[k])
        laid = overlay(pixels, shown, transform)
        yield Pair(
            patient=training.patient_ids[patient],
            image=image - int(first) + 1,
            num_images=int(last - first),
            candidate=candidate,
            similarity=float(pairs.sims[k]),
            score=float(pairs.scores[k]),
            held_out_above=int((pairs.held_out_scores >= pairs.scores[k]).sum()),
            moved=moved_words(transform),
            fate=_fate(bool(pairs.matched[candidate]), bool(pairs.dropped[candidate]), closest[candidate], k),
            shows=bool(pairs.matched[candidate]) and closest[candidate] == k,
            pictures=(
                ("patient", _picture(laid.patient)),
                ("patient, laid over", _picture(laid.laid)),
                ("synthetic image", _picture(laid.candidate)),
                ("difference", _picture(SHOWN_BY * laid.difference)),
            ),
        )


def overlay(patient: NDArray[np.uint8], candidate: NDArray[np.uint8], transform: NDArray[np.int64]) -> Overlay:
    """Lay a patient's image over a candidate, as the audit did when it compared them.

    Args:
        patient, candidate: (rows, columns) of any size.
        transform: (5,), as ``common.audit.score.compare`` gives it.
    """
    import torch

    from common.audit.search import aligned

    own, other = normalise(patient[None])[0], normalise(candidate[None])[0]
    laid = score.aligned(patient, transform)
    covered = aligned(torch.ones(own.shape), transform).numpy() > 0.5  # the frame moves: beyond it lies nothing
    fitted = np.clip(_fitted(other, laid, covered), 0, 1)
    return Overlay(own, laid, fitted, np.where(covered, np.abs(laid - fitted), 0).astype(np.float32))


def refined(
    patient: NDArray[np.uint8], candidate: NDArray[np.uint8], transform: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The transform of a comparison, its shift to the pixel: the audit itself takes larger steps, then allows play."""
    other = normalise(candidate[None])[0].ravel()
    other = other - other.mean()
    tried = [transform + np.array([0, 0, 0, *by]) for by in product(range(-PLAY, PLAY + 1), repeat=2)]

    def alike(how: NDArray[np.int64]) -> float:
        laid = score.aligned(patient, how).ravel()
        return float((laid - laid.mean()) @ other / (laid.std() or 1.0))

    return max(tried, key=alike)


def _similarity(patient: NDArray[np.uint8], candidate: NDArray[np.uint8]) -> float:
    """Of one image to one candidate: it depends on no other."""
    prepared = score.prepare_candidates(candidate[None])
    return float(score.compare(prepared, np.zeros(1, np.float32), patient[None], np.array([0, 1])).sims[0])


def _fitted(image: Image, onto: Image, seen: NDArray[np.bool_]) -> Image:
    """Brightness and contrast as in ``onto``, by least squares: the audit's similarity knows neither."""
    x, y = image[seen], onto[seen]
    if x.size == 0 or float(x.std()) == 0:
        return image
    gain = max(0.0, float(np.cov(x, y, bias=True)[0, 1] / x.var()))
    return np.asarray(gain * (image - x.mean()) + y.mean(), np.float32)


def moved_words(transform: NDArray[np.int64]) -> str:
    """``turned 5° clockwise, moved 3 px down, mirrored left to right``: what was done to the patient, in this order."""
    from common.audit.search import FLIPS, ROTATIONS, SCALES

    flip, rotation, scale, *shift = transform.tolist()
    said = []
    if ROTATIONS[rotation]:
        said.append(f"turned {abs(ROTATIONS[rotation]):g}° {'anti' if ROTATIONS[rotation] > 0 else ''}clockwise")
    if SCALES[scale] != 1:
        said.append(f"scaled to {100 * SCALES[scale]:g} %")
    for by, (back, forth) in zip(shift, (("up", "down"), ("left", "right")), strict=True):
        if by:
            said.append(f"moved {abs(by)} px {back if by > 0 else forth}")
    words = ("turned upside down", "mirrored left to right")
    said += [text for on, text in zip(FLIPS[flip], words, strict=True) if on]
    return ", ".join(said) or "as it is"


def _fate(shows: bool, dropped: bool, closest: int, own: int) -> str:
    """What the site does with the candidate of a pair; ``closest`` is the pair in which it is most similar."""
    if shows and closest == own:
        return "dropped by this site: it shows one of its patients"
    if shows:
        return f"dropped by this site: it shows one of its patients, closest in pair {closest + 1}"
    return "dropped by this site as a decoy, for no reason" if dropped else "not dropped by this site"


def _picture(image: Image) -> str:
    from PIL import Image as Pillow

    buffer = io.BytesIO()
    Pillow.fromarray(np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)).save(buffer, "PNG")
    return data_uri(buffer.getvalue())


# ---------------------------------------------------------------- histogram


def _histogram(pairs: Pairs) -> str:
    """Both groups' scores, in percent of each group: there are fewer held-out patients than others."""
    groups = {"trained on": pairs.training_scores, "held out": pairs.held_out_scores}
    everyone = np.concatenate(list(groups.values())).astype(np.float64)
    low, high = float(everyone.min()), float(everyone.max())
    edges = np.linspace(low, high if high > low else low + 1e-3, NUM_BARS + 1)
    bars = []
    for style, (name, scores) in enumerate(groups.items()):
        heights = 100 * np.histogram(scores, edges)[0] / max(1, len(scores))
        bars.append(charts.Bars(f"{name} ({len(scores)} patients)", heights.tolist(), style))
    places = [f"{edge:.2f}" if number % 4 == 0 else "" for number, edge in enumerate(edges[:-1])]
    return charts.side_by_side(
        bars,
        places,
        title="Histogram: scores of patients who were trained on and of those held out, in percent of each group.",
        labels=("score of the patient: further right is nearer to a synthetic image", "% of the group"),
        narrow=True,
    )
