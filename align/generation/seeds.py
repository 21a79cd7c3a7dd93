"""Random numbers of a completion's own: what is drawn for it does not depend on what else is in its batch."""

from collections.abc import Sequence

import numpy as np


def row_uniforms(seeds: Sequence[int], draws: int) -> np.ndarray:
    """Uniform numbers in [0, 1), float64 (rows, draws): row i depends on seeds[i] alone, whatever the other rows.

    The first n of more draws are the same n. Seeds are integers from 0 up to 2**128.
    Raises: ValueError for a seed out of that range.
    Source: Philox 4x64 keyed by the seed (Salmon et al. 2011, doi:10.1145/2063384.2063405): near keys give
    unrelated streams, and nothing has to be warmed up.
    """
    uniforms = np.empty((len(seeds), draws))
    for row, seed in enumerate(seeds):
        uniforms[row] = np.random.Generator(np.random.Philox(key=seed)).random(draws)
    return uniforms
