"""A joint round among sites: the noise of every sum that is opened, and the same discriminator as with one party."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from client import secure_round, secure_session
from client.data.slices import PreparedCohort
from client.joint import joint_step
from client.moments import release_moments
from client.round_file import last_attempt
from client.secure_round import SecureSite
from client.training import SiteStudy
from common.config import StudyConfig
from common.errors import ConfigError, FederationError, TooFewSurvivors
from common.gan.parameters import to_vector
from common.gan.training import GanTrainer
from common.messages import (
    AdvertiseKeysRequest,
    ConfirmStepRequest,
    Enrolment,
    JointRequest,
    LocalUpdate,
    MomentsRequest,
    OpenSeedsRequest,
    OpenStepRequest,
    Refusal,
    Reply,
    Request,
    ShareSeedRequest,
    StepRequest,
)
from common.noisy_sums import encoding_of, noise_for
from common.privacy.accounting import History, num_steps
from common.privacy.plan import make_plan
from common.privacy.shared_noise import noisy_integers
from common.secagg.encoding import Integers
from server import record
from server.aggregation import GanState
from server.channel import NO_ANSWER
from server.charging import charge_ahead, settle
from server.joint_round import joint_round, open_trainer, save_trainer, trainer_path
from server.record import RunRecord, SiteRecord
from server.round import Charge, PlainSums, RoundOutcome, Sums
from server.secure_round import SecureSums
from tests.client.phased_sites import within
from tests.client.sites import account_in, charged_in
from tests.common.gan.trainers import CPU, small_study
from tests.consortium import members_of, names_of
from tests.session_consortium import STEP_STAGES, SessionConsortium

FIVE = tuple(names_of(5))
FIRST = FIVE[0]
Serve = Callable[[], Reply]
Fault = Callable[[Serve], Reply]
"""What the server hears instead of a site's answer; ``serve`` lets the site do its work."""

# ---------------------------------------------------------------- the noise of an opened sum

ROUNDS, LENGTH = 200, 300


def noisy_study(sites: int, minimum: int, colluding: int) -> StudyConfig:
    """A study of one joint phase with a contract for these sites."""
    phase = [{"algorithm": "joint", "rounds": 1, "steps": ROUNDS}]
    federation = {"phase": phase, "minimum_sites": minimum, "contracted_patients": dict.fromkeys(names_of(sites), 20)}
    tree = {"privacy": {"colluding_sites": colluding, "sampling_probability": 1.0}, "federation": federation}
    return StudyConfig.model_validate(tree)


@dataclass
class EmptySums:
    """The sums that were opened, over sites that drew nobody.

    Args:
        declared: variance that the plan says, in steps of the encoding.
        share: variance of one site's share.
        sites: how many sites are in each sum.
        noise: each sum less what the colluding sites added.
    """

    declared: float
    share: float
    sites: list[int] = field(default_factory=list)
    noise: list[Integers] = field(default_factory=list)


def empty_sums(study: StudyConfig, falls_out: Mapping[str, str]) -> EmptySums:
    """Every sum of a session that the sites let the server open; the last ``colluding_sites`` survivors tell it all.

    Args:
        study: the study.
        falls_out: by site, when; a site that is not named stays.
    """
    names, plan = tuple(study.federation.contracted_patients), make_plan(study)
    assert plan is not None
    noise = noise_for(study, plan.phases[0], LENGTH)
    steps_in_clip_norm = plan.phases[0].clip_norm * 2.0**noise.fraction_bits
    declared = plan.phases[0].mechanism.noise_multiplier * (steps_in_clip_norm + LENGTH**0.5)
    found = EmptySums(declared**2, noise.scale**2)
    sites = SessionConsortium(names, LENGTH, ROUNDS, study.federation.minimum_sites, encoding=encoding_of(noise))

    def gone(stage: str) -> set[str]:
        return {name for name, when in falls_out.items() if when == stage}

    try:
        server = sites.advertise(gone("advertise"))
        sites.share(server, gone("share"))
        for _ in range(ROUNDS):
            values = {name: noisy_integers(np.zeros(LENGTH), noise) for name in names}
            total = sites.one_step(server, values, {stage: gone(stage) for stage in STEP_STAGES})
            told = server.survivors[len(server.survivors) - study.privacy.colluding_sites :]
            found.sites.append(len(server.survivors))
            found.noise.append(total - sum(values[name] for name in told))
    except TooFewSurvivors:
        pass
    return found


A, B = names_of(2)


def slow(*case: Any) -> Any:
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("sites", "minimum", "colluding", "falls_out", "opened"),
    [
        (3, 2, 1, {}, ROUNDS),
        (3, 2, 1, {A: "advertise"}, ROUNDS),
        *((3, 2, 1, {A: when}, 0) for when in ("share", *STEP_STAGES[:3])),  # three hold each other's secrets
        (3, 2, 2, {}, None),
        (5, 3, 1, {}, ROUNDS),
        *((5, 3, 1, {A: when}, ROUNDS) for when in ("advertise", "open_step")),
        *(slow(5, 3, 1, {A: when}, ROUNDS) for when in ("share", "begin_step", "confirm_step")),
        (5, 3, 1, {A: "advertise", B: "begin_step"}, ROUNDS),
        *(slow(5, 3, 1, {A: "advertise", B: when}, ROUNDS) for when in ("advertise", "confirm_step", "open_step")),
        *((5, 3, 1, {A: when, B: when}, 0) for when in STEP_STAGES[:3]),  # four of five must be left
        (5, 3, 1, {A: "open_step", B: "open_seeds"}, 0),
        (5, 3, 2, {A: "advertise", B: "confirm_step"}, ROUNDS),
        *(slow(5, 3, 2, falls_out, ROUNDS) for falls_out in ({}, {A: "open_step"})),
        *((3, 3, 1, {A: when}, 0) for when in ("advertise", "share", "begin_step")),
        *((5, 5, 2, {A: when}, 0) for when in ("advertise", "share", "begin_step")),
        *((5, 5, 2, {A: when}, 1) for when in ("confirm_step", "open_step")),  # its integers are in that sum
    ],
)
def test_an_opened_sum_has_the_declared_noise_whoever_falls_out_and_whoever_tells(
    sites: int, minimum: int, colluding: int, falls_out: dict[str, str], opened: int | None
) -> None:
    if opened is None:
        with pytest.raises(ValueError, match="above privacy.colluding_sites"):
            noisy_study(sites, minimum, colluding)
        return
    found = empty_sums(noisy_study(sites, minimum, colluding), falls_out)
    assert len(found.noise) == opened
    assert all(count >= minimum for count in found.sites)
    for count in set(found.sites):
        rest = [noise for noise, each in zip(found.noise, found.sites, strict=True) if each == count]
        honest, noise = count - colluding, np.concatenate(rest).astype(float)
        assert within(noise, honest * found.share)
        assert honest * found.share >= found.declared  # never below it
        if count == minimum:  # and just that when as few are left as may be
            assert within(noise, found.declared)
            assert not within(noise, 0.95 * found.declared) or opened < ROUNDS


# ---------------------------------------------------------------- sites that compute


@dataclass
class Network:
    """A channel to sites with patients and folders of their own; ``faults`` by site, stage and number.

    Args:
        study: with a contract for every site.
        folder: of all sites.
        cohorts: the sites' patients, in the order of the contract.
    """

    study: StudyConfig
    folder: Path
    cohorts: Sequence[PreparedCohort]
    faults: dict[tuple[str, str, int], Fault] = field(default_factory=dict)
    asked: list[tuple[str, int, tuple[str, ...]]] = field(default_factory=list)
    waited_seconds: float = 0.0

    def __post_init__(self) -> None:
        contract = tuple(self.study.federation.contracted_patients)
        members = members_of(contract, self.study.federation.minimum_sites)
        self.names = dict(enumerate(contract, start=2))
        self.secure, self.sites = {}, {}
        for name, cohort in zip(contract, self.cohorts, strict=True):
            folder = self.folder / name
            folder.mkdir(parents=True)
            account = account_in(folder, self.study)
            self.secure[name] = SecureSite(self.study, members[name], folder, partial(account_in, folder, self.study))
            self.sites[name] = SiteStudy(self.study, name, folder, cohort, cohort.num_patients, "cpu", account)

    def sums(self) -> Sums:
        if self.study.federation.aggregation == "plain":
            return PlainSums(self.study, self, self.names)
        enrolled = {
            node: Enrolment(
                name,
                "ab" * 32,
                False,
                last_attempt=last_attempt(self.secure[name].folder),
                identity=self.secure[name].member.identity.public_key().public_bytes_raw().hex(),
                roster_digest=self.secure[name].member.roster.digest,
            )
            for node, name in self.names.items()
        }
        return SecureSums(self.study, self, enrolled)

    def nodes(self, minimum: int, wanted: int, timeout_seconds: float) -> tuple[int, ...]:
        return tuple(self.names)

    def ask(self, requests: Mapping[int, Request], group: str, timeout_seconds: float) -> Iterator[tuple[int, Reply]]:
        for stage in sorted({STAGE_OF[type(request)] for request in requests.values()}):
            kind = {node: request for node, request in requests.items() if STAGE_OF[type(request)] == stage}
            number = _number(next(iter(kind.values())))
            self.asked.append((stage, number, tuple(self.names[node] for node in kind)))
        for node, request in requests.items():
            name = self.names[node]
            serve = partial(self._serve, name, request)
            fault = self.faults.get((name, STAGE_OF[type(request)], _number(request)))
            yield node, fault(serve) if fault else serve()

    def _serve(self, name: str, request: Any) -> Reply:
        site, secure = self.sites[name], self.secure[name]
        handlers: dict[type, Callable[[], Reply]] = {
            JointRequest: lambda: LocalUpdate(request.round, joint_step(site, request).floats),
            MomentsRequest: lambda: LocalUpdate(request.round, release_moments(site, request).floats),
            AdvertiseKeysRequest: lambda: secure_round.advertise_keys(secure, request),
            ShareSeedRequest: lambda: secure_session.share_seed(secure, request),
            StepRequest: lambda: secure_session.step(secure, request, partial(joint_step, site)),
            ConfirmStepRequest: lambda: secure_session.confirm_step(secure, request),
            OpenStepRequest: lambda: secure_session.open_step(secure, request),
            OpenSeedsRequest: lambda: secure_session.open_seeds(secure, request),
        }
        try:
            return handlers[type(request)]()
        except FederationError as error:  # as client/app.py does it
            return Refusal(error.code)

    def charged(self) -> dict[str, int]:
        """Steps in each site's own ledger."""
        return {name: num_steps(charged_in(site.folder, self.study)) for name, site in self.sites.items()}


def _number(request: Any) -> int:
    """The step that a request is of; the attempt, where keys are asked for; else 0."""
    return int(request.attempt if isinstance(request, AdvertiseKeysRequest) else getattr(request, "step", 0))


STAGE_OF: dict[type, str] = {
    JointRequest: "begin_step",
    MomentsRequest: "moments",
    AdvertiseKeysRequest: "advertise_keys",
    ShareSeedRequest: "share_seed",
    StepRequest: "begin_step",
    ConfirmStepRequest: "confirm_step",
    OpenStepRequest: "open_step",
    OpenSeedsRequest: "open_seeds",
}


def gone(serve: Serve) -> Reply:
    """The site never hears of it."""
    return Refusal(NO_ANSWER)


def late(serve: Serve) -> Reply:
    """The site works, and its answer is lost."""
    serve()
    return Refusal(NO_ANSWER)


def refuses(code: str) -> Fault:
    return lambda serve: Refusal(code)


def joint_study(sites: int, aggregation: str, steps: int, **tables: dict[str, Any]) -> StudyConfig:
    """Two rounds of ``joint``; the contracts have 60 patients together, 42 of them to train on."""
    federation = {
        "aggregation": aggregation,
        "minimum_sites": 1 if aggregation == "plain" else 2,
        "minimum_patients": 1,
        "contracted_patients": dict.fromkeys(names_of(sites), 60 // sites),
        "phase": [{"algorithm": "joint", "rounds": 2, "steps": steps}],
        **tables.pop("federation", {}),
    }
    tree: dict[str, dict[str, Any]] = {
        "privacy": {"sampling_probability": 1.0, "images_per_patient": 1},
        "performance": {"max_images_at_once": 1},  # so that float32 gives each patient the same wherever they are
    }
    for name, changes in tables.items():
        tree[name] = {**tree.get(name, {}), **changes}
    return small_study(federation=federation, **tree)


def cohorts_of(sites: int, patients: int = 12) -> list[PreparedCohort]:
    """The same patients of one image each, spread over so many sites."""
    images = np.random.default_rng(11).integers(256, size=(patients, 1, 28, 28), dtype=np.uint8)
    found = []
    for part in np.array_split(np.arange(patients), sites):
        ids = tuple(f"patient-{number}" for number in part)
        starts = np.arange(len(part) + 1, dtype=np.int64)
        found.append(PreparedCohort(images[part], np.zeros(len(part), np.int64), ids, starts, ()))
    return found


def start_of(study: StudyConfig) -> GanState:
    trainer = GanTrainer(study, CPU, None, 4, seed=1)
    generator = to_vector(trainer.generator)
    return GanState(0, generator, to_vector(trainer.discriminator), generator)


def ignore(names: tuple[str, ...]) -> None:
    pass


# ---------------------------------------------------------------- equal to one party with everybody's patients

STEPS = 6


def discriminator_after(sites: int, aggregation: str, folder: Path, descent: bool, steps: int) -> NDArray[np.float32]:
    """The discriminator after one joint round without privacy."""
    study = joint_study(sites, aggregation, steps, privacy={"enabled": False})
    network = Network(study, folder / f"{sites}-{aggregation}", cohorts_of(sites))
    state = start_of(study)
    trainer = open_trainer(study, None, folder, state, CPU)
    if descent:
        gan = trainer._gan
        gan.discriminator_optimizer = torch.optim.SGD(gan.discriminator.parameters(), lr=0.1)
        gan.generator_optimizer = torch.optim.SGD(gan.generator.parameters(), lr=0.1)
    outcome = joint_round(study, None, network.sums(), trainer, 1, ignore)
    assert outcome.state is not None and outcome.state.round == 1
    assert outcome.answered == tuple(names_of(sites)) and not outcome.refusals
    assert outcome.facts["joint_steps"] == steps
    return outcome.state.discriminator


def test_a_round_among_sites_is_the_round_of_one_with_all_their_patients(tmp_path: Path) -> None:
    # Plain descent: Adam would step by its whole rate in any direction where a gradient is as small as its rounding.
    alone = discriminator_after(1, "plain", tmp_path, descent=True, steps=STEPS)
    plain = discriminator_after(3, "plain", tmp_path, descent=True, steps=STEPS)
    secure = discriminator_after(3, "secure", tmp_path, descent=True, steps=STEPS)
    start = start_of(joint_study(1, "plain", STEPS)).discriminator
    moved = np.linalg.norm(alone - start)
    assert moved > 1e-3
    for other in (plain, secure):
        assert np.linalg.norm(other - alone) < 2e-5 * moved
    np.testing.assert_array_equal(plain, secure)  # the same integers, whether masked or not


def test_an_adam_step_among_sites_is_that_of_one(tmp_path: Path) -> None:
    alone = discriminator_after(1, "plain", tmp_path, descent=False, steps=1)
    secure = discriminator_after(3, "secure", tmp_path, descent=False, steps=1)
    start = start_of(joint_study(1, "plain", 1)).discriminator
    rate = joint_study(1, "plain", 1).gan.discriminator_learning_rate
    # Adam's first step is the rate in the gradient's direction, but where the gradient is as small as rounding.
    apart = np.abs(secure - alone)
    assert np.mean(apart < 0.01 * rate) > 0.97
    assert np.mean(np.abs(alone - start) > 0.9 * rate) > 0.9


# ---------------------------------------------------------------- sites that fall out


def five(folder: Path, steps: int = 4, **tables: dict[str, Any]) -> Network:
    study = joint_study(5, "secure", steps, performance={"max_images_at_once": 256}, **tables)
    return Network(study, folder / "sites", cohorts_of(5))


def one_round(network: Network, folder: Path, number: int = 1, charge: Charge = ignore) -> RoundOutcome:
    """The next round of a study, its trainer as the round before left it."""
    study, plan = network.study, make_plan(network.study)
    phase = plan.phases[0] if plan else None
    state = replace(start_of(study), round=number - 1)
    trainer = open_trainer(study, phase, folder, state, CPU)
    outcome = joint_round(study, phase, network.sums(), trainer, number, charge)
    if outcome.state is not None:
        save_trainer(trainer, folder, number)
    return outcome


def test_the_round_is_announced_once_before_the_first_step(tmp_path: Path) -> None:
    network, announced = five(tmp_path), list[tuple[tuple[str, ...], int]]()

    def charge(names: tuple[str, ...]) -> None:
        announced.append((names, sum(stage == "begin_step" for stage, *_ in network.asked)))

    assert one_round(network, tmp_path, charge=charge).failure == ""
    assert announced == [(FIVE, 0)]
    assert network.charged() == dict.fromkeys(FIVE, 4)


@pytest.mark.parametrize("stage", ["begin_step", "confirm_step", "open_step"])
@pytest.mark.parametrize("fault", [gone, pytest.param(late, marks=pytest.mark.slow)])
def test_a_site_that_falls_out_of_a_session_is_back_in_the_next_round(stage: str, fault: Fault, tmp_path: Path) -> None:
    network = five(tmp_path)
    network.faults = {(FIRST, stage, 2): fault}
    outcome = one_round(network, tmp_path)
    assert outcome.state is not None and outcome.facts["joint_steps"] == 4
    assert outcome.refusals == {FIRST: NO_ANSWER}
    assert outcome.answered == FIVE  # its part of the first step came
    steps = [names for asked, step, names in network.asked if asked == "begin_step" and step]
    assert [FIRST in names for names in steps] == [True, True, False, False]

    network.faults, network.asked = {}, []
    outcome = one_round(network, tmp_path, number=2)
    assert outcome.state is not None and (outcome.answered, outcome.refusals) == (FIVE, {})
    assert network.charged() == dict.fromkeys(FIVE, 8)


def test_a_session_that_too_few_are_left_in_is_a_shorter_round(tmp_path: Path) -> None:
    network = five(tmp_path)
    network.faults = {(name, "begin_step", 3): gone for name in FIVE[:2]}
    outcome = one_round(network, tmp_path)
    assert outcome.state is not None and outcome.facts["joint_steps"] == 2
    assert (outcome.answered, outcome.failure) == (FIVE, "")
    assert outcome.refusals == dict.fromkeys(FIVE[:2], NO_ANSWER)
    assert network.charged() == dict.fromkeys(FIVE, 4)  # paid for whole
    network.faults = {}
    outcome = one_round(network, tmp_path, number=2)
    assert outcome.state is not None and outcome.facts["joint_steps"] == 4


@pytest.mark.parametrize("stage", ["share_seed", "begin_step", "confirm_step", "open_step"])
def test_a_session_without_a_single_sum_is_a_failed_round(stage: str, tmp_path: Path) -> None:
    network = five(tmp_path)
    network.faults = {(name, stage, int(stage != "share_seed")): gone for name in FIVE[:2]}
    announced: list[tuple[str, ...]] = []
    outcome = one_round(network, tmp_path, charge=announced.append)
    assert outcome.state is None and f"ended after {stage}" in outcome.failure
    assert outcome.refusals == dict.fromkeys(FIVE[:2], NO_ANSWER)
    assert announced == ([] if stage == "share_seed" else [FIVE])
    # Whose part came, and who has therefore charged the round, though there is no sum.
    expected = {"share_seed": (), "begin_step": FIVE[2:]}.get(stage, FIVE)
    assert outcome.answered == expected
    assert {name for name, steps in network.charged().items() if steps} == set(expected)
    assert not trainer_path(tmp_path, 1).exists()


@pytest.mark.parametrize("code", ["out_of_order", "over_budget"])
@pytest.mark.parametrize(
    ("aggregation", "stages"),
    [
        ("plain", {("begin_step", 2): None}),
        ("plain", {("begin_step", 1): late, ("begin_step", 2): None}),
        ("secure", {("begin_step", 2): None}),
        ("secure", {("confirm_step", 1): None}),
        ("secure", {("open_step", 3): None}),
        ("secure", {("begin_step", 1): late, ("advertise_keys", 2): None}),  # keys for the next attempt
    ],
)
@pytest.mark.parametrize("bad", [FIVE[:1], FIVE[:2]], ids=len)
def test_the_record_never_charges_a_site_less_than_it_charged_itself(
    bad: tuple[str, ...], aggregation: str, stages: dict[tuple[str, int], Fault | None], code: str, tmp_path: Path
) -> None:
    """A code that says "nothing was spent", of a later step or question, is not believed of the round."""
    federation = {"minimum_sites": 2}
    study = joint_study(5, aggregation, 3, federation=federation, performance={"max_images_at_once": 256})
    network, plan = Network(study, tmp_path / "sites", cohorts_of(5)), make_plan(study)
    for (stage, number), fault in stages.items():
        network.faults |= {(name, stage, number): fault or refuses(code) for name in bad}
    assert plan is not None
    run, before = record_of(study), dict[str, History]()
    trainer = open_trainer(study, plan.phases[0], tmp_path, start_of(study), CPU)

    def charge(names: tuple[str, ...]) -> None:
        before.update(charge_ahead(study, plan, run, 1, names))

    outcome = joint_round(study, plan.phases[0], network.sums(), trainer, 1, charge)
    settle(study, plan, run, 1, outcome, before)
    assert set(outcome.refusals) == set(bad)
    assert network.charged() == dict.fromkeys(FIVE, 3)
    assert {site.name: num_steps(record.history(site)) for site in run.sites} == dict.fromkeys(FIVE, 3)


def record_of(study: StudyConfig) -> RunRecord:
    """Of a run that nothing is charged in yet."""
    sites = [
        SiteRecord(
            name=name,
            epsilon=None,
            delta=None,
            accountant="none",
            patients_trained=8,
            patients_held_out=4,
            holdout_commitment="ab" * 32,
            record_is_patient=False,
        )
        for name in study.federation.contracted_patients
    ]
    return RunRecord(
        study=study.model_dump(mode="json"),
        study_digest=study.digest,
        private=True,
        notice="",
        versions={},
        device="cpu",
        aggregation=study.federation.aggregation,
        sites=sites,
    )


# ---------------------------------------------------------------- what is kept between rounds


def test_the_trainer_goes_on_where_the_round_before_left_it(tmp_path: Path) -> None:
    network = five(tmp_path, privacy={"enabled": False})
    assert one_round(network, tmp_path).state is not None
    kept = trainer_path(tmp_path, 1).read_bytes()
    state = replace(start_of(network.study), round=1)
    trainer = open_trainer(network.study, None, tmp_path, state, CPU)
    assert trainer.to_bytes() == kept
    assert not np.array_equal(trainer.discriminator, state.discriminator)


def test_two_trainers_are_kept_as_a_kill_before_the_checkpoint_goes_back_by_one(tmp_path: Path) -> None:
    study = joint_study(5, "secure", 1)
    trainer = open_trainer(study, None, tmp_path, start_of(study), CPU)
    for number in (1, 2, 3):
        save_trainer(trainer, tmp_path, number)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["joint-trainer-0002.pt", "joint-trainer-0003.pt"]


def test_a_trainer_that_is_damaged_is_named_and_can_be_deleted(tmp_path: Path) -> None:
    study = joint_study(5, "secure", 1)
    path = trainer_path(tmp_path, 0)
    path.write_bytes(b"damaged")
    with pytest.raises(ConfigError, match="joint-trainer-0000.pt is damaged"):
        open_trainer(study, None, tmp_path, start_of(study), CPU)
    path.unlink()
    open_trainer(study, None, tmp_path, start_of(study), CPU)
