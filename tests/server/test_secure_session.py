"""The server's flow of sessions with real sites behind a channel in memory; only what they sum is a stand-in."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client import secure_round, secure_session
from client.round_file import ROUND_FILE, last_attempt
from client.secagg_session import SiteSession
from client.secure_round import SecureSite
from client.updates import MadeSum
from common.config import StudyConfig
from common.errors import BudgetExhausted, FederationError, OutOfOrder, ProtocolError, SiteError, TooFewSurvivors
from common.messages import (
    AdvertiseKeysRequest,
    ConfirmStepRequest,
    ConfirmSurvivorsRequest,
    Enrolment,
    JointRequest,
    MaskedInputRequest,
    OpenSeedsRequest,
    OpenStepRequest,
    Refusal,
    Reply,
    Request,
    ShareKeysRequest,
    ShareSeedRequest,
    StepRequest,
    TrainRequest,
    UnmaskRequest,
    Vector,
    Work,
)
from server.channel import NO_ANSWER
from server.round import StepSum, WantedSession, WantedSum
from server.secure_round import SecureSums
from server.secure_session import SecureSession, open_session
from tests.consortium import members_of, names_of
from tests.session_consortium import INTEGERS, discriminator_of

FIVE = names_of(5)
FIRST = FIVE[0]
LENGTH, STEPS = 6, 2
SITE_STAGES = {
    AdvertiseKeysRequest: "advertise_keys",
    ShareKeysRequest: "share_keys",
    MaskedInputRequest: "masked_input",
    ConfirmSurvivorsRequest: "confirm_survivors",
    UnmaskRequest: "unmask",
    ShareSeedRequest: "share_seed",
    StepRequest: "step",
    ConfirmStepRequest: "confirm_step",
    OpenStepRequest: "open_step",
    OpenSeedsRequest: "open_seeds",
}
IN_A_STEP = ["step", "confirm_step", "open_step"]
Serve = Callable[[], Reply]
Fault = Callable[[Serve], Reply]
"""What the server hears instead of a site's answer; ``serve`` lets the site do its work."""


def study_of() -> StudyConfig:
    federation = {"rounds": 20, "contracted_patients": dict.fromkeys(FIVE, 20), "round_timeout_seconds": 900.0}
    study = StudyConfig(name="pilot").with_changes("federation", **federation)
    return study.with_changes("secure_aggregation", stage_timeout_seconds=7.0)


@dataclass
class Network:
    """A channel to sites with folders of their own; ``faults`` by site, stage and step (0 where there is none)."""

    folder: Path
    study: StudyConfig = field(default_factory=study_of)
    faults: dict[tuple[str, str, int], Fault] = field(default_factory=dict)
    asked: list[tuple[str, str, float, set[str]]] = field(default_factory=list)  # stage, group, timeout, sites
    worked: list[tuple[str, int]] = field(default_factory=list)
    charged: list[tuple[str, ...]] = field(default_factory=list)
    waited_seconds: float = 0.0

    def __post_init__(self) -> None:
        members = members_of(FIVE)
        self.names, self.sites = dict(enumerate(FIVE, start=2)), {}
        for name in FIVE:
            (self.folder / name).mkdir()
            self.sites[name] = SecureSite(self.study, members[name], self.folder / name, lambda: None)
        random = np.random.default_rng(1)
        self.values = {name: random.integers(-(2**28), 2**28, (9, LENGTH)) for name in FIVE}
        self.sums = SecureSums(self.study, self, self.enrolled())

    def enrolled(self) -> dict[int, Enrolment]:
        return {
            node: Enrolment(
                name,
                "ab" * 32,
                False,
                last_attempt=last_attempt(self.folder / name),
                identity=self.sites[name].member.identity.public_key().public_bytes_raw().hex(),
                roster_digest=self.sites[name].member.roster.digest,
            )
            for node, name in self.names.items()
        }

    def nodes(self, minimum: int, wanted: int, timeout_seconds: float) -> tuple[int, ...]:
        return tuple(self.names)

    def ask(self, requests: Mapping[int, Request], group: str, timeout_seconds: float) -> Iterator[tuple[int, Reply]]:
        for stage in sorted({SITE_STAGES[type(request)] for request in requests.values()}):
            sites = {self.names[node] for node, each in requests.items() if SITE_STAGES[type(each)] == stage}
            self.asked.append((stage, group, timeout_seconds, sites))
        for node, request in requests.items():
            name, stage = self.names[node], SITE_STAGES[type(request)]
            fault = self.faults.get((name, stage, getattr(request, "step", 0)))
            serve = self._server_of(name, request)
            yield node, fault(serve) if fault else serve()

    def work(self, name: str) -> Callable[[JointRequest], MadeSum]:
        def work(request: JointRequest) -> MadeSum:
            assert request.discriminator.tolist() == discriminator_of(request.step).tolist()
            self.worked.append((name, request.step))
            return MadeSum(request.round, self.values[name][request.step], INTEGERS, "step")

        return work

    def _server_of(self, name: str, request: Any) -> Serve:
        site = self.sites[name]

        def make(work: Work) -> MadeSum:
            return MadeSum(work.round, self.values[name][0], INTEGERS, "sum")

        def serve() -> Reply:
            stage = SITE_STAGES[type(request)]
            try:
                if stage == "step":
                    return secure_session.step(site, request, self.work(name))
                if stage == "masked_input":
                    return secure_round.masked_input(site, request, make)
                return getattr(secure_round if hasattr(secure_round, stage) else secure_session, stage)(site, request)
            except FederationError as error:  # as client/app.py does it
                return Refusal(error.code)

        return serve

    def open(self, refusals: dict[str, str] | None = None, number: int = 1, steps: int = STEPS) -> SecureSession:
        wanted = WantedSession(number, steps, LENGTH, INTEGERS)
        return open_session(self.sums.exchange, wanted, self.charged.append, {} if refusals is None else refusals)

    def check(self, found: StepSum, step: int, sites: list[str]) -> None:
        assert found.survivors == tuple(sites)
        assert found.total.tolist() == sum(self.values[name][step] for name in sites).tolist()

    def run(self, sites: list[str], number: int = 1) -> dict[str, str]:
        """A whole session whose sums are those of these sites; the codes of the others."""
        refusals: dict[str, str] = {}
        session = self.open(refusals, number)
        for step in range(1, STEPS + 1):
            self.check(session.step(discriminator_of(step)), step, sites)
        return refusals

    def attempts(self) -> set[int]:
        return {last_attempt(self.folder / name) for name in FIVE}


@pytest.fixture
def network(tmp_path: Path) -> Network:
    return Network(tmp_path)


def gone(serve: Serve) -> Reply:
    return Refusal(NO_ANSWER)


def late(serve: Serve) -> Reply:
    serve()
    return Refusal(NO_ANSWER)


# ---------------------------------------------------------------- what a session consists of


def test_keys_once_then_three_exchanges_a_step_and_one_at_the_end(network: Network) -> None:
    assert network.run(FIVE) == {}
    stages = ["share_seed", *IN_A_STEP, *IN_A_STEP, "open_seeds"]
    assert [stage for stage, *_ in network.asked] == ["advertise_keys", *stages]
    assert network.run(FIVE, number=2) == {}  # its keys came with the last answers
    assert [stage for stage, *_ in network.asked[1 + len(stages) :]] == stages
    assert all(sites == set(FIVE) for *_, sites in network.asked)
    assert network.attempts() == {3}


def test_a_step_has_the_time_of_a_round_and_every_other_question_that_of_a_stage(network: Network) -> None:
    network.run(FIVE)
    for stage, group, timeout, _ in network.asked:
        assert timeout == (900.0 if stage == "step" else 7.0)
        assert group.startswith("1/")
    assert [group for stage, group, *_ in network.asked if stage == "step"] == ["1/1", "1/2"]


def test_the_charge_is_announced_once_before_the_first_step(network: Network) -> None:
    network.faults[FIRST, "share_seed", 0] = gone
    session = network.open()
    assert network.charged == [] and network.worked == []
    session.step(discriminator_of(1))
    session.step(discriminator_of(2))
    assert network.charged == [tuple(FIVE[1:])]


def test_sums_and_sessions_take_turns_on_the_same_keys(network: Network) -> None:
    network.run(FIVE)
    nothing: Vector = np.zeros(0, np.float32)
    wanted = WantedSum(TrainRequest(network.study.digest, 2, nothing, nothing), LENGTH, INTEGERS)
    outcome = network.sums.sum(wanted, lambda names: None)
    expected = sum(network.values[name][0] for name in FIVE) / 2.0**INTEGERS.fraction_bits
    assert outcome.total is not None
    np.testing.assert_allclose(outcome.total, expected, rtol=1e-6)
    network.run(FIVE, number=3)
    assert [stage for stage, *_ in network.asked].count("advertise_keys") == 1


def test_nothing_is_asked_for_after_the_last_round(network: Network) -> None:
    network.run(FIVE, number=20)
    assert network.attempts() == {1}
    assert not list(network.folder.glob(f"*/{ROUND_FILE}"))


def test_a_session_that_is_over_gives_no_sums_and_keeps_the_next_ones_keys(network: Network) -> None:
    session = network.open(steps=1)
    session.step(discriminator_of(1))
    with pytest.raises(OutOfOrder):
        session.step(discriminator_of(2))
    network.run(FIVE, number=2)
    assert [stage for stage, *_ in network.asked].count("advertise_keys") == 1


def test_a_session_that_is_let_go_before_its_end_is_ended_by_the_next(network: Network) -> None:
    network.open(steps=9).step(discriminator_of(1))
    network.run(FIVE, number=1)
    assert network.attempts() == {3}


# ---------------------------------------------------------------- sites that fall out


@pytest.mark.parametrize("fault", [gone, late])
@pytest.mark.parametrize("stage", ["advertise_keys", "share_seed", *IN_A_STEP])
def test_a_session_goes_on_without_a_site_that_fails_and_the_site_comes_back(
    stage: str, fault: Fault, network: Network
) -> None:
    network.faults[FIRST, stage, 1 if stage in IN_A_STEP else 0] = fault
    refusals: dict[str, str] = {}
    session = network.open(refusals)
    network.faults.pop((FIRST, "advertise_keys", 0), None)  # it is back when it is asked again
    network.check(session.step(discriminator_of(1)), 1, FIVE if stage in IN_A_STEP[1:] else FIVE[1:])
    network.check(session.step(discriminator_of(2)), 2, FIVE[1:])
    assert refusals == {FIRST: NO_ANSWER}
    assert ("open_seeds", "1/open_seeds", 7.0, set(FIVE[1:])) in network.asked
    network.faults.clear()
    assert network.run(FIVE, number=2) == {}  # it was asked for its keys in the last step


@pytest.mark.parametrize("stage", IN_A_STEP)
def test_a_session_that_fails_names_the_step_and_the_next_works(stage: str, network: Network) -> None:
    for name in FIVE[:2]:
        network.faults[name, stage, 2] = late
    refusals: dict[str, str] = {}
    session = network.open(refusals)
    network.check(session.step(discriminator_of(1)), 1, FIVE)
    ended = {"step": "begin_step 2"}.get(stage, f"{stage} 2")
    with pytest.raises(TooFewSurvivors, match=f"The secure sum of round 1 ended after {ended}"):
        session.step(discriminator_of(2))
    assert refusals == dict.fromkeys(FIVE[:2], NO_ANSWER)
    with pytest.raises(OutOfOrder):
        session.step(discriminator_of(2))
    network.faults.clear()
    # Those that failed when asked to work would let the others work for nothing again.
    assert network.run(FIVE[2:] if stage == "step" else FIVE) == {}


def test_too_few_seeds_end_a_session_before_anybody_is_charged(network: Network) -> None:
    for name in FIVE[:4]:
        network.faults[name, "share_seed", 0] = gone
    with pytest.raises(TooFewSurvivors, match="ended after share_seed"):
        network.open().step(discriminator_of(1))
    assert network.charged == [] and network.worked == []


def test_a_sum_over_fewer_than_the_minimum_is_not_opened(tmp_path: Path) -> None:
    network = Network(tmp_path, study_of().with_changes("federation", minimum_sites=5))
    network.faults[FIRST, "step", 2] = gone
    session = network.open()
    network.check(session.step(discriminator_of(1)), 1, FIVE)
    with pytest.raises(TooFewSurvivors, match="it needs 5 sites, 4 left"):
        session.step(discriminator_of(2))
    assert not any(
        stage == "confirm_step" and group == "1/confirm_step" and len(sites) < 5
        for stage, group, _, sites in network.asked
    )


@pytest.mark.parametrize("error", [BudgetExhausted("spent"), SiteError("broken"), KeyboardInterrupt()])
def test_a_site_that_fails_in_its_work_ends_the_session_there(error: BaseException, network: Network) -> None:
    network.open()
    site = network.sites[FIRST]

    def fails(asked: JointRequest) -> MadeSum:
        raise error

    session = network.open()
    requests = session._steps.step_requests(discriminator_of(1))
    with pytest.raises(type(error)):
        secure_session.step(site, requests[FIRST], fails)
    assert not (network.folder / FIRST / ROUND_FILE).exists()
    with pytest.raises(OutOfOrder):
        secure_session.step(site, requests[FIRST], network.work(FIRST))
    assert network.worked == []


# ---------------------------------------------------------------- what lies on the site's disk


def killed_in(network: Network, stage: str) -> tuple[SecureSite, StepRequest]:
    """A site whose process died in a step: before it worked, or before its masked vector left."""
    session = network.open()
    request, site = session._steps.step_requests(discriminator_of(1))[FIRST], network.sites[FIRST]
    with site.file.session(request.attempt) as current:
        current.begin_step(request)
    if stage == "masked":
        with site.file.session(request.attempt) as current:
            current.masked_step(network.values[FIRST][1], INTEGERS)
    return site, request


@pytest.mark.parametrize("stage", ["begun", "masked"])
def test_a_step_that_a_crash_cut_off_is_not_served_again(stage: str, network: Network) -> None:
    site, request = killed_in(network, stage)
    with pytest.raises(OutOfOrder):
        secure_session.step(site, request, network.work(FIRST))
    assert network.worked == []
    assert not (network.folder / FIRST / ROUND_FILE).exists()


def test_a_vector_that_cannot_be_noted_does_not_leave(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    session = network.open()
    request, site = session._steps.step_requests(discriminator_of(1))[FIRST], network.sites[FIRST]

    def fills_the_disk(asked: JointRequest) -> MadeSum:
        def full(*arguments: object, **options: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("client.round_file.write_atomically", full)
        return network.work(FIRST)(asked)

    with pytest.raises(ProtocolError, match="made and not sent"):
        secure_session.step(site, request, fills_the_disk)
    assert not (network.folder / FIRST / ROUND_FILE).exists()


def secrets_in(site: SiteSession) -> list[bytes]:
    found = (site.share_private, site.mask_private, site.seed, *site.pair_secrets.values(), *site.held.values())
    return [secret for secret in found if secret]


def test_no_secret_lies_on_disk_in_clear_and_none_when_it_is_over(network: Network) -> None:
    seen: list[bytes] = []

    def look(serve: Serve) -> Reply:
        reply = serve()
        path = network.folder / FIRST / ROUND_FILE
        if path.exists():
            site = network.sites[FIRST].file._load()
            assert isinstance(site, SiteSession)
            found, content = secrets_in(site), path.read_bytes()
            seen.extend(found)
            assert path.stat().st_mode & 0o777 == 0o600
            for secret in found:
                assert secret not in content and secret.hex().encode() not in content
            assert any(secret.hex() in json.dumps(site.to_tree()) for secret in found) or not found  # would be found
        return reply

    stages = [("share_seed", 0), *((stage, step) for stage in IN_A_STEP for step in (1, 2))]
    network.faults = {(FIRST, stage, step): look for stage, step in stages}
    network.run(FIVE, number=20)
    assert len(set(seen)) == 2 + 1 + 4 + 4  # two private keys, a seed, secrets of four pairs, four held shares
    assert not (network.folder / FIRST / ROUND_FILE).exists()


def test_messages_of_a_sum_end_a_session_and_the_other_way_round(network: Network) -> None:
    network.open()
    site, number = network.sites[FIRST], last_attempt(network.folder / FIRST)
    with pytest.raises(OutOfOrder), site.file.stage(number):
        pytest.fail("entered")
    assert not (network.folder / FIRST / ROUND_FILE).exists()
    second = network.sites[FIVE[1]]
    second.file.begin(number + 1, 2)
    with second.file.stage(number + 1) as current:
        current.stage = "share_keys"
    with pytest.raises(OutOfOrder), second.file.session(number + 1):
        pytest.fail("entered")
    assert not (network.folder / FIVE[1] / ROUND_FILE).exists()
