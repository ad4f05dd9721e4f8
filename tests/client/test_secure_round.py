"""The site's flow of a secure sum: budget, training, what an error costs, and which update leaves when."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from client import secure_round, training, updates
from client.log import site_log
from client.round_file import ROUND_FILE, SERVED_FILE, last_attempt
from client.secure_round import SecureSite
from client.training import SiteStudy, train_round
from client.updates import MadeUpdate
from common import progress
from common.config import StudyConfig
from common.errors import (
    BadPeer,
    BudgetExhausted,
    ConfigError,
    FederationError,
    OutOfOrder,
    PrivacyError,
    ProtocolError,
    SiteError,
    TooFewSurvivors,
)
from common.messages import (
    AdvertiseKeysRequest,
    MaskedInputRequest,
    TrainRequest,
    UnmaskShares,
)
from common.privacy.accounting import num_steps
from common.secagg.keys import AdvertisedKeys, Attempt
from server.secagg import SecureSum, SumPlan
from tests.client.secure_sites import make_sites, secure_site, secure_study
from tests.client.sites import account_in, charged_in, cohort_of, request_of

SITES = ("north", "south")
Train = Callable[[TrainRequest], MadeUpdate]


class Pair:
    """Two sites on disk and an honest server; the sites train on bright and dark patients in memory."""

    def __init__(self, folder: Path, study: StudyConfig | None = None) -> None:
        self.study = study or secure_study(SITES)
        self.folders = make_sites(folder, SITES, study=self.study)
        self.train = request_of(self.study)
        self.length = len(self.train.generator) + len(self.train.discriminator)
        self.keys: dict[str, AdvertisedKeys] = {}
        self.server: SecureSum | None = None

    def at(self, name: str) -> SecureSite:
        """A new object every time, as in a new process."""
        return secure_site(self.folders[name], self.study)

    def trainer(self, name: str) -> Train:
        at = SiteStudy(
            self.study, name, self.at(name).folder, cohort_of(), 8, "cpu", account_in(self.folders[name], self.study)
        )
        return lambda request: train_round(at, request)

    def steps(self, name: str) -> int:
        return num_steps(charged_in(self.folders[name], self.study))

    def saved(self, name: str) -> np.ndarray:
        state = training._load_state(self.at(name).folder)
        assert state is not None
        return np.concatenate([state["generator"].numpy(), state["discriminator"].numpy()])

    def advertise(self, number: int) -> None:
        request = AdvertiseKeysRequest(self.study.digest, number, 1)
        self.keys = {name: secure_round.advertise_keys(self.at(name), request) for name in SITES}

    def share(self, number: int) -> dict[str, MaskedInputRequest]:
        roster = self.at("north").member.roster
        encoding = self.study.encoding
        plan = SumPlan(
            Attempt(self.study.digest, number), self.train.round, self.length, encoding, 2, roster.digest, roster.sites
        )
        server = self.server = SecureSum(plan, self.keys)
        for name, request in server.share_keys_requests().items():
            server.take_sealed_shares(name, secure_round.share_keys(self.at(name), request))
        return server.masked_input_requests(self.train)

    def begin(self, number: int) -> dict[str, MaskedInputRequest]:
        self.advertise(number)
        return self.share(number)

    def mask(self, name: str, request: MaskedInputRequest, train: Train | None = None) -> None:
        assert self.server is not None
        message = secure_round.masked_input(self.at(name), request, train or self.trainer(name))
        self.server.take_masked_input(name, message)

    def open(self) -> dict[str, UnmaskShares]:
        assert self.server is not None
        for name, confirm_request in self.server.confirm_requests().items():
            self.server.take_confirmation(name, secure_round.confirm_survivors(self.at(name), confirm_request))
        opened, following = {}, min(self.train.round + 1, self.study.total_rounds)
        for name, unmask_request in self.server.unmask_requests(following).items():
            opened[name] = secure_round.unmask(self.at(name), unmask_request)
            self.server.take_unmask_shares(name, opened[name])
        return opened

    def finish(self, requests: dict[str, MaskedInputRequest]) -> dict[str, UnmaskShares]:
        for name, request in requests.items():
            self.mask(name, request)
        return self.open()

    def ended(self, name: str) -> bool:
        return not (self.at(name).folder / ROUND_FILE).exists()


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path)


def raising(error: BaseException) -> Train:
    def train(request: TrainRequest) -> MadeUpdate:
        raise error

    return train


def bound(pair: Pair) -> float:
    return 2 * 2.0**-pair.study.secure_aggregation.fraction_bits


# ---------------------------------------------------------------- whole rounds


def test_rounds_follow_one_another_on_the_keys_that_came_before_until_the_budget_is_spent(pair: Pair) -> None:
    pair.advertise(1)
    for number in (1, 2, 3):
        pair.train = request_of(pair.study, number, seed=number)
        opened = pair.finish(pair.share(number))
        assert pair.server is not None
        assert np.abs(pair.server.result() - sum(pair.saved(name) for name in SITES)).max() < bound(pair)
        assert [pair.steps(name) for name in SITES] == [2 * number] * 2
        if number < 3:
            next_keys = {name: shares.next_keys for name, shares in opened.items()}
            pair.keys = {name: each for name, each in next_keys.items() if each is not None}
            assert set(pair.keys) == set(SITES)
    # All is spent: the last answer says so by bringing no keys, and asking for them is refused.
    assert all(shares.next_keys is None for shares in opened.values())
    for name in SITES:
        assert pair.ended(name) and last_attempt(pair.at(name).folder) == 3
        with pytest.raises(BudgetExhausted):
            secure_round.advertise_keys(pair.at(name), AdvertiseKeysRequest(pair.study.digest, 4, 1))
        assert last_attempt(pair.at(name).folder) == 3  # a refusal uses no attempt up


def test_an_update_that_was_made_and_waits_takes_part_though_all_is_spent(tmp_path: Path) -> None:
    pair = Pair(tmp_path, secure_study(SITES, federation={"rounds": 1}))
    pair.begin(1)
    for name in SITES:
        pair.trainer(name)(pair.train)  # as before a crash: made, never sent
    before = {name: pair.saved(name) for name in SITES}
    assert [pair.steps(name) for name in SITES] == [2, 2]  # the whole budget
    pair.finish(pair.begin(2))
    assert pair.server is not None
    assert np.abs(pair.server.result() - sum(before.values())).max() < bound(pair)
    assert [pair.steps(name) for name in SITES] == [2, 2]
    with pytest.raises(BudgetExhausted):
        secure_round.advertise_keys(pair.at("north"), AdvertiseKeysRequest(pair.study.digest, 9, 1))


def test_a_study_without_privacy_has_no_budget(tmp_path: Path) -> None:
    pair = Pair(tmp_path, secure_study(SITES, federation={"rounds": 2}, privacy={"enabled": False}))
    for number in (1, 2):
        pair.train = request_of(pair.study, number)
        pair.finish(pair.begin(10 * number))


def test_a_study_without_secure_aggregation_makes_no_keys(tmp_path: Path) -> None:
    pair = Pair(tmp_path, secure_study(SITES, federation={"aggregation": "plain"}))
    with pytest.raises(ConfigError):
        pair.advertise(1)


@pytest.mark.parametrize(("study", "own", "joined"), [(2, 3, False), (3, 2, False), (2, 2, True)])
def test_the_larger_of_the_two_minima_counts(study: int, own: int, joined: bool, tmp_path: Path) -> None:
    pair = Pair(tmp_path, secure_study(SITES, federation={"minimum_sites": study}))
    for name, folder in pair.folders.items():
        at = secure_site(folder, pair.study)
        request = AdvertiseKeysRequest(pair.study.digest, 1, 1)
        stricter = replace(at, member=replace(at.member, minimum_cohort=own))
        pair.keys[name] = secure_round.advertise_keys(stricter, request)
    if joined:
        pair.share(1)
        return
    with pytest.raises(TooFewSurvivors):
        pair.share(1)
    assert pair.ended("north")


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("error", [BadPeer("x"), PrivacyError("x"), SiteError("x"), MemoryError(), KeyboardInterrupt()])
def test_an_error_in_training_ends_the_attempt_and_keeps_its_own_code(error: BaseException, pair: Pair) -> None:
    requests = pair.begin(1)
    with pytest.raises(type(error)) as caught:
        pair.mask("north", requests["north"], raising(error))
    assert caught.value is error
    assert pair.ended("north") and pair.steps("north") == 0
    with pytest.raises(OutOfOrder):
        pair.mask("north", requests["north"])
    pair.finish(pair.begin(2))  # the next attempt works


def test_nothing_is_trained_before_the_shares_are_checked(pair: Pair) -> None:
    requests = pair.begin(1)
    spoilt = replace(requests["north"], sealed={"south": bytes(82)})
    with pytest.raises(BadPeer):
        pair.mask("north", spoilt, raising(AssertionError("trained")))
    assert pair.ended("north")


def newer_attempt(pair: Pair) -> None:
    secure_round.advertise_keys(pair.at("north"), AdvertiseKeysRequest(pair.study.digest, 5, 1))


def damaged_file(pair: Pair) -> None:
    (pair.at("north").folder / ROUND_FILE).write_bytes(b"x" * 100)


def second_request(pair: Pair) -> None:
    with pytest.raises(OutOfOrder):
        pair.mask("north", MaskedInputRequest(1, SITES, {}, pair.train), raising(AssertionError("trained")))


@pytest.mark.parametrize("meanwhile", [newer_attempt, damaged_file, second_request])
def test_an_update_that_was_made_and_cannot_be_sent_has_a_code_of_its_own(
    meanwhile: Callable[[Pair], None], pair: Pair
) -> None:
    requests = pair.begin(1)

    def train(request: TrainRequest) -> MadeUpdate:
        update = pair.trainer("north")(request)
        meanwhile(pair)
        return update

    with pytest.raises(ProtocolError) as caught:
        pair.mask("north", requests["north"], train)
    assert caught.value.code == "protocol"  # to the server other codes say that nothing was spent
    assert pair.steps("north") == 2


def test_an_update_that_is_not_finite_does_not_leave(pair: Pair) -> None:
    requests = pair.begin(1)

    def broken(request: TrainRequest) -> MadeUpdate:
        return MadeUpdate(1, np.full(pair.length, np.nan, np.float32), "broken")

    with pytest.raises(ProtocolError) as caught:
        pair.mask("north", requests["north"], broken)
    assert caught.value.code == "protocol"
    assert pair.ended("north")


def test_how_much_was_clipped_stays_in_the_sites_own_log(pair: Pair) -> None:
    requests, folder = pair.begin(1), pair.folders["north"]
    large = np.zeros(pair.length, np.float32)
    large[:1234] = 7
    with site_log(folder):
        message = secure_round.masked_input(
            pair.at("north"), requests["north"], lambda request: MadeUpdate(1, large, "large")
        )
    assert f"1234 of {pair.length} coordinates clipped" in (folder / "site.log").read_text()
    assert set(vars(message)) == {"study_digest", "attempt", "round", "length", "modulus_bits", "words"}


# ---------------------------------------------------------------- which update leaves when


def test_the_same_round_in_a_second_attempt_is_trained_anew_under_its_own_charge(pair: Pair) -> None:
    for name, request in pair.begin(1).items():
        pair.mask(name, request)
    first = {name: pair.saved(name) for name in SITES}
    requests = pair.begin(2)  # the server says that the first attempt failed
    pair.finish(requests)
    for name in SITES:
        assert pair.steps(name) == 4
        assert not np.array_equal(first[name], pair.saved(name))


def test_an_update_whose_attempt_ended_before_it_left_is_sent_by_the_next_without_a_charge(pair: Pair) -> None:
    requests = pair.begin(1)

    def killed(request: TrainRequest) -> MadeUpdate:
        pair.trainer("north")(request)
        raise KeyboardInterrupt  # the process dies right after the update is on disk

    with pytest.raises(KeyboardInterrupt):
        pair.mask("north", requests["north"], killed)
    made = pair.saved("north")
    assert updates.read(pair.at("north").folder).pending
    pair.finish(pair.begin(2))
    assert pair.steps("north") == 2
    assert np.array_equal(pair.saved("north"), made)
    assert not updates.read(pair.at("north").folder).pending


def test_ctrl_c_in_training_ends_the_attempt_and_keeps_the_steps_for_the_next(pair: Pair) -> None:
    requests, done = pair.begin(1), []

    def stop(step: int, num_steps: int) -> None:
        done.append(step)
        raise KeyboardInterrupt

    with progress.listening(stop), pytest.raises(KeyboardInterrupt):
        pair.mask("north", requests["north"])
    assert done == [1] and pair.ended("north") and pair.steps("north") == 2
    requests = pair.begin(2)
    with progress.listening(lambda step, num_steps: done.append(step)):
        pair.mask("north", requests["north"])
    assert done == [1, 2]  # it went on after the first step
    assert pair.steps("north") == 2  # under the charge that was made
    pair.mask("south", requests["south"])
    pair.open()


def test_ctrl_c_while_a_round_is_trained_anew_keeps_the_steps_as_well(pair: Pair) -> None:
    for name, request in pair.begin(1).items():
        pair.mask(name, request)
    requests, done = pair.begin(2), list[int]()

    def stop(step: int, num_steps: int) -> None:
        raise KeyboardInterrupt

    with progress.listening(stop), pytest.raises(KeyboardInterrupt):
        pair.mask("north", requests["north"])
    assert pair.steps("north") == 4
    requests = pair.begin(3)
    with progress.listening(lambda step, num_steps: done.append(step)):
        pair.mask("north", requests["north"])
    assert done == [2]
    assert pair.steps("north") == 4


def test_no_update_leaves_twice_when_two_attempts_overlap(pair: Pair) -> None:
    """A handler of an older attempt that wakes up late must not undo what the newer one noted."""
    old = pair.begin(1)
    later = request_of(pair.study, 2, seed=2)
    left: list[np.ndarray] = []

    def slow(request: TrainRequest) -> MadeUpdate:
        update = pair.trainer("north")(request)
        pair.train = later
        for name, newer in pair.begin(2).items():
            pair.mask(name, newer)
        left.append(pair.saved("north"))
        return update

    with pytest.raises(ProtocolError):
        pair.mask("north", old["north"], slow)
    assert pair.steps("north") == 4
    requests = pair.begin(3)  # the newer round once more: its update has left in attempt 2
    pair.mask("north", requests["north"])
    assert not np.array_equal(pair.saved("north"), left[0])
    assert pair.steps("north") == 6


def test_an_update_does_not_leave_when_that_cannot_be_noted(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = pair.begin(1)

    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(updates, "note_left", full)
    with pytest.raises(ProtocolError, match="No space"):  # not a code that says nothing was spent
        pair.mask("north", requests["north"])
    assert pair.server is not None and pair.server.survivors == ()
    assert pair.ended("north")


def test_a_file_of_updates_that_is_damaged_stops_the_site(pair: Pair) -> None:
    requests = pair.begin(1)
    (pair.at("north").folder / updates.FILE_NAME).write_bytes(b"{")
    with pytest.raises(FederationError) as caught:
        pair.mask("north", requests["north"])
    assert caught.value.code == "site"
    assert pair.ended("north")


def test_a_saved_update_that_nobody_asks_for_lets_a_spent_site_join_once_only(tmp_path: Path) -> None:
    """It would else join every attempt, leave when it is to train, and let the others train for nothing."""
    pair = Pair(tmp_path, secure_study(SITES, federation={"rounds": 1}))
    pair.begin(1)
    pair.trainer("north")(pair.train)
    assert pair.steps("north") == 2 and updates.read(pair.at("north").folder).pending
    pair.train = request_of(pair.study, 1, seed=5)  # the server has another state now
    requests = pair.begin(2)
    with pytest.raises(BudgetExhausted):
        pair.mask("north", requests["north"])
    with pytest.raises(BudgetExhausted):
        secure_round.advertise_keys(pair.at("north"), AdvertiseKeysRequest(pair.study.digest, 3, 1))


def test_an_update_never_leaves_once_another_was_noted_though_that_one_was_never_saved(pair: Pair) -> None:
    """Noted as made, then the disk was full: whatever is saved is older, and may have left. It is trained anew."""
    requests = pair.begin(1)

    def killed(request: TrainRequest) -> MadeUpdate:
        pair.trainer("north")(request)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pair.mask("north", requests["north"], killed)
    saved, first = pair.saved("north"), pair.train
    updates.note_made(pair.at("north").folder, "never saved")
    requests = pair.begin(2)
    pair.train = first
    pair.mask("north", requests["north"])
    made = pair.saved("north")
    assert not np.array_equal(made, saved)
    assert pair.steps("north") == 4
    requests = pair.begin(3)
    pair.mask("north", requests["north"])
    assert not np.array_equal(pair.saved("north"), made)
    assert pair.steps("north") == 6


def test_a_failure_after_the_charge_has_a_code_that_says_so(pair: Pair) -> None:
    requests, folder = pair.begin(1), pair.at("north").folder

    def damaged(done: int, total: int) -> None:
        (folder / updates.FILE_NAME).write_bytes(b"{")

    with progress.listening(damaged), pytest.raises(ProtocolError) as caught:
        pair.mask("north", requests["north"])
    assert caught.value.code == "protocol"
    assert pair.steps("north") == 2


def test_secrets_that_a_crash_left_are_erased_when_the_site_enrols(pair: Pair) -> None:
    pair.begin(1)
    assert not pair.ended("north")
    (pair.at("north").folder / f".{ROUND_FILE}.abc").write_bytes(b"of a process that was killed while it wrote")
    file = pair.at("north").file
    file.end(last_attempt(pair.at("north").folder))
    assert pair.ended("north")
    assert not list(pair.at("north").folder.glob(f"*{ROUND_FILE}*"))


def test_a_lost_count_of_attempts_is_refused(pair: Pair) -> None:
    pair.finish(pair.begin(1))
    (pair.at("north").folder / SERVED_FILE).unlink()
    with pytest.raises(SiteError, match="is gone"):
        secure_round.advertise_keys(pair.at("north"), AdvertiseKeysRequest(pair.study.digest, 1, 1))
