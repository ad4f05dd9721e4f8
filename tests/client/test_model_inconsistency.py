"""A server that shows each site another shared state (Pasquini et al. 2022): the others' updates vanish on it."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chisquare

from tests.consortium import Consortium, names_of

NAMES, LENGTH = names_of(5), 20_000
VICTIM = NAMES[0]
UPDATE = np.random.default_rng(0).uniform(-0.3, 0.3, LENGTH).astype(np.float32)


def opened_when_the_others_are_shown(state: NDArray[np.float32]) -> NDArray[np.float32]:
    """What the server reads when the victim's update is the only one that is not zero, every check of every site kept.

    It opens the sum with every share that it is entitled to.
    """
    consortium = Consortium(NAMES, LENGTH)
    server = consortium.advertise()
    consortium.share(server)
    for name, request in server.masked_input_requests(consortium.train).items():
        train = request.work if name == VICTIM else replace(request.work, generator=state)
        consortium.sites[name].open_shares(replace(request, work=train))
        vector = UPDATE if name == VICTIM else np.zeros(LENGTH, np.float32)
        message, _ = consortium.sites[name].masked_input(vector, consortium.plan.encoding, 1)
        server.take_masked_input(name, message)
    consortium.confirm(server)
    consortium.unmask(server)
    return server.result()


def test_masks_of_sites_that_were_shown_different_states_do_not_cancel() -> None:
    same = Consortium(NAMES, LENGTH).train.generator
    assert np.abs(opened_when_the_others_are_shown(same) - UPDATE).max() < len(NAMES) * 2.0**-15  # a sum, as it should

    read = opened_when_the_others_are_shown(np.full(1, 50, np.float32))
    words = np.round(read.astype(np.float64) * 2**15).astype(np.int64) & 0x1FFFFF
    assert chisquare(np.bincount(words >> 13, minlength=256)).pvalue > 1e-9
    assert abs(np.corrcoef(read, UPDATE)[0, 1]) < 6 / np.sqrt(LENGTH)
