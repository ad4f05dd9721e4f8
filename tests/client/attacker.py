"""A server without scruples: it asks whatever it likes, keeps every answer, and removes every mask it can compute."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray
from scipy.stats import chisquare

from client.identity import Member
from client.policy import Policy
from client.round_file import ROUND_FILE
from client.secagg import SiteRound
from client.settings import SiteSettings
from client.training import STATE_FILE
from common.config import StudyConfig
from common.errors import FederationError, OutOfOrder
from common.messages import (
    AdvertiseKeysRequest,
    Confirmation,
    ConfirmSurvivorsRequest,
    MaskedInput,
    MaskedInputRequest,
    Refusal,
    Reply,
    Request,
    SealedShares,
    ShareKeysRequest,
    TrainRequest,
    UnmaskRequest,
    UnmaskShares,
)
from common.secagg import keys, masks, neighbours, shares
from common.secagg.encoding import Encoding, Words, decode
from common.secagg.keys import AdvertisedKeys, Attempt, Transcript
from tests.client.secure_sites import ask, copy_of, secure_site
from tests.client.sites import request_of
from tests.consortium import ENCODING, NOTHING, STUDY, members_of, vectors_of

Floats = NDArray[np.float32]
STAGES = ("advertise_keys", "share_keys", "masked_input", "confirm_survivors", "unmask")


class Sites(Protocol):
    """The honest sites, however they are reached."""

    study_digest: str
    names: tuple[str, ...]
    encoding: Encoding
    train: TrainRequest

    def ask(self, name: str, request: Request) -> Reply: ...
    def identity(self, name: str) -> Ed25519PrivateKey: ...
    def roster_digest(self) -> str: ...
    def vector(self, name: str) -> Floats: ...
    def in_an_attempt(self, name: str) -> bool: ...
    def snapshot(self) -> Any: ...
    def restored(self, snapshot: Any, folder: Path) -> "Sites": ...


class Machines:
    """SiteRound objects in memory. A refusal ends the attempt, as ``client/round_file.py`` does it.

    Args:
        names: the sites.
        minimum: fewest sites of a sum.
        length: coordinates of the vectors.
        members: who the sites are; new ones when None.
    """

    def __init__(
        self,
        names: Sequence[str],
        minimum: int = 2,
        length: int = 4000,
        members: Mapping[str, Member] | None = None,
    ) -> None:
        self.study_digest, self.names, self.encoding = STUDY, tuple(names), ENCODING
        self.members = dict(members or members_of(names, minimum))
        self.minimum, self.vectors = minimum, vectors_of(names, length)
        self.rounds: dict[str, SiteRound] = {}
        self.train = TrainRequest(STUDY, 1, NOTHING, NOTHING)

    def ask(self, name: str, request: Request) -> Reply:
        if isinstance(request, AdvertiseKeysRequest):
            attempt = Attempt(request.study_digest, request.attempt)
            if name not in self.rounds or self.rounds[name].attempt.number < request.attempt:
                self.rounds[name] = SiteRound(self.members[name], attempt, self.minimum)
        elif name in self.rounds and request.attempt != self.rounds[name].attempt.number:  # type: ignore[union-attr]
            return Refusal(OutOfOrder.code)
        try:
            return self._answer(name, request)
        except FederationError as error:
            self.rounds.pop(name, None)
            return Refusal(error.code)

    def _answer(self, name: str, request: Request) -> Reply:
        if name not in self.rounds:
            raise OutOfOrder("in no attempt")
        site = self.rounds[name]
        match request:
            case AdvertiseKeysRequest():
                return site.advertise_keys()
            case ShareKeysRequest():
                return site.share_keys(request)
            case MaskedInputRequest():
                site.open_shares(request)
                return site.masked_input(self.vectors[name], self.encoding, request.work.round)[0]
            case ConfirmSurvivorsRequest():
                return site.confirm_survivors(request)
            case UnmaskRequest():
                opened = site.unmask(request)
                del self.rounds[name]
                return opened
        raise AssertionError(request)

    def identity(self, name: str) -> Ed25519PrivateKey:
        return self.members[name].identity

    def roster_digest(self) -> str:
        return next(iter(self.members.values())).roster.digest

    def vector(self, name: str) -> Floats:
        return self.vectors[name]

    def in_an_attempt(self, name: str) -> bool:
        return name in self.rounds

    def snapshot(self) -> dict[str, Any]:
        return {name: site.to_tree() for name, site in self.rounds.items()}

    def restored(self, snapshot: dict[str, Any], folder: Path) -> "Machines":
        copy = Machines(self.names, self.minimum, 1, self.members)
        copy.vectors, copy.train = self.vectors, self.train
        copy.rounds = {name: SiteRound.from_tree(self.members[name], tree) for name, tree in snapshot.items()}
        return copy


class Folders:
    """Sites on disk, asked through Flower's app; they train on phantom patients.

    Args:
        folders: the site's folder by name.
        study: the study.
        scratch: where snapshots go.
    """

    def __init__(self, folders: Mapping[str, Path], study: StudyConfig, scratch: Path) -> None:
        self.study, self.folders, self._scratch = study, dict(folders), scratch
        self.study_digest, self.names = study.digest, tuple(folders)
        self.encoding, self.train = study.encoding, request_of(study)
        self._snapshots = 0

    def ask(self, name: str, request: Request) -> Reply:
        return ask(self.folders[name], self.study, request)

    def identity(self, name: str) -> Ed25519PrivateKey:
        return secure_site(self.folders[name], self.study).member.identity

    def roster_digest(self) -> str:
        return Policy.load(next(iter(self.folders.values()))).roster_digest

    def study_folder(self, name: str) -> Path:
        return SiteSettings.load(self.folders[name]).study_folder(self.study_digest)

    def vector(self, name: str) -> Floats:
        """The newest update, as the site itself keeps it; the study weighs all sites alike."""
        state = torch.load(self.study_folder(name) / STATE_FILE, weights_only=True)
        return np.concatenate([state["generator"].numpy(), state["discriminator"].numpy()])

    def in_an_attempt(self, name: str) -> bool:
        return (self.study_folder(name) / ROUND_FILE).exists()

    def snapshot(self) -> dict[str, Path]:
        self._snapshots += 1
        return copy_of(self.folders, self._scratch / f"snapshot-{self._snapshots}")

    def restored(self, snapshot: dict[str, Path], folder: Path) -> "Folders":
        return Folders(copy_of(snapshot, folder), self.study, self._scratch)


class Attacker:
    """The server's side of one attempt. Left alone it is honest; every request can be made otherwise.

    Args:
        sites: the sites.
        number: of the attempt.
        colluders: sites (of ``Machines``) whose every secret the server reads.
    """

    def __init__(self, sites: Sites, number: int = 1, colluders: Sequence[str] = ()) -> None:
        self.sites, self.number, self.colluders = sites, number, tuple(colluders)
        self.keys: dict[str, AdvertisedKeys] = {}
        self.dealt: dict[str, SealedShares] = {}
        self.masked: dict[str, MaskedInput] = {}
        self.told: dict[str, tuple[str, ...]] = {}  # by site, the sharers it masked for
        self.shown: dict[str, str] = {}  # by site, digest of the shared state it trained from
        self.confirmed: dict[str, bytes] = {}
        self.opened: dict[str, UnmaskShares] = {}
        self.private: dict[str, bytes] = {}  # of colluders: mask keys
        self.pooled: dict[str, dict[str, bytes]] = {}  # of colluders: by holder and owner, both shares

    # ------------------------------------------------------------ what it asks

    def ask(self, name: str, request: Request) -> Reply:
        """Ask, keep the answer, and read the colluders' secrets before and after."""
        self._read(name)
        reply = self.sites.ask(name, request)
        self._read(name)
        match reply:
            case AdvertisedKeys():
                self.keys[name] = reply
            case SealedShares():
                self.dealt[name] = reply
            case MaskedInput() if isinstance(request, MaskedInputRequest):
                self.masked[name], self.told[name] = reply, request.sharers
                self.shown[name] = request.work.digest
            case Confirmation():
                self.confirmed[name] = reply.signature
            case UnmaskShares():
                self.opened[name] = reply
        return reply

    def walk(
        self,
        last: str,
        first: str = STAGES[0],
        names: Sequence[str] | None = None,
        asked: Sequence[str] | None = None,
    ) -> None:
        """Walk the stages honestly from ``first`` to ``last``; ``names`` take part, and of them ``asked`` are asked."""
        for stage in STAGES[STAGES.index(first) : STAGES.index(last) + 1]:
            for name in asked or names or self.sites.names:
                reply = self.ask(name, self.request(stage, name, names))
                assert not isinstance(reply, Refusal), (stage, name, reply)

    def request(self, stage: str, name: str, names: Sequence[str] | None = None) -> Request:
        """What an honest server asks this site in this stage, when ``names`` take part."""
        names = tuple(names or self.sites.names)
        match stage:
            case "advertise_keys":
                return AdvertiseKeysRequest(self.sites.study_digest, self.number, 1)
            case "share_keys":
                return self.share_keys([self.keys[each] for each in names if each in self.keys])
            case "masked_input":
                return self.masked_input(name, [each for each in names if each in self.dealt])
            case "confirm_survivors":
                return self.confirm_survivors([each for each in names if each in self.masked])
            case _:
                return self.unmask({each: self.confirmed[each] for each in names if each in self.confirmed})

    def share_keys(self, cohort: Sequence[AdvertisedKeys]) -> ShareKeysRequest:
        return ShareKeysRequest(self.sites.study_digest, self.number, tuple(cohort))

    def masked_input(
        self, name: str, sharers: Sequence[str], sealed: Mapping[str, bytes] | None = None
    ) -> MaskedInputRequest:
        if sealed is None:
            sealed = {each: self.dealt[each].sealed[name] for each in sharers if each != name and each in self.dealt}
        return MaskedInputRequest(self.number, tuple(sharers), sealed, self.sites.train)

    def confirm_survivors(self, survivors: Sequence[str]) -> ConfirmSurvivorsRequest:
        return ConfirmSurvivorsRequest(self.sites.study_digest, self.number, tuple(survivors))

    def unmask(self, confirmations: Mapping[str, bytes]) -> UnmaskRequest:
        return UnmaskRequest(self.sites.study_digest, self.number, dict(confirmations), next_round=1)

    def refused(self, name: str, request: Request, code: str) -> None:
        """The site refuses with this code."""
        reply = self.ask(name, request)
        assert reply == Refusal(code), f"expected {code}, found {reply}"

    # ------------------------------------------------------------ what it knows

    @property
    def transcript(self) -> Transcript:
        """What everybody agreed on, when all were shown the true keys."""
        return keys.make_transcript(
            Attempt(self.sites.study_digest, self.number), self.sites.roster_digest(), self.keys.values()
        )

    def sign(self, colluder: str, survivors: Sequence[str]) -> bytes:
        """A colluder's signature over whatever list."""
        return self.sites.identity(colluder).sign(keys.confirmed(self.transcript, survivors))

    def shares_of(self, kind: str, owner: str) -> dict[str, bytes]:
        """By holder, every share of an owner's secret that was opened or that a colluder holds."""
        size = shares.SHARE_BYTES
        part = slice(0, size) if kind == "self_mask" else slice(size, 2 * size)
        found = {holder: held[owner][part] for holder, held in self.pooled.items() if owner in held}
        for holder, opened in self.opened.items():
            by_owner = opened.self_masks if kind == "self_mask" else opened.mask_keys
            if owner in by_owner:
                found[holder] = by_owner[owner]
        return found

    def secret_of(self, kind: str, owner: str, found: Mapping[str, bytes] | None = None) -> bytes | None:
        """The secret behind the shares at hand, None when they do not give the right one."""
        if kind == "mask_key" and owner in self.private:
            return self.private[owner]
        found = self.shares_of(kind, owner) if found is None else found
        point = {name: position for position, name in enumerate(sorted(self.keys), start=1)}
        try:
            secret = shares.rebuild({point[name]: share for name, share in found.items()})
        except ValueError:
            return None
        if kind == "mask_key":
            return secret if keys.public_half(secret) == self.keys[owner].mask_key else None
        right = keys.commitment(self.transcript.attempt, "seed", owner, "", secret) == self.dealt[owner].seed_digest
        return secret if right else None

    def remainder(self, victim: str) -> Words:
        """The victim's masked vector without every mask that can be computed: (num_words,) words."""
        total = self.masked[victim].words.copy()
        removed = []
        seed = self.secret_of("self_mask", victim)
        if seed:
            removed.append((keys.self_mask_key(seed, self.transcript, victim), False))
        for other in self.told[victim]:
            for one, end in ((victim, other), (other, victim)):
                private = self.secret_of("mask_key", one) if other != victim else None
                if private:
                    loaded, shared = keys.load(private), self.keys[end].mask_key
                    key = keys.pairwise_key(loaded, shared, self.transcript, self.shown[victim], victim, other)
                    removed.append((key, not victim < other))
                    break
        masks.apply(total, removed)
        return total

    def finds(self, victim: str) -> bool:
        """Whether the victim's vector lies open, to the last rounding."""
        found = decode(self.remainder(victim), self.sites.encoding, self.masked[victim].length)
        return bool(np.abs(found - self.sites.vector(victim)).max() < 2.0**-self.sites.encoding.fraction_bits)

    def assert_nothing_is_left(self, victim: str) -> None:
        """The victim's attempt is over, whatever is asked; and its vector never left or is still uniformly random."""
        assert not self.sites.in_an_attempt(victim)
        for stage in STAGES[1:]:
            self.refused(victim, self.request(stage, victim), "out_of_order")
        self.assert_hidden(victim)

    def assert_hidden(self, victim: str) -> None:
        """Too few shares of one secret or the other, and what is left of the masked vector is uniform."""
        if victim not in self.masked:
            return
        threshold = neighbours.threshold_of(len(self.keys))
        kinds = [len(self.shares_of(kind, victim)) for kind in ("self_mask", "mask_key")]
        assert min(kinds) < threshold, kinds
        rest = self.remainder(victim)
        assert uniformity(rest) > TOO_UNEVEN
        assert not self.finds(victim)

    def _read(self, name: str) -> None:
        if name not in self.colluders or not isinstance(self.sites, Machines) or name not in self.sites.rounds:
            return
        site = self.sites.rounds[name]
        if site.mask_private:
            self.private[name] = site.mask_private
        self.pooled.setdefault(name, {}).update(site.held)


TOO_UNEVEN = 1e-9  # masks come from the system's source, so the tests' own failures must be this rare


def uniformity(words: Words) -> float:
    """The chance that uniform words are as uneven as these: chi-square over the values of all their bytes."""
    return float(chisquare(np.bincount(words.view(np.uint8), minlength=256)).pvalue)


def forged(
    attempt: Attempt, site: str, signer: Ed25519PrivateKey, share: bytes = b"", mask: bytes = b""
) -> AdvertisedKeys:
    """Keys in a site's name that somebody else signed; fresh ones where none are given."""
    fresh = [keys.public_half(bytes([number]) * 32) for number in (7, 8)]
    return keys.advertise(signer, attempt, site, share or fresh[0], mask or fresh[1])
