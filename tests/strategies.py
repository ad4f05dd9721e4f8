"""Hypothesis strategies for what the tests of several packages share."""

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from common.config import StudyConfig
from common.messages import (
    AdvertiseKeysRequest,
    AuditRequest,
    Confirmation,
    ConfirmStepRequest,
    ConfirmSurvivorsRequest,
    Enrolment,
    EnrolRequest,
    FilterRequest,
    JointRequest,
    LocalUpdate,
    MaskedInput,
    MaskedInputRequest,
    MaskedStep,
    MomentsRequest,
    OpenedSeeds,
    OpenedStep,
    OpenSeedsRequest,
    OpenStepRequest,
    PlanRegistered,
    Refusal,
    RegisterPlanRequest,
    Reply,
    Request,
    SealedSeeds,
    SealedShares,
    ShareKeysRequest,
    ShareSeedRequest,
    StepRequest,
    TrainRequest,
    UnmaskRequest,
    UnmaskShares,
)
from common.privacy.accounting import Budget, Mechanism, PureRelease
from common.secagg.encoding import MODULUS_BITS, Encoding
from common.secagg.keys import AdvertisedKeys

SIZES = (28, 32, 40, 48, 56, 64, 80, 96, 112, 128)

site_names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
labels = st.text(min_size=1, max_size=20).filter(lambda text: text == text.strip() and not set(text) & set(",="))
vectors = arrays.arrays(np.float32, st.integers(0, 40), elements=st.floats(width=32, allow_nan=True))
mechanisms = st.builds(Mechanism, st.floats(1e-6, 1), st.floats(0.05, 1e5), st.integers(1, 10**6))
budgets = st.none() | st.builds(Budget, st.floats(1e-6, 1e6), st.floats(1e-12, 0.5))
pure_releases = st.builds(PureRelease, st.floats(1e-3, 10), st.integers(1, 1000))
histories = st.lists(mechanisms | pure_releases, max_size=4).map(tuple)

texts = st.text(max_size=100)
counts = st.integers(0, 2**40)
few_bytes = st.binary(max_size=200)
named_bytes = st.dictionaries(site_names, few_bytes, max_size=5)
words = arrays.arrays(np.uint64, st.integers(0, 20))
advertised = st.builds(AdvertisedKeys, texts, few_bytes, few_bytes, few_bytes)
train_requests = st.builds(TrainRequest, texts, counts, vectors, vectors)
moments_requests = st.builds(MomentsRequest, texts, counts, vectors)
joint_requests = st.builds(JointRequest, texts, counts, counts, vectors)
pixels = st.binary(max_size=40).map(lambda data: np.frombuffer(data, np.uint8))
indices = st.lists(st.integers(0, 2**62), max_size=5).map(lambda numbers: np.array(numbers, np.int64))
audit_requests = st.builds(AuditRequest, texts, counts, texts, vectors, indices, pixels, vectors)
filter_requests = st.builds(FilterRequest, texts, counts, texts, counts)
requests: st.SearchStrategy[Request] = st.one_of(
    st.builds(EnrolRequest, texts, texts, few_bytes),
    train_requests,
    moments_requests,
    joint_requests,
    audit_requests,
    filter_requests,
    st.builds(RegisterPlanRequest, texts, few_bytes),
    st.builds(AdvertiseKeysRequest, texts, counts, counts),
    st.builds(ShareKeysRequest, texts, counts, st.lists(advertised, max_size=4).map(tuple)),
    st.builds(
        MaskedInputRequest,
        counts,
        st.lists(texts, max_size=5).map(tuple),
        named_bytes,
        train_requests | moments_requests | audit_requests | filter_requests,
    ),
    st.builds(ConfirmSurvivorsRequest, texts, counts, st.lists(texts, max_size=5).map(tuple)),
    st.builds(UnmaskRequest, texts, counts, named_bytes, counts),
    st.builds(ShareSeedRequest, texts, counts, counts, counts, st.lists(advertised, max_size=4).map(tuple)),
    st.builds(StepRequest, counts, st.lists(texts, max_size=5).map(tuple), named_bytes, joint_requests),
    st.builds(ConfirmStepRequest, texts, counts, counts, st.lists(texts, max_size=5).map(tuple)),
    st.builds(OpenStepRequest, texts, counts, counts, named_bytes),
    st.builds(OpenSeedsRequest, texts, counts, counts, st.lists(texts, max_size=5).map(tuple), counts),
)
replies: st.SearchStrategy[Reply] = st.one_of(
    st.builds(Enrolment, site_names, texts, st.booleans(), histories, histories, budgets, counts, texts, texts),
    st.builds(PlanRegistered, texts),
    st.builds(LocalUpdate, counts, vectors),
    advertised,
    st.builds(SealedShares, counts, named_bytes, named_bytes, named_bytes, few_bytes),
    st.builds(MaskedInput, texts, counts, counts, counts, counts, words),
    st.builds(Confirmation, counts, few_bytes),
    st.builds(UnmaskShares, counts, named_bytes, named_bytes, st.none() | advertised),
    st.builds(SealedSeeds, counts, named_bytes, named_bytes, few_bytes),
    st.builds(MaskedStep, texts, counts, counts, counts, counts, counts, named_bytes, words),
    st.builds(OpenedStep, counts, counts, few_bytes, named_bytes),
    st.builds(OpenedSeeds, counts, counts, named_bytes, st.none() | advertised),
    st.builds(Refusal, texts),
)


@st.composite
def secure_aggregations(draw: st.DrawFn) -> dict[str, float | int]:
    """Encodings that hold three sites, and how long a stage may take."""
    value_range, fraction_bits = draw(st.floats(1e-6, 1e6)), draw(st.integers(1, 30))
    modulus_bits = draw(st.sampled_from((0, *MODULUS_BITS)))
    assume(Encoding(value_range, fraction_bits, modulus_bits or 32).most_sites >= 3)
    return {
        "value_range": value_range,
        "fraction_bits": fraction_bits,
        "modulus_bits": modulus_bits,
        "stage_timeout_seconds": draw(st.floats(0.1, 1e4)),
    }


@st.composite
def phases(draw: st.DrawFn) -> list[dict[str, str | int | float]]:
    """One to four phases whose shares of epsilon add up to 1."""
    weights = draw(st.lists(st.integers(1, 50), min_size=1, max_size=4))
    found: list[dict[str, str | int | float]] = []
    for weight in weights:
        algorithm = draw(st.sampled_from(["local", "joint", "moments"]))
        steps = 1 if algorithm == "moments" else draw(st.integers(3, 100_000))  # the generator's every third is made
        rounds = draw(st.integers(1, 100_000))
        found.append({"algorithm": algorithm, "share": weight / sum(weights), "rounds": rounds, "steps": steps})
    return found


@st.composite
def federations(draw: st.DrawFn) -> dict[str, object]:
    """In the short form, or with phases."""
    short = {"rounds": draw(st.integers(1, 100_000)), "algorithm": draw(st.sampled_from(["local", "joint", "moments"]))}
    return {
        **draw(st.just(short) | phases().map(lambda found: {"phase": found})),
        "contracted_patients": draw(st.dictionaries(site_names, st.integers(1, 10**6), max_size=3)),
        "aggregation": draw(st.sampled_from(["secure", "plain"])),
        "weights": draw(st.sampled_from(["equal", "contracted"])),
        "minimum_sites": draw(st.integers(2, 3)),
    }


@st.composite
def studies(draw: st.DrawFn) -> StudyConfig:
    """Valid studies whose every table differs from the defaults."""
    names = draw(st.just([]) | st.lists(labels, min_size=2, max_size=4, unique=True))
    tree = {
        "name": draw(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)),
        "seed": draw(st.integers(0, 2**32 - 1)),
        "image": {
            "size": draw(st.sampled_from(SIZES)),
            "label_column": draw(st.from_regex(r"[a-z ]{1,10}", fullmatch=True)) if names else "",
            "labels": names,
        },
        "gan": {
            "loss": draw(st.sampled_from(["non_saturating", "hinge", "least_squares"])),
            "latent_size": draw(st.integers(1, 1024)),
            "generator_learning_rate": draw(st.floats(1e-9, 1)),
            "discriminator_normalization": draw(st.sampled_from(["none", "group"])),
        },
        "privacy": {
            "enabled": draw(st.booleans()),
            "epsilon": draw(st.floats(1e-3, 1000)),
            "sampling_probability": draw(st.floats(1e-6, 1)),
            "colluding_sites": draw(st.integers(0, 1)),
        },
        "federation": draw(federations()),
        "secure_aggregation": draw(secure_aggregations()),
        "performance": {"max_images_at_once": draw(st.integers(1, 4096)), "mixed_precision": draw(st.booleans())},
    }
    return StudyConfig.model_validate(tree)


@st.composite
def owners(draw: st.DrawFn, max_patients: int = 6, max_images: int = 12) -> NDArray[np.int64]:
    """The owner of each row of a draw: patients ascending from 0, each with one image or more; possibly nobody."""
    counts = draw(st.lists(st.integers(1, max_images), max_size=max_patients))
    return np.repeat(np.arange(len(counts), dtype=np.int64), counts)
