"""Where a site keeps things: one TOML file in the site's folder. What it allows stands in ``client/policy.py``."""

import tomllib
from pathlib import Path
from typing import Literal, Self

import tomli_w
from pydantic import BaseModel, ConfigDict, ValidationError

from common.config import SiteName
from common.errors import ConfigError, SiteError
from common.files import writable_by_everyone, write_atomically

FILE_NAME = "site.toml"


class SiteSettings(BaseModel):
    """Where a site keeps its images and its own files.

    Args:
        name: the site's name in the study's contract.
        data: folder of images, read only.
        folder: folder of this file: policy, ledger, keys, state, prepared images, log. Nothing in it leaves the site.
        record_is_patient: count every image as a patient of its own. Only for data without patients.
        device: where to train.
        patients: only these patients take part; None for all in ``data``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    name: SiteName
    data: Path
    folder: Path
    record_is_patient: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    patients: tuple[str, ...] | None = None

    def study_folder(self, study_digest: str) -> Path:
        """Where the site keeps what belongs to one study; made when absent."""
        folder = self.folder / "studies" / study_digest[:16]
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder

    @classmethod
    def checked(cls, **settings: object) -> Self:
        """Settings from keyword arguments. Raises ConfigError that names the wrong keys."""
        try:
            return cls.model_validate(settings)
        except ValidationError as error:
            keys = "; ".join(f"{item['loc'][0]}: {item['msg']}" for item in error.errors(include_input=False))
            raise ConfigError(f"Wrong settings of a site: {keys}.", "Correct them.") from None

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read ``site.toml`` of a site's folder. Raises SiteError when it is missing or wrong."""
        path = folder / FILE_NAME
        try:
            if writable_by_everyone(path):
                raise SiteError(f"Everyone may write {path}, which says whose images are used.", f"chmod 600 {path}")
            tree = tomllib.loads(path.read_text())
            return cls.model_validate({**tree, "folder": folder})
        except OSError as error:
            raise SiteError(
                f"Cannot read {path}: {error.strerror}.", "Give the folder of a site: `synthward site init` makes one."
            ) from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise SiteError(f"{path} is not TOML: {error}.", "Correct the line.") from None
        except ValidationError as error:
            keys = ", ".join(".".join(map(str, item["loc"])) for item in error.errors(include_input=False))
            raise SiteError(f"{path} has missing, unknown or wrong keys: {keys}.", "Correct these keys.") from None

    def save(self) -> None:
        """Write ``site.toml`` into the site's folder, which is made when absent, for its owner's eyes only."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        tree = self.model_dump(mode="json", exclude={"folder"}, exclude_none=True)
        write_atomically(self.folder / FILE_NAME, tomli_w.dumps(tree).encode(), mode=0o600)
