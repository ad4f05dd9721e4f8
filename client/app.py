"""The site's Flower app: one short handler per message, and the only place that catches everything.

**Guarantee.** Nothing that derives from a patient leaves in an error: the reason goes to the site's log file, a bare
code goes to the server. (Flower would send the text of an exception along.)
"""

import logging
import sys
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.log import site_log
from client.settings import SiteSettings
from common import wire
from common.config import StudyConfig
from common.errors import INTERNAL, BadPeer, FederationError, SiteError
from common.messages import EnrolRequest, Refusal, Reply, TrainRequest

app = ClientApp()


@app.query("enrol")
def enrol(message: Message, context: Context) -> Message:
    """Check and prepare the site's data for the study, then say whether the site takes part."""
    return _answer(message, context, _enrol)


@app.train("local_round")
def local_round(message: Message, context: Context) -> Message:
    """Train one round on the site's patients."""
    return _answer(message, context, _local_round)


def _enrol(message: Message, study: StudyConfig, settings: SiteSettings) -> Reply:
    from client.enrolment import enrol

    request = wire.unpack(message.content)
    if not isinstance(request, EnrolRequest):
        raise BadPeer("Expected an enrol request, found another message.")
    _check_study(request.study_digest, study)
    return enrol(settings, study)


def _local_round(message: Message, study: StudyConfig, settings: SiteSettings) -> Reply:
    from client.enrolment import open_study
    from client.training import train_round

    request = wire.unpack(message.content)
    if not isinstance(request, TrainRequest):
        raise BadPeer("Expected a train request, found another message.")
    _check_study(request.study_digest, study)
    return train_round(open_study(settings, study), request)


def _answer(
    message: Message, context: Context, handle: Callable[[Message, StudyConfig, SiteSettings], Reply]
) -> Message:
    try:
        settings = _settings(context)
        with site_log(settings.folder) as log:
            reply = _guarded(
                lambda: handle(message, StudyConfig.from_run_config(dict(context.run_config)), settings), log
            )
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


def _check_study(digest: str, study: StudyConfig) -> None:
    if digest != study.digest:
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
    settings = SiteSettings.checked(
        name=name, data=data / name, folder=folder, device=str(context.run_config["run.device"])
    )
    settings.save()
    return settings
