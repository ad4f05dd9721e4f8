"""The site's Flower app: one short handler per message, and the only place that catches everything.

**Guarantee.** Nothing that derives from a patient leaves in an error: the reason goes to the site's log file, a bare
code goes to the server. (Flower would send the text of an exception along.)
"""

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client import secure_round
from client.accountant import SiteAccountant
from client.enrolled import open_accountant, read_enrolled
from client.identity import load_member
from client.log import site_log
from client.policy import Policy
from client.secure_round import SecureSite
from client.settings import SiteSettings
from client.simulated import allow, simulated_roster
from client.updates import MadeUpdate
from common import wire
from common.config import StudyConfig
from common.errors import INTERNAL, BadPeer, FederationError, SiteError
from common.messages import (
    AdvertiseKeysRequest,
    ConfirmSurvivorsRequest,
    EnrolRequest,
    LocalUpdate,
    MaskedInputRequest,
    Refusal,
    Reply,
    Request,
    ShareKeysRequest,
    TrainRequest,
    UnmaskRequest,
)

app = ClientApp()
R = TypeVar("R", bound=Request)


@app.query("enrol")
def enrol(message: Message, context: Context) -> Message:
    """Check and prepare the site's data for the study, then say whether the site takes part."""
    return _answer(message, context, EnrolRequest, _enrol)


@app.train("local_round")
def local_round(message: Message, context: Context) -> Message:
    """Train one round and send the update as it is: only in a study and at a site that both allow it."""
    return _answer(message, context, TrainRequest, _local_round)


@app.query("advertise_keys")
def advertise_keys(message: Message, context: Context) -> Message:
    """Make fresh keys for an attempt at a secure sum."""
    return _answer(message, context, AdvertiseKeysRequest, _secure(secure_round.advertise_keys))


@app.query("share_keys")
def share_keys(message: Message, context: Context) -> Message:
    """Deal shares of this site's secrets to its neighbours."""
    return _answer(message, context, ShareKeysRequest, _secure(secure_round.share_keys))


@app.train("masked_input")
def masked_input(message: Message, context: Context) -> Message:
    """Train one round and send the update masked."""
    return _answer(message, context, MaskedInputRequest, _masked_input)


@app.query("confirm_survivors")
def confirm_survivors(message: Message, context: Context) -> Message:
    """Sign the list of sites whose masked update came."""
    return _answer(message, context, ConfirmSurvivorsRequest, _secure(secure_round.confirm_survivors))


@app.query("unmask")
def unmask(message: Message, context: Context) -> Message:
    """Open the shares that unmask the sum."""
    return _answer(message, context, UnmaskRequest, _secure(secure_round.unmask))


def _enrol(request: EnrolRequest, study: StudyConfig, settings: SiteSettings) -> Reply:
    from client.enrolment import enrol

    return enrol(settings, study, request)


def _local_round(request: TrainRequest, study: StudyConfig, settings: SiteSettings) -> Reply:
    from client.enrolment import open_study
    from client.training import train_round

    if study.federation.aggregation != "plain":
        raise BadPeer("The server asked for an update without masks in a study that has them.", "Nothing was sent.")
    made = train_round(open_study(settings, study), request)  # asks the policy whether a plain update may leave
    return LocalUpdate(made.round, made.vector)


def _masked_input(request: MaskedInputRequest, study: StudyConfig, settings: SiteSettings) -> Reply:
    def train(train_request: TrainRequest) -> MadeUpdate:
        from client.enrolment import open_study
        from client.training import train_round

        return train_round(open_study(settings, study), train_request)

    return secure_round.masked_input(_secure_site(study, settings), request, train)


def _secure(handle: Callable[[SecureSite, R], Reply]) -> Callable[[R, StudyConfig, SiteSettings], Reply]:
    """A step of the secure sum as a handler."""
    return lambda request, study, settings: handle(_secure_site(study, settings), request)


def _secure_site(study: StudyConfig, settings: SiteSettings) -> SecureSite:
    def accountant() -> SiteAccountant | None:
        return open_accountant(settings, study, read_enrolled(settings, study))

    member = load_member(settings, Policy.load(settings.folder))
    return SecureSite(study, member, settings.study_folder(study.digest), accountant)


def _answer(
    message: Message, context: Context, kind: type[R], handle: Callable[[R, StudyConfig, SiteSettings], Reply]
) -> Message:
    def answer() -> Reply:
        study, request = StudyConfig.from_run_config(dict(context.run_config)), wire.unpack(message.content)
        if not isinstance(request, kind):
            raise BadPeer(f"Expected a {kind.__name__}, found another message.")
        _check_study(request, study)
        return handle(request, study, settings)

    try:
        settings = _settings(context)
        with site_log(settings.folder) as log:
            reply = _guarded(answer, log)
        content = wire.pack(reply)
    except Exception as error:  # no settings or no log file: the console of the site's own process is left
        print(f"synthward: {error}", file=sys.stderr)
        content = wire.pack(Refusal(error.code if isinstance(error, FederationError) else INTERNAL))
    return Message(content, reply_to=message)


def _guarded(handle: Callable[[], Reply], log: logging.Logger) -> Reply:
    """The handler's reply, or a refusal whose reason stays in the log."""
    try:
        return handle()
    except FederationError as error:
        log.error("%s: %s", error.code, error)
        return Refusal(error.code)
    except Exception as error:
        log.exception("%s: %s", INTERNAL, type(error).__name__)
        return Refusal(INTERNAL)


def _check_study(request: Request, study: StudyConfig) -> None:
    if request.study_digest != study.digest:
        raise BadPeer("The message belongs to another study than the run's configuration.", "Start the run again.")


def _settings(context: Context) -> SiteSettings:
    """The site's settings: from its folder, which the node's configuration names."""
    if "site" in context.node_config:
        return SiteSettings.load(Path(str(context.node_config["site"])))
    if "partition-id" in context.node_config:
        return _simulated(context)
    raise SiteError("This node has no site folder.", "Start the node with --node-config \"site='FOLDER'\".")


def _simulated(context: Context) -> SiteSettings:
    """In Flower's own simulation the nodes have numbers only: node i is the i-th folder of images in ``run.sites``."""
    data = Path(str(context.run_config["run.sites"]))
    names = sorted(path.name for path in data.iterdir() if path.is_dir()) if data.is_dir() else []
    position = int(context.node_config["partition-id"])
    if position >= len(names):
        raise SiteError(f"Expected a folder of images for every simulated node in {data}, found {len(names)}.")
    name = names[position]
    folder = Path(str(context.run_config["run.out"])) / "sites" / name
    roster = simulated_roster({each: folder.parent / each for each in names})
    settings = SiteSettings.checked(
        name=name,
        data=data / name,
        folder=folder,
        device=str(context.run_config["run.device"]),
    )
    allow(settings, StudyConfig.from_run_config(dict(context.run_config)), roster)
    return settings
