"""The server's flow of secure rounds with real sites behind a channel in memory; only their training is a stand-in."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client import secure_round
from client.ledger_lines import Release
from client.round_file import last_attempt
from client.secure_round import SecureSite
from client.updates import MadeUpdate
from common.config import StudyConfig
from common.errors import FederationError
from common.messages import (
    AdvertiseKeysRequest,
    Enrolment,
    LocalUpdate,
    MaskedInputRequest,
    Refusal,
    Reply,
    Request,
    SealedShares,
    TrainRequest,
    Vector,
)
from common.privacy.accounting import Budget
from common.secagg.neighbours import threshold_of
from server.aggregation import AggregateUpdate, GanState, aggregate
from server.channel import MALFORMED, NO_ANSWER
from server.round import Charge, SumOutcome, WantedSum
from server.secure_round import SecureSums
from tests.client.secure_sites import STAGE_OF
from tests.client.sites import account_in
from tests.consortium import members_of, names_of

STAGES = ("advertise_keys", "share_keys", "masked_input", "confirm_survivors", "unmask")
FIVE = names_of(5)
FIRST = FIVE[0]
GENERATOR, DISCRIMINATOR = 5, 4
Serve = Callable[[], Reply]
Fault = Callable[[Serve], list[Reply]]
"""What the server hears instead of a site's answer; ``serve`` lets the site do its work."""


def study_of(names: Sequence[str] = FIVE, **federation: object) -> StudyConfig:
    """Any number of patients; the rounds are long enough for every test here."""
    contract = {name: 10 * (1 + position) for position, name in enumerate(names)}
    return StudyConfig(name="pilot").with_changes(
        "federation", **{"rounds": 20, "contracted_patients": contract, **federation}
    )


def state_of(number: int = 0) -> GanState:
    """The shared state after some rounds."""
    return GanState(
        number, np.ones(GENERATOR, np.float32), np.zeros(DISCRIMINATOR, np.float32), np.ones(GENERATOR, np.float32)
    )


@dataclass
class Question:
    """What was asked at once."""

    group: str
    timeout_seconds: float
    requests: dict[str, Request]

    @property
    def kinds(self) -> set[type]:
        return {type(request) for request in self.requests.values()}


@dataclass
class Network:
    """A channel to sites with folders of their own.

    Args:
        study: the study.
        folder: of all sites.
        faults: by site and stage.
        slowest: these sites answer after all others.
    """

    study: StudyConfig
    folder: Path
    faults: dict[tuple[str, str], Fault] = field(default_factory=dict)
    slowest: tuple[str, ...] = ()
    questions: list[Question] = field(default_factory=list)
    waited_for: list[str] = field(default_factory=list)
    charge: Callable[[SecureSite], None] = lambda site: None
    waited_seconds: float = 0.0

    def __post_init__(self) -> None:
        names = list(self.study.federation.contracted_patients)
        members = members_of(names, self.study.federation.minimum_sites)
        self.names = dict(enumerate(names, start=2))
        self.sites = {}
        for name in names:
            (self.folder / name).mkdir(exist_ok=True)
            folder = self.folder / name
            self.sites[name] = SecureSite(self.study, members[name], folder, partial(account_in, folder, self.study))
        random = np.random.default_rng(5)
        self.updates = {name: random.uniform(-0.1, 0.1, GENERATOR + DISCRIMINATOR) for name in names}

    def enrolled(self) -> dict[int, Enrolment]:
        """What the sites say when they enrol, by node."""
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
        by_name = {self.names[node]: request for node, request in requests.items()}
        self.questions.append(Question(group, timeout_seconds, by_name))
        for node in sorted(requests, key=lambda node: (self.names[node] in self.slowest, node)):
            name, request = self.names[node], requests[node]
            serve = self._server_of(name, request)
            fault = self.faults.get((name, STAGE_OF[type(request)]))
            self.waited_for.append(name)
            for reply in fault(serve) if fault else [serve()]:
                yield node, reply

    def _server_of(self, name: str, request: Request) -> Serve:
        site = self.sites[name]

        def train(asked: TrainRequest) -> MadeUpdate:
            self.charge(site)
            weight = self.study.site_weight(name)
            return MadeUpdate(asked.round, (self.updates[name] * weight).astype(np.float32), "update")

        handlers: dict[str, Callable[[Any], Reply]] = {
            "advertise_keys": lambda asked: secure_round.advertise_keys(site, asked),
            "share_keys": lambda asked: secure_round.share_keys(site, asked),
            "masked_input": lambda asked: secure_round.masked_input(site, asked, train),
            "confirm_survivors": lambda asked: secure_round.confirm_survivors(site, asked),
            "unmask": lambda asked: secure_round.unmask(site, asked),
        }

        def serve() -> Reply:
            try:
                return handlers[STAGE_OF[type(request)]](request)
            except FederationError as error:  # as client/app.py does it
                return Refusal(error.code)

        return serve

    def rounds(self) -> Callable[[GanState, Charge], SumOutcome]:
        """What makes one attempt at the sum of the updates of the round after a state."""
        sums, study = SecureSums(self.study, self, self.enrolled()), self.study

        def run(state: GanState, charge: Charge) -> SumOutcome:
            request = TrainRequest(study.digest, state.round + 1, state.generator, state.discriminator)
            length = len(state.generator) + len(state.discriminator)
            return sums.sum(WantedSum(request, length, study.encoding), charge)

        return run

    def asked(self, stage: str) -> list[dict[str, Request]]:
        """The requests of this kind, of each question that has any."""
        found = [
            {name: request for name, request in question.requests.items() if STAGE_OF[type(request)] == stage}
            for question in self.questions
        ]
        return [requests for requests in found if requests]

    def check(self, outcome: SumOutcome, sites: Sequence[str]) -> None:
        """The outcome is the sum of the updates of exactly these sites."""
        assert outcome.total is not None, outcome.failure
        assert outcome.failure == ""
        assert outcome.answered == tuple(sorted(sites))
        expected = sum(self.updates[name] * self.study.site_weight(name) for name in sites)
        np.testing.assert_allclose(outcome.total, expected, rtol=0, atol=len(sites) * 2.0**-15 + 1e-6)


def ignore(names: tuple[str, ...]) -> None:
    pass


def without(*names: str) -> list[str]:
    return [name for name in FIVE if name not in names]


# ---------------------------------------------------------------- what a round consists of


def test_the_first_round_has_five_exchanges_and_every_other_four(tmp_path: Path) -> None:
    network = Network(study_of(), tmp_path)
    run = network.rounds()
    for number in range(3):
        network.check(run(state_of(number), ignore), FIVE)
    assert [question.group for question in network.questions] == [
        "1/advertise_keys",
        *("1/share_keys", "1", "1/confirm_survivors", "1/unmask"),
        *("2/share_keys", "2", "2/confirm_survivors", "2/unmask"),
        *("3/share_keys", "3", "3/confirm_survivors", "3/unmask"),
    ]
    assert all(set(question.requests) == set(FIVE) for question in network.questions)
    assert all(len(question.kinds) == 1 for question in network.questions)


def test_every_stage_has_the_studys_time(tmp_path: Path) -> None:
    study = study_of(round_timeout_seconds=900.0).with_changes("secure_aggregation", stage_timeout_seconds=7.0)
    network = Network(study, tmp_path)
    network.rounds()(state_of(), ignore)
    assert {question.group: question.timeout_seconds for question in network.questions} == {
        "1/advertise_keys": 7.0,
        "1/share_keys": 7.0,
        "1": 900.0,
        "1/confirm_survivors": 7.0,
        "1/unmask": 7.0,
    }


def test_training_is_announced_once_with_the_sites_that_will_be_asked(tmp_path: Path) -> None:
    network = Network(study_of(), tmp_path, faults={(FIRST, "share_keys"): gone})
    announced: list[tuple[tuple[str, ...], int]] = []
    network.rounds()(state_of(), lambda names: announced.append((names, len(network.asked("masked_input")))))
    assert announced == [(tuple(FIVE[1:]), 0)]
    (asked,) = network.asked("masked_input")
    assert tuple(asked) == tuple(FIVE[1:])


def test_attempts_go_on_where_the_sites_newest_one_was(tmp_path: Path) -> None:
    network = Network(study_of(), tmp_path)
    run = network.rounds()
    for number in range(2):
        run(state_of(number), ignore)
    assert {site.last_attempt for site in network.enrolled().values()} == {3}  # keys for the third are out already

    network.faults = {(name, "advertise_keys"): gone for name in FIVE[:4]}  # one site is ahead of the others
    network.rounds()(state_of(2), ignore)
    assert [site.last_attempt for site in network.enrolled().values()] == [3, 3, 3, 3, 4]
    network.faults, network.questions = {}, []
    network.check(network.rounds()(state_of(2), ignore), FIVE)
    assert {request.attempt for request in network.asked("advertise_keys")[0].values()} == {5}  # type: ignore[union-attr]


@pytest.mark.parametrize("weights", ["equal", "contracted"])
def test_the_mean_is_the_one_computed_by_hand(weights: str, tmp_path: Path) -> None:
    """Contracts of 10, 20, ... patients; one site falls out, and its weight with it."""
    network = Network(study_of(weights=weights), tmp_path, faults={(FIVE[4], "masked_input"): gone})
    state = state_of()
    outcome = network.rounds()(state, ignore)
    assert outcome.total is not None
    new = aggregate(network.study, state, AggregateUpdate(outcome.total, outcome.answered))
    weight = {"equal": [1, 1, 1, 1], "contracted": [10, 20, 30, 40]}[weights]
    mean = np.average([network.updates[name] for name in FIVE[:4]], axis=0, weights=weight)
    bound = 4 * 2.0**-15 / (4 if weights == "equal" else (10 + 20 + 30 + 40) / 50) + 1e-6
    np.testing.assert_allclose(new.generator, state.generator + mean[:GENERATOR], rtol=0, atol=bound)
    np.testing.assert_allclose(new.discriminator, state.discriminator + mean[GENERATOR:], rtol=0, atol=bound)
    assert new.round == 1


# ---------------------------------------------------------------- one site fails at one stage


def gone(serve: Serve) -> list[Reply]:
    """The site never hears of it."""
    return [Refusal(NO_ANSWER)]


def late(serve: Serve) -> list[Reply]:
    """The site works, and its answer comes when nobody waits any more."""
    serve()
    return [Refusal(NO_ANSWER)]


def refuses(serve: Serve) -> list[Reply]:
    return [Refusal("site")]


def in_clear(serve: Serve) -> list[Reply]:
    """An update as it is, which nobody asked for."""
    serve()
    return [LocalUpdate(1, np.ones(GENERATOR + DISCRIMINATOR, np.float32))]


def of_another_attempt(serve: Serve) -> list[Reply]:
    reply: Any = serve()
    wrong = {"signature": bytes(64)} if not hasattr(reply, "attempt") else {"attempt": reply.attempt + 1}
    return [replace(reply, **wrong)]


FAULTS: dict[Fault, str] = {
    gone: NO_ANSWER,
    late: NO_ANSWER,
    refuses: "site",
    in_clear: MALFORMED,
    of_another_attempt: MALFORMED,
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_round_goes_on_without_a_site_that_fails_and_the_site_comes_back(
    stage: str, fault: Fault, tmp_path: Path
) -> None:
    network = Network(study_of(), tmp_path, faults={(FIRST, stage): fault})
    run = network.rounds()
    outcome = run(state_of(0), ignore)
    network.check(outcome, FIVE if stage in ("confirm_survivors", "unmask") else without(FIRST))
    assert outcome.refusals == {FIRST: FAULTS[fault]}

    network.faults = {}
    # Whoever fell out before training was asked for new keys meanwhile, in this same round.
    back_at_once = stage == "share_keys"
    outcome = run(state_of(1), ignore)
    network.check(outcome, FIVE if back_at_once else without(FIRST))
    assert outcome.refusals == {}
    network.check(run(state_of(2), ignore), FIVE)
    assert len(network.asked("advertise_keys")) == (3 if stage == "advertise_keys" else 2)


@pytest.mark.parametrize("stage", STAGES[1:])
def test_a_site_that_answers_twice_is_in_the_sum_once(stage: str, tmp_path: Path) -> None:
    network = Network(study_of(), tmp_path, faults={(FIRST, stage): lambda serve: [serve()] * 2})
    run = network.rounds()
    outcome = run(state_of(), ignore)
    network.check(outcome, FIVE)
    assert outcome.refusals == {FIRST: MALFORMED}
    network.faults = {}
    network.check(run(state_of(1), ignore), FIVE)


def test_nobody_waits_for_a_site_that_is_away_once_the_others_have_trained(tmp_path: Path) -> None:
    network = Network(study_of(), tmp_path, faults={(FIRST, "masked_input"): gone}, slowest=(FIRST,))
    run = network.rounds()
    run(state_of(0), ignore)
    network.faults = {(FIRST, "advertise_keys"): gone}
    network.waited_for.clear()
    network.check(run(state_of(1), ignore), without(FIRST))
    assert {type(request) for request in network.asked("advertise_keys")[-1].values()} == {AdvertiseKeysRequest}
    assert list(network.asked("advertise_keys")[-1]) == [FIRST]
    assert FIRST not in network.waited_for

    network.faults, network.slowest = {}, ()  # it is back, and answers while the others train
    network.check(run(state_of(2), ignore), without(FIRST))
    network.check(run(state_of(3), ignore), FIVE)


def test_a_site_that_may_be_back_is_asked_before_those_that_train(tmp_path: Path) -> None:
    """Its answer is quick. Where sites share a machine it would come too late behind the others' training."""
    last = FIVE[4]
    network = Network(study_of(), tmp_path, faults={(last, "share_keys"): gone})
    network.rounds()(state_of(0), ignore)
    (training,) = [question for question in network.questions if MaskedInputRequest in question.kinds]
    assert [name for name, request in training.requests.items() if isinstance(request, AdvertiseKeysRequest)] == [last]
    assert next(iter(training.requests)) == last


def test_wrong_keys_for_the_next_attempt_cost_only_the_next_attempt(tmp_path: Path) -> None:
    def with_wrong_keys(serve: Serve) -> list[Reply]:
        reply: Any = serve()
        return [replace(reply, next_keys=replace(reply.next_keys, signature=bytes(64)))]

    network = Network(study_of(), tmp_path, faults={(FIRST, "unmask"): with_wrong_keys})
    run = network.rounds()
    outcome = run(state_of(0), ignore)
    network.check(outcome, FIVE)
    assert outcome.refusals == {FIRST: MALFORMED}
    network.faults = {}
    network.check(run(state_of(1), ignore), without(FIRST))
    network.check(run(state_of(2), ignore), FIVE)


def charge_all(site: SecureSite) -> None:
    """Everything that the study planned."""
    account = site.accountant()
    assert account is not None
    release = Release(site.study.digest, "", "run", 1, account.phase(1).mechanism, 1.0)
    account.ledger.charge(account.data_set, release, Budget(1e6, 1e-5))


def test_a_site_that_has_spent_all_gives_no_more_keys(tmp_path: Path) -> None:
    network = Network(study_of(rounds=20), tmp_path)

    def charge(site: SecureSite) -> None:
        if site.member.site == FIRST:
            charge_all(site)

    network.charge = charge
    run = network.rounds()
    network.check(run(state_of(0), ignore), FIVE)
    outcome = run(state_of(1), ignore)
    network.check(outcome, without(FIRST))
    assert outcome.refusals == {FIRST: "budget_exhausted"}


def test_when_all_have_spent_all_the_round_says_so_before_training(tmp_path: Path) -> None:
    network = Network(study_of(), tmp_path)
    network.charge = charge_all
    run = network.rounds()
    network.check(run(state_of(0), ignore), FIVE)
    announced: list[tuple[str, ...]] = []
    outcome = run(state_of(1), announced.append)
    assert outcome.total is None
    assert outcome.refusals == dict.fromkeys(FIVE, "budget_exhausted")
    assert "ended after advertise_keys" in outcome.failure
    assert announced == []


# ---------------------------------------------------------------- too many fail


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("fault", [gone, late, of_another_attempt], ids=lambda fault: fault.__name__)
def test_a_round_that_fails_names_the_stage_and_the_next_works(stage: str, fault: Fault, tmp_path: Path) -> None:
    """Four of five must stay from ``share_keys`` on. Before, two are enough."""
    assert threshold_of(5) == 4
    bad = FIVE[:4] if stage == "advertise_keys" else FIVE[:2]
    network = Network(study_of(), tmp_path, faults={(name, stage): fault for name in bad})
    run = network.rounds()
    announced: list[tuple[str, ...]] = []
    outcome = run(state_of(), announced.append)
    assert outcome.total is None
    assert f"The secure sum of round 1 ended after {stage}:" in outcome.failure
    assert outcome.refusals == dict.fromkeys(bad, FAULTS[fault])
    trained = STAGES.index(stage) >= STAGES.index("masked_input")
    assert announced == ([tuple(FIVE)] if trained else [])
    # Whose vector came, so that it is known who spent a round for nothing.
    assert set(outcome.answered) == (
        set() if not trained else set(without(*bad)) if stage == "masked_input" else set(FIVE)
    )

    network.faults, network.questions = {}, []
    # The same round, another attempt, without those that failed in training: they would let the others pay again.
    network.check(run(state_of(), ignore), without(*bad) if stage == "masked_input" else FIVE)
    assert [question.group for question in network.questions][:2] == ["1/advertise_keys", "1/share_keys"]
    (number,) = {request.attempt for request in network.asked("share_keys")[0].values()}  # type: ignore[union-attr]
    assert number > 1
    network.questions = []
    network.check(run(state_of(1), ignore), FIVE)
    assert [question.group for question in network.questions][0] == "2/share_keys"


@pytest.mark.parametrize("stage", STAGES)
def test_two_sites_get_over_one_lost_answer(stage: str, tmp_path: Path) -> None:
    """Two cannot do without one, but the second attempt has both: keys that were lost on the way are not in its way."""
    names = names_of(2)
    network = Network(study_of(names), tmp_path, faults={(names[0], stage): late})
    run = network.rounds()
    assert run(state_of(), ignore).total is None
    network.faults = {}
    network.check(run(state_of(), ignore), names)


def test_shares_that_nobody_can_open_end_the_round_and_not_the_next(tmp_path: Path) -> None:
    def sealed_wrong(serve: Serve) -> list[Reply]:
        reply = serve()
        assert isinstance(reply, SealedShares)
        return [replace(reply, sealed={name: text[:-1] + b"\0\0" for name, text in reply.sealed.items()})]

    network = Network(study_of(), tmp_path, faults={(FIRST, "share_keys"): sealed_wrong})
    run = network.rounds()
    outcome = run(state_of(), ignore)
    assert outcome.total is None
    assert "ended after masked_input" in outcome.failure
    assert outcome.refusals == dict.fromkeys(without(FIRST), "bad_peer")
    network.faults = {}
    network.check(run(state_of(), ignore), FIVE)


def test_a_site_that_gets_wrong_shares_does_not_train(tmp_path: Path) -> None:
    """What a site refuses before it trains costs it nothing, which is how the record settles these codes."""
    trained: list[str] = []
    network = Network(study_of(), tmp_path, charge=lambda site: trained.append(site.member.site))
    swapped: dict[str, Reply] = {}

    def moved(serve: Serve) -> list[Reply]:
        reply: Any = serve()
        swapped[FIRST] = replace(reply, sealed=dict(zip(reply.sealed, reversed(reply.sealed.values()), strict=True)))
        return [swapped[FIRST]]

    network.faults = {(FIRST, "share_keys"): moved}
    outcome = network.rounds()(state_of(), ignore)
    assert outcome.refusals == dict.fromkeys(without(FIRST), "bad_peer")
    assert trained == [FIRST]  # whose own shares from the others were right


def test_a_round_is_trained_from_the_shared_state(tmp_path: Path) -> None:
    network = Network(study_of(), tmp_path)
    state = replace(state_of(4), generator=np.arange(GENERATOR, dtype=np.float32))
    network.rounds()(state, ignore)
    (asked,) = network.asked("masked_input")
    for request in asked.values():
        assert isinstance(request, MaskedInputRequest)
        vectors: list[Vector] = [request.work.generator, request.work.discriminator]
        assert [vector.tolist() for vector in vectors] == [state.generator.tolist(), state.discriminator.tolist()]
        assert (request.work.round, request.work.study_digest) == (5, network.study.digest)


def test_when_too_few_would_be_left_those_that_failed_in_training_are_asked_again(tmp_path: Path) -> None:
    names = names_of(2)
    network = Network(study_of(names), tmp_path, faults={(names[0], "masked_input"): gone})
    run = network.rounds()
    assert run(state_of(), ignore).total is None
    network.faults = {}
    network.check(run(state_of(), ignore), names)
