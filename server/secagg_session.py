"""The server's side of a session: many secure sums, step by step, on one set of keys. No network.

| of a step | asked of |
|---|---|
| ``begin_step``: a masked vector | first those that shared a seed, then those that opened the step before |
| ``confirm_step``: a signature over the survivors | the survivors, those whose masked vector came |
| ``open_step``: the own mask's key, and the keys in common with partners that dropped out | those that confirmed |
| ``open_seeds``: shares of seeds, when a survivor did not open the step; after the last step, its end | who opened |

For each: what to ask of whom, then ``take`` of each answer. An answer that does not fit raises BadPeer and its site
counts as dropped. A survivor that does not open the step is out of the session once its seed is rebuilt; that needs
the threshold of its holders, and no participant that dropped out in the same step and had a mask in common with it:
that mask's key is known to the two of them only. Where it cannot be done TooFewSurvivors ends the session: nothing of
this step is decoded.
"""

from collections.abc import Iterable, Mapping

import numpy as np

from common.errors import BadPeer, OutOfOrder
from common.messages import (
    Confirmation,
    ConfirmStepRequest,
    JointRequest,
    MaskedStep,
    OpenedSeeds,
    OpenedStep,
    OpenSeedsRequest,
    OpenStepRequest,
    SealedSeeds,
    ShareSeedRequest,
    StepRequest,
    Vector,
)
from common.secagg import keys, masks
from common.secagg.encoding import Integers, decode_integers
from common.secagg.keys import AdvertisedKeys
from server.attempt import DONE, ServerAttempt, SumPlan

FOLLOWING = {
    "start": ("share_seed",),
    "share_seed": ("begin_step",),
    "begin_step": ("confirm_step",),
    "confirm_step": ("open_step",),
    "open_step": ("open_seeds", "opened"),
    "open_seeds": ("opened",),
    "opened": ("begin_step",),
}


class SecureSteps(ServerAttempt[SealedSeeds]):
    """One attempt at a session of sums.

    Args:
        plan: what is public about each sum.
        steps: how many sums there will be, at least 1.
        cohort: advertised keys by site, their signatures checked with ``check_keys``.
    """

    def __init__(self, plan: SumPlan, steps: int, cohort: Mapping[str, AdvertisedKeys]) -> None:
        super().__init__(plan, cohort)
        self.steps = steps
        self._agreed = keys.session_transcript(plan.attempt, plan.roster_digest, cohort.values(), plan.round, steps)
        self._step = keys.Step(self._agreed, 0, "", ())
        self._remaining: tuple[str, ...] = ()  # who may take part in the next step
        self._total = np.zeros(0, np.uint64)
        self._digests: dict[str, Mapping[str, bytes]] = {}  # by survivor, of its keys of the step
        self._confirmed: dict[str, bytes] = {}  # by site, its signature
        self._opened: dict[str, OpenedStep] = {}  # by survivor
        self._shares: dict[str, OpenedSeeds] = {}  # by holder

    @property
    def step(self) -> int:
        """The step that is asked for, 0 before the first."""
        return self._step.number

    @property
    def survivors(self) -> tuple[str, ...]:
        """The sites in the sum of this step."""
        return tuple(sorted(self._digests))

    @property
    def missing(self) -> tuple[str, ...]:
        """The survivors that did not open the step."""
        return tuple(name for name in self.survivors if name not in self._opened)

    @property
    def is_last(self) -> bool:
        """Whether no step follows."""
        return self.step == self.steps

    # ------------------------------------------------------------ share_seed

    def share_seed_requests(self) -> dict[str, ShareSeedRequest]:
        """Enter ``share_seed``."""
        self._enter("share_seed")
        self.check_minimum("advertise_keys", self.cohort)
        attempt, cohort = self.plan.attempt, tuple(self.cohort[name] for name in sorted(self.cohort))
        request = ShareSeedRequest(attempt.study_digest, attempt.number, self.plan.round, self.steps, cohort)
        return dict.fromkeys(self.cohort, request)

    def take_sealed_seeds(self, site: str, reply: SealedSeeds) -> None:
        """A site's dealt shares."""
        self.expect("share_seed", reply.attempt, site, self.cohort, self._dealt)
        self.check_dealt(site, reply.sealed, (reply.digests,))
        self._dealt[site] = reply

    # ------------------------------------------------------------ begin_step

    def step_requests(self, discriminator: Vector) -> dict[str, StepRequest]:
        """Enter ``begin_step`` of the next step.

        Args:
            discriminator: the shared state, flat float32.

        Raises:
            OutOfOrder: the last step is over.
            TooFewSurvivors: too few sites are left, or too few of some site's holders.
        """
        if self.is_last:
            raise OutOfOrder(f"Expected no step after {self.steps}.")
        before = self._where
        self._enter("begin_step")
        remaining = self.sharers if self.step == 0 else self._remaining
        self.check_minimum(before, remaining)
        self.check_holders(before, remaining, remaining)
        attempt = self.plan.attempt
        work = JointRequest(attempt.study_digest, self.plan.round, self.step + 1, discriminator)
        self._step = keys.Step(self._agreed, work.step, work.digest, remaining)
        self._total = np.zeros(self.plan.encoding.num_words(self.plan.length), np.uint64)
        self._digests, self._confirmed, self._opened, self._shares = {}, {}, {}, {}
        return {
            name: StepRequest(
                attempt.number, remaining, self.sealed_for(name, self._dealt) if work.step == 1 else {}, work
            )
            for name in remaining
        }

    def take_masked_step(self, site: str, reply: MaskedStep) -> None:
        """Add a site's masked vector to the total."""
        self._expect("begin_step", reply, site, self._step.participants, self._digests)
        facts = {
            "study": reply.study_digest,
            "round": reply.round,
            "length": reply.length,
            "modulus_bits": reply.modulus_bits,
        }
        self.check_masked(site, facts, len(reply.words))
        if set(reply.key_digests) != {site, *self._partners(site)}:
            raise BadPeer(f"Expected a digest of the key of every mask of {site}.")
        self._total += reply.words
        self._digests[site] = reply.key_digests

    # ------------------------------------------------------------ confirm_step

    def confirm_requests(self) -> dict[str, ConfirmStepRequest]:
        """Enter ``confirm_step``."""
        self._enter("confirm_step")
        where = f"begin_step {self.step}"
        self.check_minimum(where, self._digests)
        self.check_holders(where, self._digests, self._digests)
        attempt = self.plan.attempt
        request = ConfirmStepRequest(attempt.study_digest, attempt.number, self.step, self.survivors)
        return dict.fromkeys(self.survivors, request)

    def take_confirmation(self, site: str, reply: Confirmation) -> None:
        """A site's signature over the survivors of this step."""
        self.expect("confirm_step", reply.attempt, site, self._digests, self._confirmed)
        keys.check_signature(self.plan.identities[site], reply.signature, self._step.confirmed(self.survivors))
        self._confirmed[site] = reply.signature

    # ------------------------------------------------------------ open_step

    def open_requests(self) -> dict[str, OpenStepRequest]:
        """Enter ``open_step``: to every site that confirmed the signatures of its holders, as many as it needs."""
        self._enter("open_step")
        self.check_holders(f"confirm_step {self.step}", self._confirmed, self._confirmed)
        attempt = self.plan.attempt
        return {
            name: OpenStepRequest(
                attempt.study_digest, attempt.number, self.step, self.confirmations_for(name, self._confirmed)
            )
            for name in sorted(self._confirmed)
        }

    def take_opened_step(self, site: str, reply: OpenedStep) -> None:
        """The keys that a site opens. Raises BadPeer for one that does not suit the digests it sent with its vector."""
        self._expect("open_step", reply, site, self._confirmed, self._opened)
        if set(reply.pair_keys) != set(self._dropped_partners(site)):
            raise BadPeer(f"Expected keys in common with each partner of {site} that dropped out, and no others.")
        digests = self._digests[site]
        right = [self._step.commitment(site, "", reply.self_key) == digests[site]]
        right += [self._step.commitment(site, other, key) == digests[other] for other, key in reply.pair_keys.items()]
        if not all(right):
            raise BadPeer(f"Expected the keys of the masks that {site} used, found others.")
        self._opened[site] = reply

    # ------------------------------------------------------------ open_seeds

    def open_seeds_requests(self, next_round: int = 0) -> dict[str, OpenSeedsRequest]:
        """Enter ``open_seeds``: for the seeds of the missing, and after the last step for its end. Empty for neither.

        Args:
            next_round: of the attempt after this one, for which the sites shall send keys; 0 for none. Only after the
                last step.

        Raises:
            TooFewSurvivors: a seed cannot be rebuilt, or would not be enough. Nothing was asked for.
        """
        self._enter("open_seeds")
        where = f"open_step {self.step}"
        for name in self.missing:
            if self._dropped_partners(name):
                self.too_few(where, f"the key that {name} and a site that dropped out have in common", 0)
        self.check_holders(where, self.missing, self._opened)
        attempt, requests = self.plan.attempt, {}
        for name in sorted(self._opened):
            owners = tuple(owner for owner in self.missing if name in self.holders(owner))
            if owners or self.is_last:
                following = next_round if self.is_last else 0
                requests[name] = OpenSeedsRequest(attempt.study_digest, attempt.number, self.step, owners, following)
        return requests

    def take_opened_seeds(self, site: str, reply: OpenedSeeds) -> None:
        """The shares that a site gives. A wrong one is passed over when the seed is rebuilt."""
        self._expect("open_seeds", reply, site, self._opened, self._shares)
        self._shares[site] = reply

    # ------------------------------------------------------------ the sum

    def result(self) -> Integers:
        """Remove every mask: the sum of the survivors' integers of this step, (dim,) int64.

        Raises:
            TooFewSurvivors: too few right shares of some seed.
            BadPeer: a site dealt shares that do not belong to the mask it used. Nothing is decoded.
        """
        missing = self.missing
        self._enter("opened")
        removed = [(self._opened[name].self_key, False) for name in self._opened]
        removed += [(self._key_of_missing(name), False) for name in missing]
        for name, opened in self._opened.items():
            removed += [(key, not name < dropped) for dropped, key in opened.pair_keys.items()]
        masks.apply(self._total, removed)
        self._remaining = tuple(sorted(self._opened))
        if self.is_last:
            self.stage = DONE
        return decode_integers(self._total, self.plan.encoding, self.plan.length)

    def _key_of_missing(self, owner: str) -> bytes:
        found = {holder: reply.shares[owner] for holder, reply in self._shares.items() if owner in reply.shares}
        dealt = self._dealt[owner]
        seed = self.rebuilt(f"open_seeds {self.step}", "session_seed", owner, found, dealt.digests)
        if seed and keys.commitment(self.plan.attempt, "session_seed", owner, "", seed) == dealt.seed_digest:
            key = self._step.self_key(seed, owner)
            if self._step.commitment(owner, "", key) == self._digests[owner][owner]:
                return key
        self.stage = DONE
        raise BadPeer(f"{owner} dealt shares that do not belong to its mask; nothing was decoded.")

    # ------------------------------------------------------------ who is who, and order

    def _partners(self, site: str) -> list[str]:
        """The participants that have a mask in common with this one."""
        return [each for each in self._step.participants if each != site and self.are_partners(site, each)]

    def _dropped_partners(self, site: str) -> list[str]:
        return [each for each in self._partners(site) if each not in self._digests]

    @property
    def _where(self) -> str:
        return "share_seed" if self.step == 0 else f"open_step {self.step}"

    def _expect(
        self,
        stage: str,
        reply: MaskedStep | OpenedStep | OpenedSeeds,
        site: str,
        asked: Iterable[str],
        answered: Iterable[str],
    ) -> None:
        self.expect(stage, reply.attempt, site, asked, answered)
        if reply.step != self.step:
            raise BadPeer(f"Expected step {self.step} from {site}, found {reply.step}.")

    def _enter(self, stage: str) -> None:
        if stage not in FOLLOWING.get(self.stage, ()):
            raise OutOfOrder(f"Expected another stage after {self.stage}, found {stage}.")
        self.stage = stage
