"""Which files of a folder look like images, and what their names and headers say about whose they are."""

import os
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from client.data import nifti, pictures
from client.data.pixels import Refused
from client.data.records import Format, Kind, Refusal

_UNSUPPORTED = (
    ".mgz", ".mgh", ".mnc", ".par", ".rec", ".brik", ".head", ".hdr", ".img", ".nrrd", ".nhdr", ".mha", ".mhd", ".bmp",
    ".tif", ".tiff", ".gif", ".webp", ".jp2", ".hdr.gz", ".img.gz", ".brik.gz", ".nia", ".svs",
)  # fmt: skip
_TEXT = (".json", ".tsv", ".csv", ".txt", ".md", ".bval", ".bvec", ".toml", ".yaml", ".yml", ".xml", ".html", ".pdf")
_DICOM_NAMES = (".dcm", ".dicom", ".ima")
_BESIDE_BIDS = ("derivatives", "sourcedata", "code", "stimuli")
_NOT_ANATOMICAL = frozenset(("func", "dwi", "fmap", "perf", "pet", "meg", "eeg", "ieeg", "nirs", "mrs", "micr"))
_T1W = re.compile(r".*_T1w\.nii(\.gz)?")
_SUBJECT = re.compile(r"sub-[0-9A-Za-z]+")
_SUBJECT_IN_NAME = re.compile(r"(sub-[0-9A-Za-z]+)_.*")


@dataclass(frozen=True)
class Candidate:
    """Files that may be one image.

    Attributes:
        patient_hint: a patient id from the path or the DICOM header, or None.
        problem: why it is refused unread, or None.
        identifying: the header field that refuses it once its geometry was judged, or None.
    """

    files: tuple[Path, ...]
    kind: Kind
    format: Format
    patient_hint: str | None = None
    problem: Refused | None = None
    identifying: str | None = None


@dataclass
class Found:
    """What a walk through the folder collects."""

    candidates: list[Candidate] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    left_out: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def discover(root: Path) -> Found:
    """Walks the folder. Hidden files, and folders that are links, are left alone.

    **Guarantee.** Whether a file is a candidate depends on the files of its own subject alone, and on nothing but
    itself where no subject is known.

    Args:
        root: an existing folder.

    Returns:
        Candidates in the order of their paths, so that two runs agree.
    """
    found = Found()
    niftis: list[Path] = []
    dicoms: list[Path] = []
    others = 0
    for path in _walk(root, found):
        name = path.name.lower()
        if name.endswith(nifti.SUFFIXES):
            niftis.append(path)
        elif name.endswith(pictures.SUFFIXES):
            found.candidates.append(Candidate((path,), "image", "image", subject_of(path.relative_to(root))))
        elif name.endswith(_UNSUPPORTED):
            reason = "expected single-file NIfTI, DICOM, PNG or JPEG, found another image format; convert it"
            found.refusals.append(Refusal(path.relative_to(root).as_posix(), "unsupported_format", reason))
        elif name.endswith(_TEXT) or name == "dicomdir":
            continue
        elif not _sort_unnamed(path, root, found, dicoms):
            others += 1
    if others:
        found.notes.append(f"{others} other files hold no image that is known here and were left alone.")
    _add_niftis(niftis, root, found)
    _add_dicoms(dicoms, root, found)
    found.candidates.sort(key=lambda candidate: candidate.files[0])
    return found


def _walk(root: Path, found: Found) -> Iterator[Path]:
    def unreadable(error: OSError) -> None:
        where = Path(error.filename).relative_to(root).as_posix() if error.filename else "."
        found.refusals.append(Refusal(where, "unreadable", "expected a folder that can be listed"))

    for folder, folders, files in os.walk(root, onerror=unreadable):
        here = Path(folder)
        kept = sorted(name for name in folders if not name.startswith("."))
        links = [name for name in kept if (here / name).is_symlink()]
        beside = [name for name in kept if here == root and name in _BESIDE_BIDS]
        if links:
            found.notes.append(f"{len(links)} folders are links and were not followed.")
        if beside:
            found.notes.append(f"Folders beside the raw data were left out: {', '.join(beside)}.")
        folders[:] = [name for name in kept if name not in links and name not in beside]
        for name in sorted(files):
            if not name.startswith("."):
                yield here / name


def _sort_unnamed(path: Path, root: Path, found: Found, dicoms: list[Path]) -> bool:
    """Files without a known name: DICOM by content. Returns whether the file was dealt with."""
    from client.data.dicom import is_dicom

    relative = path.relative_to(root).as_posix()
    try:
        if is_dicom(path):
            dicoms.append(path)
        elif path.name.lower().endswith(_DICOM_NAMES):
            reason = "expected DICOM content under a DICOM name, the mark DICM is missing"
            found.refusals.append(Refusal(relative, "unreadable", reason))
        else:
            return False
    except OSError:
        found.refusals.append(Refusal(relative, "unreadable", "expected a file that can be opened"))
    return True


def subject_of(relative: PurePath) -> str | None:
    """The BIDS subject of a path: the outermost sub-* folder, else the start of the file's name."""
    for part in relative.parts[:-1]:
        if _SUBJECT.fullmatch(part):
            return part
    match = _SUBJECT_IN_NAME.fullmatch(relative.name)
    return match.group(1) if match else None


def _add_niftis(paths: list[Path], root: Path, found: Found) -> None:
    """All files without a subject; of each subject the T1w images where it has any, else all under anat/, else all."""
    by_subject: dict[str | None, list[Path]] = defaultdict(list)
    for path in paths:
        by_subject[subject_of(path.relative_to(root))].append(path)
    num_t1w = num_other = 0
    for subject, own in by_subject.items():
        anatomical = [path for path in own if "anat" in path.relative_to(root).parts[:-1]]
        t1w = [path for path in anatomical if _T1W.fullmatch(path.name)]
        chosen = own if subject is None else t1w or anatomical or own
        num_t1w += subject is not None and bool(t1w)
        num_other += subject is not None and not t1w
        found.left_out += set(own).difference(chosen)
        for path in chosen:
            problem = None if subject is None else _problem_of(path.relative_to(root), subject)
            found.candidates.append(Candidate((path,), "volume", "nifti", subject, problem))
    if found.left_out:
        found.notes.append(f"{len(found.left_out)} NIfTI files beside the anatomical images were left out.")
    if num_t1w and num_other:
        found.notes.append(f"{num_other} subjects have no T1w image, others have; the images that they have are used.")


def _problem_of(relative: Path, subject: str) -> Refused | None:
    named = _SUBJECT_IN_NAME.fullmatch(relative.name)
    if named and subject != named.group(1):
        return Refused("patient_mismatch", "expected one subject in a path, folder and file name differ")
    if not _NOT_ANATOMICAL.isdisjoint(relative.parts[:-1]):
        return Refused("not_anatomical", "expected an image under anat/, this subject has images of other kinds only")
    return None


def _add_dicoms(paths: list[Path], root: Path, found: Found) -> None:
    """Each image of its own, and each series of slices of one patient as one volume."""
    from client.data.dicom import Scan, scan_file

    series: dict[tuple[str, str], list[Scan]] = defaultdict(list)
    for path in paths:
        try:
            scan = scan_file(path)
        except Refused as refused:
            found.refusals.append(Refusal(path.relative_to(root).as_posix(), refused.code, refused.reason))
            continue
        if scan.kind == "volume":
            series[scan.patient_id, scan.series].append(scan)
        else:
            hint = scan.patient_id or None
            found.candidates.append(Candidate((path,), "image", "dicom", hint, scan.problem, scan.identifying))
    for scans in series.values():
        # One bad file makes the series incomplete: it is refused whole, under the name of that file.
        first_bad = next((scan for scan in scans if scan.problem is not None), scans[0])
        ordered = [first_bad, *(scan for scan in scans if scan is not first_bad)]
        identifying = next((scan.identifying for scan in scans if scan.identifying), None)
        files = tuple(scan.path for scan in ordered)
        hint = first_bad.patient_id or None
        found.candidates.append(Candidate(files, "volume", "dicom", hint, first_bad.problem, identifying))
