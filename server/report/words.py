"""Figures and codes as people read them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from decimal import ROUND_CEILING, Decimal
from typing import Any

CODES = {
    "config": "the study or the command is wrong",
    "site": "the site refuses its own data or settings",
    "privacy": "training would break or exceed the guarantee, or the update was to leave without masks",
    "budget_exhausted": "the site has spent what the study planned for it",
    "over_budget": "the site's own budget for its patients would be exceeded",
    "policy": "the site's policy is missing or refuses the study",
    "ledger": "the site's ledger of what it has spent is missing, altered or cannot be written",
    "protocol": "the exchange of messages failed; the reason is in the site's own log",
    "out_of_order": "a message that was repeated, came too early, or belongs to another attempt",
    "bad_peer": "a message that no honest party sends, from the coordinator or, through it, another site",
    "too_few_survivors": "fewer sites answered than the study, or the site itself, needs",
    "node_error": "the site's process failed",
    "no_answer": "no answer in time",
    "malformed": "an answer that does not fit the study",
    "enrolment_changed": "another split or privacy unit than when the run began, or a spending that cannot be true",
    "other_roster": "the site has pinned another list of members (roster) than the other sites",
    "verdict": "the synthetic images were audited, and must not be released",
    "internal": "unexpected error; the reason is in the site's own log",
    "no_patient_id": "no patient id, so it cannot be counted to a patient",
    "patient_mismatch": "file and table name different patients",
    "conflicting_table": "the table contradicts itself about this image",
    "burned_in_text": "may show text that identifies a patient",
    "identifier_in_header": "the file's header holds identifying text",
    "duplicate": "the same image twice",
    "unreadable": "cannot be read",
    "undecodable": "pixels cannot be decoded",
    "truncated": "the file ends too early",
}


ALGORITHMS = {
    "local": "each site trained both networks on its own patients, and the updates were averaged",
    "joint": "one discriminator was trained on the patients of all sites together, a noisy sum at a time",
    "moments": "the sites told what their patients look like on average, and the generator was fitted to that",
}
FACTS = {
    "noise_share": "noise in the sum",
    "residual_before": "misfit before",
    "residual_after": "misfit after",
    "steps": "generator steps",
    "stopped": "why it stopped",
}


def algorithm_words(algorithm: str) -> str:
    """What a phase of this algorithm does, in a sentence without its stop."""
    return ALGORITHMS.get(algorithm, algorithm)


def count_text(count: int, thing: str) -> str:
    """``1 round``, ``2 rounds``."""
    return f"{count} {thing}{'' if count == 1 else 's'}"


def fact_words(name: str) -> str:
    """The heading of a figure that a round left."""
    return FACTS.get(name, name.replace("_", " "))


def fact_text(value: Any) -> str:
    """A figure that a round left, as people read it."""
    return number(value) if isinstance(value, float) else str(value)


def code_words(code: str) -> str:
    """What a refusal's code means, in a few words."""
    return CODES.get(code, code.replace("_", " "))


def epsilon_text(epsilon: float) -> str:
    """Three decimals, rounded up: a figure in the report is never below the one that was computed."""
    return str(Decimal(repr(epsilon)).quantize(Decimal("0.001"), ROUND_CEILING))


def factor_text(epsilon: float) -> str:
    """``e ** epsilon`` to read: ``2.718``, ``22,026``, and a power of ten where the number would be unreadable."""
    if epsilon > 20:
        return f"10^{epsilon / math.log(10):.1f}"
    return f"{math.exp(epsilon):,.0f}" if epsilon > 7 else f"{math.exp(epsilon):.4g}"


def number(value: float) -> str:
    """Up to four significant digits, ``1e-5`` and not ``1e-05``."""
    mantissa, e, exponent = f"{value:.4g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if e else mantissa


def probability_text(value: float) -> str:
    """Two significant digits, ``below 0.0001`` where more noughts would only be counted."""
    return "below 0.0001" if value < 1e-4 else f"{value:.2g}"


def whole_text(value: float) -> str:
    """``12,345``: rounded up, for bounds and counts of people."""
    return f"{math.ceil(value - 1e-9):,}"


def seconds_text(seconds: float) -> str:
    """``0.4 s``, ``12 s``, ``3 min 5 s``, ``2 h 10 min``."""
    if seconds < 10:
        return f"{seconds:.2g} s" if seconds < 1 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def rounds_text(rounds: Iterable[int], most: int = 6) -> str:
    """``1-4, 6, 8-12`` with en dashes; after ``most`` of these, an ellipsis."""
    runs: list[list[int]] = []
    for value in sorted(rounds):
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    texts = [f"{run[0]}–{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs]
    return ", ".join(texts if len(texts) <= most else [*texts[:most], "…"])


def names_text(names: Sequence[str], everyone: bool) -> str:
    """All names when they are few, else some and how many there are."""
    if len(names) <= 3:
        return ", ".join(names)
    if everyone:
        return f"{names[0]} … {names[-1]} ({len(names)} sites)"
    return f"{names[0]}, {names[1]} and {len(names) - 2} more"


def toml(study: Mapping[str, Any]) -> str:
    """A study, as stored in ``run.json``, as the TOML file it came from."""
    import tomli_w

    return tomli_w.dumps(study)
