"""Sites in one session, and the honest server's side of it, with sites that fall out at any stage of any step."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from client.identity import Member
from client.secagg import SiteRound
from client.secagg_session import SiteSession
from common.messages import Vector
from common.secagg.encoding import Encoding, Integers
from common.secagg.keys import AdvertisedKeys, Attempt
from server.attempt import SumPlan, check_keys
from server.secagg_session import SecureSteps
from tests.consortium import STUDY, members_of

STEP_STAGES = ("begin_step", "confirm_step", "open_step", "open_seeds")
INTEGERS = Encoding(value_range=1.0, fraction_bits=20, modulus_bits=32)
LARGEST = 2**31 - 1  # of a sum
Spoil = Callable[[str, Any], Any]
"""Changes an answer of a site; None loses it."""


def integers_of(names: Sequence[str], length: int, step: int = 1, seed: int = 0) -> dict[str, Integers]:
    """Random integers a site whose sum just fits."""
    random = np.random.default_rng([seed, step])
    most = LARGEST // len(names)
    return {name: random.integers(-most, most, length, endpoint=True) for name in names}


def discriminator_of(step: int) -> Vector:
    """What every site is shown in a step."""
    return np.full(3, step, np.float32)


class SessionConsortium:
    """Sites in one session, and the honest server's side of it.

    Args:
        names: the sites.
        length: coordinates of the integers.
        steps: of the session.
        minimum: fewest sites, for the server and every site.
        number: of the attempt.
        members: who the sites are; new ones when None.
        encoding: of the sums.
    """

    def __init__(
        self,
        names: Sequence[str],
        length: int = 7,
        steps: int = 3,
        minimum: int = 2,
        number: int = 1,
        members: Mapping[str, Member] | None = None,
        encoding: Encoding = INTEGERS,
    ) -> None:
        self.members = dict(members or members_of(names, minimum))
        roster = next(iter(self.members.values())).roster
        self.names, self.steps, self.gone = tuple(names), steps, set[str]()
        plan = SumPlan(Attempt(STUDY, number), 1, length, encoding, minimum, roster.digest, roster.sites)
        self.plan, self.minimum, self.keys = plan, minimum, dict[str, AdvertisedKeys]()
        self.sites: dict[str, SiteSession] = {}
        self.values: dict[str, Integers] = {}

    def advertise(self, gone: Collection[str] = ()) -> SecureSteps:
        """Everybody but ``gone`` advertises keys; the server begins a session with them."""
        for name in self.names:
            if name not in gone:
                begun = SiteRound(self.members[name], self.plan.attempt, self.minimum)
                self.keys[name] = begun.advertise_keys()
                check_keys(self.keys[name], name, self.plan)
                self.sites[name] = SiteSession.after(begun)
        self.gone.update(gone)
        return SecureSteps(self.plan, self.steps, self.keys)

    def share(self, server: SecureSteps, gone: Collection[str] = ()) -> None:
        self.gone.update(gone)
        for name, request in server.share_seed_requests().items():
            if name not in self.gone:
                server.take_sealed_seeds(name, self.sites[name].share_seed(request))

    def answer(self, name: str, request: Any) -> Any:
        """The genuine answer of a site to a request of a step."""
        site = self.sites[name]
        match type(request).__name__:
            case "StepRequest":
                site.begin_step(request)
                return site.masked_step(self.values[name], self.plan.encoding)
            case "ConfirmStepRequest":
                return site.confirm_step(request)
            case "OpenStepRequest":
                return site.open_step(request)
            case _:
                return site.open_seeds(request)

    def ask(self, server: SecureSteps, stage: str, spoil: Spoil | None = None, gone: Collection[str] = ()) -> None:
        """One exchange of a step; ``gone`` fall out for good before they answer it."""
        self.gone.update(gone)
        requests: Mapping[str, Any] = {
            "begin_step": lambda: server.step_requests(discriminator_of(server.step + 1)),
            "confirm_step": server.confirm_requests,
            "open_step": server.open_requests,
            "open_seeds": server.open_seeds_requests,
        }[stage]()
        take = {
            "begin_step": server.take_masked_step,
            "confirm_step": server.take_confirmation,
            "open_step": server.take_opened_step,
            "open_seeds": server.take_opened_seeds,
        }[stage]
        for name, request in requests.items():
            if name not in self.gone:
                reply = self.answer(name, request)
                reply = spoil(name, reply) if spoil else reply
                if reply is not None:
                    take(name, reply)

    def one_step(
        self,
        server: SecureSteps,
        values: Mapping[str, Integers],
        drops: Mapping[str, Collection[str]] | None = None,
        spoil: Mapping[str, Spoil] | None = None,
    ) -> Integers:
        """The sum of the next step; ``drops`` has the sites that fall out in it, by stage, for good."""
        self.values = dict(values)
        for stage in STEP_STAGES:
            if stage != "open_seeds" or server.missing or server.is_last:
                self.ask(server, stage, (spoil or {}).get(stage), (drops or {}).get(stage, ()))
        return server.result()
