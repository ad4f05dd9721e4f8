"""Run folders made by hand, and a reader of the page they give."""

from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from PIL import Image

from common.config import StudyConfig
from common.privacy import accounting
from common.privacy.accounting import History, Mechanism
from common.privacy.plan import PhasePlan, PrivacyPlan, make_plan
from server import record
from server.record import MechanismRecord, RunRecord, SiteRecord, WarmStartRecord
from server.report.page import write_report

NOISE, STEPS = 2.0, 10
DELTA = 1e-5


def make_run(
    sites: Sequence[str] = ("north", "south"), *, private: bool = True, rounds: int = 3, aggregation: str = "secure"
) -> RunRecord:
    """A completed run in which every site took part in every round of STEPS steps."""
    names = list(sites)
    contract = dict.fromkeys(names, 200)
    federation = {"contracted_patients": contract, "aggregation": aggregation, "rounds": max(10, rounds)}
    study = StudyConfig(name="pilot").with_changes("federation", **federation)
    if not private:
        study = study.with_changes("privacy", enabled=False)
    plan = PrivacyPlan((PhasePlan(Mechanism(0.25, NOISE, STEPS * 10), 1.0),), DELTA, 1.0)
    run = RunRecord(
        status="completed",
        study=study.model_dump(mode="json"),
        study_digest=study.digest,
        private=private,
        notice=record.notice(study, record_is_patient=False),
        versions={"python": "3.11.0", "torch": "2.13.0"},
        device="cpu",
        aggregation=aggregation,
        rounds_completed=rounds,
        phases=record.phases(study, plan if private else None),
        seconds={"warm_start": 42.0, "total": 3725.0},
    )
    for name in names:
        spent = [MechanismRecord(sampling_probability=0.25, noise_multiplier=NOISE, steps=STEPS * rounds)]
        site = SiteRecord(
            name=name,
            epsilon=0.0 if private else None,
            delta=DELTA if private else None,
            accountant="prv" if private else "none",
            mechanisms=spent if private and rounds else [],
            rounds=list(range(1, rounds + 1)),
            patients_trained=160,
            patients_held_out=40,
            holdout_commitment="ab" * 32,
            record_is_patient=False,
        )
        record.set_epsilon(site, "prv")
        run.sites.append(site)
    return run


PHASES = [
    {"algorithm": "moments", "share": 0.6, "rounds": 2},
    {"algorithm": "joint", "share": 0.3, "rounds": 3, "steps": 40},
    {"algorithm": "local", "share": 0.1, "rounds": 4, "steps": 5},
]


def make_phased_run(
    rounds: int = 9, *, sites: Sequence[str] = ("north", "south", "west"), private: bool = True, **federation: Any
) -> RunRecord:
    """A run whose sites took part in the first rounds of a study of nine: two of moments, three joint, four local."""
    contract = dict.fromkeys(sites, 200)
    tree = {"phase": PHASES, "contracted_patients": contract, "minimum_sites": len(contract), **federation}
    privacy = {"enabled": private, "epsilon": 8.0, "sampling_probability": 0.5}
    study = StudyConfig.model_validate({"name": "pilot", "federation": tree, "privacy": privacy})
    plan = make_plan(study)
    run = make_run(sites, private=private, rounds=rounds)
    run.study, run.study_digest = study.model_dump(mode="json"), study.digest
    run.aggregation = study.federation.aggregation
    run.phases = record.phases(study, plan)
    for site in run.sites:
        site.mechanisms = record.mechanisms(charged_by(study, rounds))
        record.set_epsilon(site, "prv")
    return run


def charged_by(study: StudyConfig, rounds: int) -> History:
    """What a site has charged after the first rounds of a study, all of which it took part in."""
    plan = make_plan(study)
    history: History = ()
    if plan is None:
        return history
    for number in range(1, rounds + 1):
        phase = study.phase_number(number)
        mechanism = replace(plan.phases[phase].mechanism, steps=study.phases[phase].steps)
        history = accounting.append(history, mechanism)
    return history


def phased_lines(run: RunRecord) -> list[dict[str, Any]]:
    """A line of ``metrics.jsonl`` for each of its rounds; those of moments have facts of their own."""
    study = StudyConfig.model_validate(run.study)
    lines = []
    for number in range(1, run.rounds_completed + 1):
        algorithm = study.phases[study.phase_number(number)].algorithm
        facts = {"features": 96 * number, "noise_share": 0.123456, "stopped": "noise"} if algorithm == "moments" else {}
        steps = accounting.num_steps(charged_by(study, number))
        lines.append(line(number, {site.name: steps for site in run.sites}, algorithm=algorithm, **facts))
    return lines


def save_phased(folder: Path, run: RunRecord) -> None:
    """As ``save``, with the lines of its phases."""
    save(folder, run, phased_lines(run))


def line(number: int, steps: dict[str, int], **changes: Any) -> dict[str, Any]:
    """A line of ``metrics.jsonl``; ``steps`` is what each site had charged by then."""
    sites = {name: {"steps_charged": charged, "epsilon_rdp": None} for name, charged in steps.items()}
    seconds = {"round": 5.0, "waiting_for_sites": 4.0, "server": 1.0}
    usual = {"round": number, "generator_loss": 1.25, "discriminator_fake_loss": 0.5, "sites": sites, "refused": {}}
    return {**usual, "seconds": seconds, **changes}


def save(folder: Path, run: RunRecord, lines: Sequence[dict[str, Any]] | None = None) -> None:
    """Write the run with a metrics line and a grid for each of its rounds; grids differ in their grey level."""
    (folder / "samples").mkdir(parents=True)
    for number in range(run.rounds_completed + 1):
        Image.new("L", (8, 6), color=number).save(folder / "samples" / f"round-{number:04d}.png")
        if number:
            usual = line(number, {site.name: STEPS * number for site in run.sites})
            record.append_metrics(folder, usual if lines is None else lines[number - 1])
    run.save(folder)


def spent(steps: int) -> float:
    """Epsilon after so many steps of a run made here."""
    return accounting.epsilon((Mechanism(0.25, NOISE, steps),), DELTA)


def warm(source: str) -> WarmStartRecord:
    """A warm start from ``source``."""
    return WarmStartRecord(source=source, digest="cd" * 32, seconds=1.0, from_cache=False)


class Page(HTMLParser):
    """What a reader of the page sees: its text, its elements, its banners."""

    VOID = ("meta", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.banners: dict[str, str] = {}
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    @classmethod
    def of(cls, folder: Path) -> "Page":
        """The page that the report of this run is."""
        return cls(write_report(folder).read_text())

    @property
    def text(self) -> str:
        """All text outside the style sheet, white space collapsed."""
        return " ".join(" ".join(self.texts).split())

    def all(self, tag: str) -> list[dict[str, str]]:
        """Attributes of all elements of a kind."""
        return [attributes for name, attributes in self.elements if name == tag]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {key: value or "" for key, value in attrs}
        self.elements.append((tag, attributes))
        if tag not in self.VOID:
            self.open.append((tag, attributes.get("class", "")))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1][0] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if ("style", "") in self.open:
            return
        self.texts.append(data)
        for _, kind in self.open:
            if kind.startswith("banner "):
                name = kind.removeprefix("banner ")
                self.banners[name] = self.banners.get(name, "") + data
