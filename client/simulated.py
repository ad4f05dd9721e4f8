"""Sites of a simulation, where one person owns them all: keys, roster, policies and ledgers are made for them.

A real site makes each of these by hand, with ``synthward site`` and ``synthward policy``; the files are the same.
"""

from collections.abc import Mapping
from pathlib import Path

from client import ledger
from client.decision import whole_cost
from client.identity import ROSTER_FILE
from client.policy import FILE_NAME, DataPolicy, Policy
from client.settings import SiteSettings
from common.config import StudyConfig
from common.files import locked
from common.identity import KEY_FILE, load_identity, make_identity
from common.secagg.roster import Roster, make_roster


def simulated_roster(folders: Mapping[str, Path]) -> Roster:
    """The roster of these sites, after making the keys that are missing."""
    for folder in folders.values():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with locked(folder / "identity.lock"):  # nodes of Flower's simulation start side by side
            if not (folder / KEY_FILE).exists():
                make_identity(folder)
    return make_roster(
        {name: load_identity(folder).public_key().public_bytes_raw() for name, folder in folders.items()}
    )


def allow(settings: SiteSettings, study: StudyConfig, roster: Roster) -> None:
    """Give a site the settings, roster, policy and ledger with which it takes part in this study, and in no other."""
    settings.save()
    with locked(settings.folder / "policy.lock"):
        if (settings.folder / FILE_NAME).exists():
            return
        roster.save(settings.folder / ROSTER_FILE)
        if not (settings.folder / ledger.FILE_NAME).exists():
            ledger.create(settings.folder)
        policy_for(settings, study, roster).save(settings.folder)  # last: without it, all is made again


def policy_for(settings: SiteSettings, study: StudyConfig, roster: Roster) -> Policy:
    """The narrowest policy under which the site takes part in this study."""
    federation, privacy = study.federation, study.privacy
    return Policy(
        roster_digest=roster.digest,
        minimum_cohort=max(2, federation.minimum_sites),
        colluding_sites=privacy.colluding_sites,
        study_digests=(study.digest,),
        study_signers=(),
        algorithms=tuple(dict.fromkeys(phase.algorithm for phase in study.phases)),
        outputs=("plain_updates",) if federation.aggregation == "plain" else ("masked_updates",),
        largest_sampling_probability=privacy.sampling_probability,
        minimum_patients=federation.minimum_patients,
        data=(
            DataPolicy(
                folder=settings.data.absolute(),
                epsilon=whole_cost(study),
                delta=privacy.delta,
                public=not privacy.enabled,
            ),
        ),
    )
