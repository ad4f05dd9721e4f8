"""Shared states on disk, one file a round, so that a run goes on where it stopped and a generator can be used later."""

import io
from pathlib import Path

import torch

from common.errors import ConfigError
from common.files import write_atomically
from server.aggregation import GanState


def save(folder: Path, state: GanState, notice: str) -> Path:
    """Write the state as ``round-NNNN.pt`` into ``folder``, which is made when absent."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"round-{state.round:04d}.pt"
    write(path, state, notice)
    return path


def write(path: Path, state: GanState, notice: str) -> None:
    """Write the state as ``path``, atomically, with a notice that says how private it is."""
    content = {
        "notice": notice,
        "round": state.round,
        "generator": torch.from_numpy(state.generator),
        "discriminator": torch.from_numpy(state.discriminator),
        "generator_average": torch.from_numpy(state.generator_average),
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getvalue())


def load(path: Path) -> GanState:
    """Read one checkpoint. Raises ConfigError when it is not one."""
    return load_with_notice(path)[0]


def load_with_notice(path: Path) -> tuple[GanState, str]:
    """The checkpoint, and the notice of the run that made it. Raises ConfigError when it is not one."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        vectors = [content[key].numpy() for key in ("generator", "discriminator", "generator_average")]
        return GanState(int(content["round"]), *vectors), str(content["notice"])
    except Exception as error:  # torch raises many kinds for a file that is not a checkpoint
        raise ConfigError(f"{path} is not a checkpoint ({type(error).__name__}).", "Give a file of a run.") from None


def latest(folder: Path) -> GanState | None:
    """The newest checkpoint of a run, None when there is none."""
    paths = sorted(folder.glob("round-*.pt"), key=lambda path: int(path.stem.removeprefix("round-")))
    return load(paths[-1]) if paths else None
