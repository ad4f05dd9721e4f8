import base64
import hashlib
import json
import re
from pathlib import Path

import pytest

from common.errors import ConfigError
from server import record
from server.record import AuditsRecord, BudgetRecord, RunRecord
from server.report.page import write_report
from server.report.words import epsilon_text
from tests.server.report.runs import (
    STEPS,
    Page,
    line,
    make_phased_run,
    make_run,
    save,
    save_phased,
    spent,
    warm,
)


def test_the_figures_appear(tmp_path: Path) -> None:
    run = make_run()
    run.sites[1].refusals = {"no_answer": 7}
    run.refused_sites = {"west": "privacy"}
    run.refused_nodes = ["budget_exhausted"]
    save(tmp_path, run)
    page = Page.of(tmp_path)
    figure = epsilon_text(spent(3 * STEPS))
    for expected in (
        "pilot completed",
        f"north {figure} at 1e-5 (PRV) 30 steps, noise 2, q 0.25 3 of 3 160 40 none",
        "7 × no_answer , no answer in time",
        "and 2 that took no part",
        "west privacy training would break or exceed the guarantee",
        "name not known budget_exhausted the site has spent what the study planned for it",
        "Target ε = 10 at δ = 1e-5",
        "Add or remove one patient",
        "The coordinator saw sums only",
        f"at all 2 sites to ε = {epsilon_text(2 * spent(3 * STEPS))} at δ = 2e-5",
        "total 1 h 2 min",
        "the server's own work is 20.0 % of them",
        f"{run.study_digest} Device cpu",
        "contracted_patients] north = 200",
    ):
        assert expected in page.text, expected


def test_each_sites_budget_is_shown_with_what_was_spent_before_here_and_after(tmp_path: Path) -> None:
    run = make_run(("north", "south", "west"))
    for site, (before, budget) in zip(run.sites, ((1.2341, 8.0), (0.0, 4.0)), strict=False):
        site.budget = BudgetRecord(epsilon=budget, delta=1e-6, spent_before=before, spent_here=3.5, spent_after=4.2)
    save(tmp_path, run)
    page = Page.of(tmp_path)
    assert "north 1.235 3.500 4.200 8 1e-6" in page.text  # rounded up
    assert "south 0.000 3.500 4.200 4 1e-6" in page.text
    pair, all_three = epsilon_text(2 * spent(3 * STEPS)), epsilon_text(3 * spent(3 * STEPS))
    assert f"at two of them to ε = {pair} at most, at all 3 sites to ε = {all_three} at δ = 3e-5" in page.text


def test_without_budgets_there_is_no_table_of_them(tmp_path: Path) -> None:
    save(tmp_path, make_run())
    assert "The sites' budgets" not in Page.of(tmp_path).text


def test_what_the_audit_cost_stands_beside_the_training(tmp_path: Path) -> None:
    run = make_run()
    site = run.sites[0]
    site.audits = AuditsRecord(
        verdicts=2, epsilon_training=0.5, epsilon_held_out=2.0, spent_training=8.1234, spent_held_out=4.0
    )
    save(tmp_path, run)
    page = Page.of(tmp_path)
    assert "held out paid for the audit alone" in page.text and "north 2 0.5 8.124 2 4.000" in page.text
    assert f"north {epsilon_text(spent(3 * STEPS))} at 1e-5 (PRV)" in page.text  # the promise is training's as before
    assert "south 2" not in page.text


def test_without_an_audit_no_cost_of_one_is_shown(tmp_path: Path) -> None:
    save(tmp_path, make_run())
    assert "What the audit cost" not in Page.of(tmp_path).text


def test_secure_aggregation_is_told_as_sums_only(tmp_path: Path) -> None:
    save(tmp_path, make_run(("north", "south", "west")))
    page = Page.of(tmp_path)
    for expected in (
        "The coordinator saw sums only never one site's update",
        "Secure aggregation: the coordinator saw only sums.",
        "the sum over at least 2 sites",
        "each update was clipped and noised at its site before it was masked",
    ):
        assert expected in page.text, expected
    assert "plain" not in page.text.split("The whole study, as TOML")[0].lower()
    assert "subtract its own update" not in page.text


def test_two_sites_are_told_what_a_sum_of_two_shows_them(tmp_path: Path) -> None:
    save(tmp_path, make_run())
    assert "either of them can subtract its own update from the sum" in Page.of(tmp_path).text


@pytest.mark.parametrize("private", [True, False])
def test_plain_aggregation_is_unmissable(private: bool, tmp_path: Path) -> None:
    save(tmp_path, make_run(aggregation="plain", private=private))
    page = Page.of(tmp_path)
    assert 'The coordinator saw each site\'s update aggregation = "plain"' in page.text
    assert 'Plain (aggregation = "plain"): the coordinator saw each site\'s own update.' in page.text
    assert "sums only" not in page.text and "masked" not in page.text
    assert ("nothing kept the coordinator from reading patients' data" in page.text) is not private


def test_sums_without_privacy_are_not_called_safe(tmp_path: Path) -> None:
    save(tmp_path, make_run(private=False))
    page = Page.of(tmp_path)
    assert "The sums themselves have no protection" in page.text
    assert "The guarantee above does not rest on this" not in page.text


def test_a_way_of_combining_that_the_report_does_not_know_is_not_called_safe(tmp_path: Path) -> None:
    run = make_run()
    run.aggregation = "telepathy"
    save(tmp_path, run)
    page = Page.of(tmp_path)
    assert 'The coordinator saw not known aggregation = "telepathy"' in page.text
    assert "sums only" not in page.text and "saw only sums" not in page.text


@pytest.mark.parametrize("simulated", [True, False])
def test_a_simulation_does_not_claim_what_only_separate_machines_give(simulated: bool, tmp_path: Path) -> None:
    save(tmp_path, make_run())
    if simulated:
        (tmp_path / "sites" / "north").mkdir(parents=True)
        (tmp_path / "sites" / "north" / "data-check.json").write_text("{}")
    assert ("whoever has the machine it ran on can read" in Page.of(tmp_path).text) is simulated


def test_the_chart_draws_epsilon_of_every_round_and_the_target(tmp_path: Path) -> None:
    save(tmp_path, make_run())
    page = Page.of(tmp_path)
    row = " ".join(epsilon_text(value) for value in (0.0, spent(STEPS), spent(2 * STEPS), spent(3 * STEPS)))
    assert f"north, south {row}" in page.text
    assert "target ε = 10" in page.text
    lines = [curve["class"] for curve in page.all("polyline")]
    assert lines.count("line s0") == 4 and lines.count("line s1") == 2  # of s1 the second loss only: curves, then keys


def test_a_run_that_went_well_has_no_banner(tmp_path: Path) -> None:
    save(tmp_path, make_run())
    page = Page.of(tmp_path)
    assert page.banners == {}
    assert "NOT PRIVATE" not in page.text and "can repeat patients' images" not in page.text
    assert "Trained with differential privacy; the privacy unit is one patient." in page.text


def test_privacy_off_is_unmissable(tmp_path: Path) -> None:
    save(tmp_path, make_run(private=False))
    page = Page.of(tmp_path)
    assert list(page.banners) == ["bad"]
    assert "NOT PRIVATE" in page.banners["bad"]
    assert page.text.count("not private") == 2  # each site's row
    assert "a generator can repeat patients' images" in page.text
    assert not [
        text for text in ("(PRV)", "target", "What is not protected", "with the guarantee") if text in page.text
    ]


def test_records_without_patient_ids_are_unmissable(tmp_path: Path) -> None:
    run = make_run()
    run.sites[1].record_is_patient = True
    save(tmp_path, run)
    page = Page.of(tmp_path)
    assert list(page.banners) == ["warn"]
    assert "one record (image), not one patient: south" in page.banners["warn"]
    assert "One record (image) at south; one patient elsewhere" in page.text


def test_a_site_over_the_target_is_named(tmp_path: Path) -> None:
    run = make_run()
    run.sites[0].epsilon = 10.0001
    save(tmp_path, run)
    page = Page.of(tmp_path)
    assert list(page.banners) == ["error"]
    assert "north has spent ε = 10.001 at δ = 1e-5" in " ".join(page.banners["error"].split())


def test_exactly_the_target_is_not_over_it(tmp_path: Path) -> None:
    run = make_run()
    run.sites[0].epsilon = 10.0
    save(tmp_path, run)
    assert Page.of(tmp_path).banners == {}


@pytest.mark.parametrize(("trained", "named"), [(10_000, False), (10_001, True)])
def test_a_delta_too_large_for_the_cohort_is_named(tmp_path: Path, trained: int, named: bool) -> None:
    run = make_run()
    run.sites[1].patients_trained = trained  # the largest delta for 10 000 is 1e-5
    save(tmp_path, run)
    assert ("training patients) at south" in Page.of(tmp_path).text) == named


@pytest.mark.parametrize("status", ["completed", "interrupted", "failed", "running"])
def test_the_status_and_the_error_are_shown(tmp_path: Path, status: str) -> None:
    run = make_run()
    run.status = status  # type: ignore[assignment]
    run.error = "too_few_survivors" if status == "failed" else ""
    save(tmp_path, run)
    page = Page.of(tmp_path)
    assert [text for text in page.texts if text.strip() == status]
    assert ("fewer sites answered" in page.text.lower()) == (status == "failed")
    assert ("Not finished" in page.text) == (status == "running")


def test_everything_is_escaped(tmp_path: Path) -> None:
    hostile = "<img src=http://x/ onerror=alert(1)>\"'&"
    run = make_run(("north", "south"))
    run.sites[0].name = hostile
    run.error, run.status, run.device, run.notice = hostile, "failed", hostile, hostile
    run.aggregation = hostile
    run.sites[1].refusals = {hostile: 1}
    run.refused_sites, run.refused_nodes = {hostile: hostile}, [hostile]
    run.warm_start = warm(hostile)
    run.versions, run.seconds = {hostile: hostile}, {hostile: 1.0}
    run.sites[1].epsilon = 9.0  # curves differ, so that the name stands in a legend of its own
    save(tmp_path, run)
    check = {"accepted_records": 1, "accepted_patients": 1, "refused": {hostile: 1}, "notes": 0}
    (tmp_path / "sites" / "<b>site").mkdir(parents=True)
    (tmp_path / "sites" / "<b>site" / "data-check.json").write_text(json.dumps(check))
    page = Page.of(tmp_path)
    assert [image for image in page.all("img") if "onerror" in image or not image["src"].startswith("data:")] == []
    assert page.text.count(hostile) >= 15
    assert "<b>site" in page.text


def test_the_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    save(tmp_path, make_run())
    text = write_report(tmp_path).read_text()
    page = Page(text)
    links = [
        (tag, key, value)
        for tag, attributes in page.elements
        for key, value in attributes.items()
        if key in ("src", "href", "srcset", "data", "action", "poster", "xlink:href", "style") or key.startswith("on")
    ]
    assert links and all(tag == "img" and key == "src" and value.startswith("data:") for tag, key, value in links)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.elements}
    assert re.search(r"https?:|url\(|@import", text) is None


def test_the_content_policy_admits_this_style_sheet_and_no_other(tmp_path: Path) -> None:
    save(tmp_path, make_run())
    text = write_report(tmp_path).read_text()
    policy = next(meta["content"] for meta in Page(text).all("meta") if "http-equiv" in meta)
    style = re.findall("<style>(.*)</style>", text, re.DOTALL)
    assert len(style) == 1
    digest = base64.b64encode(hashlib.sha256(style[0].encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy and "unsafe" not in policy and "script-src" not in policy


def test_pictures_charts_and_tables_have_text_for_those_who_do_not_see_them(tmp_path: Path) -> None:
    save(tmp_path, make_run())
    page = Page.of(tmp_path)
    assert len(page.all("img")) == 4 and all(image["alt"] for image in page.all("img"))
    charts = [svg for svg in page.all("svg") if "aria-hidden" not in svg]
    assert len(charts) == 3 and all(svg["role"] == "img" and svg["aria-label"] for svg in charts)
    assert page.all("th") and all(head.get("scope") in ("row", "col") for head in page.all("th"))


@pytest.mark.parametrize(
    ("source", "caption"),
    [
        ("", "untrained"),
        ("public phantoms (brain), 600 steps", "public phantoms only, no patient used"),
        ("a checkpoint given by the study", "a checkpoint given by the study; no patient of this study used yet"),
    ],
)
def test_the_grid_before_says_what_it_was_made_from(tmp_path: Path, source: str, caption: str) -> None:
    run = make_run()
    run.warm_start = warm(source) if source else None
    save(tmp_path, run)
    assert f"Before (round 0) {caption}" in Page.of(tmp_path).text


def test_before_and_after_are_the_first_and_the_last_grid_and_few_between(tmp_path: Path) -> None:
    save(tmp_path, make_run(rounds=30))
    page = Page.of(tmp_path)
    pictures = [base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) for image in page.all("img")]
    files = [tmp_path / "samples" / f"round-{number:04d}.png" for number in (0, 30)]
    assert pictures[:2] == [file.read_bytes() for file in files]
    assert len(pictures) == 2 + 8 and len(set(pictures)) == 10


def test_no_completed_round(tmp_path: Path) -> None:
    run = make_run(rounds=0)
    run.status, run.error = "failed", "too_few_survivors"
    save(tmp_path, run)
    page = Page.of(tmp_path)
    assert "No round was completed." in page.text and "0 of 10" in page.text
    assert len(page.all("img")) == 1 and "Before (round 0)" in page.text
    assert "north 0.000 at 1e-5 (PRV) nothing 0 of 0" in page.text


def test_a_run_without_any_site(tmp_path: Path) -> None:
    run = make_run((), rounds=0)
    run.seconds = {}
    save(tmp_path, run)
    assert "No site took part." in Page.of(tmp_path).text


def test_optional_files_may_be_missing(tmp_path: Path) -> None:
    make_run().save(tmp_path)  # neither metrics nor samples nor sites
    page = Page.of(tmp_path)
    assert "holds no sample images" in page.text and "This stays at the site" in page.text


def test_a_damaged_grid_is_left_out(tmp_path: Path) -> None:
    save(tmp_path, make_run())
    (tmp_path / "samples" / "round-0003.png").write_bytes(b"<html>")
    assert "After (round 2)" in Page.of(tmp_path).text


def test_what_sites_refused(tmp_path: Path) -> None:
    save(tmp_path, make_run())
    for name, content in (
        (
            "north",
            '{"accepted_records": 501, "accepted_patients": 203, "notes": 2,'
            ' "refused": {"truncated": 6, "odd_code": 1}}',
        ),
        ("south", "{}"),
    ):
        (tmp_path / "sites" / name).mkdir(parents=True)
        (tmp_path / "sites" / name / "data-check.json").write_text(content)
    page = Page.of(tmp_path)
    assert "north 203 501 7 1 × odd_code , odd code 6 × truncated , the file ends too early 2" in page.text
    assert "south its data-check.json cannot be read" in page.text
    assert "This stays at the site" not in page.text and "before you pass this page on" in page.text


def test_fifty_equal_sites_share_one_curve(tmp_path: Path) -> None:
    save(tmp_path, make_run([f"site-{number}" for number in range(1, 51)]))
    page = Page.of(tmp_path)
    assert "site-1 … site-50 (50 sites)" in page.text
    assert (
        len([1 for curve in page.all("polyline") if curve["class"] == "line s0"]) == 4
    )  # two charts, each with its key
    assert "site-50 " in page.text


def test_fifty_unlike_sites_stay_legible(tmp_path: Path) -> None:
    run = make_run([f"site-{number}" for number in range(1, 51)])
    for number, site in enumerate(run.sites):
        site.epsilon = 9.0 - number / 10
    save(tmp_path, run)
    page = Page.of(tmp_path)
    assert "44 other sites, none higher" in page.text
    assert len([1 for curve in page.all("polyline") if curve["class"] == "line s6"]) == 44 + 1


def test_losses_that_are_not_numbers_do_not_break_the_chart(tmp_path: Path) -> None:
    make_run().save(tmp_path)
    for number, loss in enumerate((1.0, float("nan"), float("inf"), 2.0), start=1):
        record.append_metrics(tmp_path, line(number, {"north": 10}, generator_loss=loss))
    text = write_report(tmp_path).read_text()
    assert re.search(r'points="[^"]*(nan|inf)', text) is None
    assert '<td class="n">nan</td>' in text


def test_the_time_is_the_runs_own(tmp_path: Path) -> None:
    run = make_run()
    run.started, run.finished = "2026-03-04T05:06:07+00:00", "2026-03-04T06:07:08+00:00"
    save(tmp_path, run)
    assert "Started 2026-03-04 05:06 UTC, ended 2026-03-04 06:07 UTC" in Page.of(tmp_path).text
    run.finished = None
    run.save(tmp_path)
    assert "ended" not in Page.of(tmp_path).text.split("What is guaranteed")[0]


def test_the_report_is_written_again_over_the_old_one(tmp_path: Path) -> None:
    run = make_run()
    save(tmp_path, run)
    assert "interrupted" not in Page.of(tmp_path).text
    RunRecord.load(tmp_path).model_copy(update={"status": "interrupted"}).save(tmp_path)
    assert write_report(tmp_path) == tmp_path / "report.html"
    assert "interrupted" in Page.of(tmp_path).text
    assert not list(tmp_path.glob(".*.tmp"))


def test_no_run_no_report(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_study_of_another_version_is_refused_by_name(tmp_path: Path) -> None:
    run = make_run()
    run.study["gan"]["future_key"] = 1
    save(tmp_path, run)
    with pytest.raises(ConfigError, match="another version"):
        write_report(tmp_path)


# ---------------------------------------------------------------- phases


def pictures(page: Page) -> list[bytes]:
    return [base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) for image in page.all("img")]


def grid(folder: Path, number: int) -> bytes:
    return (folder / "samples" / f"round-{number:04d}.png").read_bytes()


def figure(run: RunRecord, rounds: int) -> str:
    """Epsilon as the page shows it after the first rounds of the study with phases."""
    return epsilon_text(make_phased_run(rounds).sites[0].epsilon or 0.0)


def test_the_plan_of_every_phase_is_told(tmp_path: Path) -> None:
    run = make_phased_run()
    save_phased(tmp_path, run)
    page = Page.of(tmp_path)
    noise = [f"{phase.noise_multiplier:.4g}" for phase in run.phases]
    for expected in (
        "9 of 9 moments, then joint, then local",
        "Phase 1: moments 2 releases in 2 rounds, for 60 % of ε. clip_norm 1, noise_multiplier "
        f"{noise[0]}, sampling_probability 1: all patients",
        f"Phase 2: joint 120 steps in 3 rounds, for 30 % of ε. clip_norm 1, noise_multiplier {noise[1]}, "
        "sampling_probability 0.5 for each patient at each step",
        "Phase 3: local 20 steps in 4 rounds, for 10 % of ε.",
        "composed over all rounds of all phases",
        f"2 steps, noise {noise[0]}, q 1; 120 steps, noise {noise[1]}, q 0.5; 20 steps",
        "1: moments the sites told what their patients look like on average, and the generator was fitted to that 1–2 "
        "one release 2 of 2",
        "2: joint one discriminator was trained on the patients of all sites together, a noisy sum at a time 3–5 40 3 "
        "of 3",
        "3: local each site trained both networks on its own patients, and the updates were averaged 6–9 5 4 of 4",
    ):
        assert expected in page.text, expected


def test_a_study_of_one_phase_has_no_table_of_phases(tmp_path: Path) -> None:
    save(tmp_path, make_run())
    page = Page.of(tmp_path)
    assert "Planned, of local 100 steps in 10 rounds. clip_norm 1" in page.text
    assert "What happened" not in page.text and "% of ε" not in page.text and "Phase 1" not in page.text


@pytest.mark.parametrize("why", ["", "600 patients and epsilon 8: moments alone. <b>"])
def test_why_the_phases_were_chosen_is_told_when_they_were(why: str, tmp_path: Path) -> None:
    run = make_run()
    run.phases_chosen = why
    save(tmp_path, run)
    text = Page.of(tmp_path).text
    assert ("Why these phases" in text) is bool(why)
    assert ("What happened" in text) is bool(why)
    assert why in text


def test_a_phase_that_was_not_finished_shows(tmp_path: Path) -> None:
    run = make_phased_run(4)
    save_phased(tmp_path, run)
    page = Page.of(tmp_path)
    assert "3–5 40 2 of 3" in page.text and "6–9 5 0 of 4" in page.text
    marked = [cell for cell in page.all("td") if cell.get("class") == "n over"]
    assert len(marked) == 2
    assert "After joint (round 4)" in page.text and "1 round of this phase missing" in page.text
    assert "After local" not in page.text


def test_grids_before_and_after_every_phase_stand_beside_each_other(tmp_path: Path) -> None:
    run = make_phased_run()
    run.warm_start = warm("public phantoms (brain), 600 steps")
    save_phased(tmp_path, run)
    page = Page.of(tmp_path)
    assert pictures(page)[:4] == [grid(tmp_path, number) for number in (0, 2, 5, 9)]
    assert pictures(page)[4:] == [grid(tmp_path, number) for number in (1, 3, 4, 6, 7, 8)]
    for expected in (
        "Before (round 0) public phantoms only, no patient used",
        f"and the generator was fitted to that; ε = {figure(run, 2)} spent by then at most",
        f"After joint (round 5) one discriminator was trained on the patients of all sites together, a noisy sum at a "
        f"time; ε = {figure(run, 5)} spent by then at most",
        f"After local (round 9) each site trained both networks on its own patients, and the updates were averaged; "
        f"ε = {figure(run, 9)} spent by then at most",
        "round 1, moments round 3, joint round 4, joint round 6, local",
    ):
        assert expected in page.text, expected
    assert figure(run, 2) < figure(run, 5) < figure(run, 9)


def test_a_phase_that_left_no_grid_is_left_out(tmp_path: Path) -> None:
    """As when its budget was spent before it began."""
    run = make_phased_run(5)
    save_phased(tmp_path, run)
    for number in (1, 2):
        (tmp_path / "samples" / f"round-{number:04d}.png").unlink()
    page = Page.of(tmp_path)
    assert pictures(page)[:2] == [grid(tmp_path, number) for number in (0, 5)]
    assert "After moments" not in page.text


def test_grids_of_phases_without_privacy_say_so(tmp_path: Path) -> None:
    run = make_phased_run(private=False)
    save_phased(tmp_path, run)
    page = Page.of(tmp_path)
    assert page.text.count(", without privacy") == 3  # not the one before any patient
    assert "spent by then" not in page.text and "Phase 1: moments" not in page.text
    assert "1: moments the sites told what their patients look like on average" in page.text


def test_what_rounds_of_moments_found_is_a_table(tmp_path: Path) -> None:
    save_phased(tmp_path, make_phased_run())
    page = Page.of(tmp_path)
    assert "Round Features Noise in the sum Why it stopped 1 96 0.1235 noise 2 192 0.1235 noise" in page.text
    assert "so none of it costs privacy" in page.text


@pytest.mark.parametrize("facts", [{}, {"features": 5}])
def test_rounds_of_moments_without_figures_have_no_table(facts: dict[str, int], tmp_path: Path) -> None:
    run = make_phased_run(2)
    save(tmp_path, run, [line(number, {}, algorithm="moments", **facts) for number in (1, 2)])
    assert ("Rounds of moments" in Page.of(tmp_path).text) is bool(facts)


def test_a_figure_that_only_some_rounds_left_is_a_dash_elsewhere(tmp_path: Path) -> None:
    run = make_phased_run(2)
    lines = [line(1, {}, algorithm="moments", first=1), line(2, {}, algorithm="moments", second=2.5)]
    save(tmp_path, run, lines)
    assert "Round First Second 1 1 – 2 – 2.5" in Page.of(tmp_path).text


# ---------------------------------------------------------------- noise that the sites share


def test_noise_that_sites_share_is_said_to_rest_on_the_sums(tmp_path: Path) -> None:
    save_phased(tmp_path, make_phased_run())
    text = Page.of(tmp_path).text
    for expected in (
        "In moments and joint the guarantee above rests on this: each site adds a share of the noise, and every sum "
        "over at least 3 sites holds all of it, even when the coordinator knows the shares of 1 site. No smaller sum "
        "was opened. In local it does not",
        "Against the coordinator together with more than 1 site: in moments and joint the sites share the noise",
    ):
        assert expected in text, expected
    assert "The guarantee above does not rest on this" not in text


@pytest.mark.parametrize(
    ("sites", "aggregation"), [(("north", "south"), "secure"), (("north", "south", "west"), "plain")]
)
def test_where_every_site_makes_all_of_the_noise_nothing_rests_on_the_sums(
    sites: tuple[str, ...], aggregation: str, tmp_path: Path
) -> None:
    """Of two sites one may collude, so each makes it all; in plain studies each one does."""
    run = make_phased_run(sites=sites, aggregation=aggregation)
    save_phased(tmp_path, run)
    text = Page.of(tmp_path).text
    assert "adds a share of the noise" not in text and "sites share the noise" not in text
    figures = [site.epsilon or 0.0 for site in run.sites]
    assert f"at all {len(sites)} sites to ε = {epsilon_text(sum(figures))} at δ = {len(sites)}e-5" in text


def test_a_patient_of_several_sites_under_one_noise_is_a_group(tmp_path: Path) -> None:
    """Two sites of epsilon 2 and delta 1e-5 under one noise: epsilon 4 and delta (1 + e^2) 1e-5 = 8.389e-5."""
    run = make_phased_run()
    for site, epsilon in zip(run.sites, (2.0, 1.0, 2.0), strict=True):
        site.epsilon = epsilon
    save_phased(tmp_path, run)
    text = Page.of(tmp_path).text
    assert "at two of them to ε = 4.000 at δ = 8.389e-5 at most" in text
    # All three, the smallest first: 1 + e + e^3 = 23.80.
    assert "at all 3 sites to ε = 5.000 at δ = 0.000238" in text
    for site in run.sites:
        site.epsilon = 9.0
    run.save(tmp_path)
    assert "at all 3 sites to ε = 27.000 at δ = 1, which is no guarantee" in Page.of(tmp_path).text
