"""Candidates for an audit at the server: made from the final generator, near-duplicates dropped. Post-processing."""

from dataclasses import dataclass

from common import progress
from common.audit import candidates as made
from common.audit import score
from common.audit.bins import bin_edges
from common.audit.candidates import FEWEST, CandidateSet
from common.config import StudyConfig
from common.messages import Vector


@dataclass(frozen=True)
class Candidates:
    """What an audit is about.

    Args:
        generated: how many images were made.
        kept: those that are not near-duplicates of others.
        nearest: (n,) float32, similarity of each to its nearest fellow.
        edges: (bins - 1,) float32, of the score.
    """

    generated: int
    kept: CandidateSet
    nearest: Vector
    edges: Vector


class Collapsed(Exception):
    """The generator makes too few different images to audit; the text says how many."""


def make_candidates(study: StudyConfig, generator: Vector) -> Candidates:
    """Generate, drop near-duplicates, and fix the bins.

    Raises:
        Collapsed: fewer than ``FEWEST`` different images are left, or they give no bins.
    """
    everything = made.generate(study, generator)
    prepared = score.prepare_candidates(everything.images)
    nearest = score.self_similarity(prepared, progress=progress.report)
    different = ~score.near_duplicates(prepared, nearest)
    kept = made.keep(everything, different)
    if len(kept.images) < FEWEST:
        raise Collapsed(
            f"Of {len(everything.images)} generated images {len(kept.images)} are different from each other; an audit "
            f"needs at least {FEWEST}."
        )
    if not different.all():  # the nearest fellow of one that stays may be gone
        nearest = score.self_similarity(prepared.those(different), progress=progress.report)
    try:
        edges = bin_edges(nearest)
    except ValueError as error:
        raise Collapsed(f"The generated images give no scale to compare with: {error}.") from None
    return Candidates(len(everything.images), kept, nearest, edges)
