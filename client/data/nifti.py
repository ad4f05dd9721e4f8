"""Single-file NIfTI-1 and NIfTI-2 to a checked RAS volume.

The header is read and judged before any voxel; then exactly as many bytes are read as it announces, so neither a
wrong header nor a gzip bomb can take more memory than ``pixels.MAX_VOXELS`` allows.

Design note, on affines. Where qform and sform claim the same space they must agree to half a voxel over the whole
volume. Where their codes differ (scanner and template, say) they may differ by a registration, but must name the
same axes. A shear of more than one degree is refused: voxels would no longer be boxes, and a slice no longer a
picture. An oblique volume is accepted and read along its own nearest axes. A mirrored volume whose header claims
otherwise cannot be recognised by anyone.
"""

import gzip
import math
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from client.data.geometry import canonical
from client.data.identifiers import is_tool_text
from client.data.pixels import Refused, Volume, check_size, check_spacing, check_values, check_volume_shape

SUFFIXES = (".nii", ".nii.gz")
_DICOM_EXTENSION = 2
_MAX_EXTENSION_BYTES = 2**24
_MAX_SHEAR_COSINE = float(np.sin(np.deg2rad(1.0)))
_MM_PER_UNIT = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # xyzt_units: unknown, metre, millimetre, micrometre
_MAX_FORM_CODE = 5
_TEXT_FIELDS = ("descrip", "aux_file", "db_name", "intent_name")

_Affine = npt.NDArray[np.float64]


def read_volume(path: Path) -> Volume:
    """Reads and checks one NIfTI file.

    Args:
        path: a ``.nii`` or ``.nii.gz`` file.

    Returns:
        The volume in the closest RAS order, scaled by the header's slope, trailing axes of length 1 dropped.

    Raises:
        Refused: for everything that cannot be trusted.
    """
    header, content = _read_checked(path)
    affine = _check_affine(header)
    try:
        slope, intercept = header.get_slope_inter()
    except Exception as error:  # nibabel refuses infinite scaling
        raise Refused("unreadable", "expected a finite slope and intercept, found others") from error
    shape = _spatial_shape(header)
    raw = np.frombuffer(content, header.get_data_dtype(), math.prod(shape), int(header["vox_offset"]))
    with np.errstate(all="ignore"):  # what overflows is refused as not finite
        voxels = raw.reshape(shape, order="F").astype(np.float32)
        if slope is not None:
            voxels = voxels * np.float32(slope) + np.float32(intercept)
    volume = canonical(voxels, affine)
    check_volume_shape(volume.voxels.shape)
    check_values(volume.voxels)
    return volume


def _read_checked(path: Path) -> tuple[Any, bytes]:
    """The parsed header and the whole file, no longer than the header announces."""
    with path.open("rb") as raw:
        zipped = path.name.lower().endswith(".gz")
        _check_start(raw.read(64), zipped)
        raw.seek(0)
        if not zipped:
            return _read_stream(raw)
        with gzip.GzipFile(fileobj=raw) as stream:
            try:
                return _read_stream(stream)
            except EOFError as error:
                raise Refused("truncated", "expected a whole gzip stream, it ends early") from error
            except (gzip.BadGzipFile, zlib.error) as error:
                raise Refused("unreadable", "expected a gzip stream, it is damaged") from error


def _check_start(start: bytes, zipped: bool) -> None:
    if not start:
        raise Refused("truncated", "expected a NIfTI file, found an empty one")
    if start.startswith(b"version https://git-lfs"):
        raise Refused("unreadable", "expected a NIfTI file, found a git-LFS pointer; fetch the data first")
    if zipped != start.startswith(b"\x1f\x8b"):
        if zipped:
            raise Refused("unreadable", "expected gzip content under a .gz name, found something else")
        raise Refused("wrong_extension", "expected plain NIfTI under .nii, found gzip content; name it .nii.gz")


def _read_stream(stream: IO[bytes] | gzip.GzipFile) -> tuple[Any, bytes]:
    from nibabel.nifti1 import Nifti1Header
    from nibabel.nifti2 import Nifti2Header

    header_class: Any
    start = stream.read(4)
    sizes = {int.from_bytes(start, "little"), int.from_bytes(start, "big")}
    if 348 in sizes:
        header_class, length, magic = Nifti1Header, 348, b"n+1"
    elif 540 in sizes:
        header_class, length, magic = Nifti2Header, 540, b"n+2"
    else:
        raise Refused("unreadable", "expected a NIfTI header, found something else")
    start += stream.read(length + 4 - len(start))
    if len(start) < length + 4:
        raise Refused("truncated", "expected a NIfTI header, the file ends inside it")
    endianness = "<" if int.from_bytes(start[:4], "little") == length else ">"
    header: Any = header_class(start[:length], endianness=endianness, check=False)
    if bytes(header["magic"].tobytes())[:3] != magic:
        raise Refused("unreadable", "expected the mark of a single-file NIfTI in the header, found another")
    expected = _check_header(header, length + 4)
    body = stream.read(expected - len(start))
    if len(start) + len(body) < expected:
        raise Refused("truncated", "expected as many voxels as the header announces, the file ends early")
    if stream.read(1):  # the only byte ever read beyond what was announced
        raise Refused("size_mismatch", "expected the file to end after its voxels, it goes on")
    content = start + body
    _check_text(header, content[length : int(header["vox_offset"])])
    return header, content


def _check_header(header: Any, minimum_offset: int) -> int:
    """Judges shape and data type; returns the file's expected length in bytes."""
    dim = [int(x) for x in header["dim"]]
    if not 1 <= dim[0] <= 7:
        raise Refused("bad_dimensions", "expected 1 to 7 dimensions, the header announces another number")
    shape = dim[1 : dim[0] + 1]
    check_size(tuple(shape))
    while len(shape) > 3 and shape[-1] == 1:
        shape.pop()
    if len(shape) > 3:
        raise Refused("four_d", f"expected one volume, found {len(shape)} dimensions (a time series?)")
    if len(shape) < 3 or min(shape) == 1:
        raise Refused("two_d", "expected a volume, found a single slice")
    try:
        dtype = header.get_data_dtype()
    except Exception as error:
        raise Refused("unreadable", "expected a known NIfTI data type, found another") from error
    if dtype.fields is not None:
        raise Refused("colour", "expected grey values, found RGB voxels")
    if dtype.kind == "c":
        raise Refused("complex", "expected real values, found complex ones")
    if dtype.kind not in "iuf":
        raise Refused("unsupported_pixels", "expected whole or floating-point values, found another kind")
    offset = float(header["vox_offset"])
    if not (minimum_offset <= offset <= minimum_offset + _MAX_EXTENSION_BYTES and offset == int(offset)):
        raise Refused("unreadable", "expected the voxels to start right after the header, found another offset")
    return int(offset) + math.prod(shape) * int(dtype.itemsize)


def _spatial_shape(header: Any) -> tuple[int, int, int]:
    dim = header["dim"]
    return int(dim[1]), int(dim[2]), int(dim[3])


def _check_affine(header: Any) -> _Affine:
    """The affine in millimetres, the sform first."""
    from nibabel.orientations import aff2axcodes

    scale = _MM_PER_UNIT.get(int(header["xyzt_units"]) & 7)
    if scale is None:
        raise Refused("implausible_voxel_size", "expected a length unit in the header, found an unknown code")
    sform_code, qform_code = int(header["sform_code"]), int(header["qform_code"])
    if max(sform_code, qform_code) > _MAX_FORM_CODE:
        raise Refused("no_affine", "expected a known code for the orientation in the header, found another")
    if sform_code <= 0 and qform_code <= 0:
        raise Refused("no_affine", "expected an orientation, the header says that neither qform nor sform is set")
    forms = []
    try:
        for code, form in ((sform_code, header.get_sform), (qform_code, header.get_qform)):
            if code > 0:
                forms.append(np.asarray(form(), dtype=np.float64))
    except Exception as error:
        raise Refused("singular_affine", "expected a usable orientation, the quaternion cannot be decoded") from error
    for form in forms:
        lengths = np.linalg.norm(form[:3, :3], axis=0)
        if not np.isfinite(form).all() or lengths.min() <= 0 or abs(np.linalg.det(form[:3, :3] / lengths)) < 1e-3:
            raise Refused("singular_affine", "expected an invertible affine, found a singular one")
    if len(forms) == 2 and not _agree(header, forms[0], forms[1], sform_code == qform_code, aff2axcodes):
        raise Refused("qform_sform_disagree", "expected qform and sform to agree, they place the voxels differently")
    affine: _Affine = forms[0] * np.array([[scale]] * 3 + [[1.0]])
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    if np.abs(np.triu(axes.T @ axes, 1)).max() > _MAX_SHEAR_COSINE:
        raise Refused("sheared_affine", "expected perpendicular axes, the affine shears them by more than a degree")
    check_spacing(tuple(np.linalg.norm(affine[:3, :3], axis=0)))
    return affine


def _agree(header: Any, sform: _Affine, qform: _Affine, same_space: bool, axcodes: Any) -> bool:
    if not same_space:
        return bool(axcodes(sform) == axcodes(qform))
    ends = np.array(_spatial_shape(header)) - 1
    corners = np.array([[x, y, z, 1] for x in (0, ends[0]) for y in (0, ends[1]) for z in (0, ends[2])]).T  # (4, 8)
    apart = np.linalg.norm((sform @ corners - qform @ corners)[:3], axis=0).max()
    return bool(apart <= 0.5 * np.linalg.norm(sform[:3, :3], axis=0).min())


def _check_text(header: Any, extensions: bytes) -> None:
    for field in _TEXT_FIELDS:
        if field in header and not is_tool_text(_text(header[field].tobytes())):
            raise Refused("identifier_in_header", f"expected no free text in the header field {field}, found some")
    order = "little" if header.endianness == "<" else "big"
    if not extensions[0]:  # the first of four bytes says whether extensions follow
        if any(extensions[4:]):
            raise Refused("identifier_in_header", "expected nothing between header and voxels, found undeclared data")
        return
    position = 4
    while position + 8 <= len(extensions):
        size = int.from_bytes(extensions[position : position + 4], order)  # type: ignore[arg-type]
        code = int.from_bytes(extensions[position + 4 : position + 8], order)  # type: ignore[arg-type]
        if size < 8 or position + size > len(extensions):
            break
        body = extensions[position + 8 : position + size]
        if any(body) and (code == _DICOM_EXTENSION or not is_tool_text(_text(body))):
            raise Refused("identifier_in_header", f"expected no header extension with content, found code {code}")
        position += size
    if any(extensions[position:]):
        raise Refused("identifier_in_header", "expected whole header extensions, found stray bytes after them")


def _text(field: bytes) -> str:
    return field.decode("latin-1").replace("\x00", " ").strip()
