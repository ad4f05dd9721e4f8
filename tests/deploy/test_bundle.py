"""What `flwr run` sends to the sites: the three rooms and nothing else."""

import io
import shutil
import subprocess
import sys
import tomllib
import warnings
import zipfile
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk

from common.config import StudyConfig

REPOSITORY = Path(__file__).parents[2]
ROOMS = ("server", "client", "common")
MOST_BYTES = 10 * 1024 * 1024


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built by Flower from a copy of the tree in which data lie around."""
    tree = tmp_path_factory.mktemp("tree") / "synthward"
    tree.mkdir()
    for name in (*ROOMS, "deploy", "tests"):
        shutil.copytree(REPOSITORY / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(REPOSITORY / name, tree)
    for stray in ("README.md", "runs/demo/run.json", "client/patients.json", "common/notes.md", "data/participants.py"):
        (tree / stray).parent.mkdir(parents=True, exist_ok=True)
        (tree / stray).write_text("Jane Doe")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Flower's own pattern library
        return zipfile.ZipFile(io.BytesIO(build_fab_from_disk(tree)))


def test_it_holds_the_rooms_the_licence_and_the_description(bundle: zipfile.ZipFile) -> None:
    code = {path.relative_to(REPOSITORY).as_posix() for room in ROOMS for path in (REPOSITORY / room).rglob("*.py")}
    found = {name for name in bundle.namelist() if not name.startswith(".info/")}
    assert found == code | {"LICENSE", "pyproject.toml"}
    secure = ("encoding", "keys", "masks", "neighbours", "roster", "shares")
    assert {f"common/secagg/{name}.py" for name in secure} <= found
    assert {f"client/{name}.py" for name in ("identity", "round_file", "secagg", "secure_round", "updates")} <= found
    assert {f"server/{name}.py" for name in ("secagg", "secure_round")} <= found
    assert {name for name in bundle.namelist() if name.startswith(".info/")} <= {".info/CONTENT"}


def test_nothing_that_lay_around_travels(bundle: zipfile.ZipFile) -> None:
    for name in bundle.namelist():
        assert b"Jane Doe" not in bundle.read(name), name


def test_it_is_small(bundle: zipfile.ZipFile) -> None:
    assert sum(entry.file_size for entry in bundle.infolist()) < MOST_BYTES / 10


def test_the_app_starts_from_the_bundle_alone(bundle: zipfile.ZipFile, tmp_path: Path) -> None:
    bundle.extractall(tmp_path)
    code = """
import importlib.abc, importlib.metadata, pkgutil, sys

class NotInTheBundle(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("deploy", "tests"):
            raise ImportError(name + " is not in the bundle")

sys.meta_path.insert(0, NotInTheBundle())
sys.path.insert(0, ".")
import client, common, server
for room in (client, common, server):
    assert room.__file__.startswith(sys.argv[1]), room.__file__
    for module in pkgutil.walk_packages(room.__path__, room.__name__ + "."):
        __import__(module.name)
import client.app, server.app
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
assert isinstance(client.app.app, ClientApp) and isinstance(server.app.app, ServerApp)

real = importlib.metadata.version
def version(name):
    if name == "synthward":
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)
importlib.metadata.version = version
from server.record import versions
assert versions()["synthward"] == "bundle"
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_protocol_handlers_start_without_torch(bundle: zipfile.ZipFile, tmp_path: Path) -> None:
    """Every message is a new process in deployment: seconds and half a gigabyte for a yes or no."""
    bundle.extractall(tmp_path)
    code = "import sys; sys.path.insert(0, '.'); import client.app; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


SECURE_SUM = """
import sys
sys.path.insert(0, ".")
from pathlib import Path

import numpy as np
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from client import app, secure_round
from client.enrolled import Enrolled, data_settings, note_enrolled, open_accountant, read_enrolled
from client.identity import load_member
from client.policy import Policy
from client.settings import SiteSettings
from client.simulated import allow, simulated_roster
from common import wire
from common.config import StudyConfig
from client.updates import MadeUpdate
from common.messages import AdvertiseKeysRequest, TrainRequest
from common.secagg.keys import Attempt
from server.secagg import SecureSum, SumPlan, check_keys

TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
names = ("north", "south")
contract = {"federation": {"contracted_patients": dict.fromkeys(names, 40)}, "privacy": {"enabled": False}}
study = StudyConfig.model_validate(contract)
folders = {name: Path("sites", name).resolve() for name in names}
roster = simulated_roster(folders)
for name, folder in folders.items():
    settings = SiteSettings(name=name, data=folder / "images", folder=folder)
    allow(settings, study, roster)
    # As if its images had been checked.
    note_enrolled(settings, study, Enrolled("prepared", "run", "", data_settings(settings)))

def ask(name, request):
    message = Message(wire.pack(request), 1, wire.action(request))
    message.metadata.__dict__["_message_id"] = "1"
    context = Context(run_id=1, node_id=1, node_config={"site": str(folders[name])}, state=RecordDict(),
                      run_config=study.to_run_config())
    reply = wire.unpack(app.app(message, context).content)
    handled.append((wire.action(request), type(reply).__name__, "torch" in sys.modules, "opacus" in sys.modules))
    return reply

def mask(name, request):
    settings = SiteSettings.load(folders[name])
    member, folder = load_member(settings, Policy.load(settings.folder)), settings.study_folder(study.digest)
    enrolled = read_enrolled(settings, study)
    at = secure_round.SecureSite(study, member, folder, lambda: open_accountant(settings, study, enrolled))
    return secure_round.masked_input(at, request, lambda train: MadeUpdate(1, np.full(3, 0.25, np.float32), "update"))

handled = []
plan = SumPlan(Attempt(study.digest, 1), 1, 3, study.encoding, 2, roster.digest, roster.sites)
keys = {name: ask(name, AdvertiseKeysRequest(study.digest, 1, 1)) for name in names}
for name in names:
    check_keys(keys[name], name, plan)
total = SecureSum(plan, keys)
for name, request in total.share_keys_requests().items():
    total.take_sealed_shares(name, ask(name, request))
train = TrainRequest(study.digest, 1, np.zeros(2, np.float32), np.zeros(1, np.float32))
for name, request in total.masked_input_requests(train).items():
    total.take_masked_input(name, mask(name, request))
for name, request in total.confirm_requests().items():
    total.take_confirmation(name, ask(name, request))
for name, request in total.unmask_requests().items():
    total.take_unmask_shares(name, ask(name, request))
for line in sorted(set(handled)):
    print(*line)
print(total.result().round(3), "torch" in sys.modules, "opacus" in sys.modules)
"""


def test_a_whole_secure_sum_but_its_training_needs_no_torch(bundle: zipfile.ZipFile, tmp_path: Path) -> None:
    bundle.extractall(tmp_path)
    done = subprocess.run([sys.executable, "-c", SECURE_SUM], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "query.advertise_keys AdvertisedKeys False False",
        "query.confirm_survivors Confirmation False False",
        "query.share_keys SealedShares False False",
        "query.unmask UnmaskShares False False",
        "[0.5 0.5 0.5] False False",
    ]


def test_the_study_in_the_app_is_the_built_in_one_for_two_sites() -> None:
    app = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    flat = {}

    def flatten(prefix: str, value: object) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                flatten(f"{prefix}.{key}" if prefix else key, inner)
        else:
            flat[prefix] = value

    flatten("", app["config"])
    study = StudyConfig.from_run_config(flat)
    built_in = StudyConfig.from_toml(REPOSITORY / "deploy" / "examples" / "phantom.toml")
    contract = {"site-1": 40, "site-2": 40}
    assert study == built_in.with_changes("federation", contracted_patients=contract)
    # Flower lets `-c` change only keys that are there.
    assert {key for key in flat if key.startswith("study.")} == set(study.to_run_config())
    expected = {f"run.{key}" for key in ("out", "device", "resume", "audit", "sites", "study_signature")}
    assert {key for key in flat if key.startswith("run.")} == expected
