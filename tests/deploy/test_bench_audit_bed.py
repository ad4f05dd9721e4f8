"""The audit's test bed: what its generators depend on, its noise and baselines by hand, and a memoriser end to end."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from common.audit.counts import TRAINING, CountNoise
from common.audit.verdict import NO_RELEASE, PASS
from common.privacy import gradient
from deploy.bench import audit_bed, audit_bed_release, audit_bed_training
from deploy.bench.audit_bed import Cell
from deploy.bench.audit_bed_images import COPIES, GENERATORS, Setting
from deploy.bench.audit_bed_release import Scored, baselines, distances, judge, score_patients, summary

FACTS = {"PASS": 3, "FAIL": 1, "NO RELEASE": 0, "p": 0.5, "upper_bound": 12.0, "seconds": 1.0}


def textures(count: int, seed: int) -> NDArray[np.uint8]:
    """Smooth random images, none like another."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal((count, 32, 32)), (0, 2, 2))
    return np.clip(127 + 60 * noise / noise.std((1, 2), keepdims=True), 0, 255).astype(np.uint8)


def a_setting(num_patients: int = 40, num_fresh: int = 60) -> Setting:
    people = list(textures(num_patients, 1)[:, None])
    training = np.arange(num_patients) % 5 > 0
    return Setting(textures(num_fresh, 2), people, training, 0.2, np.random.default_rng(3))


def scores_of(values: list[float]) -> Scored:
    edges = tuple(np.linspace(-0.4, 0.4, 7).tolist())
    return Scored(np.zeros((0, 2, 2), np.uint8), np.array(values, np.float32), edges)


class TestGenerators:
    @pytest.mark.parametrize("name", GENERATORS)
    def test_each_makes_as_many_images_as_there_are_fresh_ones(self, name: str) -> None:
        made = GENERATORS[name](a_setting(100, 120))
        assert made.candidates.shape == (120, 32, 32)
        assert made.candidates.dtype == np.uint8
        assert made.fixed.shape == (100,)

    @pytest.mark.parametrize("count", COPIES[:4])
    def test_copies_are_of_as_many_who_were_trained_on_and_nobody_else(self, count: int) -> None:
        at = a_setting()
        made = GENERATORS[f"fresh + {count} copies"](at)
        shown = np.array([(made.candidates == image[0]).all((1, 2)).any() for image in at.people])
        assert shown.sum() == count
        assert (shown == made.fixed).all()
        assert at.training[shown].all()

    @pytest.mark.parametrize("name", ["fresh patients", "blurry", "collapsed", "other contrast"])
    def test_what_depends_on_nobody_is_the_same_whoever_was_trained_on(self, name: str) -> None:
        first, second = a_setting(), a_setting()
        second = Setting(second.fresh, second.people, ~second.training, second.share, second.rng)
        assert not GENERATORS[name](first).fixed.any()
        assert (GENERATORS[name](a_setting()).candidates == GENERATORS[name](second).candidates).all()

    def test_the_dial_goes_from_copies_to_strangers(self) -> None:
        at = a_setting()
        flat = np.concatenate(at.people).reshape(40, -1)[at.training].astype(float)
        likeness = []
        for dial in (0.1, 0.5, 0.9):
            made = GENERATORS[f"bootstrap {dial:g}"](at).candidates.reshape(60, -1).astype(float)
            likeness.append(np.corrcoef(made, flat)[:60, 60:].max(1).mean())
        assert likeness[0] > 0.99
        assert likeness[0] > likeness[1] > likeness[2]


class TestReleases:
    def test_the_noise_is_that_of_three_sites(self) -> None:
        noise = audit_bed_release._noise(4000, 4, np.random.default_rng(0).bytes)  # (releases, groups, 1, bins)
        claimed = CountNoise(0.5, 2.0, 3, 2)
        for group in range(3):
            cells = noise[:, group].ravel()
            # 16000 cells; the variance of a discrete Laplace's estimate is below 6 times its square over 16000.
            assert cells.var() == pytest.approx(claimed.variance(group), rel=0.1)
            assert abs(cells.mean()) < 5 * np.sqrt(claimed.variance(group) / 16_000)
        assert TRAINING == 0

    def test_no_release_without_candidates_enough(self) -> None:
        found = score_patients(textures(20, 0), list(textures(5, 1)[:, None]), fewest=21)
        assert found.problem == "20 of 20 candidates differ"
        verdicts = judge(found, np.ones(5, bool), np.ones(5, bool), 0.2, 3, np.random.default_rng(0))
        assert [each.outcome for each in verdicts] == [NO_RELEASE] * 3
        assert summary(verdicts)["problem"] == found.problem

    def test_of_all_identical_candidates_one_is_left(self) -> None:
        found = score_patients(np.repeat(textures(1, 0), 20, 0), list(textures(5, 1)[:, None]), fewest=2)
        assert found.problem == "1 of 20 candidates differ"

    def test_everybody_remembered_is_never_passed_and_nobody_remembered_is(self) -> None:
        rng = np.random.default_rng(0)
        training = np.arange(500) % 5 > 0
        fixed = np.ones(500, bool)
        remembered = judge(scores_of([0.5 if each else 0.0 for each in training]), training, fixed, 0.2, 20, rng)
        nobody = judge(scores_of([0.0] * 500), training, ~fixed, 0.2, 20, rng)
        assert summary(remembered)[PASS] == 0
        assert summary(nobody)[PASS] >= 18

    def test_copies_are_found_from_images_on(self) -> None:
        """The thinnest whole: images to verdict. 60 of 160 copied among strangers."""
        people = list(textures(200, 1)[:, None])
        training = np.arange(200) % 5 > 0
        copied = np.flatnonzero(training)[:60]
        candidates = np.concatenate([textures(120, 2), np.concatenate([people[k] for k in copied])])
        found = score_patients(candidates, people, 100)
        fixed = np.isin(np.arange(200), copied)
        assert found.scores[fixed].min() > found.scores[~fixed].max()
        verdicts = judge(found, training, fixed, 0.2, 10, np.random.default_rng(0))
        assert summary(verdicts)[PASS] == 0


class TestBaselines:
    def test_by_hand(self) -> None:
        # Patients at 0, 100 (trained on), 50 (held out); candidates at 1 and 49, one pixel each but a second to differ.
        def image(value: int) -> NDArray[np.uint8]:
            return np.array([[[value, 0]]], np.uint8)

        people = [image(0), image(100), image(50)]
        between = distances(np.concatenate([image(1), image(49)]), people)
        assert between.nearest * 255 == pytest.approx(np.array([[1, 99, 49], [49, 51, 1]]), abs=0.1)
        found = baselines(between, np.array([True, True, False]))
        assert found["authenticity"] == (0.0, True)  # 1 < 100 and 49 < 100
        assert found["closest record"][0] == 0.5  # the first is nearer to one trained on, the second to the held-out

    def test_copies_of_all_are_seen_and_strangers_are_not(self) -> None:
        people = list(textures(60, 1)[:, None])
        member = np.arange(60) < 45
        of_all = baselines(distances(np.concatenate(people)[:45], people), member)
        of_none = baselines(distances(textures(45, 2), people), member)
        assert {name: flagged for name, (_, flagged) in of_all.items()} == dict.fromkeys(of_all, True)
        assert not of_none["Meehan"][1]
        assert not of_none["closest record"][1]


class TestBugs:
    @pytest.mark.parametrize("name", ["bug: no clipping", "bug: clipping per image", "bug: batch mean leaks"])
    def test_the_white_box_audit_flags_it(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        margin, bug = gradient.ROUNDING_MARGIN, audit_bed_training.BUGS[name]
        monkeypatch.setitem(audit_bed_training.BUGS, name, replace(bug, trials=2))
        assert "sensitivity" in audit_bed_training.white_box(name, 0, 1)["white_box"]
        assert gradient.ROUNDING_MARGIN == margin  # and is gone afterwards


class TestCells:
    def test_finished_cells_survive_a_line_that_is_cut_off(self, tmp_path: Path) -> None:
        first, second = Cell("phantoms", "blurry", 0), Cell("phantoms", "blurry", 1)
        audit_bed.append(tmp_path, first, FACTS)
        path = tmp_path / audit_bed.CELLS
        whole = path.read_bytes()
        path.write_bytes(whole + whole[: len(whole) // 2])
        audit_bed.append(tmp_path, second, FACTS)
        assert audit_bed.read(tmp_path) == {first: FACTS, second: FACTS}

    def test_another_recipe_is_not_of_this_table(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        audit_bed.append(tmp_path, Cell("phantoms", "blurry", 0), FACTS)
        monkeypatch.setattr(audit_bed, "RECIPE", audit_bed.RECIPE + 1)
        assert audit_bed.read(tmp_path) == {}

    def test_the_list_says_what_is_missing(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        audit_bed.append(tmp_path, Cell("phantoms", "blurry", 0), FACTS)
        audit_bed.main(["--results", str(tmp_path), "--list", "--only", "blurry"])
        listed = capsys.readouterr().out.splitlines()
        assert listed[0] == "done    phantoms,blurry,seed=0"
        assert listed[1].startswith("missing ")

    def test_the_table_adds_up_seeds(self) -> None:
        text = audit_bed.table({Cell("phantoms", "blurry", seed): FACTS for seed in range(2)})
        assert "| blurry | 2 | 6 | 2 | 0 | 0.500 | 12 |" in text

    def test_a_name_is_unique(self) -> None:
        names = [cell.name for cell in audit_bed.all_cells(2)]
        assert len(set(names)) == len(names)
        json.dumps(names)
