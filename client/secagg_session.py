"""The site's side of a session: many secure sums, step by step, on one set of keys. No files and no network.

| message | what the site does |
|---|---|
| ``share_seed`` | checks the cohort, draws a seed, deals shares of it; the mask key is dealt to nobody |
| ``begin_step`` | checks who takes part; in the first step opens shares and agrees on a secret with each partner |
| ``masked_step`` | masks the step's integers: a self mask from the seed, one mask with each partner taking part |
| ``confirm_step`` | signs the survivors |
| ``open_step`` | enough holders signed: opens its own mask's key, and the keys in common with those that dropped out |
| ``open_seeds`` | a share of the seed of each survivor that did not open the step, which is then out of the session |

As long as every survivor opens its own key, no share is touched. Keys come from seed, pair secret and ``keys.Step``:
step number, shared state and participants. Nothing but keys of single steps, and seeds, is ever opened.

**Guarantee.** The only thing of a step that derives from this site's patients is the masked vector, one a step at most:
steps are numbered, each is begun once, and only after this site opened the one before. Let h be the number of a
site's holders, itself included, t > 2h/3 the threshold, and c of the holders collude with the server. A site signs one
list of survivors a step, opens keys for that list only, masks only with participants that survived all steps before
(as it saw them) and whose seed it did not open. It follows, for any two honest sites v and w of which w holds v's seed:

1. In a whole session w opens a share of v's seed or keys of masks with v, never both. For w opens a share in a step
   whose survivors it signed with v among them. Before, v survived in all steps that w saw, so w opened no key with v;
   after it, w masks with v no more. And once w opened a key with v, v is no survivor for it, nor ever again.
2. If v opened its own key of a step, t of its holders signed v's list for the same step, state and participants. Of
   these t - 1 - c are honest others; they are on v's list and v on theirs, so neither end opens the masks between them.
3. If v's seed is opened, t - c honest others gave a share of it, since v itself never does, and by 1 none of them ever
   opens a key with v. v masks with t of its holders in every step, itself included; so with 2t - h - c of those at
   least. One that gave its share in an earlier step sends no vector in a step with v, so that nothing cancels its mask.

So v's vector of a step stays hidden, or comes in a sum with honest sites' whose masks with v nobody can open. With
every site a holder (up to ``neighbours.COMPLETE`` sites) and c < 2t - h, two lists cannot both find t signatures: the
one sum of a step that can be opened is that over all its survivors, at least t and at least the minimum. With
neighbours, a set of sites makes a sum of its own only when each that opened its own key has t - 1 of its picks, and
each whose seed was opened 2t - h of its picks (at holders that opened their own), in the set or colluding. For secret
picks and one site in twenty colluding no such set of up to a third of the sites exists, nor are 2t - h holders of one
site colluding, but with a chance of 2^-40; where no seed is opened, none of up to half of the sites.

So what is left to whom:

- t - 1 colluding holders and an honest server: all sites see the same lists, so the sum over the survivors, from which
  the colluders subtract their own vectors. Of a site that dropped out they know every pairwise mask and t - 1 shares of
  its seed: should its vector come late, its self mask still covers it.
- An active server, c < 2t - h, that shows two lists of survivors: one of them at most finds enough signatures. Two
  lists of participants, or two states: masks made for one do not cancel those made for the other, nor do its signatures
  and opened keys serve there.
- One that holds a masked vector back: its site counts as dropped, its partners open the keys in common; its self mask
  stays, for its seed is opened of a survivor only, and it is in no later step.
- One that has a seed opened by some holders now and by others later: each share that it gets is a pairwise mask that it
  never gets (1 and 3).
- One that ends the session anywhere: nothing more; what was opened belongs to steps that are over.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from client.attempt import SiteAttempt, bytes_by_name, common_fields, hex_by_name
from client.identity import Member
from client.secagg import SiteRound
from common.errors import BadPeer, OutOfOrder
from common.messages import (
    Confirmation,
    ConfirmStepRequest,
    MaskedStep,
    OpenedSeeds,
    OpenedStep,
    OpenSeedsRequest,
    OpenStepRequest,
    SealedSeeds,
    ShareSeedRequest,
    StepRequest,
)
from common.secagg import keys, masks
from common.secagg.encoding import Encoding, Integers

FOLLOWING = {
    "advertise_keys": ("share_seed",),
    "share_seed": ("begin_step",),
    "begin_step": ("masked_step",),
    "masked_step": ("confirm_step",),
    "confirm_step": ("open_step",),
    "open_step": ("open_seeds", "begin_step"),
    "open_seeds": ("begin_step",),
}


@dataclass(repr=False)
class SiteSession(SiteAttempt):
    """One session, as one site lives it. ``held`` has a share of the seed of each owner.

    Args:
        round: the round that all steps belong to.
        steps: how many there will be.
        step: the step that the site is in, 0 before the first.
        state: digest of what that step sums.
        seed: of this site's self masks, 32 bytes; empty before and after its time.
        pair_secrets: by partner, what this site and it share; empty before and after their time.
        remaining: the sites that may take part in the next step.
        participants: of the step.
        survivors: of the step.
    """

    round: int = 0
    steps: int = 0
    step: int = 0
    state: str = ""
    seed: bytes = b""
    pair_secrets: dict[str, bytes] = field(default_factory=dict)
    remaining: tuple[str, ...] = ()
    participants: tuple[str, ...] = ()
    survivors: tuple[str, ...] = ()

    @classmethod
    def after(cls, begun: SiteRound) -> "SiteSession":
        """Make a session of an attempt. Raises OutOfOrder unless all that happened in it are its keys."""
        if begun.stage != "advertise_keys":
            raise OutOfOrder(f"Expected no session after {begun.stage}.")
        return cls(
            begun.member,
            begun.attempt,
            begun.minimum_cohort,
            stage=begun.stage,
            share_private=begun.share_private,
            mask_private=begun.mask_private,
            cohort=begun.cohort,
        )

    # ------------------------------------------------------------ the stages

    def share_seed(self, request: ShareSeedRequest) -> SealedSeeds:
        """Check the cohort, draw the seed and deal shares of it.

        Raises:
            BadPeer: a cohort that no honest server names (``SiteAttempt.join``), or a session without steps.
            TooFewSurvivors: the cohort is below the minimum.
        """
        self._enter("share_seed")
        if request.steps < 1:
            raise BadPeer("Expected a session of at least one step.")
        self.join(request.cohort)
        self.round, self.steps, roster = request.round, request.steps, self.member.roster.digest
        self.agreed = keys.session_transcript(self.attempt, roster, request.cohort, self.round, self.steps)
        self.remaining, self.seed = tuple(sorted(self.cohort)), secrets.token_bytes(32)
        texts, digests = self.deal({"session_seed": self.seed})
        del texts[self.member.site]  # a site opens its own keys, never its own seed
        seed_digest = keys.commitment(self.attempt, "session_seed", self.member.site, "", self.seed)
        return SealedSeeds(self.attempt.number, self.seal(texts), digests["session_seed"], seed_digest)

    def begin_step(self, request: StepRequest) -> None:
        """Check who takes part, and in the first step open the shares. Nothing is computed before this succeeds.

        Raises:
            OutOfOrder: the step is not the next one of this session.
            BadPeer: another round, or a participant that fell out; in the first step, what ``SiteAttempt.unseal`` says.
            TooFewSurvivors: too few sites, or too few of this site's holders, take part.
        """
        self._enter("begin_step")
        if request.step != self.step + 1 or request.step > self.steps:
            raise OutOfOrder(f"Expected step {self.step + 1} of {self.steps}, found {request.step}.")
        if (request.study_digest, request.work.round) != (self.attempt.study_digest, self.round):
            raise BadPeer(f"Expected a step of round {self.round}, found another.")
        participants = self.check_list(request.participants, self.remaining)
        if request.step == 1:
            self._agree(request.sealed, participants)
        elif request.sealed:
            raise BadPeer("Expected shares in the first step only.")
        self.step, self.state, self.participants = request.step, request.work.digest, tuple(sorted(participants))
        self.survivors = ()

    def _agree(self, sealed: Mapping[str, bytes], participants: set[str]) -> None:
        self.unseal(sealed, participants, num_shares=1)
        private, site = keys.load(self.mask_private), self.member.site
        for other in (set(self.picks) & participants) | set(sealed):
            public = self.cohort[other].mask_key
            self.pair_secrets[other] = keys.pair_secret(private, public, self.transcript, site, other)
        self.share_private = self.mask_private = b""
        self.cohort, self.checked = {}, ()

    def masked_step(self, values: Integers, encoding: Encoding) -> MaskedStep:
        """Mask the integers of the step that was begun.

        Args:
            values: (dim,) int64, whose sum over all sites fits the encoding.
            encoding: of the session.

        Raises:
            OutOfOrder: no step was begun, or its vector was masked already.
        """
        self._enter("masked_step")
        step, site = self._step, self.member.site
        pair_keys = {other: step.pair_key(self.pair_secrets[other], site, other) for other in self._partners}
        self_key = step.self_key(self.seed, site)
        # What one of two partners adds, the other subtracts.
        all_masks = [(self_key, True), *((key, site < other) for other, key in pair_keys.items())]
        words = masks.masked_integers(values, encoding, all_masks)
        digests = {other: step.commitment(site, other, key) for other, key in pair_keys.items()}
        digests[site] = step.commitment(site, "", self_key)
        study, number = self.attempt.study_digest, self.attempt.number
        return MaskedStep(study, number, self.round, self.step, len(values), encoding.modulus_bits, digests, words)

    def confirm_step(self, request: ConfirmStepRequest) -> Confirmation:
        """Sign the survivors of the step.

        Raises:
            OutOfOrder: no vector of this step was masked.
            BadPeer: a survivor that did not take part, one twice, or this site left out.
            TooFewSurvivors: too few sites, or too few of this site's holders, survive.
        """
        self._enter("confirm_step", request.step)
        self.survivors = tuple(sorted(self.check_list(request.survivors, self.participants)))
        return Confirmation(self.attempt.number, self.member.identity.sign(self._step.confirmed(self.survivors)))

    def open_step(self, request: OpenStepRequest) -> OpenedStep:
        """Open the key of this site's own mask, and of each participant that dropped out that of the mask in common.

        Raises:
            BadPeer: a signature that is not a survivor's over the same survivors of the same step.
            TooFewSurvivors: fewer than the threshold of this site's holders confirmed.
        """
        self._enter("open_step", request.step)
        step, site = self._step, self.member.site
        self.check_confirmations(request.confirmations, self.survivors, step.confirmed(self.survivors))
        dropped = [other for other in self._partners if other not in self.survivors]
        pair_keys = {other: step.pair_key(self.pair_secrets[other], site, other) for other in dropped}
        self_key = step.self_key(self.seed, site)
        self._keep(self.survivors)
        if self.step == self.steps:
            self.seed, self.pair_secrets = b"", {}
        return OpenedStep(self.attempt.number, self.step, self_key, pair_keys)

    def open_seeds(self, request: OpenSeedsRequest) -> OpenedSeeds:
        """Give a share of the seed of each survivor that did not open the step, and never mask with it again.

        Raises:
            BadPeer: an owner that is no survivor of this step, this site itself, or one whose seed it holds no share
                of; nobody before the last step; keys of another attempt asked for before it.
        """
        self._enter("open_seeds", request.step)
        owners, last = set(request.owners), self.step == self.steps
        if len(owners) < len(request.owners) or not owners <= set(self.survivors) & set(self.held):
            raise BadPeer("Expected survivors of this step whose shares this site holds, each once.")
        if not last and (request.next_round or not owners):
            raise BadPeer("Expected seeds to open, and no end of the session before its last step.")
        opened = {owner: self.held[owner] for owner in sorted(owners)}
        self._keep(tuple(sorted(set(self.remaining) - owners)))
        if last:
            self.held = {}
        return OpenedSeeds(self.attempt.number, self.step, opened, None)

    # ------------------------------------------------------------ the step

    @property
    def _step(self) -> keys.Step:
        return keys.Step(self.transcript, self.step, self.state, self.participants)

    @property
    def _partners(self) -> list[str]:
        """The participants that share a mask with this site."""
        return [other for other in self.participants if other in self.pair_secrets]

    def _keep(self, names: tuple[str, ...]) -> None:
        """From now on only these take part; what this site shares with others is forgotten."""
        self.remaining = names
        self.held = {owner: share for owner, share in self.held.items() if owner in names}
        self.pair_secrets = {other: secret for other, secret in self.pair_secrets.items() if other in names}

    def _enter(self, stage: str, step: int | None = None) -> None:
        if stage not in FOLLOWING.get(self.stage, ()):
            raise OutOfOrder(f"Expected another stage after {self.stage}, found {stage}.")
        if step is not None and step != self.step:
            raise OutOfOrder(f"Expected {stage} of step {self.step}, found that of {step}.")
        self.stage = stage

    # ------------------------------------------------------------ between two messages

    def to_tree(self) -> dict[str, Any]:
        """Everything but the member, as JSON can hold it. Secret: see ``client/round_file.py``."""
        return {
            **self.common_tree(),
            "round": self.round,
            "steps": self.steps,
            "step": self.step,
            "state": self.state,
            "seed": self.seed.hex(),
            "pair_secrets": hex_by_name(self.pair_secrets),
            "remaining": self.remaining,
            "participants": self.participants,
            "survivors": self.survivors,
        }

    @classmethod
    def from_tree(cls, member: Member, tree: Mapping[str, Any]) -> "SiteSession":
        """The inverse of ``to_tree``."""
        return cls(
            member,
            **common_fields(tree),
            round=tree["round"],
            steps=tree["steps"],
            step=tree["step"],
            state=tree["state"],
            seed=bytes.fromhex(tree["seed"]),
            pair_secrets=bytes_by_name(tree["pair_secrets"]),
            remaining=tuple(tree["remaining"]),
            participants=tuple(tree["participants"]),
            survivors=tuple(tree["survivors"]),
        )
