"""The coordinator's Flower app: reads the run's configuration and hands over to the study's flow."""

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.config import StudyConfig

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the study in the run's configuration and write its report. See ``server/study_run.py``."""
    from server.flower_channel import FlowerChannel
    from server.report.page import write_report
    from server.study_run import run_study

    config = dict(context.run_config)
    out = Path(str(config["run.out"]))
    study = StudyConfig.from_run_config(config)
    try:
        run_study(study, FlowerChannel(grid), out, str(config["run.device"]), bool(config["run.resume"]))
    finally:
        if (out / "run.json").exists():
            write_report(out)
