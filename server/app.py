"""The coordinator's Flower app: reads the run's configuration and hands over to the study's flow."""

import logging
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.config import StudyConfig
from common.errors import ConfigError

app = ServerApp()
logger = logging.getLogger("synthward.server")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the study in the run's configuration, or audit what it has made, and write its report.

    See ``server/study_run.py`` and ``server/audit.py``.
    """
    from server.audit import run_audit
    from server.flower_channel import FlowerChannel
    from server.report.page import write_report
    from server.study_run import run_study

    config = dict(context.run_config)
    out = Path(str(config["run.out"]))
    if not out.is_absolute():
        raise ConfigError(
            f"run.out must be an absolute path, found {out}: Flower runs the app in a folder of its own.",
            "Give it as in: flwr run . -c 'run.out=\"/home/me/runs/flwr\"'.",
        )
    study = StudyConfig.from_run_config(config)
    refused = dict(pair.split("=") for pair in str(config.get("run.refused_sites", "")).split(",") if pair)
    signature = _signature(str(config.get("run.study_signature", "")))
    device, resume = str(config["run.device"]), bool(config["run.resume"])
    channel = FlowerChannel(grid)
    try:
        if config.get("run.audit"):
            run_audit(study, channel, out, signature)
        else:
            run_study(study, channel, out, device, resume, refused, signature)
    except BaseException:
        _report_failure(out)
        raise
    write_report(out)


def _signature(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise ConfigError(
            "run.study_signature is no signature.", "Give what `synthward study sign` wrote into STUDY.toml.sig."
        ) from None


def _report_failure(out: Path) -> None:
    """A report of what there is; its own failure must not hide why the run failed."""
    from server.report.page import write_report

    try:
        if (out / "run.json").exists():
            write_report(out)
    except Exception as error:
        logger.error("the report could not be written: %s", error)
