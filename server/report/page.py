"""One HTML page about a run, for the person who answers for the data and for the engineer who ran it.

The page needs no network and runs no script: pictures are data URIs, charts are inline SVG, and its content security
policy refuses everything else. It shows only what the coordinator knows, and, after a simulation on one machine, the
sites' counts of refused data.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from common.config import StudyConfig
from common.errors import ConfigError
from common.files import write_atomically
from server import record
from server.record import RunRecord, SiteRecord
from server.report import charts, template, words
from server.report.audit import audit_of
from server.report.curves import Curve, epsilon_curves, phase_of, spread
from server.report.render import data_uri, render

REPORT_FILE = "report.html"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
FILMSTRIP, MOST_BARS, MOST_POINTS = 8, 48, 200
EVERY_ROUND = (
    "round algorithm private generator_loss discriminator_fake_loss sites refused seconds".split()
)  # keys of a line of metrics.jsonl


class DataCheck(BaseModel):
    """``sites/NAME/data-check.json``: how many, never which."""

    model_config = ConfigDict(extra="ignore")

    accepted_records: int
    accepted_patients: int
    refused: dict[str, int]
    notes: int


def write_report(run: Path) -> Path:
    """Write ``report.html`` into the folder of a run, finished or not, and return its path.

    Raises:
        ConfigError: the folder holds no readable ``run.json``.
    """
    facts = RunRecord.load(run)
    study = _study(facts)
    metrics = record.read_metrics(run)
    curves = epsilon_curves(facts, metrics) if facts.private else []
    page = render(
        template.PAGE,
        run=facts,
        study=study,
        num_rounds=len(metrics),
        error_words=words.CODES.get(facts.error, ""),
        missed={site.name: set(range(1, facts.rounds_completed + 1)) - set(site.rounds) for site in facts.sites},
        refused_sites=[
            *sorted(facts.refused_sites.items()),
            *(("name not known", code) for code in sorted(facts.refused_nodes)),
        ],
        **_privacy(facts, study, curves),
        **_losses(metrics),
        **_moments(metrics),
        phases=_phases(facts),
        grids=_grids(run, facts, curves),
        strip=_strip(run, facts),
        **_timings(facts, metrics),
        audit=audit_of(run, facts),
        checks=_data_checks(run),
        toml=words.toml(facts.study),
    )
    path = run / REPORT_FILE
    write_atomically(path, page.encode())
    return path


def _study(run: RunRecord) -> StudyConfig:
    try:
        return StudyConfig.model_validate(run.study)
    except ValidationError:
        raise ConfigError("run.json holds a study of another version.", "Use the version that made it.") from None


def _privacy(run: RunRecord, study: StudyConfig, curves: Sequence[Curve]) -> dict[str, Any]:
    """The largest and the summed epsilon, what breaks the expectations, and the chart. Nothing without privacy."""
    private = [site for site in run.sites if run.private and site.epsilon is not None and site.delta is not None]
    together = _composed if not _shared_noise(run, study) else _of_group
    pair = together(sorted(private, key=lambda site: site.epsilon or 0.0)[-2:])
    every = together(private)
    return {
        "record_sites": [site.name for site in run.sites if site.record_is_patient],
        "over_target": [site for site in private if (site.epsilon or 0.0) > study.privacy.epsilon],
        "large_delta": [site.name for site in private if (site.delta or 0.0) * 10 * site.patients_trained > 1],
        "worst": max(private, key=lambda site: site.epsilon or 0.0, default=None),
        "shares_noise": _shared_noise(run, study),
        "pair_epsilon": pair[0],
        "pair_delta": pair[1],
        "sum_epsilon": every[0],
        "sum_delta": every[1],
        "budgets": [site for site in run.sites if site.budget is not None],
        "audited": [site for site in private if site.audits is not None and site.audits.verdicts],
        "factor": words.factor_text(study.privacy.epsilon),
        "curves": [(", ".join(curve.sites), curve.points) for curve in curves],
        "epsilon_chart": _epsilon_chart(curves, study) if curves else "",
    }


def _epsilon_chart(curves: Sequence[Curve], study: StudyConfig) -> str:
    """As many curves as can be told apart have a style and a name; the rest are grey."""
    named = curves[: charts.NUM_STYLES]
    labels = [words.names_text(curve.sites, everyone=len(curves) == 1) for curve in named]
    series = [charts.Series(label, curve.points, i) for i, (label, curve) in enumerate(zip(labels, named, strict=True))]
    others = curves[charts.NUM_STYLES :]
    if others:
        count = sum(len(curve.sites) for curve in others)
        series += [charts.Series("", curve.points, charts.OTHERS) for curve in others]
        series[charts.NUM_STYLES] = charts.Series(f"{count} other sites, none higher", others[0].points, charts.OTHERS)
    budget = study.privacy
    return charts.line_chart(
        series,
        title=f"Line chart: epsilon at delta {words.number(budget.delta)} over rounds, by site; table below.",
        y_label=f"ε at δ = {words.number(budget.delta)}",
        target=(f"target ε = {words.number(budget.epsilon)}", budget.epsilon),
    )


def _losses(metrics: Sequence[dict[str, Any]]) -> dict[str, Any]:
    shown = [metrics[i] for i in spread(len(metrics), MOST_POINTS)] if metrics else []
    names = {"generator_loss": "generator", "discriminator_fake_loss": "discriminator on synthetic images"}
    series = []
    for style, (key, label) in enumerate(names.items()):
        points = [(float(line["round"]), float(line[key])) for line in shown if _finite(line.get(key))]
        series += [charts.Series(label, points, style)] if points else []
    title = "Line chart: both losses over rounds. Figures in the table below."
    table = [(line["round"], *(line.get(key) for key in names)) for line in shown]
    chart = charts.line_chart(series, title=title, y_label="loss") if series else ""
    return {"loss_chart": chart, "loss_table": table}


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _moments(metrics: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the rounds of moments left beside what every round leaves, one row a round."""
    lines = [line for line in metrics if line.get("algorithm") == "moments"]
    names = list(dict.fromkeys(name for line in lines for name in line if name not in EVERY_ROUND))
    return {
        "fact_names": names,
        "fact_rows": [(line["round"], [line.get(name, "–") for name in names]) for line in lines] if names else [],
    }


@dataclass(frozen=True)
class PhaseOutcome:
    """A phase, as far as it came. Its rounds are those from ``first`` to ``last``; ``done`` were completed."""

    algorithm: str
    first: int
    last: int
    steps: int
    done: int


def _phases(run: RunRecord) -> list[PhaseOutcome]:
    taken = {number for site in run.sites for number in site.rounds if number <= run.rounds_completed}
    found: list[PhaseOutcome] = []
    for phase in run.phases:
        first = found[-1].last + 1 if found else 1
        last = first + phase.rounds - 1
        done = len(taken.intersection(range(first, last + 1)))
        found.append(PhaseOutcome(phase.algorithm, first, last, phase.steps, done))
    return found


def _shared_noise(run: RunRecord, study: StudyConfig) -> list[str]:
    """The algorithms of this run in which what one site gives to a sum holds a part of the noise only."""
    if not run.private or run.aggregation == "plain" or study.num_noisy == 1:
        return []
    return list(dict.fromkeys(phase.algorithm for phase in run.phases if phase.algorithm != "local"))


def _composed(sites: Sequence[SiteRecord]) -> tuple[float, float]:
    """Epsilon and delta for a patient of all these sites, each of which makes the whole noise: composition."""
    return sum(site.epsilon or 0.0 for site in sites), sum(site.delta or 0.0 for site in sites)


def _of_group(sites: Sequence[SiteRecord]) -> tuple[float, float]:
    """Epsilon and delta for a patient of all these sites under one noise: group privacy (Vadhan 2017, lemma 2.2).

    From data with all of them to data without: each step multiplies what comes after it by e^epsilon.
    """
    epsilon, delta = 0.0, 0.0
    for site in sorted(sites, key=lambda site: site.epsilon or 0.0):
        delta += math.exp(min(epsilon, 700.0)) * (site.delta or 0.0)
        epsilon += site.epsilon or 0.0
    return epsilon, min(delta, 1.0)


@dataclass(frozen=True)
class Grid:
    """A grid of synthetic images: a data URI, and what stands below it."""

    image: str
    title: str
    caption: str
    epsilon: float | None = None


def _grids(run: Path, facts: RunRecord, curves: Sequence[Curve]) -> list[Grid]:
    """The grid before any patient, then the last one of each phase that has one."""
    rounds = _sample_files(run)
    grids = [Grid(data_uri(rounds[0]), "Before (round 0)", _start_words(facts))] if 0 in rounds else []
    for phase in _phases(facts):
        numbers = [number for number in rounds if phase.first <= number <= phase.last]
        if not numbers:
            continue
        number = max(numbers)
        spent = [value for curve in curves for at, value in curve.points if at == number]
        name = f"After {phase.algorithm}" if len(facts.phases) > 1 else "After"
        caption = words.algorithm_words(phase.algorithm)
        if number < phase.last:
            caption += f"; {words.count_text(phase.last - number, 'round')} of this phase missing"
        grids.append(Grid(data_uri(rounds[number]), f"{name} (round {number})", caption, max(spent, default=None)))
    return grids


def _strip(run: Path, facts: RunRecord) -> list[tuple[str, str]]:
    """Title and data URI of some grids between those of ``_grids``."""
    rounds, phases = _sample_files(run), _phases(facts)
    at_ends = {max((n for n in rounds if phase.first <= n <= phase.last), default=0) for phase in phases}
    between = [number for number in rounds if number not in at_ends and number > 0]
    chosen = [between[i] for i in spread(len(between), FILMSTRIP)] if between else []
    titles = {number: f"round {number}" for number in chosen}
    if len(facts.phases) > 1:
        titles = {number: f"round {number}, {facts.phases[phase_of(facts, number)].algorithm}" for number in chosen}
    return [(title, data_uri(rounds[number])) for number, title in titles.items()]


def _start_words(run: RunRecord) -> str:
    """What the networks had seen before the first round."""
    start = run.warm_start.source if run.warm_start else ""
    if not start:
        return "untrained: the network has seen nothing yet"
    if start.startswith("public phantoms"):
        return "public phantoms only, no patient used"
    return f"{start}; no patient of this study used yet"


def _sample_files(run: Path) -> dict[int, bytes]:
    """The grids that can be shown, PNG files by round, in order."""
    files = {}
    for path in sorted((run / "samples").glob("round-*.png")):
        number, content = path.stem.removeprefix("round-"), path.read_bytes()
        if number.isdigit() and content.startswith(PNG_SIGNATURE):
            files[int(number)] = content
    return dict(sorted(files.items()))


def _data_checks(run: Path) -> list[tuple[str, DataCheck | None]]:
    """Counts by site, None where the file cannot be read. Only a simulation has the sites' folders beside the run."""
    found: list[tuple[str, DataCheck | None]] = []
    for path in sorted((run / "sites").glob("*/data-check.json")):
        try:
            found.append((path.parent.name, DataCheck.model_validate_json(path.read_bytes())))
        except (OSError, ValueError):
            found.append((path.parent.name, None))
    return found


def _timings(run: RunRecord, metrics: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Seconds by name, and the rounds' waiting against the server's own work, in at most MOST_BARS bars."""
    parts = [(line["round"], line["seconds"]) for line in metrics]
    size = math.ceil(len(parts) / MOST_BARS)
    bars = []
    for start in range(0, len(parts), max(1, size)):
        group = parts[start : start + size]
        means = [sum(float(s[key]) for _, s in group) / len(group) for key in ("waiting_for_sites", "server")]
        bars.append(((group[0][0] + group[-1][0]) / 2, means))
    title = "Bar chart: seconds of each round, waiting for the sites and on the server. Figures in the table below."
    y_label = "seconds" if size <= 1 else f"seconds a round, mean of {size} rounds"
    chart = charts.stacked_bars(bars, ["waiting for the sites", "server"], title=title, y_label=y_label) if bars else ""
    rows = []
    for key, label in (("waiting_for_sites", "waiting for the sites"), ("server", "server"), ("round", "whole round")):
        values = [float(seconds[key]) for _, seconds in parts]
        if values:
            rows.append((label, sum(values), median(values), max(values)))
    whole = rows[-1][1] if rows else 0.0
    return {
        "timing_chart": chart,
        "round_seconds": rows,
        "overhead": rows[1][1] / whole if whole else None,
        "total_seconds": run.seconds.get("total"),
    }
