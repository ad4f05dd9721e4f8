"""What each site had spent after each round, for the chart: epsilon computed anew from the mechanisms' history."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from common.privacy import accounting
from common.privacy.accounting import Entry, History, Mechanism
from common.privacy.plan import same_kind
from server import record
from server.record import RunRecord, SiteRecord

POINT_COUNTS = (10, 5, 3, 2)
MOST_EVALUATIONS = 60  # with more unlike sites than this allows, curves get fewer points


@dataclass(frozen=True)
class Curve:
    """Epsilon over rounds, the same for all of ``sites``; it starts at (0, 0)."""

    sites: tuple[str, ...]
    points: tuple[tuple[int, float], ...]


def epsilon_curves(run: RunRecord, metrics: Sequence[dict[str, Any]]) -> list[Curve]:
    """Curves of all sites with a guarantee, equal ones once, highest final epsilon first; points where a phase ended.

    The last point is the figure in ``run.json``: a site that was killed may have charged more than rounds show.
    """
    sites = [site for site in run.sites if site.delta is not None and site.epsilon is not None]
    if not sites or not metrics:
        return []
    phases = [phase_of(run, int(line["round"])) for line in metrics]
    histories = {site.name: _histories(run, site, metrics, phases) for site in sites}
    ends = [i for i in range(len(phases)) if i + 1 == len(phases) or phases[i] != phases[i + 1]]
    chosen = _choose(list(histories.values()), ends)
    groups: dict[Any, list[str]] = {}
    for site in sites:
        kept = tuple(histories[site.name][i] for i in chosen[:-1])
        groups.setdefault((kept, site.epsilon, site.delta, site.accountant), []).append(site.name)
    rounds = [int(metrics[i]["round"]) for i in chosen]
    curves = []
    for (kept, final, delta, accountant), names in groups.items():
        compute = accounting.epsilon if accountant == "prv" else accounting.rdp_epsilon
        spent = [0.0, *(compute(history, delta) for history in kept), final]
        curves.append(Curve(tuple(names), tuple(zip([0, *rounds], spent, strict=True))))
    return sorted(curves, key=lambda curve: -curve.points[-1][1])


def phase_of(run: RunRecord, round_number: int) -> int:
    """Index of the phase of a round; the last phase for rounds after it."""
    last = 0
    for number, phase in enumerate(run.phases):
        last += phase.rounds
        if round_number <= last:
            return number
    return max(0, len(run.phases) - 1)


def spread(length: int, count: int) -> list[int]:
    """At most ``count`` indices of a list of ``length``, evenly spaced, the last one included."""
    count = min(length, count)
    return sorted({round((i + 1) * length / count) - 1 for i in range(count)})


def prefix(history: History, steps: int) -> History:
    """The mechanisms that the first ``steps`` steps of a history used."""
    taken: list[Entry] = []
    for mechanism in history:
        if steps > 0:
            used = min(steps, mechanism.steps)
            taken.append(replace(mechanism, steps=used))
            steps -= used
    return tuple(taken)


def _histories(
    run: RunRecord, site: SiteRecord, metrics: Sequence[dict[str, Any]], phases: Sequence[int]
) -> list[History]:
    """What the site had charged after each line; a round it missed adds nothing that the coordinator knows of.

    Nothing of a later phase was charged by then, even where the line counts steps that the site turned out not to have
    made: they are not filled up with those.
    """
    whole, steps, found = record.history(site), 0, []
    for line, phase in zip(metrics, phases, strict=True):
        steps = int(line["sites"].get(site.name, {}).get("steps_charged", steps))
        found.append(prefix(tuple(m for m in whole if not _is_later(run, m, phase)), steps))
    return found


def _is_later(run: RunRecord, mechanism: Entry, phase: int) -> bool:
    """Whether only phases after this one have the mechanism."""
    planned = [
        Mechanism(each.sampling_probability, each.noise_multiplier, each.rounds * each.steps)
        for each in run.phases
        if each.sampling_probability is not None and each.noise_multiplier is not None
    ]
    return any(same_kind(mechanism, later) for later in planned[phase + 1 :]) and not any(
        same_kind(mechanism, sooner) for sooner in planned[: phase + 1]
    )


def _choose(histories: Sequence[Sequence[History]], ends: Sequence[int]) -> list[int]:
    """Indices of the rounds to compute, fewer when sites are so unlike that it would take long; ``ends`` always."""
    indices: list[int] = []
    for count in POINT_COUNTS:
        indices = sorted({*spread(len(histories[0]), count), *ends})
        if len({one[i] for one in histories for i in indices[:-1]}) <= MOST_EVALUATIONS:
            break
    return indices
