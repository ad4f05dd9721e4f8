from pathlib import Path

import pytest
from pydantic import ValidationError

from client.settings import FILE_NAME, SiteSettings
from common.errors import ConfigError, SiteError

MARKER = "Zebra-4711"


def settings_of(folder: Path) -> SiteSettings:
    return SiteSettings(name="north", data=folder / "data", folder=folder, patients=("a", "b"), device="cpu")


def test_saved_settings_are_read_back(tmp_path: Path) -> None:
    settings = settings_of(tmp_path / "site")
    settings.save()
    assert SiteSettings.load(tmp_path / "site") == settings
    assert (tmp_path / "site" / FILE_NAME).stat().st_mode & 0o077 == 0


def test_the_folder_is_where_the_file_lies_whatever_it_says(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text('name = "north"\ndata = "data"\nfolder = "/elsewhere"\n')
    assert SiteSettings.load(tmp_path).folder == tmp_path


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (f'name = "{MARKER} x"\ndata = "d"', "name"),
        ('name = "north"', "data"),
        (f'name = "north"\ndata = "d"\ncolour = "{MARKER}"', "colour"),
        (f'name = "north"\ndata = "d"\ndevice = "{MARKER}"', "device"),
        (f'name = "../{MARKER}"\ndata = "d"', "name"),
        (f'name = "{MARKER}', "TOML"),
    ],
)
def test_wrong_settings_are_refused_by_key_without_values(content: str, found: str, tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text(content)
    with pytest.raises(SiteError, match=found) as caught:
        SiteSettings.load(tmp_path)
    assert MARKER not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SiteError, match="Cannot read"):
        SiteSettings.load(tmp_path / "none")


def test_checked_names_the_wrong_keys(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="name") as caught:
        SiteSettings.checked(name=f"{MARKER} x", data=tmp_path, folder=tmp_path)
    assert MARKER not in str(caught.value)


def test_settings_are_frozen(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        settings_of(tmp_path).name = "south"  # type: ignore[misc]


@pytest.mark.parametrize("key", ["roster_digest", "minimum_cohort", "allow_plain", "epsilon"])
def test_what_a_site_allows_stands_elsewhere(key: str, tmp_path: Path) -> None:
    """In ``policy.toml``: a rule that would be read past here must not look as if it held."""
    (tmp_path / FILE_NAME).write_text(f'name = "north"\ndata = "d"\n{key} = "{MARKER}"\n')
    with pytest.raises(SiteError, match=key) as caught:
        SiteSettings.load(tmp_path)
    assert MARKER not in str(caught.value)
