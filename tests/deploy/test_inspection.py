"""A hospital's own page of its closest pairs: what it shows, and that nothing of it gets out."""

import base64
import io
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from PIL import Image

from client import audit, audit_pairs, audit_plan
from client.audit_pairs import Pairs, load_pairs, save_pairs
from client.data import slices
from client.data.cohort import KEY_NAME
from client.data.slices import PreparedCohort
from client.enrolled import ENROLLED_FILE, HELD_OUT, PREPARED, TRAINING
from client.settings import SiteSettings
from client.simulated import allow, simulated_roster
from common import wire
from common.audit import score
from common.audit.plan import make_audit_plan, sign
from common.errors import SiteError
from common.files import write_atomically
from common.messages import (
    AdvertiseKeysRequest,
    AuditRequest,
    ConfirmStepRequest,
    ConfirmSurvivorsRequest,
    Enrolment,
    EnrolRequest,
    FilterRequest,
    JointRequest,
    LocalUpdate,
    MaskedInputRequest,
    MomentsRequest,
    OpenSeedsRequest,
    OpenStepRequest,
    PlanRegistered,
    Refusal,
    RegisterPlanRequest,
    Reply,
    Request,
    ShareKeysRequest,
    ShareSeedRequest,
    StepRequest,
    UnmaskRequest,
)
from deploy import inspection
from deploy.inspection import PAGE_FILE, inspect, moved_words, overlay, refined
from deploy.phantoms import write_bids
from tests.client.audited_sites import audited_study, phantoms, site_audit
from tests.client.secure_sites import flower_task, send
from tests.client.sites import request_of as train_request
from tests.deploy.command import synthward
from tests.server.report.runs import Page

AUDITED, NUM_CANDIDATES, COPIED = "5a" * 32, 60, 4
MARK = "Okapi2718"
"""In the id of every patient."""
STUDY = audited_study(
    federation={"contracted_patients": {"north": 40}, "aggregation": "plain", "minimum_sites": 1, "minimum_patients": 9}
)
STILL = np.array([0, 1, 1, 0, 0])
"""The transform that changes nothing."""
PLAN = sign(make_audit_plan(STUDY, ""), Ed25519PrivateKey.from_private_bytes(bytes(32)))


DIGEST = STUDY.digest
NOTHING = np.zeros(3, np.float32)
JOINT = JointRequest(DIGEST, 1, 1, NOTHING)
ASKED = (
    EnrolRequest(DIGEST),
    RegisterPlanRequest(DIGEST, PLAN.model_dump_json().encode()),
    train_request(STUDY),
    FilterRequest(DIGEST, STUDY.filter_round, AUDITED, NUM_CANDIDATES),
)
"""What a site answers here: it enrols, registers the plan, trains, and filters."""
REFUSED = (
    AuditRequest(
        DIGEST, STUDY.audit_round, PLAN.plan.digest, NOTHING, np.arange(2), np.zeros(2 * 28 * 28, np.uint8), NOTHING[:2]
    ),
    FilterRequest(DIGEST, STUDY.filter_round, AUDITED, NUM_CANDIDATES - 1),
    MomentsRequest(DIGEST, 1, NOTHING),
    JOINT,
    AdvertiseKeysRequest(DIGEST, 1, 1),
    ShareKeysRequest(DIGEST, 1, ()),
    MaskedInputRequest(1, ("north",), {}, ASKED[3]),
    ConfirmSurvivorsRequest(DIGEST, 1, ("north",)),
    UnmaskRequest(DIGEST, 1, {"north": b"x"}),
    ShareSeedRequest(DIGEST, 1, 1, 1, ()),
    StepRequest(1, ("north",), {}, JOINT),
    ConfirmStepRequest(DIGEST, 1, 1, ("north",)),
    OpenStepRequest(DIGEST, 1, 1, {"north": b"x"}),
    OpenSeedsRequest(DIGEST, 1, 1, ("north",), 1),
)
"""What it refuses: all that is left to ask."""


@dataclass(frozen=True)
class Inspected:
    """A site after an audit whose page was written, and every reply it gave, before the page and after."""

    folder: Path
    page: Path
    before: bytes
    after: bytes
    replies: tuple[Reply, ...]

    @property
    def study(self) -> Path:
        return self.page.parent.parent

    @property
    def pairs(self) -> Pairs:
        return load_pairs(self.study)

    def prepared(self, name: str) -> PreparedCohort:
        kept = json.loads((self.study / ENROLLED_FILE).read_bytes())["prepared"]
        return slices.reopen(self.folder / PREPARED / kept, name=name)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inspected]:
    """Enrolled, audited and inspected through the site's app and the user's command; asked everything again after."""
    root = tmp_path_factory.mktemp("inspected")
    (data,) = write_bids(root / "data", sites=1, patients=16, seed=3, shape=(24, 24, 12))
    mark_patients(data)
    folder = root / "north"
    folder.mkdir(mode=0o700)
    write_atomically(folder / KEY_NAME, bytes(range(32)), mode=0o600)  # it says which patients are held out
    settings = SiteSettings(name="north", data=data, folder=folder, device="cpu")
    allow(settings, STUDY, simulated_roster({"north": folder}))
    with flower_task():
        before = [send(folder, STUDY, wire.pack(each), wire.action(each)) for each in ASKED[:3]]
        keep_a_comparison(settings)
        before.append(send(folder, STUDY, wire.pack(ASKED[3]), wire.action(ASKED[3])))
        result = synthward("audit", "inspect", folder)
        assert result.status == 0, result.err
        after = [send(folder, STUDY, wire.pack(each), wire.action(each)) for each in (*ASKED, *REFUSED)]
    page = Path(result.out.splitlines()[0])
    yield Inspected(
        folder,
        page,
        b"".join(packed for _, packed in before),
        b"".join(packed for _, packed in after),
        tuple(reply for reply, _ in (*before, *after)),
    )


def keep_a_comparison(settings: SiteSettings) -> None:
    """What an audit of few candidates leaves at the site; an audit of the fewest allowed takes a minute."""
    at = audit.open_audit(settings, STUDY)
    own, random = np.asarray(at.training.images[:, 0], np.float64), np.random.default_rng(8)
    first, second = random.integers(len(own), size=(2, NUM_CANDIDATES))
    images = (0.6 * own[first] + 0.4 * own[second]).astype(np.uint8)  # somewhat like two patients
    images[COPIED] = own[2]
    candidates = score.prepare_candidates(images)
    nearest = score.self_similarity(candidates)
    parts = (at.training, at.held_out)
    training, held_out = (score.compare(candidates, nearest, part.images[:, 0], part.starts) for part in parts)
    closest = np.argsort(-training.scores, kind="stable")
    decoy = next(each for each in training.candidates[closest] if each != COPIED)
    shows = np.arange(NUM_CANDIDATES) == COPIED
    kept = Pairs(
        audit_digest=np.array(AUDITED),
        matched=shows,
        dropped=shows | (np.arange(NUM_CANDIDATES) == decoy),
        threshold=np.array(0.2),
        training_scores=training.scores,
        held_out_scores=held_out.scores,
        patients=closest,
        images=training.images[closest],
        candidates=training.candidates[closest],
        candidate_images=images[training.candidates[closest]],
        scores=training.scores[closest],
        sims=training.sims[closest],
        transforms=training.transforms[closest],
    )
    save_pairs(at.folder, kept)


def mark_patients(data: Path) -> None:
    """Give every patient a name that is easy to find."""
    table = data / "participants.tsv"
    names = [row.split("\t")[0] for row in table.read_text().splitlines()[1:]]
    for name in names:
        marked = name.replace("sub-", f"sub-{MARK}x")
        table.write_text(re.sub(rf"^{name}\b", marked, table.read_text(), flags=re.MULTILINE))
        for path in sorted((data / name).rglob(f"{name}*")):
            path.rename(path.with_name(path.name.replace(name, marked)))
        (data / name).rename(data / marked)


def pictures(page: str) -> list[np.ndarray]:
    """The page's pictures, pixels."""
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(each)))) for each in found]


# ---------------------------------------------------------------- what the page shows


def test_the_page_lies_in_the_studys_audit_folder_for_its_owners_eyes_only(site: Inspected) -> None:
    assert site.page == site.folder / "studies" / STUDY.digest[:16] / audit_pairs.FOLDER / PAGE_FILE
    assert site.page.stat().st_mode & 0o777 == 0o600
    assert site.page.parent.stat().st_mode & 0o077 == 0


def test_each_pair_has_the_patient_the_candidate_their_figures_and_what_becomes_of_it(site: Inspected) -> None:
    page, pairs, training = Page(site.page.read_text()), site.pairs, site.prepared(TRAINING)
    assert len(pairs.patients) == training.num_patients  # all of so few
    fates = set()
    for k in range(len(pairs.patients)):
        patient, candidate = int(pairs.patients[k]), int(pairs.candidates[k])
        above = int((pairs.held_out_scores >= pairs.scores[k]).sum())
        assert f"{k + 1}. Patient {training.patient_ids[patient]}, image" in page.text
        assert (
            f"Similarity {pairs.sims[k]:.3f} , score {pairs.scores[k]:.3f} ; "
            f"held out as high: {above} of {site.prepared(HELD_OUT).num_patients}"
        ) in page.text
        fate = (
            "dropped by this site as a decoy, for no reason" if pairs.dropped[candidate] else "not dropped by this site"
        )
        if pairs.matched[candidate]:
            fate = "dropped by this site: it shows one of its patients"
        fates.add(fate)
        shown = page.text.split(f" {k + 1}. Patient ")[1].split(" Patient laid over: ")[1]
        assert shown.split(f"Synthetic image {candidate}: ")[1].startswith(fate)
    assert len(fates) == 3 and MARK in page.text
    assert pairs.candidates[0] == COPIED and pairs.sims[0] > 0.99
    red = [text for text in page.all("span") if text.get("class") == "over"]
    assert len(red) == pairs.matched.sum() == 1


def test_the_pictures_are_those_that_were_compared(site: Inspected) -> None:
    shown, pairs, training = pictures(site.page.read_text()), site.pairs, site.prepared(TRAINING)
    assert len(shown) == 4 * len(pairs.patients)
    for k in range(len(pairs.patients)):
        patient, laid, _, _ = shown[4 * k : 4 * k + 4]
        pixels = np.asarray(training.images[pairs.images[k], 0])
        assert np.abs(patient - 255 * score.normalise(pixels[None])[0]).max() <= 0.51
        how = refined(pixels, pairs.candidate_images[k], pairs.transforms[k])
        assert np.abs(how - pairs.transforms[k]).tolist() <= [0, 0, 0, 2, 2]
        assert np.abs(laid - 255 * np.clip(score.aligned(pixels, how), 0, 1)).max() <= 0.51


def test_both_groups_are_in_the_histogram_and_nothing_is_fetched_or_run(site: Inspected) -> None:
    text = site.page.read_text()
    page = Page(text)
    assert f"trained on ({site.prepared(TRAINING).num_patients} patients)" in page.text
    assert f"held out ({site.prepared(HELD_OUT).num_patients} patients)" in page.text
    assert {"bar s0", "bar s1"} <= {box["class"] for box in page.all("rect")}
    assert "THIS PAGE SHOWS PATIENTS" in page.banners["bad"]
    (policy,) = (meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert not page.all("script") and not page.all("a") and not page.all("link")
    assert all(image["src"].startswith("data:") for image in page.all("img"))
    assert "http" not in text.replace("http-equiv", "")


def test_a_patients_name_cannot_become_part_of_the_page(site: Inspected, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(site.folder, tmp_path / "north"))
    for index in copy.glob(f"{PREPARED}/*/{TRAINING}.json"):
        index.write_text(index.read_text().replace(MARK, "<script>alert(1)</script>"))
    assert "<script" not in inspect(copy).read_text()


# ---------------------------------------------------------------- alignment


def warped(image: np.ndarray, degrees: float, rows: int, columns: int, mirrored: bool) -> np.ndarray:
    """Turned clockwise, moved down and to the right, then mirrored left to right, by another library."""
    turned = Image.fromarray(image).rotate(-degrees, Image.Resampling.BICUBIC)
    moved = np.asarray(turned.transform(turned.size, Image.Transform.AFFINE, (1, 0, -columns, 0, 1, -rows)))
    return moved[:, ::-1].copy() if mirrored else moved


@pytest.mark.parametrize("size", [32, 64, 96])
@pytest.mark.parametrize(
    ("degrees", "rows", "columns", "mirrored"),
    [(0, 4, -4, False), (0, -3, 2, True), (5, 2, -2, False), (-5, 2, -4, True), (-5, -4, 4, False), (3, 3, 0, True)],
)
def test_a_copy_that_was_turned_moved_and_mirrored_is_shown_aligned(
    size: int, degrees: float, rows: int, columns: int, mirrored: bool
) -> None:
    patient, *others = phantoms(12, seed=7, size=size)[:, 0]
    copy = warped(patient, degrees, rows * size // 64, columns * size // 64, mirrored)
    candidates = score.prepare_candidates(np.stack([*others, copy]))
    found = score.compare(candidates, score.self_similarity(candidates), patient[None], np.array([0, 1]))
    assert found.candidates[0] == len(others)
    aligned = overlay(patient, copy, refined(patient, copy, found.transforms[0]))
    as_it_is = overlay(patient, copy, STILL)
    stranger = overlay(patient, others[0], refined(patient, others[0], found.transforms[0]))
    assert np.corrcoef(aligned.laid.ravel(), aligned.candidate.ravel())[0, 1] > 0.95
    assert aligned.difference.mean() < 0.06
    assert aligned.difference.mean() < 0.5 * min(as_it_is.difference.mean(), stranger.difference.mean())


def test_brightness_and_contrast_are_fitted_and_what_differs_stands_out() -> None:
    patient = phantoms(1, seed=7, size=64)[0, 0]
    darker = (40 + 0.4 * patient.astype(np.float64)).astype(np.uint8)
    assert overlay(patient, darker, STILL).difference.max() < 0.05
    marked = patient.copy()
    marked[30:34, 30:34] = np.where(patient[30:34, 30:34] > 127, 0, 255)
    difference = overlay(patient, marked, STILL).difference
    assert difference[30:34, 30:34].min() > 0.3 and np.median(difference) < 0.05


def test_where_the_moved_image_does_not_reach_no_difference_is_claimed() -> None:
    everywhere = np.random.default_rng(1).integers(100, 256, (64, 64)).astype(np.uint8)
    found = overlay(everywhere, everywhere, np.array([0, 1, 1, 6, 0]))
    assert (found.candidate[-6:] > 0.1).mean() > 0.8  # something is there
    assert (found.difference[-6:] == 0).all() and (found.difference[:-6] > 0).mean() > 0.8


def blob(row: int, column: int) -> np.ndarray:
    image = np.zeros((64, 64), np.uint8)
    image[row - 3 : row + 4, column - 3 : column + 4] = 255
    return image


@pytest.mark.parametrize(
    ("transform", "words", "place"),
    [
        ((0, 1, 1, 0, 0), "as it is", (16, 44)),
        ((0, 1, 1, 6, 0), "moved 6 px up", (10, 44)),
        ((0, 1, 1, -6, 3), "moved 6 px down, moved 3 px left", (22, 41)),
        ((1, 1, 1, 0, 0), "mirrored left to right", (16, 19)),
        ((2, 1, 1, 0, 0), "turned upside down", (47, 44)),
        ((0, 0, 1, 0, 0), "turned 5° clockwise", (17.1, 45.3)),
        ((0, 2, 1, 0, 0), "turned 5° anticlockwise", (15, 42.6)),
        ((0, 1, 2, 0, 0), "scaled to 110 %", (14.5, 45.2)),
    ],
)
def test_the_words_say_what_was_done(transform: tuple[int, ...], words: str, place: tuple[float, float]) -> None:
    how = np.array(transform)
    laid = overlay(blob(16, 44), blob(16, 44), how).laid
    centre = [float((grid * laid).sum() / laid.sum()) for grid in np.indices(laid.shape)]
    assert moved_words(how) == words
    assert centre == pytest.approx(place, abs=0.5)


# ---------------------------------------------------------------- nothing leaves


def secrets_of(site: Inspected) -> dict[str, list[bytes]]:
    """What is on the page or in what it was made of, in the forms in which it could travel."""
    pairs = site.pairs
    found: dict[str, list[bytes]] = {"names": [MARK.encode(), MARK.lower().encode(), MARK.encode().hex().encode()]}
    found["file"] = [PAGE_FILE.encode(), audit_pairs.FILE_NAME.encode(), site.page.read_bytes()[2000:2100]]
    found["pictures"] = [b"iVBORw0KGgo", b"\x89PNG\r\n"]
    rows = []
    for k, image in enumerate(pairs.images):
        pixels = np.asarray(site.prepared(TRAINING).images[image, 0])
        laid = score.aligned(pixels, pairs.transforms[k])
        rows += [pixels[14, 6:22], pixels[14, 6:22].astype(np.float32), laid[32, 20:30]]
        rows += [np.round(255 * np.clip(laid[32, 16:40], 0, 1)).astype(np.uint8)]
    found["pixels"] = [row.tobytes() for row in rows if len(np.unique(row)) > 6]
    numbers = np.concatenate([pairs.training_scores, pairs.held_out_scores, pairs.scores, pairs.sims])
    found["scores"] = [np.array(value, kind).tobytes() for value in numbers for kind in (np.float32, np.float64)]
    found["scores"] += [f"{value:.5f}".encode() for value in numbers]
    return found


def test_the_search_finds_what_is_there(site: Inspected) -> None:
    """The control: all that is searched for lies in the site's own folder."""
    own = site.page.read_bytes() + b"".join(path.read_bytes() for path in site.folder.glob(f"{PREPARED}/*/*.npy"))
    own += b"".join(getattr(site.pairs, field.name).tobytes() for field in fields(Pairs))
    secrets = secrets_of(site)
    assert {name: any(piece in own for piece in pieces) for name, pieces in secrets.items()} == dict.fromkeys(
        secrets, True
    )
    assert len(secrets["pixels"]) > 20 and sum(piece in own for piece in secrets["scores"]) > 20


def test_no_reply_of_any_handler_holds_anything_of_the_page(site: Inspected) -> None:
    assert {type(each) for each in (*ASKED, *REFUSED)} == set(get_args(Request))  # every one is asked
    answers = {Enrolment, PlanRegistered, LocalUpdate}
    assert {type(reply) for reply in site.replies} == {*answers, Refusal}
    assert all(type(reply) in answers for reply in site.replies[: 2 * len(ASKED)])
    for name, pieces in secrets_of(site).items():
        assert [piece for piece in pieces if piece in site.before or piece in site.after] == [], name


def test_the_sites_answers_are_the_same_whether_or_not_it_looked(site: Inspected) -> None:
    before, after = site.replies[3], site.replies[7]
    assert isinstance(before, LocalUpdate) and isinstance(after, LocalUpdate)
    for answer in (before, after):
        assert np.array_equal(answer.vector != 0, site.pairs.dropped)


def test_only_the_filter_and_this_page_read_what_an_audit_has_kept() -> None:
    """No other code of a site, the server or both names it: what cannot be read cannot be sent."""
    root = Path(inspection.__file__).parents[1]
    readers, importers = set(), set()
    for path in (path for room in ("client", "common", "server", "deploy") for path in (root / room).rglob("*.py")):
        text, name = path.read_text(), str(path.relative_to(root))
        if re.search(r"\baudit_pairs\b|\bload_pairs\b|pairs\.npz", text):
            readers.add(name)
        if re.search(r"\binspection\b|closest-pairs", text):
            importers.add(name)
    assert readers == {"client/audit.py", "client/audit_pairs.py", "deploy/inspection.py"}
    assert importers == {"deploy/audit_commands.py", "deploy/inspection.py"}


def test_the_filters_numbers_follow_from_what_is_dropped_alone(
    site: Inspected, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replace every other array of what was kept: with the same random numbers the answer is the same."""
    at, kept = replace(site_audit(tmp_path, STUDY), plan=PLAN.plan), site.pairs
    question = ASKED[3]
    answers = []
    changed = {
        field.name: np.zeros_like(getattr(kept, field.name))
        for field in fields(Pairs)
        if field.name not in ("audit_digest", "dropped")
    }
    for pairs in (kept, replace(kept, **changed), replace(kept, dropped=~kept.dropped)):
        save_pairs(tmp_path, pairs)
        random = np.random.default_rng(5)
        monkeypatch.setattr(audit.secrets, "randbelow", lambda most, random=random: int(random.integers(most)))
        answers.append(audit.drop(at, question).vector)
    assert np.array_equal(answers[0], answers[1])
    assert not np.array_equal(answers[0], answers[2])


# ---------------------------------------------------------------- errors


def test_a_folder_that_is_no_sites_is_named(tmp_path: Path) -> None:
    result = synthward("audit", "inspect", tmp_path)
    assert result.status == SiteError.exit_status
    assert str(tmp_path / "site.toml") in result.err and "Traceback" not in result.err


def test_a_site_that_audited_nothing_says_so(tmp_path: Path) -> None:
    SiteSettings(name="north", data=tmp_path, folder=tmp_path / "north").save()
    result = synthward("audit", "inspect", tmp_path / "north")
    assert result.status == SiteError.exit_status
    assert "north has compared no synthetic images with its patients" in result.err
    assert not list((tmp_path / "north").rglob("*.html"))


def other_images(copy: Path) -> None:
    """Prepared anew from other data: as many patients, other pixels."""
    for path in copy.glob(f"{PREPARED}/*/{TRAINING}-*.npy"):
        np.save(path, np.load(path)[::-1])


def fewer_patients(copy: Path) -> None:
    pairs = load_pairs(next(copy.glob("studies/*")))
    save_pairs(next(copy.glob("studies/*")), replace(pairs, training_scores=pairs.training_scores[:-1]))


def gone(copy: Path) -> None:
    shutil.rmtree(copy / PREPARED)


def damaged(copy: Path) -> None:
    path = next(copy.glob(f"studies/*/{audit_pairs.FOLDER}/{audit_pairs.FILE_NAME}"))
    path.write_bytes(path.read_bytes()[:500])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (other_images, "no longer those that were audited"),
        (fewer_patients, "no longer those that were audited"),
        (gone, "no prepared images"),
        (damaged, "is damaged"),
    ],
)
def test_a_page_of_other_patients_than_those_compared_is_not_made(
    spoil: object, words: str, site: Inspected, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(site.folder, tmp_path / "north"))
    next(copy.glob(f"studies/*/*/{PAGE_FILE}")).unlink()
    spoil(copy)  # type: ignore[operator]
    with pytest.raises(SiteError, match=words):
        inspect(copy)
    assert not list(copy.rglob("*.html"))


def test_every_audited_study_has_its_page_and_the_newest_is_named_first(site: Inspected, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(site.folder, tmp_path / "north"))
    newest = copy / "studies" / STUDY.digest[:16]
    older = Path(shutil.copytree(newest, copy / "studies" / ("0" * 16)))
    (newest / audit_pairs.FOLDER / audit_pairs.FILE_NAME).touch()
    for page in copy.glob(f"studies/*/*/{PAGE_FILE}"):
        page.unlink()
    assert inspect(copy) == newest / audit_pairs.FOLDER / PAGE_FILE
    assert (older / audit_pairs.FOLDER / PAGE_FILE).exists()


def test_a_study_without_a_readable_plan_is_named(site: Inspected, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(site.folder, tmp_path / "north"))
    next(copy.glob(f"studies/*/{audit_plan.FILE_NAME}")).unlink()
    result = synthward("audit", "inspect", copy)
    assert result.status in (2, 3) and audit_plan.FILE_NAME in result.err
