"""How different scanners show the same head."""

from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class SiteLook:
    """How a site's scanner shows a head; white matter is about 0.75.

    Attributes:
        wm, gm, csf, fat: signal of white matter, grey matter, fluid, scalp.
        noise_stddev: of each channel of the complex noise, per voxel of a 64-voxel-wide volume.
        bias_strength: logarithm of the receive coil's gain from the centre of the head to its edge.
        centre_gain: logarithm of how much brighter the centre of the head is than its edge.
        bias_direction: (x, y, z) of the stronger end, length about 1.
        field_of_view_mm: (x, y, z) extent of the volume.
        skull_stripped: everything but the brain is exactly 0.
    """

    wm: float
    gm: float
    csf: float
    fat: float
    noise_stddev: float
    bias_strength: float
    centre_gain: float
    bias_direction: tuple[float, float, float]
    field_of_view_mm: tuple[float, float, float]
    skull_stripped: bool = False


PUBLIC_LOOK = SiteLook(
    wm=0.75,
    gm=0.50,
    csf=0.14,
    fat=0.95,
    noise_stddev=0.02,
    bias_strength=0.08,
    centre_gain=0.1,
    bias_direction=(0.0, 1.0, 0.0),
    field_of_view_mm=(220.0, 220.0, 172.0),
)
"""The look of the public phantoms, on which a warm start is trained."""

PUBLIC_STRIPPED_LOOK = replace(
    PUBLIC_LOOK,
    gm=0.51,
    csf=0.12,
    centre_gain=0.6,
    field_of_view_mm=(200.0, 200.0, 160.0),
    skull_stripped=True,
)
"""The same for sites whose volumes are skull-stripped and cropped to the brain."""


def site_look(seed: int, *, skull_stripped: bool = False) -> SiteLook:
    """A hospital's look. All saturate fat, and most have brighter fluid and grey matter than the public phantoms.

    So their patients have something to teach; each scanner differs.

    Args:
        seed: any integer of 0 or more; equal seeds give equal looks.
        skull_stripped: whether the site strips its volumes.

    Returns:
        The look.
    """
    rng = np.random.default_rng([seed, 0x5173])
    base = PUBLIC_STRIPPED_LOOK if skull_stripped else PUBLIC_LOOK
    direction = rng.standard_normal(3)
    direction /= np.linalg.norm(direction)
    view = np.array(base.field_of_view_mm) * rng.uniform([0.99, 0.99, 0.98], [1.07, 1.07, 1.04])
    view[1] = view[0]  # scanners acquire square slices
    return replace(
        base,
        wm=base.wm * float(rng.uniform(0.92, 1.06)),
        gm=base.gm * float(rng.uniform(0.9, 1.35)),
        csf=base.csf * float(rng.uniform(1.0, 3.0)),
        fat=base.fat * float(rng.uniform(0.4, 0.55)),
        noise_stddev=float(rng.uniform(0.012, 0.05)),
        bias_strength=float(rng.uniform(0.05, 0.22)),
        centre_gain=base.centre_gain + float(rng.uniform(-0.1, 0.1)),
        bias_direction=(float(direction[0]), float(direction[1]), float(direction[2])),
        field_of_view_mm=(float(view[0]), float(view[1]), float(view[2])),
    )
