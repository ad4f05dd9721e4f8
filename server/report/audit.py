"""The audit's verdict for the page: what ``audit.json`` says, and its figures."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from common.audit.plan import AuditPlan
from common.audit.power import FOUND, LEVEL
from common.audit.verdict import CONTROL_LEVEL, FAIL, FAIL_LEVEL, NO_RELEASE, PASS, Verdict
from server.audit import is_signed, read_audit
from server.record import RunRecord
from server.report import charts

DEVIATIONS = 1.96
"""Lines in the figures reach so many standard deviations up and down: 95 of 100 lie within."""
BANNERS = {PASS: "good", FAIL: "bad", NO_RELEASE: "warn"}
HEADLINES = {
    PASS: "The audit found no sign that patients were memorised, within the limits below.",
    FAIL: "These images must not be released: they show too much of the patients who were trained on.",
    NO_RELEASE: "These images must not be released: the audit could not clear them.",
}


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class CandidateFacts(_Facts):
    """How many images were made, and how many of them the sites compared."""

    generated: int
    audited: int
    root: str


class FilterFacts(_Facts):
    """What the sites' filter left of them."""

    dropped: int
    kept: int
    epsilon_one_sided: float


class SpentFacts(_Facts):
    """What the answer cost a patient."""

    training: float
    held_out: float


class AuditFacts(_Facts):
    """``audit.json``."""

    time: str
    run: str
    study_digest: str
    private: bool
    plan: AuditPlan
    plan_digest: str
    generator_digest: str
    candidates: CandidateFacts | None
    verdict: Verdict
    filter: FilterFacts | None
    spent: SpentFacts
    key: str


@dataclass(frozen=True)
class Audit:
    """What the section shows.

    Args:
        facts: None when there is no verdict to go by.
        trouble: why there is none although there is a file; "" else.
        banner, headline: of the outcome.
        histogram, excess, power: charts; "" for none.
        canaries: (trained on, left out) in all, and of each those in the highest bin.
        spent_training, spent_held_out: the most that a patient of any site has spent in this study, training included,
            and the delta; None in a study that is not private.
        level, fail_level, control_level, found: the rule's own numbers.
    """

    facts: AuditFacts | None = None
    trouble: str = ""
    banner: str = ""
    headline: str = ""
    histogram: str = ""
    excess: str = ""
    power: str = ""
    canaries: tuple[tuple[int, int], ...] = ()
    spent_training: float | None = None
    spent_held_out: float | None = None
    spent_delta: float | None = None
    level: float = LEVEL
    fail_level: float = FAIL_LEVEL
    control_level: float = CONTROL_LEVEL
    found: float = FOUND

    @property
    def outcome(self) -> str:
        """``PASS``, ``FAIL``, ``NO RELEASE``, or "" without a verdict."""
        return self.facts.verdict.outcome if self.facts else ""


def audit_of(folder: Path, run: RunRecord) -> Audit:
    """The audit of a run. What cannot be trusted is no verdict: the section then says why."""
    try:
        content = read_audit(folder)
    except (OSError, ValueError):
        return Audit(trouble="audit.json cannot be read")
    if content is None:
        return Audit()
    if not is_signed(content):
        return Audit(trouble="audit.json was changed after it was signed")
    try:
        facts = AuditFacts.model_validate(content)
    except ValidationError:
        return Audit(trouble="audit.json was written by another version")
    if (facts.run, facts.study_digest, facts.generator_digest) != (run.run, run.study_digest, run.generator_digest):
        return Audit(trouble="audit.json is about another run, or about a generator that this run did not end with")
    verdict, counted = facts.verdict, bool(facts.verdict.tails)
    paid = [site.audits for site in run.sites if site.audits is not None and site.audits.verdicts and run.private]
    return Audit(
        facts=facts,
        banner=BANNERS.get(verdict.outcome, "error"),
        headline=HEADLINES.get(verdict.outcome, "These images must not be released."),
        histogram=_histogram(verdict) if counted else "",
        excess=_excess(verdict) if counted else "",
        power=_power(verdict) if verdict.power_curve else "",
        canaries=tuple((sum(row), row[-1]) for row in verdict.canaries),
        spent_training=max((each.spent_training for each in paid), default=None),
        spent_held_out=max((each.spent_held_out for each in paid), default=None),
        spent_delta=max((site.delta or 0.0 for site in run.sites), default=None),
    )


def _histogram(verdict: Verdict) -> str:
    """Patients in each bin; those held out times the patients trained on for each of them."""
    ratio = (verdict.training_patients or 0) / max(1, verdict.held_out_patients or 0)
    training, held_out = verdict.training_cells, verdict.held_out_cells
    spreads = (
        DEVIATIONS * (verdict.training_cell_stddev or 0.0),
        DEVIATIONS * ratio * (verdict.held_out_cell_stddev or 0.0),
    )
    bars = [
        charts.Bars("trained on", training, 0, [spreads[0]] * len(training)),
        charts.Bars(f"held out, times {ratio:.3g}", [ratio * c for c in held_out], 1, [spreads[1]] * len(held_out)),
    ]
    return charts.side_by_side(
        bars,
        ["lower", *(f"{tail.edge:.2f}" for tail in verdict.tails)],
        title="Bar chart: patients by score, trained on and held out, with the noise. Figures in the table.",
        labels=("score from: further right is nearer to a synthetic image", "patients"),
    )


def _excess(verdict: Verdict) -> str:
    """Patients trained on who score at least so high, less those that the patients held out explain."""
    bars = charts.Bars(
        "more patients who were trained on than those held out explain",
        [tail.training - tail.expected for tail in verdict.tails],
        0,
        [DEVIATIONS * tail.stddev for tail in verdict.tails],
    )
    return charts.side_by_side(
        [bars],
        [f"≥ {tail.edge:.2f}" for tail in verdict.tails],
        title="Bar chart: excess of patients trained on above each score, with chance. Figures in the table.",
        labels=("score of at least", "patients"),
    )


def _power(verdict: Verdict) -> str:
    points = [(float(number), 100 * chance) for number, chance in verdict.power_curve]
    return charts.line_chart(
        [charts.Series("chance to find them", points, 0)],
        title="Line chart: chance that memorised patients are found, by how many they are. Figures in the table.",
        y_label="% of audits",
        x_label="memorised patients",
        target=(f"{100 * FOUND:g} %", 100 * FOUND),
    )
