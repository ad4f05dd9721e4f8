"""Sites on disk in a study with secure aggregation: folders, identities, a pinned roster; asked through the app."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.common.serde import message_to_proto
from flwr.supercore.task_identity import TaskIdentity

from client import app
from client.identity import load_member
from client.policy import Policy
from client.secure_round import SecureSite
from client.settings import SiteSettings
from client.simulated import allow, simulated_roster
from common import wire
from common.config import StudyConfig
from common.messages import (
    AdvertiseKeysRequest,
    ConfirmSurvivorsRequest,
    MaskedInputRequest,
    Reply,
    Request,
    ShareKeysRequest,
    UnmaskRequest,
)
from tests.client.sites import account_in, study_of

NAMES = ("east", "north", "south", "west")


def secure_study(names: Sequence[str] = NAMES, **tables: dict[str, Any]) -> StudyConfig:
    """The tiny study of three rounds with a contract for these sites."""
    federation = {"contracted_patients": dict.fromkeys(names, 11), "minimum_sites": 2, **tables.pop("federation", {})}
    tree = study_of().model_dump()
    tree["federation"] |= federation
    for name, changes in tables.items():
        tree[name] |= changes
    return StudyConfig.model_validate(tree)


def make_sites(
    folder: Path,
    names: Sequence[str] = NAMES,
    data: Mapping[str, Path] | None = None,
    study: StudyConfig | None = None,
) -> dict[str, Path]:
    """A folder a site with its key, policy, ledger and the consortium's roster; patients only where ``data`` says.

    Args:
        folder: where the sites' folders go.
        names: the sites.
        data: folders of images by site; the stages that train nobody need none.
        study: which the sites' policies allow; others need ``allow_too``.
    """
    folders = {name: folder / name for name in names}
    roster = simulated_roster(folders)
    for name, path in folders.items():
        images = (data or {}).get(name, folder / f"no-data-{name}")
        allow(SiteSettings(name=name, data=images, folder=path, device="cpu"), study or secure_study(names), roster)
    return folders


def allow_too(folder: Path, study: StudyConfig, **changes: Any) -> None:
    """Let a site's policy allow this study as well, whatever it asks, with further changes of the policy's keys."""
    policy = Policy.load(folder)
    policy.model_copy(
        update={
            "study_digests": (*policy.study_digests, study.digest),
            "outputs": ("masked_updates", "plain_updates"),
            "data": tuple(
                data.model_copy(update={"epsilon": 100.0, "public": not study.privacy.enabled}) for data in policy.data
            ),
            **changes,
        }
    ).save(folder)


def secure_site(folder: Path, study: StudyConfig) -> SecureSite:
    """The site as ``client/secure_round.py`` takes it."""
    settings = SiteSettings.load(folder)
    member = load_member(settings, Policy.load(folder))
    return SecureSite(study, member, settings.study_folder(study.digest), lambda: account_in(folder, study))


@contextmanager
def flower_task() -> Iterator[None]:
    """Flower makes messages only inside a task."""
    before = {name: vars(TaskIdentity)[name] for name in ("_task_id", "_run_id", "_node_id")}
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(TaskIdentity, name, value)


def send(site: Path, study: StudyConfig, content: RecordDict, action: str) -> tuple[Reply, bytes]:
    """The reply of the site's app to any record, and all its bytes on the wire."""
    message = Message(content, 1, action)
    message.metadata.__dict__["_message_id"] = "1"  # private to Flower: a SuperLink would set it
    config: dict[str, Any] = {"site": str(site)}
    context = Context(run_id=1, node_id=1, node_config=config, state=RecordDict(), run_config=study.to_run_config())
    reply = app.app(message, context)
    assert not reply.has_error()
    return wire.unpack(reply.content), message_to_proto(reply).SerializeToString()  # type: ignore[return-value]


def ask(site: Path, study: StudyConfig, request: Request) -> Reply:
    """The reply of the site's app to a request."""
    return send(site, study, wire.pack(request), wire.action(request))[0]


STAGE_OF: dict[type, str] = {
    AdvertiseKeysRequest: "advertise_keys",
    ShareKeysRequest: "share_keys",
    MaskedInputRequest: "masked_input",
    ConfirmSurvivorsRequest: "confirm_survivors",
    UnmaskRequest: "unmask",
}


def copy_of(folders: Mapping[str, Path], target: Path) -> dict[str, Path]:
    """The sites' folders as they are now, copied: they go on from here independently of the originals."""
    for name, path in folders.items():
        shutil.copytree(path, target / name)
    return {name: target / name for name in folders}
