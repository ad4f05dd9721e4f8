"""PNG and JPEG files."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from client.data.pictures import read_picture
from tests.client.data.builders import verdict, voxels, write_picture


def grey(size: tuple[int, int] = (32, 40)) -> Image.Image:
    return Image.fromarray(voxels(0, size))


def save(path: Path, image: Image.Image, **options: object) -> None:
    image.save(path, **options)


def coloured() -> Image.Image:
    return Image.merge("RGB", [grey(), grey(), Image.fromarray(voxels(1, (32, 40)))])


@pytest.mark.parametrize(
    ("expected", "image"),
    [
        ("accepted", grey()),
        ("accepted", grey().convert("RGB")),  # three equal channels are grey
        ("accepted", Image.fromarray(voxels(0, (32, 40)).astype(np.uint16) * 200)),
        ("colour", coloured()),
        ("colour", grey().convert("P")),
        ("colour", grey().convert("RGBA")),
        ("colour", grey().convert("LA")),
        ("colour", grey().convert("1")),
        ("constant", Image.new("L", (32, 32), 7)),
        ("too_small", grey((15, 40))),
    ],
)
def test_png(tmp_path: Path, expected: str, image: Image.Image) -> None:
    save(tmp_path / "a.png", image)
    assert verdict(tmp_path) == expected


@pytest.mark.parametrize(
    ("expected", "image"), [("accepted", grey()), ("accepted", grey().convert("RGB")), ("colour", coloured())]
)
def test_jpeg(tmp_path: Path, expected: str, image: Image.Image) -> None:
    save(tmp_path / "a.jpg", image)
    assert verdict(tmp_path) == expected


def test_sixteen_bits_keep_their_values(tmp_path: Path) -> None:
    values = voxels(0, (32, 40)).astype(np.uint16) * 200
    save(tmp_path / "a.png", Image.fromarray(values))
    np.testing.assert_array_equal(read_picture(tmp_path / "a.png").pixels, values)


def test_an_exif_rotation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    save(tmp_path / "a.jpg", grey(), exif=exif)
    assert read_picture(tmp_path / "a.jpg").pixels.shape == (40, 32)


def test_damaged_files(tmp_path: Path) -> None:
    whole = write_picture(tmp_path / "a.png").read_bytes()
    for content in (b"", b"<html>", whole[:20], whole[: len(whole) // 2]):
        (tmp_path / "a.png").write_bytes(content)
        assert verdict(tmp_path) in ("truncated", "unreadable")


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    whole = bytearray(write_picture(tmp_path / "a.png").read_bytes())
    import zlib

    for edge in (20000, 60000):  # below and above Pillow's own limit
        whole[16:24] = edge.to_bytes(4, "big") * 2
        whole[29:33] = zlib.crc32(whole[12:29]).to_bytes(4, "big")
        (tmp_path / "a.png").write_bytes(whole)
        assert verdict(tmp_path) == "too_large"


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("Comment", "Doe Jane", "identifier_in_header"),
        ("Software", "SimpleITK 2.3", "accepted"),
        ("XML:com.adobe.xmp", "<x/>", "identifier_in_header"),
    ],
)
def test_text_chunks(tmp_path: Path, key: str, text: str, expected: str) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_itxt(key, text)
    save(tmp_path / "a.png", grey(), pnginfo=info)
    assert verdict(tmp_path) == expected


def test_exif_text_and_several_frames(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[270] = "Doe Jane, 1950"
    (tmp_path / "exif").mkdir()
    save(tmp_path / "exif" / "a.jpg", grey(), exif=exif)
    assert verdict(tmp_path / "exif") == "identifier_in_header"
    (tmp_path / "frames").mkdir()
    save(tmp_path / "frames" / "a.png", grey(), save_all=True, append_images=[Image.fromarray(voxels(1, (32, 40)))])
    assert verdict(tmp_path / "frames") == "several_frames"
