"""How many canaries each site of a study has, which every party can tell.

A canary is a phantom that is nobody. About half of them are trained on like patients; the audit of the synthetic images
asks whether it can tell which. How they are made and chosen stands in ``client/data/canaries.py``.
"""

from common.config import StudyConfig

LARGEST_PERCENTAGE = 2  # of a site's contracted training patients


def num_canaries(study: StudyConfig, site: str) -> int:
    """Canaries that a site draws a coin for: from the contract alone, so it says nothing about the patients found.

    The study's ``audit.canaries`` are shared in proportion to the contracted training patients, rounded down, and no
    site has more than 2 % of its own: a site with fewer than 50 training patients has none.

    Raises ConfigError when the study has no contract with the site.
    """
    trained, _ = study.contracted_split(site)
    everybody = sum(study.contracted_split(each)[0] for each in study.federation.contracted_patients)
    share = study.audit.canaries * trained // max(1, everybody)
    return min(share, LARGEST_PERCENTAGE * trained // 100)
