"""What a site allows: ``policy.toml`` in the site's folder, written by the site alone and read at every decision.

**Guarantee.** Default deny: what the file does not allow is refused, and without a file that can be trusted nothing is
allowed. Decisions are made in ``client/decision.py``.

| edge case | what happens |
|---|---|
| no file, not readable, not TOML, an unknown, missing or wrong key | ``PolicyError``: the site does not take part |
| everyone may write the file, or the folder that it is in | ``PolicyError``: anyone could have widened it |
| the file is a link | followed; the file it leads to and both folders are judged |
| a data folder is listed twice | refused: two budgets for the same patients would be two answers |
| a folder inside a listed one, or around it | not listed |
| privacy is off, and the data are not declared public | refused; no budget covers it |
"""

import json
import os
import re
import stat
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from common.config import Algorithm
from common.errors import ConfigError, PolicyError
from common.files import write_atomically
from common.privacy.accounting import Budget

FILE_NAME = "policy.toml"
Hex64 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Output = Literal["masked_updates", "plain_updates"]
_ROSTER_LINE = re.compile(r"""^([ \t]*roster_digest[ \t]*=[ \t]*)("[^"\r\n]*"|'[^'\r\n]*')(?!["'])""", re.MULTILINE)


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, allow_inf_nan=False)


class DataPolicy(_Table):
    """One folder of images and the most that may ever be spent on any of its patients.

    Args:
        folder: absolute.
        epsilon: with ``delta``, over all studies and runs together.
        delta: of the budget.
        public: everyone has these images already: a study may train on them without privacy.
    """

    folder: Path
    epsilon: Annotated[float, Field(strict=True, gt=0)]
    delta: Annotated[float, Field(strict=True, gt=0, lt=1)]
    public: Annotated[bool, Field(strict=True)] = False

    @field_validator("folder")
    @classmethod
    def _absolute(cls, folder: Path) -> Path:
        try:
            usable = folder.is_absolute() and b"\0" not in str(folder).encode()
        except UnicodeEncodeError:
            usable = False
        if not usable:
            raise ValueError("must be a whole path that begins with /, in UTF-8")
        return folder

    @property
    def budget(self) -> Budget:
        """Epsilon and delta as the accountant takes them."""
        return Budget(self.epsilon, self.delta)


class Policy(_Table):
    """What a site allows.

    Args:
        roster_digest: the consortium's roster that this site has checked and pinned; "" for none yet.
        minimum_cohort: the site joins no sum over fewer sites.
        colluding_sites: where sites share the noise of a sum, at least so many must be able to tell theirs.
        study_digests: studies that may use the site.
        study_signers: Ed25519 public keys; a study signed by one of them may use the site as well.
        algorithms: how may be trained.
        outputs: what may leave the site.
        largest_sampling_probability: of a patient at a step.
        minimum_patients: the site takes part with no fewer patients, in the contract and in its data.
        data: the folders of images that may be used.
    """

    roster_digest: Annotated[str, Field(pattern="^([0-9a-f]{64})?$")] = ""
    minimum_cohort: Annotated[int, Field(strict=True, ge=2)]
    colluding_sites: Annotated[int, Field(strict=True, ge=0)] = 1
    study_digests: tuple[Hex64, ...] = ()
    study_signers: tuple[Hex64, ...] = ()
    algorithms: tuple[Algorithm, ...] = ()
    outputs: tuple[Output, ...] = ()
    largest_sampling_probability: Annotated[float, Field(strict=True, gt=0, le=1)]
    minimum_patients: Annotated[int, Field(strict=True, ge=1)]
    data: tuple[DataPolicy, ...] = ()

    def data_of(self, folder: Path) -> DataPolicy:
        """What is listed for a folder of images. Raises PolicyError when it is not listed exactly once."""
        found = [data for data in self.data if data.folder.resolve() == folder.resolve()]
        if len(found) != 1:
            raise PolicyError(
                f"The policy lists the folder {folder.resolve()} {'more than once' if found else 'nowhere'}.",
                f"Give it one [[data]] block in {FILE_NAME}.",
            )
        return found[0]

    def budget_of(self, folder: Path) -> Budget:
        """The budget of each patient in a folder of images. Raises PolicyError when it is not listed exactly once."""
        return self.data_of(folder).budget

    @classmethod
    def checked(cls, **keys: object) -> Self:
        """A policy from keyword arguments. Raises ConfigError that names the wrong keys, without their values."""
        try:
            return cls.model_validate(keys)
        except ValidationError as error:
            raise ConfigError(f"Not a policy: {_wrong_keys(error)}.", "Correct them.") from None

    @classmethod
    def load(cls, site_folder: Path) -> Self:
        """Read the policy in a site's folder. Raises PolicyError: missing, wrong, or anyone may write it."""
        path = site_folder / FILE_NAME
        try:
            return cls.model_validate(tomllib.loads(_read_trusted(path).decode()))
        except OSError as error:
            raise PolicyError(
                f"Cannot read {path}: {error.strerror}. Without a policy a site allows nothing.",
                "Make one with `synthward policy init FOLDER`, or correct the file's rights.",
            ) from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise PolicyError(f"{path} is not TOML: {_without_bytes(error)}.", "Correct the line.") from None
        except ValidationError as error:
            raise PolicyError(f"{path} is not a policy: {_wrong_keys(error)}.", "Correct these keys.") from None

    def save(self, site_folder: Path) -> None:
        """Write the policy with an explanation of every key, for its owner's eyes only."""
        write_atomically(site_folder / FILE_NAME, self._to_toml().encode(), mode=0o600)

    def _to_toml(self) -> str:
        tree = self.model_dump(mode="json")
        blocks = tree.pop("data")
        text = _TEXT.format(**{key: _line(key, value) for key, value in tree.items()})
        tables = "\n".join(f"[[data]]\n{tomli_w.dumps(block)}" for block in blocks)
        return text + (tables or "data = []\n")


def set_roster_digest(site_folder: Path, digest: str) -> None:
    """Pin another roster in an existing policy: one value changes, all else stays as it was written.

    Raises:
        ConfigError: not a digest. Nothing is changed.
        PolicyError: there is no policy, or it has not one plain line ``roster_digest = "..."``. Nothing is changed.
    """
    path = site_folder / FILE_NAME
    wanted = Policy.checked(**{**Policy.load(site_folder).model_dump(), "roster_digest": digest})
    text, num_lines = _ROSTER_LINE.subn(rf'\g<1>"{digest}"', path.read_bytes().decode())
    if num_lines != 1 or Policy.model_validate(tomllib.loads(text)) != wanted:
        raise PolicyError(
            f'{path} has not exactly one line roster_digest = "...".', "Write the line as `synthward policy init` does."
        )
    target = path.resolve()  # of a link, what it leads to: the link stays
    write_atomically(target, text.encode(), mode=stat.S_IMODE(target.stat().st_mode))


# ---------------------------------------------------------------- the file


def _read_trusted(path: Path) -> bytes:
    """The content of a file that only its owner and group may change. Raises OSError or PolicyError."""
    with open(path, "rb", opener=_open_at_once) as file:
        status = os.fstat(file.fileno())  # what is judged is what is read
        if not stat.S_ISREG(status.st_mode):
            raise PolicyError(f"{path} is no file.", "Make a policy with `synthward policy init FOLDER`.")
        folders = {path.parent.resolve(), path.resolve().parent}
        writable = [place for place in sorted(folders) if place.stat().st_mode & stat.S_IWOTH]
        if status.st_mode & stat.S_IWOTH:
            writable.insert(0, path)
        if writable:
            raise PolicyError(
                f"Everyone may write {writable[0]}, so anyone could have widened the policy.",
                f"Read it again, then: chmod o-w {writable[0]}",
            )
        return file.read()


def _open_at_once(name: str, flags: int) -> int:
    return os.open(name, flags | os.O_NONBLOCK)  # else a pipe waits for a writer


def _line(key: str, value: object) -> str:
    """A key with its value; a short list on one line."""
    short = isinstance(value, list) and len(value) < 2
    return f"{key} = {json.dumps(value)}" if short else tomli_w.dumps({key: value}).strip()


def _wrong_keys(error: ValidationError) -> str:
    """Every wrong key with the reason; values never appear."""
    return "; ".join(_wrong_key(item) for item in error.errors(include_url=False, include_input=False))


def _wrong_key(item: Mapping[str, Any]) -> str:
    reasons = {"extra_forbidden": "no such key", "missing": "the key is missing"}
    reason = reasons.get(item["type"], item["msg"].removeprefix("Value error, "))
    place = " ".join(f"(number {part + 1})" if isinstance(part, int) else str(part) for part in item["loc"])
    return f"{place}: {reason}"


def _without_bytes(error: ValueError) -> str:
    return "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)


_TEXT = """\
# What this site allows. Synthward reads this file whenever it decides about a study.
# Whatever is not allowed here is refused. Nothing that the coordinator or the server sends can change this file.
#
# Lines that begin with # explain and have no effect. Texts stand in "quotes"; a list stands in [brackets] with commas
# between its entries, and [] is an empty list. After a change, run `synthward policy check FOLDER STUDY.toml`: it shows
# rule by rule what is allowed to a study, what is refused, and why.
#
# Let only those people change this file who answer for the patients' data. When everyone with an account on this
# computer may change it, Synthward trusts it no longer and takes part in nothing.


# ---- Which studies may use this site?

# Studies that are allowed, each by its digest: 64 letters and digits that change when anything in the study changes,
# its speed settings excepted. `synthward study digest STUDY.toml` prints it. Read a study before you list it here.
{study_digests}

# People whose studies are allowed when they have signed them, each by their public key: 64 letters and digits.
# They can change a study and sign it again without asking you; all other rules of this file still hold.
# When this list and the one above are both empty, no study is allowed.
{study_signers}

# Ways of training that are allowed:
#   "local":   the networks are trained here, inside this site, on its own images.
#   "joint":   the coordinator trains; at every step this site adds what its own images say, and noise.
#   "moments": this site tells once, with noise, what its images look like on average; the coordinator trains by that.
# The budget below covers all three together, and the audit.
{algorithms}

# What may leave this site:
#   "masked_updates": what was learned, hidden under a mask. The server can read only the sum over several sites.
#   "plain_updates":  what was learned, as it is. The server can read what this site alone has learned.
# Patients' images never leave. In studies with differential privacy both carry the noise that protects patients. With
# "local", and with "plain_updates", it is all this site's own. In "masked_updates" of "joint" and "moments" the sites
# share it: this site adds a part, and relies on the others' parts (see colluding_sites below).
{outputs}


# ---- Together with whom?

# The smallest number of sites in a sum that this site takes part in. The more sites, the less a sum says about one.
{minimum_cohort}

# Where the sites share the noise that protects patients, some of them might tell the server their parts. A study must
# be so careful that patients stay protected even when this many other sites do.
{colluding_sites}

# The digest of the consortium's list of sites and their keys, which this site has compared with the coordinator.
# `synthward site pin` writes it. While it is "", this site sends no masked updates.
{roster_digest}


# ---- With how many patients?

# The smallest number of patients, in a study's contract with this site and in its data: one of many is harder to find.
{minimum_patients}

# How likely each patient may be drawn for one step of training, at most: 0.5 is every second patient on average,
# 1 is every patient at every step. Patients who are drawn rarely are better protected by the same noise.
{largest_sampling_probability}


# ---- Which images, and how much may ever be learned about one patient?
#
# One block that begins with [[data]] for each folder of images. A folder without a block is never used.
#
#   folder   The folder of images, as a whole path that begins with /.
#   epsilon  The budget: the most that may ever be spent on any one patient, all studies and all years together.
#            A smaller number protects better. Compared with results made without a patient, all results together can
#            change the odds of any guess about this patient by a factor of e to the power of epsilon at most: 2.7 for
#            epsilon 1, 55 for 4, about 3000 for 8.
#            A study whose synthetic images are audited for memorised patients needs room for that as well, as
#            `synthward policy check` shows: beside its training, and for patients it never trains on.
#            When the budget is spent, this site stops. What was spent is in its ledger: `synthward ledger show FOLDER`.
#   delta    How likely, at most, the promise of epsilon may fail. It must be 1 / (10 x number of patients) or less:
#            0.0001 or less for 1000 patients. 0.0001 may also be written 1e-4.
#   public   true only when anyone may have these images anyway, such as a published collection: studies without any
#            protection of patients are then allowed on them. false for the images of a hospital's patients.

"""
