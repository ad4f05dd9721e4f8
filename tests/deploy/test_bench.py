"""The benchmarks' own studies are valid; their results are measured by hand."""

from pathlib import Path

import pytest

from common.config import StudyConfig
from deploy.bench import mnist


@pytest.mark.parametrize("table", [mnist.PRIVATE.format(epsilon=10.0), mnist.NOT_PRIVATE], ids=["private", "not"])
def test_mnist_runs_with_its_one_site(table: str, tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text(mnist.STUDY + table)
    study = StudyConfig.from_toml(tmp_path / "study.toml")
    assert (study.federation.aggregation, study.federation.minimum_sites) == ("plain", 1)
    assert study.image.num_classes == 10
