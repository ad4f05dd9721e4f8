"""The power that the plan prints: it grows with copies, falls with noise, and is about what verdicts then find."""

import numpy as np
import pytest

from common.audit.counts import CountNoise
from common.audit.power import FOUND, NUMBERS, power_before
from common.audit.verdict import decide
from tests.common.audit.audit_counts import EDGES, NOISE, counts_of


def test_more_copies_are_found_more_often_and_noise_hides_them() -> None:
    quiet, loud = (
        power_before(CountNoise(epsilon, 2.0, 3, 2), 400, 100, 1, np.random.default_rng(0)) for epsilon in (2.0, 0.1)
    )
    for power in (quiet, loud):
        assert [number for number, _ in power.curve] == list(NUMBERS)
        found = [probability for _, probability in power.curve]
        assert found == sorted(found)
        assert 0 <= found[0] < 0.05
    assert all(less <= more + 0.02 for (_, more), (_, less) in zip(quiet.curve, loud.curve, strict=True))
    assert quiet.minimum_detectable is not None
    assert loud.minimum_detectable is None or loud.minimum_detectable > 2 * quiet.minimum_detectable


def test_the_minimum_is_where_the_curve_reaches_it() -> None:
    power = power_before(NOISE, 1600, 400, 1, np.random.default_rng(1))
    assert power.minimum_detectable is not None
    assert np.interp(power.minimum_detectable, *zip(*power.curve, strict=True)) >= FOUND - 0.01
    assert np.interp(power.minimum_detectable - 1, *zip(*power.curve, strict=True)) < FOUND + 0.01


def test_what_nobody_can_find_has_no_minimum() -> None:
    loud = CountNoise(0.01, 0.01, 3, 1)
    assert power_before(loud, 400, 100, 4, np.random.default_rng(0)).minimum_detectable is None


@pytest.mark.parametrize("share", [0.2, 0.3])
def test_the_plan_s_power_is_what_verdicts_find(share: float) -> None:
    rng = np.random.default_rng(5)
    training, held_out = round(2000 * (1 - share)), round(2000 * share)
    power = power_before(NOISE, training, held_out, 1, rng)
    copies = 30
    found = 0
    for _ in range(100):
        verdict = decide(
            counts_of(2000, rng, copies=copies, share=share),
            edges=EDGES,
            noise=NOISE,
            certified_epsilon=3.0,
            delta=1e-5,
            training_patients=training,
            held_out_patients=held_out,
            source=rng.bytes,
            simulations=1000,
            with_power=False,
        )
        assert verdict.p is not None
        found += verdict.p <= 0.01
    assert found / 100 == pytest.approx(dict(power.curve)[copies], abs=0.15)
