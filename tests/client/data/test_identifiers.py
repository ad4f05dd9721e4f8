"""What may stand in a free-text field."""

import pytest

from client.data.identifiers import is_tool_text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "FSL5.0",
        "FSL3.3\x00 v2.25 NIfTI-1 Single file format",
        "spm - 3D normalized",
        "FreeSurfer 7.3.2",
        "ds002748 CC0 downsampled x2",
        "TE=2.5;Time=123456.780;phase=1",
        "dcm2niix v1.0.20",
        "SimpleITK",
        "none",
    ],
)
def test_tools_may_sign(text: str) -> None:
    assert is_tool_text(text.replace("\x00", " "))


@pytest.mark.parametrize(
    "text",
    [
        "Name: DOE^JANE 1950-01-02",
        "Jane",
        "SPM Jane",
        "12345678",
        "1950-01-02",
        "01.02.1950",
        "spm 19500102",
        "ward seven",
        "J\u00f6rg",
        "^",
        "http://example.org/u/jane",
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    assert not is_tool_text(text)
