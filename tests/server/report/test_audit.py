"""What a data protection officer reads of an audit in the report."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from common.audit.verdict import Verdict, no_release
from server.audit import AUDIT_FILE, sign_facts
from server.report import charts
from server.report.words import epsilon_text, probability_text, whole_text
from tests.server.report.audits import GENERATOR, ROOT, audited, failed, passed
from tests.server.report.runs import Page, make_run, save


def section(page: Page) -> str:
    """The text of the section."""
    return page.text.split("Audit: were patients memorised?")[1].split("How the sites' updates were combined")[0]


def test_a_run_that_was_not_audited_must_not_be_released(tmp_path: Path) -> None:
    save(tmp_path, make_run())
    page = Page.of(tmp_path)
    assert "were not audited for memorised patients. They must not be released." in section(page)
    assert "Audit of the images none must not be released" in page.text
    assert page.banners == {} and "PASS" not in page.text


def test_a_pass_is_a_banner_with_its_reasons_and_every_figure(tmp_path: Path) -> None:
    run = audited(tmp_path, passed())
    page = Page.of(tmp_path)
    paid = run.sites[0].audits
    assert paid is not None
    assert page.banners.keys() == {"good"}
    assert " ".join(page.banners["good"].split()) == (
        "PASS The audit found no sign that patients were memorised, within the limits below. "
        "Nobody is nearer than chance. At most 12 were memorised."
    )
    for expected in (
        "p = 0.34 : the probability",
        "PASS needs more than 0.01; 0.001 or less is FAIL",
        "at most 12 of 480 trained on, with 95 % confidence, counting those nearer than 0.25; allowed are 30",
        "24 memorised patients or more, with a probability of 85 %",
        "canaries: no leak seen (ε ≥ 0); patients: ε ≥ 1.25 . Certified: ε ≤ 10 at δ = 1e-5",
        "128 phantom patients, nobody's images: 64 trained on, of them 4 nearest to a synthetic image (highest bin); "
        "64 left out, of them 0",
        "Control clean , p = 0.61",
        "each of 480 patients trained on ε = 0.5, each of 120 held out ε = 2 (who pay for nothing else)",
        f"With training, at most ε = {epsilon_text(paid.spent_training)} and {epsilon_text(paid.spent_held_out)} "
        "at δ = 1e-5",
        "2,041 generated, 38 left out as near-duplicates of others, 2,003 audited . "
        "601 dropped by the sites' filter, 1,402 kept : only these may be released",
        "ε = 1.386 for each dropped image that shows a patient",
        "Fewer than 24 memorised patients",
        "-0.100 83 19 76.0 7.0 21.5 0.33",
        "0.250 -3 1 4.0 -7.0 7.2 -0.97",
        "20 70.0 40 98.0",
        "2031-05-06 07:08 UTC",
        GENERATOR,
        ROOT,
    ):
        assert expected in section(page), expected
    assert "Audit of the images PASS up to the limits below" in page.text
    assert "must not be released" not in page.text


def test_a_fail_cannot_be_overlooked(tmp_path: Path) -> None:
    audited(tmp_path, failed())
    page = Page.of(tmp_path)
    assert page.banners.keys() == {"bad"}
    assert page.banners["bad"].startswith("FAIL")
    assert "These images must not be released: they show too much of the patients" in page.banners["bad"]
    assert "Audit of the images FAIL must not be released" in page.text
    assert "p < 0.0001" in section(page) and "at most 52 of 480" in section(page)
    assert "ε ≥ 12" in section(page) and "None may be released" in section(page)
    over = [attributes for name, attributes in page.elements if name == "b" and attributes.get("class") == "over"]
    assert len(over) == 2  # the bound and the measured epsilon
    assert "only these may be released" not in page.text


@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        (passed(outcome="NO RELEASE", upper_bound=31.0), "allowed are 30"),
        (passed(outcome="NO RELEASE", control_p=0.0004), "Control failed , p = 0.0004"),
        (
            passed(outcome="NO RELEASE", minimum_detectable=None),
            "even 200 memorised patients would not have been found",
        ),
        (passed(outcome="NO RELEASE", epsilon_lower_canaries=None, canaries=()), "canaries: none to measure by"),
    ],
)
def test_no_release_says_why_and_what_failed(verdict: Verdict, words: str, tmp_path: Path) -> None:
    audited(tmp_path, verdict)
    page = Page.of(tmp_path)
    assert page.banners.keys() == {"warn"}
    assert "These images must not be released: the audit could not clear them." in page.banners["warn"]
    assert words in section(page)
    assert "Audit of the images NO RELEASE must not be released" in page.text


def test_no_verdict_on_anything_but_images_that_differ(tmp_path: Path) -> None:
    """All candidates are alike: there are no figures, and none is made up."""
    spent = {"training": 0.0, "held_out": 0.0}
    audited(tmp_path, no_release("The images are too alike."), candidates=None, spent=spent)
    page = Page.of(tmp_path)
    assert "NO RELEASE" in page.banners["warn"] and "The images are too alike." in page.banners["warn"]
    assert "No site was asked" in section(page) and "it cost nobody anything" in section(page)
    assert "p value" not in section(page) and "None" not in section(page)
    assert not [chart for chart in page.all("svg") if "patients" in chart.get("aria-label", "")]


def test_what_was_spent_stands_there_even_where_nothing_came_of_it(tmp_path: Path) -> None:
    audited(tmp_path, no_release("There are no held-out patients to compare with."))
    assert "It cost each patient trained on ε = 0.5 and each held out ε = 2 all the same" in section(Page.of(tmp_path))


def test_without_privacy_a_pass_is_no_permission(tmp_path: Path) -> None:
    audited(tmp_path, passed(certified_epsilon=None), private=False)
    text = section(Page.of(tmp_path))
    assert "This verdict alone is no reason to release anything of it" in text
    assert "Certified: nothing." in text and "With training, at most" not in text


# ---------------------------------------------------------------- a file that does not count


def changed(content: dict[str, Any], out: Path) -> str:
    content["verdict"]["outcome"] = "PASS"
    return json.dumps(content)


def of_another_run(content: dict[str, Any], out: Path) -> str:
    return json.dumps(sign_facts({**unsigned(content), "run": "00" * 16}, out))


def of_another_generator(content: dict[str, Any], out: Path) -> str:
    return json.dumps(sign_facts({**unsigned(content), "generator_digest": "00" * 32}, out))


def of_another_version(content: dict[str, Any], out: Path) -> str:
    facts = unsigned(content)
    del facts["verdict"]["outcome"]
    return json.dumps(sign_facts(facts, out))


def cut_short(content: dict[str, Any], out: Path) -> str:
    return json.dumps(content)[:-10]


def unsigned(content: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name not in ("key", "signature")}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (changed, "was changed after it was signed"),
        (of_another_run, "is about another run"),
        (of_another_generator, "is about another run, or about a generator that this run did not end with"),
        (of_another_version, "was written by another version"),
        (cut_short, "cannot be read"),
    ],
)
def test_a_verdict_that_cannot_be_trusted_is_none(spoil: Any, words: str, tmp_path: Path) -> None:
    audited(tmp_path, failed())
    path = tmp_path / AUDIT_FILE
    path.write_text(spoil(json.loads(path.read_text()), tmp_path))
    page = Page.of(tmp_path)
    assert words in page.banners["error"] and "No verdict" in page.banners["error"]
    assert "must not be released" in section(page)
    assert "Audit of the images none" in page.text and "PASS" not in page.text


def test_texts_of_a_verdict_cannot_become_part_of_the_page(tmp_path: Path) -> None:
    audited(tmp_path, passed(reasons=("<script>alert(1)</script>",)))
    page = Page.of(tmp_path)
    assert not page.all("script") and "<script>alert(1)</script>" in page.banners["good"]


# ---------------------------------------------------------------- figures


def bars(folder: Path, label: str) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """(top, bottom) of each bar in the chart of this label, and (lowest, highest) of each line of noise."""
    text = Page.of(folder) and (folder / "report.html").read_text()
    (svg,) = re.findall(rf'<svg[^>]*aria-label="{label}.*?</svg>', text, re.DOTALL)
    boxes = [dict(re.findall(r'(\w+)="([^"]+)"', box)) for box in re.findall(r"<rect[^>]*>", svg)]
    lines = [dict(re.findall(r'(\w+)="([^"]+)"', line)) for line in re.findall(r'<line class="spread"[^>]*>', svg)]
    return (
        [(float(box["y"]), float(box["y"]) + float(box["height"])) for box in boxes],
        [(float(line["y1"]), float(line["y2"])) for line in lines],
    )


def test_the_histogram_scales_the_held_out_patients_and_draws_the_noise_of_both(tmp_path: Path) -> None:
    audited(tmp_path, passed())
    boxes, noise = bars(tmp_path, "Bar chart: patients by score")
    assert "held out, times 4" in Page.of(tmp_path).text
    pixels = (boxes[0][1] - boxes[0][0]) / 401  # of one patient
    assert boxes[3][1] - boxes[3][0] == pytest.approx(4 * 102 * pixels, abs=0.3)  # 408 of 401: alike
    lengths = [low - high for low, high in noise]
    assert lengths[:3] == pytest.approx([2 * 1.96 * 2.8 * pixels] * 3, abs=0.3)
    assert lengths[3:] == pytest.approx([2 * 1.96 * 4 * 0.8 * pixels] * 3, abs=0.3)
    assert boxes[2][0] == pytest.approx(boxes[0][1], abs=0.2)  # -3 patients, because of the noise: below the floor


def test_the_excess_is_drawn_with_what_chance_makes_of_it(tmp_path: Path) -> None:
    audited(tmp_path, passed())
    boxes, noise = bars(tmp_path, "Bar chart: excess")
    floor = boxes[0][1]
    assert boxes[0][0] < floor and boxes[1] == pytest.approx((floor, floor + floor - boxes[0][0]), abs=0.3)  # 7, -7
    pixels = (floor - boxes[0][0]) / 7
    assert [low - high for low, high in noise] == pytest.approx([3.92 * 21.5 * pixels, 3.92 * 7.25 * pixels], rel=0.02)


def test_the_power_curve_has_its_target(tmp_path: Path) -> None:
    audited(tmp_path, passed())
    page = Page.of(tmp_path)
    assert "85 %" in page.text and "memorised patients" in page.text
    assert any("chance that memorised patients are found" in chart.get("aria-label", "") for chart in page.all("svg"))


@pytest.mark.parametrize(
    ("value", "text"), [(0.34159, "0.34"), (0.00016, "0.00016"), (2e-5, "below 0.0001"), (1.0, "1")]
)
def test_probabilities_are_short(value: float, text: str) -> None:
    assert probability_text(value) == text


@pytest.mark.parametrize(("value", "text"), [(11.2, "12"), (11.0, "11"), (12345, "12,345"), (0.0, "0")])
def test_bounds_on_people_are_rounded_up(value: float, text: str) -> None:
    assert whole_text(value) == text


def test_bars_side_by_side_stay_in_the_drawing() -> None:
    one = charts.Bars("a", [5.0, -2.0, 0.0], 0, [1.0, 30.0, 0.0])
    svg = charts.side_by_side([one, charts.Bars("b", [1, 2, 3], 1)], ["x", "", "z"], title="t", labels=("u", "v"))
    ys = [float(value) for value in re.findall(r'y[12]?="([-0-9.]+)"', svg.split("<ul")[0])]
    assert min(ys) >= 0 and max(ys) <= charts.HEIGHT
    assert svg.count('class="spread"') == 2 and svg.count('class="bar s0"') == 3 + 1
    assert [name in svg for name in (">x<", ">z<", ">u<", ">v<")] == [True] * 4
