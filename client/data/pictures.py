"""PNG and JPEG files to checked grey images.

Text in the file's fields is refused; text burned into the pixels is not searched for. Markers such as L and R are usual
in radiographs, and nothing in these formats tells them from a name: whoever exports the pictures must look.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

from client.data.identifiers import is_tool_text
from client.data.pixels import MIN_PIXELS, Picture, Refused, check_size, check_values
from common.quiet import quiet

SUFFIXES = (".png", ".jpg", ".jpeg")
_GREY_MODES = ("L", "I;16", "I;16B", "I;16L", "I;16N", "I", "F")
_HARMLESS_INFO = frozenset(
    "dpi gamma srgb icc_profile chromaticity aspect transparency interlace compression jfif jfif_version jfif_unit "
    "jfif_density progressive progression adobe adobe_transform exif photoshop bkgd background".split()
)
_TEXTUAL_EXIF = {
    270: "ImageDescription", 315: "Artist", 33432: "Copyright", 37510: "UserComment", 34853: "GPSInfo",
    40091: "XPTitle", 40092: "XPComment", 40093: "XPAuthor", 40094: "XPKeywords", 40095: "XPSubject",
    42032: "CameraOwnerName", 269: "DocumentName", 316: "HostComputer",
}  # fmt: skip
_EXIF_IFD, _ORIENTATION = 34665, 274
_JPEG_CHROMA_TOLERANCE = 2  # a grey image stored as colour JPEG comes back with channels this close


def read_picture(path: Path) -> Picture:
    """Reads and checks one PNG or JPEG file.

    Args:
        path: an 8 or 16 bit grey image, or an RGB one whose channels are equal.

    Returns:
        The image, upright (an EXIF orientation is applied).

    Raises:
        Refused: for everything that cannot be trusted.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with quiet():  # Pillow warns of large images, which check_size refuses
            with Image.open(path, formats=("PNG", "JPEG")) as image:
                check_size((image.height, image.width))
                if min(image.height, image.width) < MIN_PIXELS:
                    raise Refused("too_small", f"expected at least {MIN_PIXELS}x{MIN_PIXELS} pixels, found fewer")
                if getattr(image, "n_frames", 1) != 1:
                    raise Refused("several_frames", "expected one image, found several frames")
                if image.mode not in (*_GREY_MODES, "RGB"):
                    raise Refused("colour", "expected grey values, found a palette, transparency, colour or bitmap")
                image.load()
                _check_text(image)
                upright = ImageOps.exif_transpose(image) if image.getexif().get(_ORIENTATION, 1) != 1 else image
                pixels = _grey(np.asarray(upright), image.format == "JPEG")
    except Refused:
        raise
    except Image.DecompressionBombError as error:
        raise Refused("too_large", "expected an image of moderate size, the header announces far more") from error
    except UnidentifiedImageError as error:
        raise Refused("unreadable", "expected a PNG or JPEG file, found something else") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        code = "truncated" if "truncat" in str(error).lower() else "unreadable"
        raise Refused(code, "expected a whole image, the file ends early or is damaged") from error
    check_values(pixels)
    return Picture(pixels, (1.0, 1.0))


def _grey(pixels: Any, is_jpeg: bool) -> Any:
    if pixels.ndim == 3:  # (rows, columns, 3)
        spread = int(np.ptp(pixels, axis=2).max())
        if spread > (_JPEG_CHROMA_TOLERANCE if is_jpeg else 0):
            raise Refused("colour", "expected grey values, found three channels that differ")
        pixels = pixels[:, :, 1]
    return np.ascontiguousarray(pixels, dtype=np.float32)


def _check_text(image: Any) -> None:
    """Refuses text chunks and EXIF fields that hold free text."""
    for key, value in image.info.items():
        name = str(key).casefold()
        if name in _HARMLESS_INFO or not isinstance(value, (str, bytes)):
            continue
        text = value.decode("latin-1") if isinstance(value, bytes) else value
        if name.startswith(("xml:", "raw profile", "xmp")) or not is_tool_text(text):
            field = name if re.fullmatch(r"[a-z :_-]{1,20}", name) else "of another name"
            raise Refused("identifier_in_header", f"expected no free text in the image file, found a field {field}")
    exif = image.getexif()
    tags = dict(exif) | dict(exif.get_ifd(_EXIF_IFD)) if exif else {}
    for tag, field in _TEXTUAL_EXIF.items():
        if tag in tags and (tag == 34853 or not is_tool_text(str(tags[tag]))):
            raise Refused("identifier_in_header", f"expected no free text in the EXIF data, found {field}")
