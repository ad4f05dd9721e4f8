"""MNIST, one site, one record a patient: how well a classifier does on real digits when it saw synthetic ones only.

One site has nobody to add its update to, so aggregation is plain.

    python -m deploy.bench.mnist MNIST.npz --epsilon 10 --out DIR      (--epsilon 0: without privacy)

MNIST.npz holds x_train, y_train, x_test, y_test. The whole product runs: pictures are written to a folder, ``synthward
simulate --record-is-patient`` trains, images are drawn, a small network learns them and is tested on the real test set.
"""

import argparse
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn
from torch.nn.functional import cross_entropy

from common.config import StudyConfig
from server import checkpoints
from server.record import RunRecord
from server.synthesis import synthesize

NUM_SYNTHETIC = 20_000

STUDY = """name = "mnist"
[image]
size = 28
label_column = "label"
labels = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]
[gan]
latent_size = 64
generator_width = 16
"""
NOT_PRIVATE = """discriminator_width = 16
generator_learning_rate = 1e-3
discriminator_learning_rate = 1e-3
discriminator_steps_per_generator_step = 1
ema_decay = 0.999
[privacy]
enabled = false
sampling_probability = 0.00133
images_per_patient = 1
[federation]
aggregation = "plain"
minimum_sites = 1
rounds = 20
local_steps = 400
"""
PRIVATE = """discriminator_width = 8
generator_learning_rate = 1e-3
discriminator_learning_rate = 1e-3
discriminator_steps_per_generator_step = 3
ema_decay = 0.99
[privacy]
epsilon = {epsilon}
delta = 1e-6
sampling_probability = 0.008
images_per_patient = 1
[federation]
aggregation = "plain"
minimum_sites = 1
rounds = 20
local_steps = 100
"""


def main() -> None:
    """Run the benchmark and print one line of results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mnist", type=Path)
    parser.add_argument("--epsilon", type=float, default=10.0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    with np.load(options.mnist) as archive:
        digits = {name: archive[name] for name in ("x_train", "y_train", "x_test", "y_test")}
    folder = options.out / "pictures"
    if not folder.exists():
        write_pictures(folder, digits["x_train"], digits["y_train"])
    study_file = options.out / f"mnist-{options.epsilon:g}.toml"
    table = PRIVATE.format(epsilon=options.epsilon) if options.epsilon > 0 else NOT_PRIVATE
    study_file.write_text(STUDY + table)
    run_folder = options.out / f"run-{options.epsilon:g}"
    cpu_seconds = simulate(study_file, folder, run_folder)
    run = RunRecord.load(run_folder)
    study = StudyConfig.model_validate(run.study)
    state = checkpoints.latest(run_folder / "checkpoints")
    if state is None:
        sys.exit("the run left no checkpoint")
    labels = np.arange(NUM_SYNTHETIC, dtype=np.int64) % 10
    synthetic = synthesize(study, state.generator_average, labels, seed=1)
    accuracy = train_on_synthetic_test_on_real(synthetic.images, labels, digits["x_test"], digits["y_test"])
    site = run.sites[0]
    print(
        f"epsilon={site.epsilon} delta={site.delta} noise_multiplier={run.noise_multiplier} "
        f"steps={study.total_steps} accuracy={accuracy:.4f} cpu_seconds={cpu_seconds:.0f}"
    )


def write_pictures(folder: Path, images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> None:
    """One PNG an image and ``images.tsv``, which has no patient ids: MNIST has none."""
    folder.mkdir(parents=True)
    lines = ["filename\tlabel"]
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        Image.fromarray(image).save(folder / f"{number:05d}.png", compress_level=1)
        lines.append(f"{number:05d}.png\t{label}")
    (folder / "images.tsv").write_text("\n".join(lines) + "\n")


def simulate(study_file: Path, data: Path, out: Path) -> float:
    """The command itself, in this process. Returns CPU seconds."""
    from deploy.cli import main as synthward

    before = resource.getrusage(resource.RUSAGE_SELF)
    started = time.monotonic()
    try:
        synthward(["simulate", str(study_file), "--site", f"mnist={data}", "--record-is-patient", "--out", str(out)])
    except SystemExit as end:
        if end.code:
            raise
    after = resource.getrusage(resource.RUSAGE_SELF)
    print(f"wall {time.monotonic() - started:.0f} s", file=sys.stderr)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def train_on_synthetic_test_on_real(
    images: NDArray[np.float32], labels: NDArray[np.int64], real: NDArray[np.uint8], real_labels: NDArray[np.uint8]
) -> float:
    """Accuracy on the real test set of a small convolution network that saw synthetic images only, five epochs."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 49, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    inputs, targets = torch.from_numpy(images), torch.from_numpy(labels)
    for _ in range(5):
        for batch in torch.randperm(len(inputs)).split(128):
            optimizer.zero_grad()
            cross_entropy(network(inputs[batch]), targets[batch]).backward()
            optimizer.step()
    test = torch.from_numpy(real.astype(np.float32) / 127.5 - 1)[:, None]
    with torch.inference_mode():
        predicted = torch.cat([network(part) for part in test.split(500)]).argmax(dim=1)
    return float((predicted.numpy() == real_labels).mean())


if __name__ == "__main__":
    main()
