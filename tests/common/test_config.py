"""The study file: what is refused and how, what the digest covers, and that every way of carrying it keeps it."""

import re
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings
from pydantic import ValidationError

from common.config import PhaseConfig, StudyConfig, holdout_share, start_size
from common.errors import ConfigError
from common.secagg.encoding import Encoding
from tests.strategies import SIZES, studies

MARKER = "Zebra-4711"


def study_of(**tables: Any) -> StudyConfig:
    return StudyConfig.model_validate(tables)


def write(folder: Path, text: str) -> Path:
    path = folder / "study.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("size", "start"), [(28, 7), (32, 4), (40, 5), (48, 6), (56, 7), (64, 4), (80, 5), (96, 6), (112, 7), (128, 4)]
)
def test_start_sizes_by_hand(size: int, start: int) -> None:
    assert start_size(size) == start
    assert study_of(image={"size": size}).image.size == size


@pytest.mark.parametrize("size", [-28, 0, 1, 4, 7, 14, 16, 24, 27, 29, 30, 36, 44, 63, 72, 100, 127, 144, 160, 256])
def test_other_sizes_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="size must be"):
        start_size(size)
    with pytest.raises(ValidationError):
        study_of(image={"size": size})


def test_exactly_the_listed_sizes_are_allowed() -> None:
    allowed = []
    for size in range(300):
        try:
            start_size(size)
        except ValueError:
            continue
        allowed.append(size)
    assert tuple(allowed) == SIZES


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("colour = 1", "colour"),
        ("[privacy]\nepsylon = 1", "privacy.epsylon"),
        ("[federation]\nround = 1", "federation.round"),
        ("[gan]\nlosss = 'hinge'", "gan.losss"),
        ("[image]\nsizes = 64", "image.sizes"),
        ("[performance]\nthreads = 1", "performance.threads"),
        ("[secure_aggregation]\nthreshold = 2", "secure_aggregation.threshold"),
        ("[noise]\nseed = 1", "noise"),
    ],
)
def test_unknown_keys_are_refused_by_name(text: str, key: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{key}: no such key"):
        StudyConfig.from_toml(write(tmp_path, text))


@pytest.mark.parametrize(
    "text",
    [
        f"name = '{MARKER} with a space'",
        f"seed = '{MARKER}'",
        f"[gan]\nloss = '{MARKER}'",
        f"[gan]\nloss = ['{MARKER}']",
        f"[privacy]\nepsilon = '{MARKER}'",
        f"[privacy]\nenabled = '{MARKER}'",
        f"[image]\nlabels = ['{MARKER}']\nlabel_column = 'group'",
        f"[image]\nlabels = ['{MARKER},', 'b']\nlabel_column = 'group'",
        f"[image]\nlabel_column = '{MARKER}'",
        f"[federation]\ncontracted_patients = '{MARKER}'",
        f"[federation]\ncontracted_patients = 'site={MARKER}'",
        f"[federation.contracted_patients]\nsite = '{MARKER}'",
        f"image = '{MARKER}'",
    ],
)
def test_values_are_never_printed(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        StudyConfig.from_toml(write(tmp_path, text))
    assert MARKER not in str(caught.value)
    assert MARKER not in caught.value.message + caught.value.remedy
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


def test_every_wrong_key_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        StudyConfig.from_toml(write(tmp_path, "a = 1\n[privacy]\nepsilon = -1\ndelta = 2\n[image]\nsize = 3"))
    for key in ("a: no such key", "privacy.epsilon", "privacy.delta", "size must be"):
        assert key in str(caught.value)


@pytest.mark.parametrize(
    "tables",
    [
        {"privacy": {"epsilon": 0}},
        {"privacy": {"epsilon": float("nan")}},
        {"privacy": {"epsilon": float("inf")}},
        {"privacy": {"delta": 0}},
        {"privacy": {"delta": 0.01}},
        {"privacy": {"clip_norm": 0}},
        {"privacy": {"clip_norm": float("inf")}},
        {"privacy": {"sampling_probability": 0}},
        {"privacy": {"sampling_probability": 1.01}},
        {"privacy": {"images_per_patient": 0}},
        {"privacy": {"unit": "image"}},
        {"privacy": {"colluding_sites": -1}},
        {"federation": {"rounds": 0}},
        {"federation": {"local_steps": 0}},
        {"federation": {"contracted_patients": {"a": 0}}},
        {"federation": {"contracted_patients": {"a,b": 3}}},
        {"federation": {"contracted_patients": {"a=b": 3}}},
        {"federation": {"contracted_patients": {"../a": 3}}},
        {"federation": {"contracted_patients": "a=1,a=2"}},
        {"federation": {"contracted_patients": "a"}},
        {"federation": {"algorithm": "central"}},
        {"federation": {"aggregation": "masked"}},
        {"federation": {"minimum_sites": 0}},
        {"secure_aggregation": {"value_range": 0}},
        {"secure_aggregation": {"value_range": float("inf")}},
        {"secure_aggregation": {"value_range": 1e7}},
        {"secure_aggregation": {"fraction_bits": 0}},
        {"secure_aggregation": {"fraction_bits": 31}},
        {"secure_aggregation": {"modulus_bits": 20}},
        {"secure_aggregation": {"modulus_bits": 24}},
        {"secure_aggregation": {"modulus_bits": 64}},
        {"secure_aggregation": {"stage_timeout_seconds": 0}},
        {"image": {"channels": 3}},
        {"gan": {"discriminator_normalization": "batch"}},
        {"performance": {"max_images_at_once": 0}},
        {"seed": -1},
        {"seed": 2**32},
        {"name": ""},
        {"name": "../up"},
    ],
)
def test_values_out_of_range_are_refused(tables: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        study_of(**tables)


@pytest.mark.parametrize(
    "image",
    [
        {"labels": ["ill", "well"]},
        {"label_column": "group"},
        {"label_column": "group", "labels": ["ill"]},
        {"label_column": "group", "labels": ["ill", "ill"]},
        {"label_column": "group", "labels": ["ill", ""]},
        {"label_column": "group", "labels": ["ill", "a,b"]},
        {"label_column": "group", "labels": ["ill", "a=b"]},
        {"label_column": "group", "labels": ["ill", " well"]},
        {"label_column": "group", "labels": ["ill", "well\n"]},
        {"label_column": "group", "labels": ["ill", "x" * 65]},
        {"label_column": "group", "labels": ["ill", 1]},
    ],
)
def test_labels_and_their_column_belong_together(image: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        study_of(image=image)


def test_the_number_of_classes() -> None:
    assert study_of().image.num_classes == 1
    assert study_of(image={"label_column": "g", "labels": "ill, well ,other"}).image.labels == ("ill", "well", "other")
    assert study_of(image={"label_column": "g", "labels": ["ill", "well"]}).image.num_classes == 2


def test_a_study_is_frozen() -> None:
    study = study_of()
    for part, key in ((study, "seed"), (study.privacy, "epsilon"), (study.federation, "rounds")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(part, key, 1)


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("", {"seed": 1}),
        ("", {"name": "other"}),
        ("image", {"size": 32}),
        ("gan", {"loss": "hinge"}),
        ("privacy", {"epsilon": 9.0}),
        ("privacy", {"enabled": False}),
        ("privacy", {"clip_norm": 2.0}),
        ("privacy", {"colluding_sites": 0}),
        ("federation", {"rounds": 11}),
        ("federation", {"algorithm": "joint"}),
        ("federation", {"phase": [{"algorithm": "local", "steps": 10}]}),
        ("federation", {"contracted_patients": {"a": 30}}),
        ("federation", {"aggregation": "plain"}),
        ("federation", {"weights": "contracted"}),
        ("federation", {"minimum_sites": 3}),
        ("secure_aggregation", {"value_range": 2.0}),
        ("secure_aggregation", {"fraction_bits": 12}),
        ("secure_aggregation", {"modulus_bits": 32}),
        ("secure_aggregation", {"stage_timeout_seconds": 60.0}),
    ],
)
def test_the_digest_covers_the_guarantee(part: str, changes: dict[str, Any]) -> None:
    study = study_of()
    assert study.with_changes(part, **changes).digest != study.digest


def test_the_digest_leaves_speed_out() -> None:
    study = study_of()
    faster = study.with_changes("performance", max_images_at_once=7, mixed_precision=False)
    assert faster != study
    assert faster.digest == study.digest
    assert len(study.digest) == 64


def test_the_digest_does_not_depend_on_the_order_of_keys() -> None:
    one = study_of(federation={"contracted_patients": {"a": 1, "b": 2}})
    other = study_of(federation={"contracted_patients": {"b": 2, "a": 1}})
    assert one.digest == other.digest


def test_a_change_is_checked_again() -> None:
    with pytest.raises(ConfigError, match=r"privacy\.epsilon"):
        study_of().with_changes("privacy", epsilon=-1)
    with pytest.raises(ConfigError, match="no such key"):
        study_of().with_changes("privacy", noise=1)


@given(studies())
def test_the_run_config_keeps_the_study(study: StudyConfig) -> None:
    flat = study.to_run_config()
    assert all(type(value) in (str, int, float, bool) for value in flat.values())
    again = StudyConfig.from_run_config({**flat, "other.key": 1, "run.sites": "sites"})
    assert again == study
    assert again.digest == study.digest


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(study=studies())
def test_a_saved_study_is_read_back(study: StudyConfig, tmp_path: Path) -> None:
    study.save(tmp_path / "study.toml")
    again = StudyConfig.from_toml(tmp_path / "study.toml")
    assert again == study
    assert again.digest == study.digest


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("study.privacy.epsylon", "privacy.epsylon: no such key"),
        ("study.nothing", "nothing: no such key"),
        ("study.federation.contracted_patients.a", "no such key"),
    ],
)
def test_unknown_keys_of_the_run_config_are_refused(key: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        StudyConfig.from_run_config({key: 1})


@pytest.mark.parametrize(
    "keys", [("study.privacy", "study.privacy.epsilon"), ("study.privacy.epsilon", "study.privacy")]
)
def test_a_key_that_is_also_a_table_is_refused(keys: tuple[str, str]) -> None:
    with pytest.raises(ConfigError):
        StudyConfig.from_run_config(dict.fromkeys(keys, 1.0))


@pytest.mark.parametrize("content", [b"[privacy", b"a = ", b"\xff\xfe", b"privacy = 1\n[privacy]"])
def test_a_file_that_is_not_toml_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_bytes(content)
    with pytest.raises(ConfigError, match="TOML"):
        StudyConfig.from_toml(tmp_path / "study.toml")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(ConfigError, match="Cannot read"):
            StudyConfig.from_toml(path)


def test_the_contracted_split_by_hand() -> None:
    # Under 150 patients 30 % are held out, from 150 on 20 %: 100 -> 70 + 30, 149 -> 104 + 45 (44.7), 200 -> 160 + 40.
    study = study_of(federation={"contracted_patients": {"a": 100, "b": 149, "c": 200, "d": 1}})
    assert [study.contracted_split(site) for site in "abcd"] == [(70, 30), (104, 45), (160, 40), (1, 0)]
    with pytest.raises(ConfigError, match="contracted"):
        study.contracted_split("e")


def test_the_share_of_the_split_is_the_one_that_sites_use() -> None:
    from client.data.cohort import holdout_share as at_site

    assert [holdout_share(n) for n in (1, 149, 150, 9999)] == [at_site(n) for n in (1, 149, 150, 9999)]


# ---------------------------------------------------------------- secure aggregation


def test_a_study_that_says_nothing_sums_securely() -> None:
    study = study_of()
    assert study.federation.aggregation == "secure"
    assert study.federation.minimum_sites == 2
    assert study.encoding == Encoding(value_range=1.0, fraction_bits=15, modulus_bits=21)


def test_a_secure_sum_needs_two_sites() -> None:
    with pytest.raises(ConfigError, match=r"federation\.minimum_sites must be at least 2 with secure aggregation"):
        study_of().with_changes("federation", minimum_sites=1)
    plain = study_of().with_changes("federation", minimum_sites=1, aggregation="plain")
    with pytest.raises(ConfigError, match="minimum_sites must be at least 2"):
        plain.with_changes("federation", aggregation="secure")


@pytest.mark.parametrize(
    ("table", "sites", "change"),
    [
        # 2^20 - 1 over 2^15 leaves room for 31 sites of range 1 and for 3 of range 8; over 2^19, for one.
        ({"modulus_bits": 21}, 32, "modulus_bits=21 cannot hold 32 sites at value_range=1, fraction_bits=15; use 32"),
        (
            {"modulus_bits": 21, "value_range": 8.0},
            4,
            "modulus_bits=21 cannot hold 4 sites at value_range=8, fraction_bits=15; use 32",
        ),
        (
            {"modulus_bits": 21, "fraction_bits": 19},
            2,
            "modulus_bits=21 cannot hold 2 sites at value_range=1, fraction_bits=19; use 32",
        ),
        ({"modulus_bits": 16, "fraction_bits": 10}, 32, "modulus_bits=16 cannot hold 32 sites"),
        (
            {"modulus_bits": 32, "fraction_bits": 30},
            2,
            "cannot hold 2 sites at value_range=1, fraction_bits=30; lower fraction_bits or value_range",
        ),
        (
            {"fraction_bits": 30},
            2,
            "modulus_bits=32 cannot hold 2 sites at value_range=1, fraction_bits=30; lower fraction_bits",
        ),
    ],
)
def test_a_sum_that_could_wrap_is_refused_with_the_number_to_change(
    table: dict[str, Any], sites: int, change: str, tmp_path: Path
) -> None:
    contract = {f"site-{number}": 40 for number in range(sites)}
    study = {"federation": {"contracted_patients": contract}, "secure_aggregation": table}
    with pytest.raises(ConfigError, match=re.escape(change)):
        StudyConfig.from_toml(write(tmp_path, tomli_w.dumps(study)))
    study["federation"]["aggregation"] = "plain"  # nothing is encoded
    StudyConfig.from_toml(write(tmp_path, tomli_w.dumps(study)))


def test_the_largest_cohort_that_cannot_wrap_is_allowed() -> None:
    contract = {f"site-{number}": 40 for number in range(31)}
    study = study_of(federation={"contracted_patients": contract}, secure_aggregation={"modulus_bits": 21})
    assert study.encoding.most_sites == 31


@pytest.mark.parametrize(
    ("table", "sites", "bits"),
    [
        # 2^15 - 1 over 2^10 leaves room for 31 sites in 16 bits, as 2^20 - 1 over 2^15 in 21.
        ({"fraction_bits": 10}, 31, 16),
        ({"fraction_bits": 10}, 32, 21),
        ({}, 2, 21),
        ({}, 31, 21),
        ({}, 32, 32),
        ({}, 10_000, 32),
        ({"modulus_bits": 32}, 2, 32),
        ({"modulus_bits": 21, "fraction_bits": 10}, 2, 21),
    ],
)
def test_the_modulus_has_the_fewest_bits_that_hold_the_sites_unless_it_is_given(
    table: dict[str, int], sites: int, bits: int
) -> None:
    contract = {f"site-{number}": 40 for number in range(sites)}
    study = study_of(federation={"contracted_patients": contract}, secure_aggregation=table)
    assert study.encoding.modulus_bits == bits
    assert StudyConfig.from_run_config(study.to_run_config()).encoding == study.encoding


def test_a_modulus_that_was_not_given_grows_with_the_contract() -> None:
    study = study_of()
    assert study.encoding.modulus_bits == 21
    contract = {f"site-{number}": 40 for number in range(200)}
    assert study.with_changes("federation", contracted_patients=contract).encoding.modulus_bits == 32


def test_sites_that_have_no_contract_yet_count_by_their_minimum() -> None:
    with pytest.raises(ValidationError, match="cannot hold 300 sites"):
        study_of(federation={"minimum_sites": 300}, secure_aggregation={"modulus_bits": 21})
    assert study_of(federation={"minimum_sites": 300}).encoding.modulus_bits == 32


def test_weights_by_hand() -> None:
    contract = {"a": 25, "b": 75, "c": 50}
    equal = study_of(federation={"contracted_patients": contract})
    assert [equal.site_weight(site) for site in "abc"] == [1.0, 1.0, 1.0]
    study = equal.with_changes("federation", weights="contracted")
    assert [study.site_weight(site) for site in "abc"] == [25 / 75, 1.0, 50 / 75]  # held-out patients count, too
    with pytest.raises(ConfigError, match="contracted number of patients for site 'e'"):
        study.site_weight("e")


@given(studies())
def test_no_weight_takes_an_update_out_of_the_value_range(study: StudyConfig) -> None:
    weights = [study.site_weight(site) for site in study.federation.contracted_patients]
    assert all(0 < weight <= 1 for weight in weights)
    assert not weights or max(weights) == 1


def test_total_steps() -> None:
    assert study_of(federation={"rounds": 7, "local_steps": 5}).total_steps == 35


# ---------------------------------------------------------------- phases

PHASES = """
name = "lungs"
[federation]
minimum_sites = 4
[[federation.phase]]
algorithm = "moments"
share = 0.6
rounds = 2
[[federation.phase]]
algorithm = "joint"
share = 0.3
rounds = 3
steps = 100
[[federation.phase]]
algorithm = "local"
share = 0.1
rounds = 4
steps = 5
"""
FLAT = "moments share=0.6 rounds=2 steps=1; joint share=0.3 rounds=3 steps=100; local share=0.1 rounds=4 steps=5"
THREE = (
    PhaseConfig(algorithm="moments", share=0.6, rounds=2, steps=1),
    PhaseConfig(algorithm="joint", share=0.3, rounds=3, steps=100),
    PhaseConfig(algorithm="local", share=0.1, rounds=4, steps=5),
)


def three_phases() -> StudyConfig:
    return study_of(name="lungs", federation={"phase": THREE, "minimum_sites": 4})


def test_phases_are_tables_of_the_study_file(tmp_path: Path) -> None:
    study = StudyConfig.from_toml(write(tmp_path, PHASES))
    assert study.phases == THREE
    assert study == three_phases()
    assert (study.total_rounds, study.total_steps) == (2 + 3 + 4, 2 * 1 + 3 * 100 + 4 * 5)


def test_phases_are_one_text_for_flower() -> None:
    flat = three_phases().to_run_config()
    assert flat["study.federation.phase"] == FLAT
    assert StudyConfig.from_run_config(flat).phases == THREE
    loose = StudyConfig.from_run_config({"study.federation.phase": " moments  share=0.4 ;joint steps=7 share=0.6; "})
    assert loose.phases == (
        PhaseConfig(algorithm="moments", share=0.4),
        PhaseConfig(algorithm="joint", share=0.6, rounds=1, steps=7),
    )
    assert StudyConfig.from_run_config(study_of().to_run_config()).federation.phase == ()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("moments share", "expected 'algorithm key=value"),
        ("moments rounds=1 rounds=2", "each key once"),
        ("moments algorithm=joint", "each key once"),
        ("moments colour=red", "colour: no such key"),
        ("share=1", "phase.0.algorithm"),
        ("moments rounds=many", "phase.0.rounds"),
        ("moments; moments", "add up to 1"),
    ],
)
def test_a_text_that_is_no_phases_is_refused(text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(problem)):
        StudyConfig.from_run_config({"study.federation.phase": text})


@pytest.mark.parametrize("algorithm", ["local", "joint", "moments"])
def test_the_short_form_is_one_phase(algorithm: str) -> None:
    study = study_of(federation={"algorithm": algorithm, "rounds": 7, "local_steps": 5})
    steps = 1 if algorithm == "moments" else 5
    assert [phase.model_dump() for phase in study.phases] == [
        {"algorithm": algorithm, "share": 1.0, "rounds": 7, "steps": steps}
    ]
    assert (study.total_rounds, study.total_steps) == (7, 7 * steps)


@pytest.mark.parametrize("beside", [{"algorithm": "joint"}, {"rounds": 11}, {"local_steps": 11}])
def test_phases_are_said_once(beside: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="leave these out beside phase tables"):
        study_of(federation={"phase": [{"algorithm": "moments"}], **beside})


@pytest.mark.parametrize("shares", [(0.5,), (0.5, 0.4), (0.5, 0.50001), (0.9, 0.9), (1.0, 1e-5)])
def test_shares_that_do_not_add_up_are_refused(shares: tuple[float, ...]) -> None:
    with pytest.raises(ValidationError, match="must add up to 1"):
        study_of(federation={"phase": [{"algorithm": "moments", "share": share} for share in shares]})


def test_shares_add_up_though_no_double_is_a_third() -> None:
    for count in range(1, 40):
        study = study_of(federation={"phase": [{"algorithm": "moments", "share": 1 / count}] * count})
        assert len(study.phases) == count


@pytest.mark.parametrize(
    "phase",
    [
        {"algorithm": "moments", "steps": 2},  # a round is one release
        {"algorithm": "central"},
        {"algorithm": "auto"},
        {"algorithm": "joint", "rounds": 0},
        {"algorithm": "joint", "steps": 0},
        {"algorithm": "joint", "share": 0.0},
        {"algorithm": "joint", "share": 1.1},
        {"algorithm": "joint", "share": -1.0},
        {"algorithm": "joint", "local_steps": 4},
        {"algorithm": "local", "steps": 2},  # the generator makes a step after every third
        {},
    ],
)
def test_what_is_no_phase_is_refused(phase: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        study_of(federation={"phase": [phase]})


def test_rounds_count_through_all_phases() -> None:
    study = three_phases()
    assert [study.phase_number(number) for number in range(1, 10)] == [0, 0, 1, 1, 1, 2, 2, 2, 2]
    assert [study.last_round(number) for number in range(3)] == [2, 5, 9]


@pytest.mark.parametrize("number", [-1, 0, 10])
def test_no_other_round_has_a_phase(number: int) -> None:
    with pytest.raises(ValueError, match=f"expected a round from 1 to 9, found {number}"):
        three_phases().phase_number(number)


@given(studies())
def test_every_phase_has_its_rounds_in_order(study: StudyConfig) -> None:
    first = 1
    for number, phase in enumerate(study.phases):
        last = study.last_round(number)
        assert last - first + 1 == phase.rounds
        assert study.phase_number(first) == study.phase_number(last) == number
        first = last + 1
    assert first - 1 == study.total_rounds


@pytest.mark.parametrize(("key", "value"), [("algorithm", "local"), ("share", 0.7), ("rounds", 3), ("steps", 7)])
def test_the_digest_covers_every_key_of_a_phase_and_their_order(key: str, value: object) -> None:
    rest = {"algorithm": "joint", "share": 0.3, "steps": 3}
    first = {"algorithm": "joint", "share": 0.7, "rounds": 2, "steps": 4}
    if key == "share":
        first["share"], rest["share"] = 0.6, 0.4
    study = study_of(federation={"phase": [first, rest]})
    other = {**rest, "share": 0.3} if key == "share" else rest
    assert study_of(federation={"phase": [{**first, key: value}, other]}).digest != study.digest
    assert study_of(federation={"phase": [rest, first]}).digest != study.digest
    assert study_of(federation={"phase": [dict(reversed(first.items())), rest]}).digest == study.digest


# ---------------------------------------------------------------- who makes the noise of a sum


@pytest.mark.parametrize(
    ("aggregation", "minimum", "colluding", "expected"),
    [("secure", 2, 1, 1), ("secure", 5, 1, 4), ("secure", 5, 4, 1), ("secure", 5, 0, 5), ("plain", 5, 1, 1)],
)
def test_the_sites_that_are_sure_to_have_made_the_noise(
    aggregation: str, minimum: int, colluding: int, expected: int
) -> None:
    study = study_of(
        federation={"aggregation": aggregation, "minimum_sites": minimum}, privacy={"colluding_sites": colluding}
    )
    assert study.num_noisy == expected


@pytest.mark.parametrize(("minimum", "colluding"), [(2, 2), (3, 3), (3, 7)])
def test_a_sum_whose_noise_colluding_sites_could_know_is_refused(minimum: int, colluding: int) -> None:
    tables: dict[str, Any] = {"federation": {"minimum_sites": minimum}, "privacy": {"colluding_sites": colluding}}
    with pytest.raises(ValidationError, match=r"minimum_sites must be above privacy\.colluding_sites"):
        study_of(**tables)
    tables["federation"]["aggregation"] = "plain"  # every site makes all of it
    assert study_of(**tables).num_noisy == 1


@pytest.mark.parametrize("name", ["brain-t1", "chest-xray", "phantom"])
def test_the_examples_are_valid(name: str) -> None:
    path = Path(__file__).parents[2] / "deploy" / "examples" / f"{name}.toml"
    study = StudyConfig.from_toml(path)
    assert study.privacy.enabled
    assert study.federation.aggregation == "secure"
