"""Whole simulations under secure aggregation: the same generator as in the clear, and sites that die at any stage."""

import json
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message
from flwr.common.serde import message_to_proto
from numpy.typing import NDArray
from scipy import stats

import client.app
import client.training
from client.accountant import open_ledger
from client.data.cohort import KEY_NAME
from client.policy import Policy
from client.settings import SiteSettings
from client.training import SiteStudy
from client.updates import MadeUpdate
from common import wire
from common.config import StudyConfig
from common.messages import MaskedInput, TrainRequest
from common.privacy import accounting
from common.privacy.gradient import PatientOptimizer
from common.privacy.sampling import draw_patients
from deploy.phantoms import write_bids
from deploy.simulate import Simulation, simulate
from server import checkpoints, record
from server.aggregation import AggregateUpdate, GanState, aggregate
from server.record import RunRecord
from tests.consortium import encoded, lanes_of
from tests.deploy.command import Result, synthward, tiny_study

SITES = ("site-1", "site-2", "site-3", "site-4", "site-5")
STAGES = ("advertise_keys", "share_keys", "masked_input", "confirm_survivors", "unmask")
STEPS = 3


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Five phantom hospitals of six patients."""
    folders = write_bids(tmp_path_factory.mktemp("five"), sites=5, patients=6, seed=3, shape=(40, 40, 24))
    return {folder.name: folder for folder in folders}


def small_study(path: Path, **changes: Any) -> Path:
    """The tiny study for six patients a site; a generator that moves much more in a round than rounding does."""
    defaults: dict[str, Any] = {"federation__minimum_patients": 5, "gan__generator_learning_rate": 5e-3}
    return tiny_study(path, **{**defaults, **changes})


@dataclass
class Between:
    """The sites' app, with something between it and the server.

    Args:
        handle: (site, stage, round, serve) to the reply; ``serve`` is the app's own handler. It may raise, as a site
            does that dies.
    """

    handle: Callable[[str, str, int, Callable[[], Message]], Message]
    app: Any = field(default_factory=lambda: client.app.app)

    def __call__(self, message: Message, context: Context) -> Message:
        site = Path(str(context.node_config["site"])).name
        _, _, stage = message.metadata.message_type.partition(".")
        number, _, _ = message.metadata.group_id.partition("/")
        return self.handle(site, stage, 0 if number == "enrol" else int(number), lambda: self.app(message, context))


@contextmanager
def between(handle: Callable[[str, str, int, Callable[[], Message]], Message]) -> Iterator[None]:
    """Put it between for a while."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client.app, "app", Between(handle))
        yield


def simulate_five(five: dict[str, Path], study: Path, out: Path) -> Result:
    """The user's command."""
    sites = [word for name, path in five.items() for word in ("--site", f"{name}={path}")]
    return synthward("simulate", study, *sites, "--out", out)


def steps_spent(out: Path, site: str) -> int:
    """By the site's own ledger."""
    return sum(line.steps for line in open_ledger(out / "sites" / site).lines())


def steps_charged(facts: RunRecord) -> dict[str, int]:
    """By ``run.json``."""
    return {site.name: accounting.num_steps(record.history(site)) for site in facts.sites}


def generators(out: Path, rounds: int) -> list[GanState]:
    return [checkpoints.load(out / "checkpoints" / f"round-{number:04d}.pt") for number in range(rounds + 1)]


# ---------------------------------------------------------------- the same generator as in the clear


class Dice:
    """A source of randomness that gives a site the same numbers in the same round, whatever the threads do."""

    def __init__(self) -> None:
        self._current = threading.local()

    def throw(self, site: str, number: int) -> None:
        self._current.random = random.Random(f"{site}/{number}")

    def bytes(self, count: int) -> bytes:
        return bytes(self._current.random.randbytes(count))

    def system_random(self) -> random.Random:
        return self._current.random  # type: ignore[no-any-return]


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, int], MadeUpdate]:
    """With dice instead of the system's randomness in the sites' training; every update they make, by site and round.

    Keys, masks and the rounding of the encoding stay as random as they are.
    """
    dice, made = Dice(), dict[tuple[str, int], MadeUpdate]()
    train_round = client.training.train_round

    def seeded(at: SiteStudy, request: TrainRequest) -> MadeUpdate:
        dice.throw(at.site, request.round)
        made[at.site, request.round] = update = train_round(at, request)
        return update

    monkeypatch.setattr(client.training, "train_round", seeded)
    monkeypatch.setattr(client.training, "secrets", SimpleNamespace(SystemRandom=dice.system_random))
    for function in (draw_patients, PatientOptimizer.__init__):
        assert [default for default in function.__defaults__ or () if default.__name__ == "urandom"]
        monkeypatch.setattr(function, "__defaults__", (dice.bytes,))
    return made


def federate(five: dict[str, Path], study: StudyConfig, out: Path) -> list[GanState]:
    """The shared state after every round, of sites whose split of the patients is the same in every run."""
    sites = []
    for name, path in five.items():
        settings = SiteSettings.checked(name=name, data=path, folder=out / "sites" / name, device="cpu")
        settings.save()
        key = settings.folder / KEY_NAME
        key.write_bytes(name.encode().ljust(32))
        key.chmod(0o600)
        sites.append(settings)
    simulate(Simulation(study, sites, out, "cpu"))
    assert RunRecord.load(out).aggregation == study.federation.aggregation
    return generators(out, study.federation.rounds)


def rounding(study: StudyConfig, state: GanState) -> float:
    """How far the mean may be off: a unit of the encoding a site, and float32."""
    weights = sum(study.site_weight(name) for name in SITES)
    return float(len(SITES) * 2.0**-study.secure_aggregation.fraction_bits / weights + 2.0**-21 * _largest(state))


def _largest(state: GanState) -> float:
    return float(max(np.abs(state.generator).max(), np.abs(state.discriminator).max(), 1.0))


def off(one: GanState, other: GanState) -> float:
    """The largest difference of any weight."""
    names = ("generator", "discriminator", "generator_average")
    return max(float(np.abs(getattr(one, name) - getattr(other, name)).max()) for name in names)


@pytest.mark.parametrize("weights", ["equal", "contracted"])
def test_one_round_gives_the_generator_that_the_plain_mean_gives(
    weights: str, five: dict[str, Path], tmp_path: Path, updates: dict[tuple[str, int], MadeUpdate]
) -> None:
    contract = {name: 6 * (1 + position) for position, name in enumerate(SITES)}
    study = StudyConfig.from_toml(small_study(tmp_path / "s.toml", federation__rounds=1)).with_changes(
        "federation", weights=weights, contracted_patients=contract
    )
    start, secure = federate(five, study, tmp_path / "secure")
    masked = dict(updates)
    plain_study = study.with_changes("federation", aggregation="plain")
    plain_start, plain = federate(five, plain_study, tmp_path / "plain")

    np.testing.assert_array_equal(start.generator, plain_start.generator)
    for at, update in masked.items():
        np.testing.assert_array_equal(update.vector, updates[at].vector)
    bound = rounding(study, plain)
    assert 0 < off(secure, plain) <= bound
    assert off(plain, start) > 20 * bound  # the round did much more than rounding could
    for name in SITES:
        assert " 0 of " in (tmp_path / "secure" / "sites" / name / "site.log").read_text()


def test_every_round_is_the_plain_mean_of_the_updates_and_three_rounds_stay_close(
    five: dict[str, Path], tmp_path: Path, updates: dict[tuple[str, int], MadeUpdate]
) -> None:
    study = StudyConfig.from_toml(small_study(tmp_path / "s.toml", federation__rounds=3))
    secure = federate(five, study, tmp_path / "secure")
    for before, after in zip(secure[:-1], secure[1:], strict=True):
        total = np.sum([updates[name, after.round].vector.astype(np.float64) for name in SITES], axis=0)
        expected = aggregate(study, before, AggregateUpdate(total.astype(np.float32), SITES))
        assert off(expected, after) <= rounding(study, after)

    plain = federate(five, study.with_changes("federation", aggregation="plain"), tmp_path / "plain")
    moved = np.linalg.norm(plain[3].generator - plain[0].generator)
    assert np.linalg.norm(secure[3].generator - plain[3].generator) < 0.1 * moved


# ---------------------------------------------------------------- five sites, one dies in each stage

DIES = dict(zip(range(1, 6), zip(SITES, STAGES, strict=True), strict=True))
"""By round, which site dies at which stage of it. Rounds 6 and 7 are quiet."""
IN_SUM = [
    ("site-2", "site-3", "site-4", "site-5"),  # site-1 gave no keys; it is asked again while the others train
    ("site-1", "site-3", "site-4", "site-5"),  # site-2 dealt no shares; it is asked for keys at once
    ("site-1", "site-2", "site-4", "site-5"),  # site-3 gave no vector
    ("site-1", "site-2", "site-4", "site-5"),  # site-3 gives keys; site-4 dies when its vector is there
    ("site-1", "site-2", "site-3", "site-5"),  # site-4 gives keys; so does site-5, when its vector is there
    ("site-1", "site-2", "site-3", "site-4"),  # site-5 gives keys
    SITES,
]


@dataclass
class Heard:
    """One message that left a site, and the update that the site had on disk then."""

    site: str
    stage: str
    round: int
    content: bytes
    message: object
    update: NDArray[np.float32] | None


@dataclass
class Scene:
    """A completed run in which a site dies in each stage."""

    out: Path
    result: Result
    heard: list[Heard]


@pytest.fixture(scope="module", params=["before it answers", "after its work"])
def scene(request: pytest.FixtureRequest, five: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """Seven rounds. A site that dies after its work has served the stage, and its answer is lost."""
    folder, heard, dead = tmp_path_factory.mktemp("scene"), list[Heard](), set[str]()
    out = folder / "run"

    def handle(site: str, stage: str, number: int, serve: Callable[[], Message]) -> Message:
        dies = DIES.get(number) == (site, stage) and site not in dead
        if dies:
            dead.add(site)  # once: it is there again when it is asked for new keys
        if dies and request.param == "before it answers":
            raise ConnectionError("the site is gone")
        reply = serve()
        heard.append(
            Heard(site, stage, number, bytes_of(reply), wire.unpack(reply.content), update_of(out / "sites" / site))
        )
        if dies:
            raise ConnectionError("the answer is lost")
        return reply

    study = small_study(folder / "s.toml", federation__rounds=len(IN_SUM), federation__local_steps=STEPS)
    with between(handle):
        return Scene(out, simulate_five(five, study, out), heard)


def bytes_of(message: Message) -> bytes:
    """All that leaves a site, arrays as they are too."""
    arrays = [array.data for arrays in message.content.array_records.values() for array in arrays.values()]
    return message_to_proto(message).SerializeToString() + b"".join(arrays)


def update_of(site: Path) -> NDArray[np.float32] | None:
    """The update in the site's state file: generator, then discriminator."""
    paths = list(site.glob("studies/*/state.pt"))
    if not paths:
        return None
    state = torch.load(paths[0], map_location="cpu", weights_only=True)
    return np.concatenate([state["generator"].numpy(), state["discriminator"].numpy()])


def test_the_run_completes_without_the_sites_that_died_and_with_them_again(scene: Scene) -> None:
    assert scene.result.status == 0, scene.result.err
    assert "Traceback" not in scene.result.err
    facts = RunRecord.load(scene.out)
    assert (facts.status, facts.error, facts.aggregation) == ("completed", "", "secure")
    lines = record.read_metrics(scene.out)
    assert [tuple(line["sites"]) for line in lines] == IN_SUM
    assert [line["refused"] for line in lines] == [
        *({site: "node_error"} for site, _ in DIES.values()),
        {},
        {},
    ]
    for site in facts.sites:
        assert site.rounds == [number for number, names in enumerate(IN_SUM, start=1) if site.name in names]
        assert site.refusals == {"node_error": 1}


def test_the_record_charges_what_the_sites_have_charged_themselves_or_more(scene: Scene) -> None:
    facts = RunRecord.load(scene.out)
    charged = steps_charged(facts)
    for site in facts.sites:
        assert charged[site.name] >= steps_spent(scene.out, site.name) >= STEPS * len(site.rounds)
    # Only site-3, which died in training, may have trained for nothing.
    assert charged == {site.name: STEPS * (len(site.rounds) + (site.name == "site-3")) for site in facts.sites}


def test_the_updates_leave_in_masked_messages_only(scene: Scene) -> None:
    kinds = {(heard.stage, type(heard.message).__name__) for heard in scene.heard}
    assert kinds == {
        ("enrol", "Enrolment"),
        ("advertise_keys", "AdvertisedKeys"),
        ("share_keys", "SealedShares"),
        ("masked_input", "MaskedInput"),
        ("confirm_survivors", "Confirmation"),
        ("unmask", "UnmaskShares"),
    }


def test_no_message_holds_a_piece_of_an_update(scene: Scene) -> None:
    """Sixteen weights, as float32, or six words with three each, as they were summed, nowhere in anything that left."""
    left = b"".join(heard.content for heard in scene.heard)
    study = StudyConfig.from_toml(scene.out / "study.toml")
    num_pieces = 0
    for heard in scene.heard:
        if heard.stage != "masked_input":
            continue
        assert heard.update is not None and np.abs(heard.update).max() > 1e-3
        words = encoded(heard.update, study.encoding)
        for vector, size in ((heard.update.tobytes(), 16 * 4), (words.tobytes(), 6 * 8)):
            for start in range(0, len(vector) - size, size * 37):  # one piece of 37: the search is slow
                piece = vector[start : start + size]
                if len(set(piece)) > 8:  # not a row of zeros
                    num_pieces += 1
                    assert piece not in left
    assert num_pieces > 1000


def test_a_masked_vector_has_nothing_of_the_update_in_it(scene: Scene) -> None:
    study = StudyConfig.from_toml(scene.out / "study.toml")
    encoding = study.encoding
    masked = [heard for heard in scene.heard if isinstance(heard.message, MaskedInput)]
    assert len(masked) >= sum(len(names) for names in IN_SUM)
    for heard in masked:
        assert isinstance(heard.message, MaskedInput) and heard.update is not None
        counts = np.bincount(heard.message.words.view(np.uint8), minlength=256)
        assert heard.message.length == len(heard.update) > 10_000
        assert stats.chisquare(counts).pvalue > 1e-9
        # A weight rounds to one of two integers. By chance one lane in 2^20 is either; more would be a leak.
        lanes = lanes_of(heard.message.words, encoding, len(heard.update))
        low = np.floor(heard.update.astype(np.float64) * 2.0**encoding.fraction_bits).astype(np.int64)
        assert np.count_nonzero(((lanes - low) % 2**encoding.modulus_bits) <= 1) <= 3
        assert abs(np.corrcoef(lanes, heard.update)[0, 1]) < 6 / np.sqrt(len(lanes))


# ---------------------------------------------------------------- a budget ends


def test_a_site_whose_budget_ends_stops_and_the_others_complete_the_study(
    five: dict[str, Path], tmp_path: Path
) -> None:
    """Its officer lowers the budget while the second round trains; what was spent stays spent, and no more is."""
    out, rounds = tmp_path / "run", 4

    def handle(site: str, at: str, number: int, serve: Callable[[], Message]) -> Message:
        if (site, at, number) == ("site-2", "masked_input", 2):
            policy = Policy.load(out / "sites" / site)
            lower = policy.data[0].model_copy(update={"epsilon": 5.0})
            policy.model_copy(update={"data": (lower,)}).save(out / "sites" / site)
        return serve()

    study = small_study(tmp_path / "s.toml", federation__rounds=rounds, federation__local_steps=STEPS)
    with between(handle):
        result = simulate_five(five, study, out)
    assert result.status == 0, result.err
    facts = RunRecord.load(out)
    assert (facts.status, facts.error, facts.rounds_completed) == ("completed", "", rounds)
    for site in facts.sites:
        stopped = site.name == "site-2"
        assert site.rounds == ([1] if stopped else [1, 2, 3, 4])
        assert steps_spent(out, site.name) == steps_charged(facts)[site.name] == STEPS * len(site.rounds)
        assert set(site.refusals) == ({"over_budget"} if stopped else set())
    assert "over_budget" in (out / "report.html").read_text()
    spent = json.loads(synthward("ledger", "show", out / "sites" / "site-2", "--json").out)["spent"]["epsilon"]
    assert 0 < spent <= 5.0


# ---------------------------------------------------------------- four of five die


@pytest.mark.parametrize("stage", STAGES)
def test_four_of_five_dead_ends_the_run_with_the_stage_and_it_resumes(
    stage: str, five: dict[str, Path], tmp_path: Path
) -> None:
    out, rounds = tmp_path / "run", 3

    def handle(site: str, at: str, number: int, serve: Callable[[], Message]) -> Message:
        if site != "site-5" and at == stage:
            raise ConnectionError("the site is gone")
        return serve()

    study = small_study(tmp_path / "s.toml", federation__rounds=rounds, federation__local_steps=STEPS)
    with between(handle):
        result = simulate_five(five, study, out)
    assert result.status == 4
    assert f"The secure sum of round 1 ended after {stage}:" in result.err
    assert "site-1: node_error" in result.err
    assert "Traceback" not in result.err
    failed = RunRecord.load(out)
    assert (failed.status, failed.error, failed.rounds_completed) == ("failed", "too_few_survivors", 0)
    assert "too_few_survivors" in (out / "report.html").read_text()
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["round-0000.pt"]
    spent = {site: steps_spent(out, site) for site in trained(out)}
    assert all(steps_charged(failed)[site] >= steps for site, steps in spent.items())

    result = synthward("simulate", "--resume", out)  # all are back
    assert result.status == 0, result.err
    facts = RunRecord.load(out)
    assert facts.status == "completed"
    # Both attempts were trained for nothing where all had trained: one of three rounds is left to spend.
    lost = stage in ("confirm_survivors", "unmask")
    assert (facts.error, facts.rounds_completed) == (("budget_exhausted", 1) if lost else ("", rounds))
    assert record.read_metrics(out)[0]["refused"] == {}
    assert facts.sites[0].rounds[0] == 1
    charged = steps_charged(facts)
    for site in SITES:
        assert steps_spent(out, site) <= charged[site] <= STEPS * rounds


def trained(out: Path) -> Sequence[str]:
    """The sites that have charged anything."""
    return sorted(path.parent.name for path in out.glob("sites/*/ledger.db") if open_ledger(path.parent).lines())


def test_secrets_of_a_round_do_not_outlive_a_completed_run(scene: Scene) -> None:
    """What is left after the last round are the keys of an attempt that never began, sealed, for their owner alone."""
    for site in SITES:
        (folder,) = (scene.out / "sites" / site / "studies").iterdir()
        sealed = folder / "secure-sum.sealed"
        if sealed.exists():
            assert sealed.stat().st_mode & 0o777 == 0o600
            with pytest.raises(ValueError):
                json.loads(sealed.read_bytes())
