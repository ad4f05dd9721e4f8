import tomllib
from pathlib import Path
from typing import get_args

import pytest

from common.config import Algorithm, StudyConfig
from common.errors import INTERNAL, FederationError
from server.channel import MALFORMED, NO_ANSWER, NODE_ERROR
from server.enrolment import ENROLMENT_CHANGED, OTHER_ROSTER
from server.report import charts, words

COORDINATORS = (MALFORMED, NO_ANSWER, NODE_ERROR, ENROLMENT_CHANGED, OTHER_ROSTER)


@pytest.mark.parametrize(
    ("epsilon", "text"),
    [(0.0, "0.000"), (9.97, "9.970"), (9.9991, "10.000"), (10.0001, "10.001"), (2.5e-05, "0.001")],
)
def test_epsilon_is_rounded_up_and_only_when_needed(epsilon: float, text: str) -> None:
    assert words.epsilon_text(epsilon) == text
    assert float(text) >= epsilon


def codes(kind: type[FederationError]) -> set[str]:
    found = {kind.code} if hasattr(kind, "code") else set()
    return found.union(*(codes(below) for below in kind.__subclasses__()))


@pytest.mark.parametrize("code", sorted(codes(FederationError) | {INTERNAL, *COORDINATORS}))
def test_every_code_that_a_site_or_the_coordinator_gives_has_words(code: str) -> None:
    assert words.CODES[code] and words.code_words(code) != code


def test_an_unknown_code_is_read_as_it_is() -> None:
    assert words.code_words("odd_code") == "odd code"


def test_numbers_and_times() -> None:
    assert [words.number(value) for value in (1e-5, 0.25, 1.57563, 10.0)] == ["1e-5", "0.25", "1.576", "10"]
    times = [words.seconds_text(value) for value in (0, 0.43, 9.5, 59.6, 185, 7800)]
    assert times == ["0 s", "0.43 s", "9.5 s", "1 min 0 s", "3 min 5 s", "2 h 10 min"]


def test_the_factor_stays_readable() -> None:
    assert words.factor_text(1.0) == "2.718"
    assert words.factor_text(10.0) == "22,026"
    assert words.factor_text(1000.0) == "10^434.3"


def test_rounds_run_together() -> None:
    assert words.rounds_text({3, 1, 2, 6, 8, 9}) == "1–3, 6, 8–9"
    assert words.rounds_text(range(1, 40, 2), most=3) == "1, 3, 5, …"


def test_many_names_are_counted() -> None:
    names = [f"site-{number}" for number in range(1, 51)]
    assert words.names_text(names, everyone=True) == "site-1 … site-50 (50 sites)"
    assert words.names_text(names[:33], everyone=False) == "site-1, site-2 and 31 more"
    assert words.names_text(names[:3], everyone=False) == "site-1, site-2, site-3"


def test_the_study_reads_back_as_the_same_study(tmp_path: Path) -> None:
    study = StudyConfig(name="a.b-c").with_changes("federation", contracted_patients={"ward-7": 20, "plain": 30})
    study = study.with_changes("image", label_column="finding", labels=["a'b", 'c"d\\'])
    text = words.toml(study.model_dump(mode="json"))
    assert tomllib.loads(text)["privacy"]["delta"] == 1e-5
    (tmp_path / "study.toml").write_text(text)
    assert StudyConfig.from_toml(tmp_path / "study.toml") == study


@pytest.mark.parametrize(("low", "high"), [(0, 10), (0.0, 3e-7), (-4, 9), (1, 2), (0, 987654)])
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    found = charts.ticks(low, high, 5)
    assert 2 <= len(found) <= 6
    assert low <= found[0] and found[-1] <= high
    assert charts.ticks(1, 3, 8, whole=True) == [1, 2, 3]


def test_a_chart_puts_the_highest_value_on_top_and_time_to_the_right() -> None:
    series = [charts.Series("a", [(0, 0.0), (1, 5.0), (2, 10.0)], 0)]
    svg = charts.line_chart(series, title="t", y_label="y")
    points = svg.split('points="')[1].split('"')[0].split()
    xs, ys = zip(*((float(x), float(y)) for x, y in (point.split(",") for point in points)), strict=True)
    assert list(xs) == sorted(xs) and list(ys) == sorted(ys, reverse=True)
    assert (xs[0], xs[-1]) == (charts.LEFT, charts.WIDTH - charts.RIGHT)
    assert ys[0] == charts.HEIGHT - charts.BOTTOM and ys[-1] > charts.TOP
    assert ys[1] == pytest.approx((ys[0] + ys[2]) / 2)


@pytest.mark.parametrize(("count", "expected"), [(0, "0 rounds"), (1, "1 round"), (2, "2 rounds")])
def test_counts(count: int, expected: str) -> None:
    assert words.count_text(count, "round") == expected


def test_every_algorithm_has_words_and_a_later_one_its_name() -> None:
    assert set(words.ALGORITHMS) == set(get_args(Algorithm))
    assert words.algorithm_words("diffusion") == "diffusion"


def test_figures_of_rounds_read_as_words() -> None:
    assert words.fact_words("noise_share") == "noise in the sum"
    assert words.fact_words("a_new_figure") == "a new figure"
    assert [words.fact_text(value) for value in (0.123456, 12, "noise", 1e-7)] == ["0.1235", "12", "noise", "1e-7"]
