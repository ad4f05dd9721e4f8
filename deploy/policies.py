"""``synthward policy`` and ``synthward study``: what a site allows, and who vouches for a study."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client import ledger
from client.decision import Rule, decide
from client.identity import ROSTER_FILE
from client.policy import FILE_NAME, Policy
from client.settings import SiteSettings
from common import study_signature
from common.config import StudyConfig
from common.errors import ConfigError, PolicyError, SiteError
from common.files import write_atomically
from common.identity import load_private_key
from common.secagg.roster import load_roster
from deploy.ledgers import spent_by

# What a new policy says of the rules that nobody was asked about. Its owner reads and changes the file.
FIRST_MINIMUM_PATIENTS, FIRST_SAMPLING_PROBABILITY = 20, 0.5


def init(folder: Path, epsilon: float, delta: float, minimum_cohort: int, public: bool) -> None:
    """Write a site's first policy, which allows no study yet, and its empty ledger.

    Args:
        folder: the site's, with its settings.
        epsilon: the budget for each patient of the site's data, at ``delta``.
        delta: of the budget.
        minimum_cohort: the site joins no sum over fewer sites.
        public: everyone has the images anyway.

    Raises:
        SiteError: the site has no settings.
        ConfigError: there is a policy already, or a value is wrong. Nothing is written.
        LedgerError: the site has trained without a ledger. Nothing is written.
    """
    settings, path = SiteSettings.load(folder), folder / FILE_NAME
    if os.path.lexists(path):
        raise ConfigError(f"{path} exists already.", "Edit it: what it says was decided.")
    pinned = folder / ROSTER_FILE
    policy = Policy.checked(
        roster_digest=load_roster(pinned).digest if pinned.exists() else "",
        minimum_cohort=minimum_cohort,
        algorithms=("local", "joint", "moments"),
        outputs=("masked_updates",),
        largest_sampling_probability=FIRST_SAMPLING_PROBABILITY,
        minimum_patients=FIRST_MINIMUM_PATIENTS,
        data=({"folder": settings.data.absolute(), "epsilon": epsilon, "delta": delta, "public": public},),
    )
    if not (folder / ledger.FILE_NAME).exists():  # one that is there is kept: what was spent stays spent
        ledger.create(folder)
    policy.save(folder)
    print(f"{path}   what this site allows: no study yet. Read it, every line")
    print(f"{folder / ledger.FILE_NAME}   what this site has spent: back it up with {ledger.HEAD_FILE}, change neither")
    print("To allow a study, add its digest (`synthward study digest STUDY.toml`) to study_digests in the policy, or")
    print(f"its signer's public key to study_signers. Then ask: synthward policy check {folder} STUDY.toml")


def check(folder: Path, study_path: Path, signature_path: Path | None, as_json: bool) -> None:
    """Print what each rule of the site's policy says to a study, and the verdict.

    Args:
        folder: the site's.
        study_path: the study.
        signature_path: its signature; None for the one beside the study, if there is one.
        as_json: for programs.

    Raises:
        PolicyError: there is no policy that can be trusted, or, after printing, it refuses the study.
        SiteError: the site has no settings or no data.
        LedgerError: what was spent cannot be told.
        ConfigError: no study, or no signature where one was said to be.
    """
    settings, policy, study = SiteSettings.load(folder), Policy.load(folder), StudyConfig.from_toml(study_path)
    signature = _read_signature(study_path, signature_path)
    rules = decide(policy, settings, study, signature, spent_by(settings, study))
    refused = [rule.name for rule in rules if not rule.allowed]
    verdict = f"refused, because of: {', '.join(refused)}" if refused else "allowed"
    if as_json:
        listed = [{"rule": rule.name, "allowed": rule.allowed, "why": rule.why} for rule in rules]
        print(json.dumps({"study": study.digest, "allowed": not refused, "rules": listed}, indent=2))
    else:
        _print(rules)
        print(f"{settings.name} and the study {study.name}: {verdict}")
    if refused:
        raise PolicyError(f"The study {study.name} is {verdict}.", f"Only this site changes its {FILE_NAME}.")


def study_digest(study_path: Path) -> None:
    """Print the digest of a study, as a policy lists it. Raises ConfigError."""
    print(StudyConfig.from_toml(study_path).digest)


def study_sign(study_path: Path, key_path: Path) -> None:
    """Sign a study with the private key that ``synthward site keygen`` made; the signature goes beside the study.

    Raises:
        ConfigError: no study, no Ed25519 private key, or a key that others can read.
    """
    study, key = StudyConfig.from_toml(study_path), _signing_key(key_path)
    signature = study_signature.sign(key, study.digest)
    write_atomically(signature_file(study_path), f"{signature.hex()}\n".encode())
    print(f"{signature_file(study_path)}   goes with the study {study.digest}")
    print(f"public key {key.public_key().public_bytes_raw().hex()}   sites add it to study_signers in their policy")


def signature_file(study_path: Path) -> Path:
    """Where the signature of a study lies."""
    return study_path.with_name(f"{study_path.name}.sig")


def read_signature(path: Path) -> bytes:
    """The signature in a file; whose it is, and of what, is not asked here. Raises ConfigError."""
    try:
        return bytes.fromhex(path.read_text(encoding="ascii"))
    except OSError as error:
        raise ConfigError(f"Cannot read the signature {path}: {error.strerror}.", "Give an existing file.") from None
    except ValueError:
        raise ConfigError(f"{path} is no signature.", "Give the file that `synthward study sign` wrote.") from None


def _read_signature(study_path: Path, signature_path: Path | None) -> bytes:
    path = signature_path or signature_file(study_path)
    return read_signature(path) if signature_path or path.exists() else b""


def _print(rules: Sequence[Rule]) -> None:
    width = max(len(rule.name) for rule in rules)
    for rule in rules:
        print(f"{rule.name:<{width}}  {'allowed' if rule.allowed else 'REFUSED'}  {rule.why}")


def _signing_key(path: Path) -> Ed25519PrivateKey:
    try:
        return load_private_key(path)
    except SiteError as error:  # the wrong argument of a command, not a fault of a site
        raise ConfigError(error.message, "Give the identity.key that `synthward site keygen` made.") from None
