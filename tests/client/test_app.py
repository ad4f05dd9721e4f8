"""From Flower message to Flower message: phantom patients in, updates or bare codes out.

A marker is planted in every text that could name a patient; no byte of any reply may hold it.
"""

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Context, Message, RecordDict
from flwr.common.serde import message_to_proto
from flwr.supercore.task_identity import TaskIdentity

from client import app, enrolment, training
from client.accountant import open_ledger
from client.data import slices
from client.enrolled import HELD_OUT, PREPARED
from client.enrolment import open_study
from client.policy import Policy
from client.settings import SiteSettings
from client.simulated import allow, simulated_roster
from common import wire
from common.config import StudyConfig
from common.errors import (
    BadPeer,
    BudgetExhausted,
    ConfigError,
    LedgerError,
    OutOfOrder,
    OverBudget,
    PolicyError,
    PrivacyError,
    ProtocolError,
    SiteError,
    TooFewSurvivors,
)
from common.messages import Enrolment, EnrolRequest, LocalUpdate, Refusal, Reply, Request
from common.privacy.accounting import Budget, num_steps
from common.secagg.roster import make_roster
from common.study_signature import sign
from deploy.phantoms import write_bids
from tests.client import sites
from tests.client.secure_sites import allow_too
from tests.client.sites import request_of

MARKER = "Zebra4711"


def study_of(**federation: Any) -> StudyConfig:
    """The tiny study, its updates sent as they are."""
    return sites.study_of(federation={"aggregation": "plain", "minimum_sites": 1, **federation})


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("phantoms")
    write_bids(folder, sites=2, patients=12, seed=1, shape=(24, 24, 12))
    return folder


@pytest.fixture(autouse=True)
def flower() -> Iterator[None]:
    """Flower makes messages only inside a task."""
    before = {name: vars(TaskIdentity)[name] for name in ("_task_id", "_run_id", "_node_id")}
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    yield
    for name, value in before.items():
        setattr(TaskIdentity, name, value)


def site_at(folder: Path, phantoms: Path, name: str = "north", number: int = 1) -> Path:
    """A site's folder over its own copy of the phantom patients, whose folder names hold the marker."""
    data = folder / f"{MARKER}-{name}"
    shutil.copytree(phantoms / f"site-{number}", data)
    return site_with(folder / f"site-{name}", data, name)


def site_with(folder: Path, data: Path, name: str = "north") -> Path:
    """A site's folder whose policy allows the tiny study; others are allowed with ``allow_too``."""
    allow(SiteSettings(name=name, data=data, folder=folder, device="cpu"), study_of(), make_roster({name: bytes(32)}))
    return folder


def spent(site: Path, study: StudyConfig) -> int:
    """Steps in the site's ledger."""
    return num_steps(open_ledger(site).read().of_study(study.digest))


def ask(
    site: Path | None, study: StudyConfig, request: Request | RecordDict, node: dict[str, Any] | None = None
) -> tuple[Reply, bytes]:
    """The reply of the site's app, and all its bytes on the wire."""
    content = request if isinstance(request, RecordDict) else wire.pack(request)
    kind = "train.local_round" if isinstance(request, RecordDict) else wire.action(request)
    message = Message(content, 1, kind)
    message.metadata.__dict__["_message_id"] = "1"  # private to Flower: a SuperLink would set it
    config = {"site": str(site)} if site is not None else node or {}
    context = Context(run_id=1, node_id=1, node_config=config, state=RecordDict(), run_config=study.to_run_config())
    reply = app.app(message, context)
    assert not reply.has_error()
    return wire.unpack(reply.content), message_to_proto(reply).SerializeToString()  # type: ignore[return-value]


def log_of(site: Path) -> str:
    return (site / "site.log").read_text()


def test_a_site_enrols_and_trains_until_its_budget_is_spent(tmp_path: Path, phantoms: Path) -> None:
    study, site = study_of(), site_at(tmp_path, phantoms)
    enrolled, _ = ask(site, study, EnrolRequest(study.digest))
    assert isinstance(enrolled, Enrolment)
    assert (enrolled.site, enrolled.record_is_patient) == ("north", False)
    assert len(enrolled.holdout_commitment) == 64
    assert (enrolled.history, enrolled.last_attempt) == ((), 0)
    for round_number in (1, 2, 3):
        update, packed = ask(site, study, request_of(study, round_number, seed=round_number))
        assert isinstance(update, LocalUpdate)
        assert spent(site, study) == 2 * round_number
        assert np.isfinite(update.vector).all() and (update.vector != 0).any()
        assert MARKER.encode() not in packed
    refused, _ = ask(site, study, request_of(study, 3, seed=4))
    assert refused == Refusal("budget_exhausted")
    assert "6 steps" in log_of(site)
    refused, _ = ask(site, study, request_of(study, 4, seed=4))
    assert refused == Refusal("bad_peer")  # the study has three rounds
    again, _ = ask(site, study, EnrolRequest(study.digest))
    assert isinstance(again, Enrolment) and num_steps(again.history) == 6


def test_what_leaves_in_an_enrolment_does_not_depend_on_the_patients(tmp_path: Path, phantoms: Path) -> None:
    study, site = study_of(), site_at(tmp_path, phantoms)
    first, packed = ask(site, study, EnrolRequest(study.digest))
    assert MARKER.encode() not in packed
    data = SiteSettings.load(site).data
    shutil.rmtree(next(data.glob("sub-*")))
    second, _ = ask(site, study, EnrolRequest(study.digest))
    assert first == second


def test_training_uses_the_training_patients_only(tmp_path: Path, phantoms: Path) -> None:
    study, site = study_of(), site_at(tmp_path, phantoms)
    ask(site, study, EnrolRequest(study.digest))
    at = open_study(SiteSettings.load(site), study)
    held_out = slices.reopen(next((site / PREPARED).iterdir()), name=HELD_OUT)
    assert set(at.cohort.patient_ids).isdisjoint(held_out.patient_ids)
    assert len(at.cohort.patient_ids) + len(held_out.patient_ids) == 12
    assert at.num_patients == 8  # 11 by contract, 3 of them held out: 0.3 x 11 = 3.3


def test_a_site_that_never_enrolled_refuses_to_train(tmp_path: Path, phantoms: Path) -> None:
    study, site = study_of(), site_at(tmp_path, phantoms)
    refused, _ = ask(site, study, request_of(study))
    assert refused == Refusal("site")


@pytest.mark.parametrize(("study_says", "site_allows"), [("plain", False), ("secure", True), ("secure", False)])
def test_an_update_leaves_without_masks_only_when_study_and_site_say_so(
    study_says: str, site_allows: bool, tmp_path: Path, phantoms: Path
) -> None:
    study, folder = study_of(aggregation=study_says, minimum_sites=2), site_at(tmp_path, phantoms)
    roster = simulated_roster({"north": folder, "south": tmp_path / "site-south"})
    roster.save(folder / "roster.json")
    outputs = ("masked_updates", "plain_updates") if site_allows else ("masked_updates",)
    allow_too(folder, study, outputs=outputs, roster_digest=roster.digest)
    enrolled, _ = ask(folder, study, EnrolRequest(study.digest))
    assert isinstance(enrolled, Enrolment) if study_says == "secure" else enrolled == Refusal("policy")
    refused, _ = ask(folder, study, request_of(study))
    assert refused == Refusal("bad_peer" if study_says == "secure" else "site")
    assert spent(folder, study) == 0


def test_a_policy_that_is_narrowed_between_two_rounds_stops_the_site(tmp_path: Path, phantoms: Path) -> None:
    study, folder = study_of(), site_at(tmp_path, phantoms)
    ask(folder, study, EnrolRequest(study.digest))
    assert isinstance(ask(folder, study, request_of(study, 1))[0], LocalUpdate)
    policy = Policy.load(folder)
    policy.model_copy(update={"outputs": ("masked_updates",)}).save(folder)
    assert ask(folder, study, request_of(study, 2))[0] == Refusal("policy")
    policy.model_copy(update={"data": (policy.data[0].model_copy(update={"epsilon": 3.5}),)}).save(folder)
    assert ask(folder, study, request_of(study, 2))[0] == Refusal("over_budget")
    (folder / "policy.toml").unlink()
    for request in (request_of(study, 2), EnrolRequest(study.digest)):
        assert ask(folder, study, request)[0] == Refusal("policy")
    assert spent(folder, study) == 2
    policy.save(folder)
    assert isinstance(ask(folder, study, request_of(study, 2))[0], LocalUpdate)


def test_a_study_that_the_policy_does_not_list_is_refused_before_any_image_is_read(
    tmp_path: Path, phantoms: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, other = site_at(tmp_path, phantoms), study_of().with_changes("", seed=1)
    monkeypatch.setattr(enrolment, "prepare_data", raising(AssertionError("read the images")))
    assert ask(folder, other, EnrolRequest(other.digest))[0] == Refusal("policy")
    assert other.digest in log_of(folder)


def test_a_study_that_a_trusted_signer_has_signed_is_allowed_and_stays_so(tmp_path: Path, phantoms: Path) -> None:
    folder, other, signer = (
        site_at(tmp_path, phantoms),
        study_of().with_changes("", seed=1),
        Ed25519PrivateKey.generate(),
    )
    public = signer.public_key().public_bytes_raw().hex()
    policy = Policy.load(folder)
    policy.model_copy(update={"study_signers": (public,)}).save(folder)
    signature = sign(signer, other.digest)
    for wrong in (
        b"",
        signature[:-1],
        sign(signer, study_of().digest),
        sign(Ed25519PrivateKey.generate(), other.digest),
    ):
        assert ask(folder, other, EnrolRequest(other.digest, "run", wrong))[0] == Refusal("policy")
    assert isinstance(ask(folder, other, EnrolRequest(other.digest, "run", signature))[0], Enrolment)
    assert isinstance(ask(folder, other, request_of(other))[0], LocalUpdate)
    policy.save(folder)  # the signer is no longer trusted
    assert ask(folder, other, request_of(other, 2))[0] == Refusal("policy")


def test_a_second_study_is_refused_when_both_do_not_fit_and_told_what_the_first_one_spent(
    tmp_path: Path, phantoms: Path
) -> None:
    first, second, folder = study_of(), study_of().with_changes("", seed=1), site_at(tmp_path, phantoms)
    ask(folder, first, EnrolRequest(first.digest, "run-1"))
    ask(folder, first, request_of(first, 1))
    allow_too(folder, second)  # with a budget of 100
    answer, _ = ask(folder, second, EnrolRequest(second.digest, "run-2"))
    assert isinstance(answer, Enrolment)
    assert (answer.history, num_steps(answer.earlier), answer.budget) == ((), 2, Budget(100.0, 1e-5))
    policy = Policy.load(folder)
    policy.model_copy(update={"data": (policy.data[0].model_copy(update={"epsilon": 5.0}),)}).save(folder)
    assert ask(folder, second, EnrolRequest(second.digest, "run-2"))[0] == Refusal("over_budget")
    assert isinstance(ask(folder, first, EnrolRequest(first.digest, "run-1"))[0], Enrolment)  # its own plan still fits
    (line,) = open_ledger(folder).lines()
    assert (line.run, line.round, line.study_name, line.folder) == (
        "run-1",
        1,
        "study",
        str(Policy.load(folder).data[0].folder),
    )


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    return fail


TEXT = f"{MARKER}: sub-{MARKER} in /data/{MARKER}.nii.gz, 17 patients"
ERRORS = [
    (SiteError(TEXT, TEXT), "site"),
    (PrivacyError(TEXT), "privacy"),
    (BudgetExhausted(TEXT), "budget_exhausted"),
    (OverBudget(TEXT), "over_budget"),
    (PolicyError(TEXT), "policy"),
    (LedgerError(TEXT), "ledger"),
    (ConfigError(TEXT), "config"),
    (BadPeer(TEXT), "bad_peer"),
    (TooFewSurvivors(TEXT), "too_few_survivors"),
    (OutOfOrder(TEXT), "out_of_order"),
    (ProtocolError(TEXT), "protocol"),
    (OSError(28, TEXT, f"/data/{MARKER}"), "internal"),
    (FileNotFoundError(2, TEXT, f"/data/{MARKER}"), "internal"),
    (KeyError(MARKER), "internal"),
    (ValueError(TEXT), "internal"),
    (RuntimeError(TEXT), "internal"),
    (MemoryError(TEXT), "internal"),
    (AssertionError(TEXT), "internal"),
    (UnicodeDecodeError("utf-8", MARKER.encode(), 0, 1, TEXT), "internal"),
    (ExceptionGroup(TEXT, [ValueError(TEXT)]), "internal"),
    (type(MARKER, (Exception,), {})(TEXT), "internal"),
]


@pytest.mark.parametrize(("error", "code"), ERRORS, ids=[type(error).__name__ for error, _ in ERRORS])
@pytest.mark.parametrize("handler", ["enrol", "train"])
def test_every_error_leaves_as_a_bare_code(
    error: BaseException, code: str, handler: str, tmp_path: Path, phantoms: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, site = study_of(), tmp_path / "site"
    site_with(site, tmp_path / MARKER)
    monkeypatch.setattr(enrolment, "enrol", raising(error))
    monkeypatch.setattr(enrolment, "open_study", raising(error))
    request = EnrolRequest(study.digest) if handler == "enrol" else request_of(study)
    reply, packed = ask(site, study, request)
    assert reply == Refusal(code)
    assert MARKER.encode() not in packed
    assert MARKER in log_of(site)  # the site's own engineer sees the reason


def test_an_error_within_training_leaves_as_a_bare_code(
    tmp_path: Path, phantoms: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, site = study_of(), site_at(tmp_path, phantoms)
    ask(site, study, EnrolRequest(study.digest))
    monkeypatch.setattr(training, "draw", raising(IndexError(TEXT)))
    reply, packed = ask(site, study, request_of(study))
    assert reply == Refusal("internal")
    assert MARKER.encode() not in packed
    assert spent(site, study) == 2


@pytest.mark.parametrize("message", ["enrol", "train"])
def test_a_message_of_another_study_is_refused(message: str, tmp_path: Path) -> None:
    study, site = study_of(), site_with(tmp_path / "site", tmp_path)
    other = study.with_changes("privacy", epsilon=6.0)
    reply, _ = ask(site, study, EnrolRequest(other.digest) if message == "enrol" else request_of(other))
    assert reply == Refusal("bad_peer")


def test_a_message_for_the_other_handler_or_malformed_is_refused(tmp_path: Path) -> None:
    study, site = study_of(), site_with(tmp_path / "site", tmp_path)
    for content in (wire.pack(EnrolRequest(study.digest)), wire.pack(Refusal("site")), RecordDict()):
        assert ask(site, study, content)[0] == Refusal("bad_peer")


def test_a_study_without_a_contract_for_the_site_is_refused(tmp_path: Path) -> None:
    study, site = study_of(), tmp_path / "site"
    site_with(site, tmp_path, "elsewhere")
    assert ask(site, study, EnrolRequest(study.digest))[0] == Refusal("config")


def test_too_few_patients_refuse_without_their_number(tmp_path: Path, phantoms: Path) -> None:
    study = study_of(minimum_patients=13)
    site = site_at(tmp_path, phantoms)
    allow_too(site, study)
    assert ask(site, study, EnrolRequest(study.digest))[0] == Refusal("site")
    assert "found 12" in log_of(site)


@pytest.mark.parametrize("content", [None, "name = ", f'name = "{MARKER} x"\ndata = "{MARKER}"'])
def test_a_missing_or_wrong_site_folder_is_refused(content: str | None, tmp_path: Path) -> None:
    site = tmp_path / MARKER
    if content is not None:
        site.mkdir()
        (site / "site.toml").write_text(content)
    study = study_of()
    reply, packed = ask(site, study, EnrolRequest(study.digest))
    assert reply == Refusal("site")
    assert MARKER.encode() not in packed


def test_a_node_without_a_site_is_refused() -> None:
    study = study_of()
    assert ask(None, study, EnrolRequest(study.digest))[0] == Refusal("site")


@pytest.mark.parametrize("obstacle", ["log", "settings", "simulation"])
def test_errors_before_and_outside_the_handler_leave_as_a_bare_code(
    obstacle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, site = study_of(), tmp_path / MARKER
    SiteSettings(name="elsewhere", data=tmp_path, folder=site, device="cpu").save()
    node: dict[str, Any] = {"site": str(site)}
    match obstacle:
        case "log":  # the disk is full or the log belongs to somebody else
            (site / "site.log").mkdir()
        case "settings":
            monkeypatch.setattr(SiteSettings, "load", raising(RuntimeError(TEXT)))
        case "simulation":  # a run configuration without run.sites
            node = {"partition-id": 0}
    try:
        reply, packed = ask(None, study, EnrolRequest(study.digest), node)
    except Exception as error:
        pytest.fail(f"{type(error).__name__} would reach the server with its text: {error}")
    assert isinstance(reply, Refusal)
    assert MARKER.encode() not in packed


def test_two_sites_in_two_threads_keep_their_logs_apart(tmp_path: Path, phantoms: Path) -> None:
    study = study_of()
    sites = {name: site_at(tmp_path, phantoms, name, number) for number, name in ((1, "north"), (2, "south"))}
    replies: dict[str, list[Reply]] = {name: [] for name in sites}

    def work(name: str) -> None:
        replies[name].append(ask(sites[name], study, EnrolRequest(study.digest))[0])
        replies[name].append(ask(sites[name], study, request_of(study))[0])
        replies[name].append(ask(sites[name], study, EnrolRequest("another"))[0])

    threads = [threading.Thread(target=work, args=(name,)) for name in sites]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, site in sites.items():
        assert [type(reply) for reply in replies[name]] == [Enrolment, LocalUpdate, Refusal]
        log = log_of(site)
        assert log.count("accepted 12 records") == 1
        assert log.count("round 1: 2 steps") == 1
        assert log.count("bad_peer") == 1
