"""The audit's score: who was copied, however disguised, and who was not."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from common.audit import score
from common.audit.images import normalise
from common.phantom.brain import draw_slices
from deploy.bench.audit_kinds import KINDS

Images = NDArray[np.uint8]


def _heads(count: int, seed: int) -> Images:
    drawn = draw_slices(np.random.default_rng(seed), count, 64, lesion=np.zeros(count, np.bool_))[:, 0]
    return np.rint((drawn + 1) * 127.5).astype(np.uint8)


FRESH, PATIENTS = _heads(40, 1), _heads(24, 2)


def _starts(*counts: int) -> NDArray[np.int64]:
    return np.cumsum([0, *counts])


def _compare(candidates: Images, images: Images, starts: NDArray[np.int64]) -> score.Comparison:
    prepared = score.prepare_candidates(candidates)
    return score.compare(prepared, score.self_similarity(prepared), images, starts)


def _planted(kinds: list[str], each: int) -> score.Comparison:
    """Every kind in so many patients of their own; the last ten patients are in none."""
    rng = np.random.default_rng(0)
    parts = [PATIENTS[k * each : (k + 1) * each] for k in range(len(kinds))]
    copies = [KINDS[kind](part, np.roll(PATIENTS[:each], 1, 0), rng) for kind, part in zip(kinds, parts, strict=True)]
    images = np.concatenate([*parts, PATIENTS[-10:]])
    return _compare(np.concatenate([FRESH, *copies]), images, _starts(*[1] * len(images)))


def test_copied_patients_stand_above_all_others() -> None:
    kinds = ["exact", "noise 0.10", "gamma", "blur 1", "flip left-right", "flip up-down", "rotation 5"]
    found = _planted(kinds, 2)
    assert found.scores[:14].min() > found.scores[14:].max()
    assert found.candidates[:14].tolist() == list(range(40, 54))


def test_disguised_patients_stand_above_most_others() -> None:
    found = _planted(["shift 2-4", "combined", "elastic 1", "mixture 0.7"], 3)
    assert (found.scores[:12] > found.scores[12:].max()).sum() >= 9


def test_an_exact_copy_is_of_similarity_one_and_says_which_images_they_are() -> None:
    # Three patients with 2, 1 and 3 images; candidate 4 is the last patient's second image.
    candidates = np.concatenate([FRESH[:4], PATIENTS[4:5], FRESH[4:9]])
    found = _compare(candidates, PATIENTS[:6], _starts(2, 1, 3))
    assert (found.images[2], found.candidates[2]) == (4, 4)
    assert found.sims[2] == pytest.approx(1, abs=0.02)
    assert found.nearest_patients[4] == 2 and found.second_sims[4] < 0.8 < found.nearest_sims[4]
    assert found.transforms[2].tolist() == [0, 1, 1, 0, 0]  # neither flipped, turned, zoomed nor moved


def test_the_aligned_image_lies_on_the_candidate() -> None:
    copy = np.roll(PATIENTS[:1, :, ::-1], (4, -2), (1, 2))
    found = _compare(np.concatenate([FRESH[:20], copy]), PATIENTS[:1], _starts(1))
    laid = score.aligned(PATIENTS[0], found.transforms[0])
    assert found.flips[0].tolist() == [False, True]
    assert np.corrcoef(laid.ravel(), normalise(copy)[0].ravel())[0, 1] > 0.99


def test_the_score_is_the_largest_similarity_less_the_candidates_own() -> None:
    prepared = score.prepare_candidates(FRESH[:8])
    c = score.self_similarity(prepared)
    found = score.compare(prepared, c, PATIENTS[:5], _starts(3, 2))
    np.testing.assert_allclose(found.scores, found.sims - c[found.candidates], atol=1e-6)
    # With fewer candidates than are compared, every one is: each image against all by hand.
    single = score.compare(prepared, np.zeros(8, np.float32), PATIENTS[:5], _starts(*[1] * 5))
    np.testing.assert_allclose(single.nearest_sims.max(), single.scores.max(), atol=1e-6)


def test_what_is_found_for_an_image_does_not_depend_on_the_others() -> None:
    prepared = score.prepare_candidates(FRESH)
    c = score.self_similarity(prepared)
    together = score.compare(prepared, c, PATIENTS[:9], _starts(*[1] * 9)).scores
    alone = [score.compare(prepared, c, PATIENTS[k : k + 1], _starts(1)).scores[0] for k in range(9)]
    np.testing.assert_allclose(together, alone, atol=1e-4)


def test_some_can_be_checked_without_the_rest() -> None:
    prepared = score.prepare_candidates(FRESH)
    some = np.array([17, 3, 39])
    np.testing.assert_allclose(score.self_similarity(prepared, some), score.self_similarity(prepared)[some], atol=1e-4)


def test_self_similarity_is_to_another() -> None:
    pair = np.concatenate([FRESH[:10], FRESH[3:4]])
    c = score.self_similarity(score.prepare_candidates(pair))
    assert c[3] == pytest.approx(1, abs=0.02) and c[10] == pytest.approx(1, abs=0.02)
    assert np.delete(c, [3, 10]).max() < 0.8


def test_two_candidates_are_few_enough() -> None:
    assert score.self_similarity(score.prepare_candidates(FRESH[:2])).shape == (2,)
    with pytest.raises(ValueError, match="make more"):
        score.self_similarity(score.prepare_candidates(FRESH[:1]))


def test_constant_images_are_like_nothing() -> None:
    flat = np.full((3, 64, 64), 90, np.uint8)
    prepared = score.prepare_candidates(np.concatenate([FRESH[:5], flat]))
    c = score.self_similarity(prepared)
    assert np.isfinite(c).all() and np.abs(c[5:]).max() < 0.01
    found = score.compare(prepared, c, np.concatenate([flat[:1], PATIENTS[:1]]), _starts(1, 1))
    assert abs(found.scores[0]) < 0.01 or found.scores[0] < 0
    assert np.isfinite(found.scores).all()


def test_near_duplicates_are_dropped_but_one_of_each() -> None:
    rng = np.random.default_rng(5)
    noisy = KINDS["noise 0.01"](FRESH[[2, 2, 7]], FRESH[:3], rng)
    prepared = score.prepare_candidates(np.concatenate([FRESH[:12], noisy]))
    dropped = score.near_duplicates(prepared, score.self_similarity(prepared))
    assert np.flatnonzero(dropped).tolist() == [12, 13, 14]
    kept = prepared.those(~dropped)
    assert not score.near_duplicates(kept, score.self_similarity(kept)).any()


def test_of_a_collapsed_generator_one_candidate_stays() -> None:
    prepared = score.prepare_candidates(np.repeat(FRESH[:1], 40, 0))
    assert (~score.near_duplicates(prepared, score.self_similarity(prepared))).sum() == 1


def test_those_that_stay_are_prepared_as_if_they_were_all() -> None:
    kept = np.arange(40) % 3 > 0
    some, anew = score.prepare_candidates(FRESH).those(kept), score.prepare_candidates(FRESH[kept])
    np.testing.assert_allclose(some.usual, anew.usual, atol=1e-6)
    np.testing.assert_allclose(some.fine, anew.fine, atol=1e-6)


def test_starts_must_fit_the_images() -> None:
    prepared = score.prepare_candidates(FRESH[:3])
    for starts in (_starts(2), _starts(2, 0, 1), np.array([1, 3])):
        with pytest.raises(ValueError, match="do not divide"):
            score.compare(prepared, np.zeros(3, np.float32), PATIENTS[:3], starts)


def test_progress_is_heard_and_threads_are_left_as_they_were() -> None:
    heard: list[tuple[int, int]] = []
    before = torch.get_num_threads()
    prepared = score.prepare_candidates(FRESH[:10], lambda done, total: heard.append((done, total)))
    score.self_similarity(prepared)
    assert heard[-1] == (10, 10) and torch.get_num_threads() == before


def test_volumes_are_compared_too() -> None:
    """Blobs at random places: a turned, dimmer copy of one volume is nearest to it alone."""
    rng = np.random.default_rng(4)
    grid = np.stack(np.meshgrid(*[np.arange(24)] * 3, indexing="ij"), -1)

    def blobs() -> Images:
        centres = rng.uniform(6, 18, (6, 3))
        return np.sum([90 * np.exp(-((grid - centre) ** 2).sum(-1) / 12) for centre in centres], 0).clip(0, 255)

    volumes = np.stack([blobs() for _ in range(8)]).astype(np.uint8)
    candidates = np.concatenate([volumes[:5], volumes[6:7, :, :, ::-1] // 2])
    found = _compare(candidates, volumes[5:], _starts(1, 1, 1))
    assert found.scores.argmax() == 1 and found.candidates[1] == 5 and found.flips[1].tolist() == [False, True]
