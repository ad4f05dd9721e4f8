"""The user's command, run in this process, and a study small enough for tests."""

import contextlib
import io
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

TINY = """
name = "tiny"
[image]
size = 28
label_column = "group"
labels = ["healthy", "lesion"]
[gan]
latent_size = 16
generator_width = 8
discriminator_width = 4
generator_batch_size = 8
warm_start = "phantom"
warm_start_steps = 10
[privacy]
epsilon = 8.0
sampling_probability = 0.25
images_per_patient = 2
[federation]
rounds = 2
local_steps = 3
minimum_sites = 2
minimum_patients = 20
"""

PLAIN: dict[str, Any] = {"federation__aggregation": "plain"}
"""Changes of a study whose sites send their updates as they are."""
ONE_SITE: dict[str, Any] = {**PLAIN, "federation__minimum_sites": 1}
"""Changes of a study that goes on when only one site is left; a secure sum needs two."""


@dataclass(frozen=True)
class Result:
    """What the user sees of one command."""

    status: int
    out: str
    err: str


def synthward(*arguments: object) -> Result:
    """Run ``synthward`` with these arguments."""
    from deploy.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as ended:
            status = int(ended.code or 0)
    return Result(status, out.getvalue(), err.getvalue())


def tiny_study(path: Path, **changes: Any) -> Path:
    """Write the tiny study with some keys changed, ``federation__rounds=1`` as an example."""
    tree = tomllib.loads(TINY)
    for key, value in changes.items():
        part, _, leaf = key.rpartition("__")
        (tree[part] if part else tree)[leaf] = value
    path.write_text(tomli_w.dumps(tree))
    return path


def phased_study(path: Path, **changes: Any) -> Path:
    """The tiny study with ``federation__phase`` in place of its rounds, and other keys changed."""
    tree = tomllib.loads(tiny_study(path, **changes).read_text())
    del tree["federation"]["rounds"], tree["federation"]["local_steps"]
    path.write_text(tomli_w.dumps(tree))
    return path
