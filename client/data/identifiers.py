"""Which header fields may name a person, and which contents are plainly harmless.

The rule is the same for every format: a field that can hold a name, a date of birth, an address or free text must be
empty, or hold something that is evidently not an identifier. What a file claims about itself (PatientIdentityRemoved)
is not asked. Refusals name the field, never its value.

Design note: the name of the institution is not refused. It names the site, which knows itself, and no header
leaves it; the check guards against raw exports, where the patient's own fields are filled too. An operator's initials
(up to three letters) pass as well: they name no patient and, alone, no person.
"""

import re
from collections.abc import Iterator
from typing import Any

PATIENT_FIELDS = (
    "PatientName", "PatientBirthName", "PatientMotherBirthName", "OtherPatientNames", "OtherPatientIDs",
    "PatientBirthDate", "PatientBirthDateInAlternativeCalendar", "PatientBirthTime", "PatientAddress",
    "PatientTelephoneNumbers", "PatientTelecomInformation", "MedicalRecordLocator", "AccessionNumber",
    "InsurancePlanIdentification", "ResponsiblePerson", "PatientComments", "AdditionalPatientHistory",
    "PersonAddress", "PersonTelephoneNumbers", "AdmissionID", "PatientInstitutionResidence",
)  # fmt: skip
STAFF_FIELDS = (
    "ReferringPhysicianName", "ReferringPhysicianAddress", "ReferringPhysicianTelephoneNumbers",
    "PerformingPhysicianName", "OperatorsName", "PhysiciansOfRecord", "NameOfPhysiciansReadingStudy",
    "RequestingPhysician", "ConsultingPhysicianName", "PersonName", "ContentCreatorName", "ReviewerName",
    "ScheduledPerformingPhysicianName", "VerifyingObserverName", "HumanPerformerName",
)  # fmt: skip
_FIELDS = frozenset(PATIENT_FIELDS + STAFF_FIELDS)
_NOT_SEARCHED = frozenset({"PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence", "WaveformSequence"})
_PLACEHOLDERS = frozenset(
    {"", "anon", "anonymous", "anonymized", "anonymised", "deidentified", "removed", "redacted", "withheld", "none",
     "na", "unknown", "noname", "default"}
)  # fmt: skip
_PLACEHOLDER_DATES = frozenset({"00000000", "00010101", "18000101", "19000101", "19010101"})

# Words that image tools write into the free-text fields of a NIfTI header.
_TOOL_WORDS = frozenset(
    "afni ants antsregistration bet bids bias bin brain brainsuite bse c3d cat12 cc0 clip compressed convert3d "
    "converted corrected created crop cropped dcm2nii dcm2niix dcmstack denoised deoblique dicom2nifti "
    "downsampled elastix fast field file flip flirt float fmriprep fnirt format freesurfer fsl fslmaths fslmerge "
    "gz hdbet image image3d int16 isotropic itk lfs mask masked matlab mean medpy minc mni mni152 monai mri_convert "
    "mricron mricrogl mrtrix mrtrix3 mrconvert n4 nibabel nifti nii niftilib nilearn normalised normalized oriented "
    "phantom qsiprep ras realigned recon register registered reg_aladin reoriented resample resampled resliced "
    "rigid robex segmented simpleitk single skull skullstripped slicer smoothed spm spm12 spm8 standard stripped "
    "swapped synthetic synthseg synthstrip synthward template to torchio uint8 volume vtk warped warp with by and the "
    "version from space nu orig t1 t1w t2 t2w flair pd te tr ti fa time phase mb dwell mag real imaginary none".split()
)
_TOOL_TOKEN = re.compile(r"(ds\d{6}|fsl\d*|spm\d*|x\d|\dx|\dd|\d{1,4}|v\d+|[a-z])")
_ACQUISITION = re.compile(r"(te|tr|ti|fa|time|phase|mb|dwell)=[\d.]+", re.IGNORECASE)  # dcm2niix


def is_tool_text(text: str) -> bool:
    """Whether free text in a NIfTI or picture header is only what image tools write there.

    Every word must be a known tool or processing word, a short number or a public OpenNeuro accession (ds002748): an
    allow-list, because no pattern recognises all names. A caret (the separator of DICOM names), a date and any
    number of more than four digits fail.
    """
    if "^" in text or re.search(r"\d{4}[-/.]\d{1,2}[-/.]\d{1,2}|\d{1,2}[-/.]\d{1,2}[-/.]\d{4}", text):
        return False
    rest = _ACQUISITION.sub(" ", text.casefold())
    words = [w for w in re.split(r"[^0-9a-z_]+", rest) if w]
    if re.search(r"[^\x00-\x7f]", text):
        return False
    return all(w in _TOOL_WORDS or _TOOL_TOKEN.fullmatch(w) is not None for w in words)


def identifying_field(dataset: Any) -> str | None:
    """The keyword of the first DICOM field that may identify a person, or None.

    A date of birth equal to the date of the study passes where the patient's name is a placeholder too: tools that
    blank all dates do so with one date. (A newborn scanned on its first day looks the same; no header leaves the site.)

    Args:
        dataset: a pydicom ``Dataset`` of one file, without pixels.
    """
    patient_id = str(dataset.get("PatientID", "") or "")
    name_is_placeholder = _is_placeholder(str(dataset.get("PatientName", "") or ""), patient_id)
    study_date = str(dataset.get("StudyDate", "") or "")
    for element in _elements(dataset):
        keyword = element.keyword
        if keyword not in _FIELDS or element.value is None:
            continue
        for value in _texts(element.value):
            if _is_placeholder(value, patient_id):
                continue
            if keyword in STAFF_FIELDS and len(re.sub(r"[\W\d_]", "", value)) <= 3 and len(value) <= 5:
                continue
            if keyword.startswith("PatientBirthDate") and (
                value in _PLACEHOLDER_DATES or (name_is_placeholder and value == study_date)
            ):
                continue
            if keyword == "PatientBirthTime" and not value.strip("0."):
                continue
            return str(keyword)
    return None


def _elements(dataset: Any) -> Iterator[Any]:
    for element in dataset:
        if element.VR != "SQ":
            yield element
        elif element.keyword == "OtherPatientIDsSequence" or element.keyword not in _NOT_SEARCHED:
            for item in element.value:
                yield from _elements(item)


def _texts(value: object) -> list[str]:
    if isinstance(value, (list, tuple)) or type(value).__name__ == "MultiValue":
        return [str(v) for v in value]  # type: ignore[attr-defined]
    return [str(value)]


def _is_placeholder(value: str, patient_id: str) -> bool:
    text = re.sub(r"[\W_]+", "", value).casefold()
    if text in _PLACEHOLDERS or (patient_id and value.strip() == patient_id.strip()):
        return True
    return re.fullmatch(r"x+|0+|(anon|anonymous|anonymized|anonymised)\d*", text) is not None
