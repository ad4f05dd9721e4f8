"""One HTML page about a run, for the person who answers for the data and for the engineer who ran it.

The page needs no network and runs no script: pictures are data URIs, charts are inline SVG, and its content security
policy refuses everything else. It shows only what the coordinator knows, and, after a simulation on one machine, the
sites' counts of refused data.
"""

import base64
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from common.config import StudyConfig
from common.errors import ConfigError
from common.files import write_atomically
from server import record
from server.record import RunRecord
from server.report import charts, template, words
from server.report.curves import Curve, epsilon_curves, spread
from server.report.style import STYLE

REPORT_FILE = "report.html"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
FILMSTRIP, MOST_BARS, MOST_POINTS = 8, 48, 200


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
    page = _render(
        run=facts,
        study=study,
        num_rounds=len(metrics),
        error_words=words.CODES.get(facts.error, ""),
        missed={site.name: set(range(1, facts.rounds_completed + 1)) - set(site.rounds) for site in facts.sites},
        refused_sites=[
            *sorted(facts.refused_sites.items()),
            *(("name not known", code) for code in sorted(facts.refused_nodes)),
        ],
        **_privacy(facts, study, metrics),
        **_losses(metrics),
        **_samples(run, facts),
        **_timings(facts, metrics),
        checks=_data_checks(run),
        toml=words.toml(facts.study),
    )
    path = run / REPORT_FILE
    write_atomically(path, page.encode())
    return path


def _render(**values: Any) -> str:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "code_words": words.code_words,
        "epsilon": words.epsilon_text,
        "number": words.number,
        "rounds": words.rounds_text,
        "seconds": words.seconds_text,
    }
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    return environment.from_string(template.PAGE).render(style=STYLE, style_digest=digest, **values)


def _study(run: RunRecord) -> StudyConfig:
    try:
        return StudyConfig.model_validate(run.study)
    except ValidationError:
        raise ConfigError("run.json holds a study of another version.", "Use the version that made it.") from None


def _privacy(run: RunRecord, study: StudyConfig, metrics: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The largest and the summed epsilon, what breaks the expectations, and the chart. Nothing without privacy."""
    private = [site for site in run.sites if run.private and site.epsilon is not None and site.delta is not None]
    curves = epsilon_curves(run, metrics) if run.private else []
    return {
        "record_sites": [site.name for site in run.sites if site.record_is_patient],
        "over_target": [site for site in private if (site.epsilon or 0.0) > study.privacy.epsilon],
        "large_delta": [site.name for site in private if (site.delta or 0.0) * 10 * site.patients_trained > 1],
        "worst": max(private, key=lambda site: site.epsilon or 0.0, default=None),
        "pair_epsilon": sum(sorted(site.epsilon or 0.0 for site in private)[-2:]),
        "sum_epsilon": sum(site.epsilon or 0.0 for site in private),
        "sum_delta": sum(site.delta or 0.0 for site in private),
        "budgets": [site for site in run.sites if site.budget is not None],
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


def _samples(run: Path, facts: RunRecord) -> dict[str, Any]:
    """Data URIs of the grid before any patient, of the last one, and of some between."""
    rounds = {}
    for path in sorted((run / "samples").glob("round-*.png")):
        number, content = path.stem.removeprefix("round-"), path.read_bytes()
        if number.isdigit() and content.startswith(PNG_SIGNATURE):
            rounds[int(number)] = "data:image/png;base64," + base64.b64encode(content).decode()
    start = facts.warm_start.source if facts.warm_start else ""
    if not start:
        caption = "untrained: the network has seen nothing yet"
    elif start.startswith("public phantoms"):
        caption = "public phantoms only, no patient used"
    else:
        caption = f"{start}; no patient of this study used yet"
    numbers = sorted(rounds)
    between = numbers[1:-1]
    return {
        "before": rounds.get(0),
        "before_caption": caption,
        "after": rounds[numbers[-1]] if numbers and numbers[-1] > 0 else None,
        "after_round": numbers[-1] if numbers else 0,
        "between": [(between[i], rounds[between[i]]) for i in spread(len(between), FILMSTRIP)] if between else [],
    }


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
