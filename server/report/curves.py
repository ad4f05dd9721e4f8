"""What each site had spent after each round, for the chart: epsilon computed anew from the mechanisms' history."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from common.privacy import accounting
from common.privacy.accounting import History, Mechanism
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
    """Curves of all sites with a guarantee, equal ones once, highest final epsilon first.

    The last point is the figure in ``run.json``: a site that was killed may have charged more than rounds show.
    """
    sites = [site for site in run.sites if site.delta is not None and site.epsilon is not None]
    if not sites or not metrics:
        return []
    histories = {site.name: _histories(site, metrics) for site in sites}
    chosen = _choose(list(histories.values()))
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


def spread(length: int, count: int) -> list[int]:
    """At most ``count`` indices of a list of ``length``, evenly spaced, the last one included."""
    count = min(length, count)
    return sorted({round((i + 1) * length / count) - 1 for i in range(count)})


def prefix(history: History, steps: int) -> History:
    """The mechanisms that the first ``steps`` steps of a history used."""
    taken: list[Mechanism] = []
    for mechanism in history:
        if steps > 0:
            used = min(steps, mechanism.steps)
            taken.append(Mechanism(mechanism.sampling_probability, mechanism.noise_multiplier, used))
            steps -= used
    return tuple(taken)


def _histories(site: SiteRecord, metrics: Sequence[dict[str, Any]]) -> list[History]:
    """What the site had charged after each line; a round it missed adds nothing that the coordinator knows of."""
    whole, steps, found = record.history(site), 0, []
    for line in metrics:
        steps = int(line["sites"].get(site.name, {}).get("steps_charged", steps))
        found.append(prefix(whole, steps))
    return found


def _choose(histories: Sequence[Sequence[History]]) -> list[int]:
    """Indices of the rounds to compute, fewer when sites are so unlike that it would take long."""
    indices: list[int] = []
    for count in POINT_COUNTS:
        indices = spread(len(histories[0]), count)
        if len({one[i] for one in histories for i in indices[:-1]}) <= MOST_EVALUATIONS:
            break
    return indices
