"""``synthward data check``: what a site would accept and refuse, printed for the site's own eyes."""

import json
import sys
from pathlib import Path

from client.data.inventory import Inventory, take_inventory
from common.config import ImageConfig, StudyConfig
from common.errors import SiteError

MOST_LINES = 200


def check(folder: Path, study_path: Path | None, *, record_is_patient: bool, as_json: bool) -> None:
    """Print the inventory of ``folder``.

    Raises:
        SiteError: nothing usable was found, or fewer patients than the study's minimum.
    """
    study = StudyConfig.from_toml(study_path) if study_path else None
    image = study.image if study else ImageConfig()
    inventory = take_inventory(
        folder, label_column=image.label_column or None, labels=image.labels, record_is_patient=record_is_patient
    )
    if as_json:
        json.dump(inventory.to_json(), sys.stdout, indent=2)
        print()
    else:
        _print(inventory)
    minimum = study.federation.minimum_patients if study else 1
    if len(inventory.patients) < minimum:
        raise SiteError(
            f"Expected at least {minimum} patients with usable images, found {len(inventory.patients)}.",
            "Correct what was refused above, or add patients.",
        )


def _print(inventory: Inventory) -> None:
    print(f"accepted: {len(inventory.records)} records of {len(inventory.patients)} patients")
    if inventory.record_is_patient:
        print("NOTE: every record counts as a patient; a real patient with several images is NOT protected as one.")
    print(f"refused:  {len(inventory.refusals)}")
    for refusal in inventory.refusals[:MOST_LINES]:
        print(f"  {refusal.file}: {refusal.code}: {refusal.reason}")
    if len(inventory.refusals) > MOST_LINES:
        print(f"  ... and {len(inventory.refusals) - MOST_LINES} more; --json lists all")
    for note in inventory.notes:
        print(f"note: {note}")
