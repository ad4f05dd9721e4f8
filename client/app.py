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

from client import secure_round, secure_session, updates
from client.accountant import SiteAccountant
from client.enrolled import open_accountant, read_enrolled
from client.identity import load_member
from client.log import site_log
from client.policy import Policy
from client.secure_round import SecureSite
from client.settings import SiteSettings
from client.simulated import allow, simulated_roster
from client.updates import MadeSum, MadeUpdate
from common import wire
from common.config import StudyConfig
from common.errors import INTERNAL, BadPeer, FederationError, SiteError
from common.messages import (
    AdvertiseKeysRequest,
    AuditRequest,
    ConfirmStepRequest,
    ConfirmSurvivorsRequest,
    EnrolRequest,
    FilterRequest,
    JointRequest,
    LocalUpdate,
    MaskedInputRequest,
    MomentsRequest,
    OpenSeedsRequest,
    OpenStepRequest,
    Refusal,
    RegisterPlanRequest,
    Reply,
    Request,
    ShareKeysRequest,
    ShareSeedRequest,
    StepRequest,
    TrainRequest,
    UnmaskRequest,
    Work,
)

app = ClientApp()
R = TypeVar("R", bound=Request)


@app.query("enrol")
def enrol(message: Message, context: Context) -> Message:
    """Check and prepare the site's data for the study, then say whether the site takes part."""
    return _answer(message, context, EnrolRequest, _enrol)


@app.query("register_plan")
def register_plan(message: Message, context: Context) -> Message:
    """Keep the plan by which the study's images will be audited."""
    return _answer(message, context, RegisterPlanRequest, _register_plan)


@app.train("local_round")
def local_round(message: Message, context: Context) -> Message:
    """Train one round and send the update as it is: only in a study and at a site that both allow it."""
    return _answer(message, context, TrainRequest, _in_the_clear(_make))


@app.train("moments")
def moments(message: Message, context: Context) -> Message:
    """Send the noisy sum of the patients' features as it is: only in a study and at a site that both allow it."""
    return _answer(message, context, MomentsRequest, _in_the_clear(_make))


@app.train("joint_step")
def joint_step(message: Message, context: Context) -> Message:
    """Send the noisy sum of a step's gradients as it is: only in a study and at a site that both allow it."""
    return _answer(message, context, JointRequest, _in_the_clear(_make_step))


@app.train("audit")
def audit(message: Message, context: Context) -> Message:
    """Send the noisy counts of an audit as they are: only in a study and at a site that both allow it."""
    return _answer(message, context, AuditRequest, _in_the_clear(_make))


@app.train("filter")
def filter_candidates(message: Message, context: Context) -> Message:
    """Send what drops candidates as it is: only in a study and at a site that both allow it."""
    return _answer(message, context, FilterRequest, _in_the_clear(_make))


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
    """Train one round, or sum the patients' features, and send the result masked."""
    return _answer(message, context, MaskedInputRequest, _masked_input)


@app.query("confirm_survivors")
def confirm_survivors(message: Message, context: Context) -> Message:
    """Sign the list of sites whose masked update came."""
    return _answer(message, context, ConfirmSurvivorsRequest, _secure(secure_round.confirm_survivors))


@app.query("unmask")
def unmask(message: Message, context: Context) -> Message:
    """Open the shares that unmask the sum."""
    return _answer(message, context, UnmaskRequest, _secure(secure_round.unmask))


@app.query("share_seed")
def share_seed(message: Message, context: Context) -> Message:
    """Deal shares of the seed of this site's masks for the many sums of a joint round."""
    return _answer(message, context, ShareSeedRequest, _secure(secure_session.share_seed))


@app.train("begin_step")
def begin_step(message: Message, context: Context) -> Message:
    """Draw a step's patients, and send the noisy sum of their gradients masked."""
    return _answer(message, context, StepRequest, _begin_step)


@app.query("confirm_step")
def confirm_step(message: Message, context: Context) -> Message:
    """Sign the list of sites whose masked step came."""
    return _answer(message, context, ConfirmStepRequest, _secure(secure_session.confirm_step))


@app.query("open_step")
def open_step(message: Message, context: Context) -> Message:
    """Open the keys that unmask the sum of a step."""
    return _answer(message, context, OpenStepRequest, _secure(secure_session.open_step))


@app.query("open_seeds")
def open_seeds(message: Message, context: Context) -> Message:
    """Open shares for sites that were gone before they opened a step."""
    return _answer(message, context, OpenSeedsRequest, _secure(secure_session.open_seeds))


def _enrol(request: EnrolRequest, study: StudyConfig, settings: SiteSettings) -> Reply:
    from client.enrolment import enrol

    return enrol(settings, study, request)


def _register_plan(request: RegisterPlanRequest, study: StudyConfig, settings: SiteSettings) -> Reply:
    from client import audit_plan
    from client.audit import pinned_roster

    accountant = open_accountant(settings, study, read_enrolled(settings, study))
    folder = settings.study_folder(study.digest)
    has_trained = bool(accountant.history) if accountant else (folder / updates.FILE_NAME).exists()
    roster = pinned_roster(settings, study)
    return audit_plan.register(folder, study, roster, request, has_trained=has_trained)


def _in_the_clear(
    make: Callable[[R, StudyConfig, SiteSettings], MadeUpdate | MadeSum],
) -> Callable[[R, StudyConfig, SiteSettings], Reply]:
    """This site's part of a sum as it is."""

    def handle(request: R, study: StudyConfig, settings: SiteSettings) -> Reply:
        if study.federation.aggregation != "plain":
            raise BadPeer("The server asked for an update without masks in a study that has them.", "Nothing was sent.")
        made = make(request, study, settings)  # asks the policy whether a plain update may leave
        return LocalUpdate(made.round, made.floats)

    return handle


def _masked_input(request: MaskedInputRequest, study: StudyConfig, settings: SiteSettings) -> Reply:
    return secure_round.masked_input(_secure_site(study, settings), request, lambda work: _make(work, study, settings))


def _begin_step(request: StepRequest, study: StudyConfig, settings: SiteSettings) -> Reply:
    return secure_session.step(_secure_site(study, settings), request, lambda work: _make_step(work, study, settings))


def _make(work: Work, study: StudyConfig, settings: SiteSettings) -> MadeUpdate | MadeSum:
    """This site's part of a sum."""
    from client import audit
    from client.enrolment import open_study
    from client.moments import release_moments
    from client.training import train_round

    match work:
        case TrainRequest():
            return train_round(open_study(settings, study), work)
        case MomentsRequest():
            return release_moments(open_study(settings, study), work)
        case AuditRequest():
            return audit.count(audit.open_audit(settings, study), work)
        case FilterRequest():
            return audit.drop(audit.open_audit(settings, study), work)


def _make_step(work: JointRequest, study: StudyConfig, settings: SiteSettings) -> MadeSum:
    """This site's part of a step's sum."""
    from client.enrolment import open_study
    from client.joint import joint_step

    return joint_step(open_study(settings, study), work)


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
