"""Noise that sites share: each adds a part in whole steps, and the sum of the parts is the plan's noise.

A site's sum over its patients is rounded to steps of 2^-fraction_bits and a discrete Gaussian is added, so that what a
secure sum carries is an integer from the start. Nothing is clipped after that: a sum of integers that wraps is a
function of the sum, but a site's share of noise that was cut would be less noise.

**Guarantee.** A sum of integers that holds the shares of ``num_noisy`` sites or more is as private as the plan's
mechanism, the *continuous* Gaussian that accountants compose and sample, in any composition of releases and for every
(epsilon, delta), up to less than 1e-60 in epsilon. The shares of others, if any, are independent of these, and so add
noise or nothing. Notation: a step is 2^-f; C the clip norm, d the length; w^2 = n s^2 the variance of n shares of scale
s in steps; sigma the plan's noise multiplier.

1. *Sensitivity.* One patient more or less moves a site's sum by at most C, and each of the d coordinates rounds by at
   most half a step before and after. So the integers move by at most D = 2^f C + sqrt(d) steps, in whole steps. This is
   ``sensitivity``, C' = C + 2^-f sqrt(d), in units of C.
2. *A sum of discrete Gaussians is one.* The probability of x under the sum of one of variance k s^2 and one of s^2 is
   proportional to exp(-x^2 / (2 (k + 1) s^2)) times a sum over the integers a of exp(-(a - x')^2 / (2 r^2)) with
   r^2 = s^2 k / (k + 1). By Poisson's summation formula that sum is r sqrt(2 pi) (1 +- eta(r)), whatever x' is, with
   eta(r) = 2 sum_{j >= 1} exp(-2 pi^2 r^2 j^2). By induction the n shares have N_Z(0, w^2) up to a factor
   exp(+-10 sum_k exp(-2 pi^2 s^2 k / (k + 1))), k = 1 ... n - 1, a coordinate (Kairouz, Liu and Steinke 2021). From
   s = 10 on the terms are at most exp(-986).
3. *A discrete Gaussian is a continuous one, rounded at random.* Let Y be N(m, w^2 - r^2) with r^2 = 9 and an integer m,
   and let T(y) give the integer x with a probability proportional to exp(-(x - y)^2 / (2 r^2)) (Peikert 2010, theorem
   3.1). The density of Y at y times that of N(y, r^2) at x is, integrated over y, the density of N(m, w^2) at x; T's
   normalisation is 1 +- eta(r) by the same formula, and so is that of N_Z. Hence P[T(Y) = x] is the probability of x
   under m + N_Z(0, w^2) up to a factor (1 + eta) / (1 - eta), where eta < 1e-76. So the integers are a post-processing
   of the continuous mechanism with variance w^2 - r^2, up to exp(+-d 1e-75).
4. ``scale`` is chosen so that n s^2 >= (sigma D)^2 + r^2. What is left of the variance is the plan's.

A factor exp(+-t) on all probabilities turns (epsilon, delta) into (epsilon + 2 t, delta exp(t)). With up to 1e9
coordinates and 1e6 releases t is below 1e-60. Poisson sampling mixes mechanisms of the kind above, of which each one's
divergence is bounded whatever the other patients are; hockey-stick divergences are jointly convex.

It is point 3 that carries over to PRV and PLD accounting. That discrete Gaussians satisfy the same zCDP (Canonne,
Kamath and Steinke 2020, theorem 4) would not: on its lattice of losses the privacy profile of N_Z is above that of the
Gaussian of equal variance at some epsilons (at scale 10 by a part in a thousand), which the r^2 pays for.
"""

import math
import os
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.privacy import discrete_gaussian
from common.privacy.plan import PhasePlan
from common.privacy.sampling import ByteSource

MODULUS_BITS = 32
SMALLEST_SCALE = 10

_FINEST_BITS = 20  # steps in a clip norm, as a power of two
_COARSEST_BITS = -64
_TAIL = 12  # a sum farther out than this many standard deviations has a probability of 1e-32 a coordinate
_ROUNDING_VARIANCE = 10  # r^2 of the proof is 9: the rest is more than the floats below err by


@dataclass(frozen=True)
class SharedNoise:
    """How a site's sum becomes noisy integers. All three are public.

    Args:
        fraction_bits: a step is 2^-fraction_bits; negative for steps larger than 1.
        scale: of one site's share, N_Z(0, scale^2) in steps; 0 for no noise.
        sensitivity: most by which one patient moves the rounded sum, L2, in the units of the sum.
    """

    fraction_bits: int
    scale: int
    sensitivity: float

    def stddev_of_sum(self, num_sites: int) -> float:
        """Standard deviation of all the noise in a sum over so many sites, in the units of the sum."""
        return self.scale * math.sqrt(num_sites) * 2.0**-self.fraction_bits


def shared_noise(plan: PhasePlan | None, length: int, patients: int, num_sites: int, num_noisy: int) -> SharedNoise:
    """The finest steps for which no sum wraps, and the scale of each site's share.

    Args:
        plan: of the phase; None for no noise, with vectors of norm at most 1.
        length: coordinates of a vector.
        patients: contracted patients of all sites together: the most vectors that are summed.
        num_sites: most sites in a sum.
        num_noisy: sites that are sure to have added their share to every sum that is opened, and to tell nobody: the
            fewest in a sum less those that may collude. 1 where every site makes all the noise.

    Returns:
        The most ``fraction_bits``, with at most 2^20 steps in a clip norm, for which 2^f patients C, half a step a site
        and 12 standard deviations of the whole noise are together below 2^31.

    Raises:
        ValueError: no steps hold the sum, or the share's scale is below 10 steps, where point 2 would be in doubt.
    """
    if not (length >= 1 and patients >= 1 and 1 <= num_noisy <= num_sites):
        raise ValueError(f"not a sum: {length=}, {patients=}, {num_sites=}, {num_noisy=}")
    clip_norm = plan.clip_norm if plan is not None else 1.0
    finest = _FINEST_BITS - math.ceil(math.log2(clip_norm))
    for fraction_bits in range(finest, _COARSEST_BITS, -1):
        step = 2.0**-fraction_bits
        sensitivity = clip_norm + step * math.sqrt(length)
        scale = 0
        if plan is not None:
            declared = plan.mechanism.noise_multiplier * sensitivity / step
            scale = math.ceil(math.sqrt((declared**2 + _ROUNDING_VARIANCE) / num_noisy))
        largest = patients * clip_norm / step + num_sites / 2 + _TAIL * scale * math.sqrt(num_sites)
        if largest < 2 ** (MODULUS_BITS - 1) and scale <= discrete_gaussian.LARGEST_SCALE:
            break
    else:
        raise ValueError(
            f"sums over {patients} patients of {length} coordinates with noise from {num_sites} sites do not fit "
            f"{MODULUS_BITS} bits: use a larger epsilon, fewer coordinates or fewer patients"
        )
    if plan is not None and scale < SMALLEST_SCALE:
        raise ValueError(
            f"the noise of a site would have a scale of {scale} steps, fewer than {SMALLEST_SCALE}: "
            "use a larger noise multiplier (a smaller epsilon), fewer patients in a sum or fewer sites that share it"
        )
    return SharedNoise(fraction_bits, scale, sensitivity)


def noisy_integers(
    vector: NDArray[np.float64], noise: SharedNoise, source: ByteSource = os.urandom
) -> NDArray[np.int64]:
    """A site's sum, rounded to steps, with its share of the noise.

    Args:
        vector: (length,) float64: a sum that one patient moves by at most the clip norm.
        noise: from ``shared_noise``.
        source: bytes from a cryptographic source; anything else only in tests.

    Returns:
        (length,) int64 steps.

    Raises:
        ValueError: a value is not finite, or above 2^62 steps.
        OSError: the source failed. Nothing is returned, so nothing without noise can go on.

    >>> noisy_integers(np.array([0.5, -0.26]), SharedNoise(fraction_bits=2, scale=0, sensitivity=1.0))
    array([ 2, -1])
    """
    steps = np.rint(vector * 2.0**noise.fraction_bits)  # scaling by a power of two is exact
    if not (np.abs(steps) < 2.0**62).all():  # false for NaN
        raise ValueError("expected finite values of at most 2^62 steps")
    integers = steps.astype(np.int64)
    if noise.scale:
        integers += discrete_gaussian.sample(len(integers), noise.scale, source)
    return integers


def exact_step(clip_norm: float) -> float:
    """The step to whose multiples patients' vectors are rounded before they are summed: a power of two, from 2^-32 to
    2^-31 of ``clip_norm``.

    **Guarantee.** float64 adds up to 2^20 such vectors exactly, in any order, so that a sum less a patient is the sum
    of the others to the last bit. Rounding lengthens a vector by at most 2^-32 clip_norm sqrt(length): less than the
    2^-14 clip_norm that ``common.privacy.gradient`` clips within the bound, for lengths up to 2^35.
    """
    return float(2.0 ** (math.ceil(math.log2(clip_norm)) - 32))
