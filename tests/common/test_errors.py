import pytest

from common import errors
from common.errors import BadPeer, BudgetExhausted, FederationError


def leaves(kind: type[FederationError]) -> list[type[FederationError]]:
    below = kind.__subclasses__()
    return [kind] if not below else [leaf for each in below for leaf in leaves(each)]


def every(kind: type[FederationError]) -> list[type[FederationError]]:
    return [kind, *(each for below in kind.__subclasses__() for each in every(below))]


@pytest.mark.parametrize("kind", every(FederationError)[1:])
def test_every_error_has_a_bare_code_and_an_exit_status(kind: type[FederationError]) -> None:
    assert kind.code.replace("_", "").isalpha() and kind.code == kind.code.lower()
    assert kind.exit_status in (2, 3, 4, 5)
    assert kind.__name__ in (errors.__doc__ or "")


def test_codes_differ() -> None:
    codes = [kind.code for kind in every(FederationError)[1:]]
    assert len(set(codes)) == len(codes)
    assert {kind.code for kind in leaves(FederationError)} >= {"bad_peer", "budget_exhausted"}


def test_the_text_says_what_and_what_to_do() -> None:
    error = BadPeer("Expected a, found b.", "Do c.")
    assert (error.message, error.remedy, str(error)) == ("Expected a, found b.", "Do c.", "Expected a, found b. Do c.")
    assert str(BudgetExhausted("Spent.")) == "Spent."
