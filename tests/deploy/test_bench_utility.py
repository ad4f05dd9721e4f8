"""The utility benchmark: measures by hand, cells that survive a kill, a table that never guesses."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from common.config import StudyConfig
from common.errors import ConfigError
from common.privacy.plan import check_delta, make_plan
from deploy.bench import measures, utility, utility_data, utility_report, utility_results
from deploy.bench.utility_cells import (
    BOTH,
    JOINT,
    LOCAL,
    MOMENTS,
    NOT_PRIVATE,
    OTHERS,
    TABLES,
    WARM_START,
    Cell,
    all_cells,
    contract_for,
    recipe,
    study_for,
)
from deploy.bench.utility_instrument import Lesson, kept_instrument, make_instrument
from deploy.bench.utility_results import Result
from deploy.bench.utility_training import train
from server.warm_start import warm_start

CPU = torch.device("cpu")
MEASURED = {"frechet": 1.0, "coverage": 0.5}


def column(*values: float) -> NDArray[np.float64]:
    return np.array(values, np.float64)[:, None]


def a_cell(**changes: object) -> Cell:
    facts = {"patients": 600, "epsilon": 8.0, "sites": 5, "algorithm": LOCAL, "seed": 0} | changes
    return Cell("phantoms", "phantoms", **facts)  # type: ignore[arg-type]


def a_result(cell: Cell, frechet: float = 1.0) -> Result:
    return Result(cell, recipe(cell), {"frechet": frechet}, {"training": 1.0}, {"machine": "here"})


class TestNeighbourhoods:
    def test_by_hand(self) -> None:
        # k = 1: the balls of the reals 0, 1, 10 have radii 1, 1, 9; those of the fakes 0.5, 3, 30 have 2.5, 2.5, 27.
        found = measures.neighbourhoods(column(0, 1, 10), column(0.5, 3, 30), k=1)
        assert found["precision"] == pytest.approx(2 / 3)  # 0.5 and 3; 30 is in none: |30 - 10| = 20
        assert found["recall"] == 1.0  # 0 and 1 lie within 2.5 of 0.5; 10 within 27 of 30
        # 0.5 lies in the balls of 0 and 1, and |0.5 - 10| = 9.5 is outside the third; 3 lies in the third's alone.
        assert found["density"] == pytest.approx(3 / 3)
        assert found["coverage"] == 1.0

    def test_a_set_covers_itself(self) -> None:
        points = np.random.default_rng(0).standard_normal((50, 3))
        found = measures.neighbourhoods(points, points)
        assert (found["precision"], found["recall"], found["coverage"]) == (1.0, 1.0, 1.0)

    def test_fewer_modes_lower_recall_and_coverage_but_not_precision(self) -> None:
        rng = np.random.default_rng(0)
        centres = np.array([[0.0, 0.0], [20.0, 0.0], [0.0, 20.0], [20.0, 20.0]])
        real = centres[np.arange(400) % 4] + rng.standard_normal((400, 2))
        all_modes = centres[np.arange(400) % 4] + rng.standard_normal((400, 2))
        one_mode = centres[0] + rng.standard_normal((400, 2))
        whole, collapsed = (measures.neighbourhoods(real, fake) for fake in (all_modes, one_mode))
        assert collapsed["precision"] > 0.9 < whole["precision"]
        assert whole["recall"] > 0.9 and whole["coverage"] > 0.9
        assert collapsed["recall"] < 0.3 and collapsed["coverage"] < 0.3

    def test_one_image_over_and_over_covers_next_to_nothing(self) -> None:
        real = np.random.default_rng(0).standard_normal((200, 2))
        found = measures.neighbourhoods(real, np.zeros((200, 2)))
        assert found["precision"] == 1.0
        assert found["recall"] == 0.0
        assert found["coverage"] < 0.2

    def test_odd_images_lower_precision_and_density(self) -> None:
        rng = np.random.default_rng(0)
        real, fake = rng.standard_normal((200, 2)), rng.standard_normal((200, 2))
        fake[:100] += 100
        found = measures.neighbourhoods(real, fake)
        assert found["precision"] < 0.55
        assert found["density"] < 0.6

    @given(shift=st.floats(-50, 50), scale=st.floats(0.1, 10), seed=st.integers(0, 2**16))
    def test_shares_stay_within_0_and_1_and_scale_does_not_matter(self, shift: float, scale: float, seed: int) -> None:
        rng = np.random.default_rng(seed)
        real, fake = rng.standard_normal((20, 2)), shift + scale * rng.standard_normal((30, 2))
        found = measures.neighbourhoods(real, fake)
        assert all(0 <= found[name] <= 1 for name in ("precision", "recall", "coverage"))
        assert found["density"] >= found["precision"] / measures.NEIGHBOURS
        assert measures.neighbourhoods(2 * real, 2 * fake) == found

    def test_too_few_images_are_refused(self) -> None:
        with pytest.raises(ValueError, match="more than 5"):
            measures.neighbourhoods(np.zeros((5, 2)), np.zeros((50, 2)))


class TestFrechet:
    def test_by_hand(self) -> None:
        # Covariances I and 4 I, means (0, 0) and (3, 0): 3^2 + 2 (1 - 2)^2.
        a = np.array([[-1.0, 0.0], [1.0, 0.0], [0.0, -1.0], [0.0, 1.0]]) * np.sqrt(1.5)  # covariance: identity
        assert measures.frechet(a, 2 * a + [3.0, 0.0]) == pytest.approx(9 + 2 * (1 - 2) ** 2)

    def test_images_of_one_kind_are_nearer_than_those_of_another(self) -> None:
        one, other = (utility_data.draw_patients(300, seed, 1, 32).images for seed in (1, 2))
        noise = np.random.default_rng(0).integers(256, size=one.shape).astype(np.uint8)
        seen = [measures.features(utility_data.to_floats(images)) for images in (one, other, noise)]
        assert measures.frechet(seen[0], seen[1]) < 0.1 * measures.frechet(seen[0], seen[2])

    def test_features_do_not_depend_on_who_else_is_measured(self) -> None:
        images = utility_data.to_floats(utility_data.draw_patients(20, 1, 1, 32).images)
        np.testing.assert_allclose(measures.features(images)[:3], measures.features(images[:3]), rtol=1e-4, atol=1e-5)


class TestInstrument:
    """Discs on either side, bright or dim: either may be the fact."""

    def discs(
        self, seed: int, count: int = 300, **same: float
    ) -> tuple[measures.Images, dict[str, NDArray[np.float64]]]:
        rng = np.random.default_rng(seed)
        drawn = {name: rng.integers(2, size=count).astype(float) for name in ("side", "bright")}
        drawn |= {name: np.full(count, value) for name, value in same.items()}
        rows, columns = np.mgrid[:16, :16]
        inside = (rows - 8) ** 2 + (columns - (4 + 7 * drawn["side"])[:, None, None]) ** 2 < 9
        level = (0.5 + 0.5 * drawn["bright"])[:, None, None]
        return (level * inside - 0.5 + 0.1 * rng.standard_normal((count, 16, 16)))[:, None].astype(np.float32), drawn

    def lesson(self, fact: str = "side") -> Lesson:
        images, drawn = self.discs(0, 2000)
        return Lesson(images, np.column_stack([drawn[fact], np.ones(2000)]).astype(np.float32))

    def test_it_sees_the_fact_it_learned_before_all_else(self) -> None:
        distance = {}
        for fact in ("side", "bright"):
            instrument = make_instrument(self.lesson(fact))
            here, same, one_side, one_level = (
                instrument.features(images)
                for images, _ in (self.discs(1), self.discs(2), self.discs(3, side=0), self.discs(4, bright=0))
            )
            assert here.shape == (300, 64)
            distance[fact] = [measures.frechet(here, other) for other in (same, one_side, one_level)]
        assert max(found[0] for found in distance.values()) < 0.05
        # How far away one side only is, in units of one level only: more for who learned the sides.
        side, bright = (found[1] / found[2] for found in (distance["side"], distance["bright"]))
        assert side > 1.4 * bright, distance

    def test_it_is_made_once_and_is_the_same_after(self, tmp_path: Path) -> None:
        made = []

        def lesson() -> Lesson:
            made.append(self.lesson())
            return made[-1]

        images, _ = self.discs(1)
        first, again = (kept_instrument(tmp_path, "discs", 16, lesson).features(images) for _ in range(2))
        other = kept_instrument(tmp_path, "others", 16, lesson).features(images)
        assert len(made) == 2  # one a name
        np.testing.assert_array_equal(first, again)
        np.testing.assert_array_equal(first, other)

    def test_phantoms_of_the_lesson_come_with_what_they_show(self) -> None:
        lesson = utility_data.draw_lesson(60, 5, 16)
        assert lesson.images.shape == (60, 1, 16, 16) and len(lesson.facts) == 60
        assert lesson.images.min() == -1 and lesson.images.max() == 1
        assert (lesson.facts.std(axis=0) > 0).all()


class TestDownstream:
    def discs(self, count: int, seed: int) -> tuple[measures.Images, measures.Labels]:
        """A disc on the left or on the right: equal grey levels, so no statistic tells them apart."""
        rng = np.random.default_rng(seed)
        labels = rng.integers(2, size=count)
        rows, columns = np.mgrid[:32, :32]
        centre = np.where(labels == 1, 22, 9) + rng.integers(-3, 4, count)
        inside = (rows - 16) ** 2 + (columns - centre[:, None, None]) ** 2 < 25
        noise = 0.1 * rng.standard_normal((count, 32, 32))
        return (inside - 0.5 + noise)[:, None].astype(np.float32), labels.astype(np.int64)

    def test_shapes_are_learned_and_are_no_shortcut(self) -> None:
        synthetic, real = self.discs(400, 0), self.discs(200, 1)
        assert measures.downstream_accuracy(*synthetic, *real, CPU, epochs=3) > 0.95
        assert measures.shortcut_accuracy(*synthetic, *real) < 0.65

    def test_labels_that_mean_nothing_teach_nothing(self) -> None:
        images, labels = self.discs(400, 0)
        shuffled = np.random.default_rng(2).permutation(labels)
        assert 0.3 < measures.downstream_accuracy(images, shuffled, *self.discs(200, 1), CPU, epochs=2) < 0.7

    def test_brightness_is_a_shortcut(self) -> None:
        rng = np.random.default_rng(0)
        labels = rng.integers(2, size=300)
        images = (0.2 * rng.standard_normal((300, 1, 8, 8)) + 0.3 * labels[:, None, None, None]).astype(np.float32)
        assert measures.shortcut_accuracy(images[:150], labels[:150], images[150:], labels[150:]) > 0.95

    def test_a_rare_class_counts_as_much_as_a_common_one(self) -> None:
        labels = np.array([0] * 9 + [1])
        assert measures.balanced_accuracy(np.zeros(10, np.int64), labels) == 0.5
        assert measures.balanced_accuracy(labels, labels) == 1.0

    def test_twelve_statistics_by_hand(self) -> None:
        [found] = measures.statistics(np.array([[[[-1.0, -1.0], [1.0, 1.0]]]], np.float32))
        assert len(found) == measures.NUM_STATISTICS
        assert found[:4] == pytest.approx([0, 1, 0, 1])  # mean, spread, skewness, kurtosis
        assert (found[7], found[11]) == pytest.approx((0, 0.5))  # median, share of black


class TestCells:
    def test_names_are_unique_and_every_study_is_valid(self) -> None:
        for table in TABLES:
            cells = list(all_cells(table, 2))
            assert len({cell.name for cell in cells}) == len(cells)
            assert len({recipe(cell) for cell in cells}) > 1

    @pytest.mark.parametrize("patients", [300, 600, 2000, 5000, 20000])
    @pytest.mark.parametrize("sites", [1, 5, 10])
    @pytest.mark.parametrize("algorithm", [LOCAL, JOINT, MOMENTS, BOTH])
    def test_a_study_trains_on_just_its_patients_and_suits_its_delta(
        self, patients: int, sites: int, algorithm: str
    ) -> None:
        cell = a_cell(patients=patients, sites=sites, algorithm=algorithm)
        study = study_for(cell, {f"site-{n}": patients // sites for n in range(sites)})
        assert sum(study.contracted_split(site)[0] for site in study.federation.contracted_patients) == patients
        for contracted in study.federation.contracted_patients.values():
            check_delta(study.privacy.delta, contracted)
        assert [phase.algorithm for phase in study.phases] == algorithm.split(" + ")

    def test_the_plan_is_within_epsilon(self) -> None:
        plan = make_plan(study_for(a_cell(algorithm=BOTH), {f"site-{n}": 120 for n in range(5)}))
        assert plan is not None and 7.9 < plan.epsilon <= 8

    @given(st.integers(1, 5000).filter(lambda count: not 105 <= count <= 119))
    def test_a_contract_gives_the_training_patients_asked_for(self, count: int) -> None:
        study = StudyConfig().with_changes("federation", contracted_patients={"site": contract_for(count)})
        assert study.contracted_split("site")[0] == count

    def test_without_privacy_is_one_cell_for_all_epsilons(self) -> None:
        cells = [cell for cell in all_cells("phantoms", 1) if cell.algorithm == NOT_PRIVATE]
        assert len(cells) == 5 * 3 and all(cell.epsilon is None for cell in cells)


class TestData:
    def test_any_number_of_sites_has_the_same_patients(self) -> None:
        pooled = []
        for sites in (1, 5, 10):
            data = utility_data.load(a_cell(patients=20, sites=sites), None)
            assert [site.num_patients for site in data.sites.values()] == [20 // sites] * sites
            images = np.concatenate([site.images for site in data.sites.values()])
            pooled.append(sorted(image.tobytes() for image in images))
        assert pooled[0] == pooled[1] == pooled[2]

    def test_hospitals_look_different_and_all_have_both_labels(self) -> None:
        data = utility_data.load(a_cell(patients=100, sites=5), None)
        means = [site.images.mean() for site in data.sites.values()]
        assert np.ptp(means) > 3
        assert all(set(site.label_indices.tolist()) == {0, 1} for site in data.sites.values())

    def test_records_are_dealt_and_the_test_set_is_as_given(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        x, y = rng.integers(256, size=(40, 28, 28)).astype(np.uint8), np.arange(40) % 10
        np.savez(tmp_path / "records.npz", x_train=x, y_train=y, x_test=x[:10], y_test=y[:10])
        cell = Cell("records", "mnist", 0, 1.0, 4, MOMENTS, 0)
        data = utility_data.load(cell, tmp_path / "records.npz")
        dealt = np.concatenate([site.images for site in data.sites.values()])
        assert sorted(image.tobytes() for image in dealt) == sorted(image.tobytes() for image in x)
        assert data.test.min() == pytest.approx(-1, abs=0.02) and data.test_labels.tolist() == y[:10].tolist()

    def test_chest_patients_are_on_one_side_only(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        for site, labels in (("a", ["No Finding", "Pneumonia"]), ("b", ["COVID-19"])):
            (tmp_path / site).mkdir()
            lines = ["filename\tpatient_id\tlabel"]
            for number in range(20):
                level = rng.integers(256, size=(64, 64)).astype(np.uint8)
                Image.fromarray(level).save(tmp_path / site / f"{number}.png")
                lines.append(f"{number}.png\t{site}{number // 2}\t{labels[number % len(labels)]}")
            (tmp_path / site / "images.tsv").write_text("\n".join(lines) + "\n")
        data = utility_data.load(Cell("real", "chest", 0, 8.0, 2, LOCAL, 0), tmp_path)
        assert {name: site.num_patients for name, site in data.sites.items()} == {"a": 7, "b": 7}
        assert len(data.test) == 12  # 3 of 10 patients with two images each, at two sites
        assert set(data.sites["b"].label_indices.tolist()) == {1}
        training = {image.tobytes() for site in data.sites.values() for image in utility_data.to_floats(site.images)}
        assert training.isdisjoint(image.tobytes() for image in data.test)

    def test_slices_of_a_subject_stay_together(self, tmp_path: Path) -> None:
        x = np.random.default_rng(0).integers(256, size=(60, 128, 128)).astype(np.uint8)
        subject = np.array([f"s{number // 3}" for number in range(60)])
        site = np.where(np.arange(60) < 30, "a", "b")
        z = np.arange(60) % 3
        np.savez(tmp_path / "t1.npz", x=x, z=z, subject=subject, site=site)
        data = utility_data.load(Cell("real", "t1", 0, 8.0, 2, LOCAL, 0), tmp_path / "t1.npz")
        assert [site.num_patients for site in data.sites.values()] == [7, 7]
        assert all(np.diff(site.starts).tolist() == [3] * 7 for site in data.sites.values())
        assert data.test.shape == (18, 1, 64, 64)

    def test_data_that_are_not_there_are_named(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="mnist"):
            utility_data.load(Cell("records", "mnist", 0, 1.0, 4, MOMENTS, 0), tmp_path / "none.npz")


class TestResults:
    def test_a_line_that_a_kill_cut_off_costs_itself_only(self, tmp_path: Path) -> None:
        first, second = a_cell(seed=0), a_cell(seed=1)
        utility_results.append(tmp_path, a_result(first))
        path = tmp_path / utility_results.FILE_NAME
        whole = path.read_bytes()
        path.write_bytes(whole + whole[: len(whole) // 2])
        utility_results.append(tmp_path, a_result(second))
        assert [result.cell for result in utility_results.read(tmp_path)] == [first, second]

    def test_results_come_back_as_they_were(self, tmp_path: Path) -> None:
        results = [a_result(a_cell(seed=seed)) for seed in range(3)]
        for result in results:
            utility_results.append(tmp_path, result)
        assert utility_results.read(tmp_path) == results


class TestReport:
    def test_mean_spread_and_what_is_missing(self, tmp_path: Path) -> None:
        values = {0: 1.0, 1: 2.0, 2: 3.0}
        for seed, value in values.items():
            utility_results.append(tmp_path, a_result(a_cell(seed=seed), value))
        references = [Cell("phantoms", "phantoms", 0, None, 0, name, 0) for name in (OTHERS, WARM_START)]
        once = [*references, a_cell(algorithm=MOMENTS), a_cell(algorithm=NOT_PRIVATE, epsilon=None)]
        for cell, value in zip(once, (0.1, 9.0, 0.5, 0.2), strict=True):
            utility_results.append(tmp_path, a_result(cell, value))
        text = utility_report.write_report(tmp_path, seeds=3)
        [line] = [line for line in text.splitlines() if line.startswith("| 600 | 8 | 5 |")]
        entries = [entry.strip() for entry in line.strip("|").split("|")]
        assert entries[3:5] == ["0.10 (1 of 3)", "9.00 (1 of 3)"]  # other patients and warm start, on every line
        assert entries[5:] == ["2.00 ± 1.00", "-", "0.50 (1 of 3)", "-", "0.20 (1 of 3)"]
        assert (tmp_path / utility_report.MARKDOWN).read_text() == text

    def test_a_result_of_other_settings_is_not_of_this_table(self, tmp_path: Path) -> None:
        cell = a_cell()
        utility_results.append(tmp_path, Result(cell, "other settings", MEASURED, {"training": 1.0}, {}))
        assert "1.00" not in utility_report.write_report(tmp_path, seeds=1)
        assert (cell, recipe(cell)) not in utility.finished(tmp_path)

    def test_the_page_shows_real_images_and_the_warm_start_beside_each_algorithm(self, tmp_path: Path) -> None:
        cells = [Cell("phantoms", "phantoms", 0, None, 0, name, 0) for name in (OTHERS, WARM_START)]
        cells += [a_cell(algorithm=name) for name in (LOCAL, MOMENTS)]
        cells += [a_cell(algorithm=NOT_PRIVATE, epsilon=None), a_cell(algorithm=MOMENTS, sites=1)]
        for number, cell in enumerate([None, *cells]):
            name = cell.name if cell else "phantoms,real"
            utility_report.write_grid(tmp_path, name, np.full((2, 2, 8, 8), number / 10, np.float32))
        for cell in cells:
            utility_results.append(tmp_path, a_result(cell))
        utility_report.write_report(tmp_path, seeds=1)
        page = (tmp_path / utility_report.PAGE).read_text()
        _, one_site, five_sites = page.split('<h3 class="next">')
        captions = [part.split("<")[0] for part in five_sites.split("<figcaption>")[1:]]
        assert one_site.startswith("600 patients, epsilon 8, 1 site<")
        assert captions == ["real", WARM_START, LOCAL, MOMENTS, NOT_PRIVATE]
        assert page.count("data:image/png;base64,") == 5 + 3


class TestTraining:
    @pytest.mark.parametrize(
        ("algorithm", "sites"),
        [
            (LOCAL, 2),
            (JOINT, 1),
            (JOINT, 2),
            (NOT_PRIVATE, 2),
            # The server's fit to the moments takes a minute, whatever the data.
            pytest.param(MOMENTS, 1, marks=pytest.mark.slow),
            pytest.param(BOTH, 2, marks=pytest.mark.slow),
        ],
    )
    def test_every_algorithm_goes_through_its_phases(self, algorithm: str, sites: int) -> None:
        epsilon = None if algorithm == NOT_PRIVATE else 8.0
        cell = a_cell(patients=40, sites=sites, algorithm=algorithm, epsilon=epsilon)
        data = utility_data.load(cell, None)
        whole = study_for(cell, {name: site.num_patients for name, site in data.sites.items()})
        short = [
            phase.model_dump() | ({} if phase.algorithm == "moments" else {"rounds": 2, "steps": 3})
            for phase in whole.phases
        ]
        study = whole.with_changes("federation", phase=short).with_changes("gan", warm_start="none")
        start = warm_start(study, CPU).state
        states = list(train(study, start, data.sites, CPU))
        assert len(states) == len(short)
        assert states[-1].round == sum(phase["rounds"] for phase in short)
        assert np.isfinite(states[-1].generator_average).all()
        assert not np.array_equal(states[-1].generator_average, start.generator_average)


def tiny_records(path: Path) -> Path:
    rng = np.random.default_rng(0)
    labels = np.arange(80) % 10
    images = np.clip(rng.normal(10 + 20 * labels[:, None, None], 8, (80, 28, 28)), 0, 255).astype(np.uint8)
    np.savez(path, x_train=images, y_train=labels, x_test=images[:40], y_test=labels[:40])
    return path


class TestCommand:
    def test_a_kill_costs_the_cell_in_hand_and_no_other(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        data, folder = tiny_records(tmp_path / "records.npz"), tmp_path / "results"
        path = folder / utility_results.FILE_NAME
        options = ["--table", "records", "--results", str(folder), "--data", f"mnist={data}", "--seeds", "3"]
        others = [*options, "--only", "^mnist.*other"]
        killed = subprocess.Popen([sys.executable, "-m", "deploy.bench.utility", *others], stderr=subprocess.DEVNULL)
        while not (path.exists() and b"\n" in path.read_bytes()) and killed.poll() is None:
            time.sleep(0.005)
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait()
        before = path.read_text().splitlines()
        assert 1 <= len(before) < 3
        utility.main(others)
        lines = path.read_text().splitlines()
        assert lines[: len(before)] == before
        assert [json.loads(line)["cell"]["seed"] for line in lines] == [0, 1, 2]
        assert "| all | 1 | 1 |" in capsys.readouterr().out

        utility.main([*options, "--only", "^mnist.*seed=0", "--list"])
        states = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
        assert states == ["done"] + ["missing"] * (len(states) - 1) and len(states) > 1

    def test_cells_without_their_data_are_not_run_and_said(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit, match="1 cells failed"):
            utility.main(["--table", "records", "--only", "^mnist.*other", "--seeds", "1", "--results", str(tmp_path)])
        assert "no --data mnist=PATH" in capsys.readouterr().err
        assert utility_results.read(tmp_path) == []
