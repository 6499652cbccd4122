"""Counter-based random numbers: a pure function of a key and counters, in any order, on any machine.

The hash is the finaliser of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014), applied once for every counter.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]
Floats = NDArray[np.float64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)
_S27, _S30, _S31, _S32, _S11 = (np.uint64(shift) for shift in (27, 30, 31, 32, 11))
_ONE = np.uint64(1)


# PyTorch takes no larger seed, and no larger number is a key.
MOST_SEED = 2**64 - 1


def check_seed(seed: int) -> None:
    """Raises ValueError for what is no seed."""
    if not 0 <= seed <= MOST_SEED:
        raise ValueError(f"seed: expected 0 to 2**64 - 1, got {seed}")


def words(key: Words | int, *counters: NDArray[np.integer] | Words | int) -> Words:
    """Random 64-bit words, one for each element of the broadcast counters.

    Words drawn may serve as the key of a further draw: ``words(words(k, a), b) == words(k, a, b)``.
    """
    state = np.asarray(key).astype(np.uint64)
    with np.errstate(over="ignore"):
        for counter in counters:
            state = state ^ ((np.asarray(counter).astype(np.uint64) + _ONE) * _GOLDEN)
            state = (state ^ (state >> _S30)) * _MIX1
            state = (state ^ (state >> _S27)) * _MIX2
            state = state ^ (state >> _S31)
            state = state + _GOLDEN
    return state


def below(random: Words, bound: NDArray[np.integer] | int) -> NDArray[np.int64]:
    """Words -> integers in 0..bound-1, bound at most 2^32. Bias: below bound / 2^32."""
    return (((random >> _S32) * np.asarray(bound).astype(np.uint64)) >> _S32).astype(np.int64)


def uniform(random: Words) -> Floats:
    """Words -> floats in the open interval (0, 1)."""
    return ((random >> _S11).astype(np.float64) + 0.5) * 2.0**-53


def log_gamma(key: Words, shape: float) -> Floats:
    """Logarithms of Gamma(shape, 1) variates, one a key; shape at least 1 (Marsaglia & Tsang, ACM TOMS 2000)."""
    d = shape - 1 / 3
    c = 1 / (3 * math.sqrt(d))
    flat = key.reshape(-1)
    result = np.zeros(flat.shape)
    pending = np.arange(flat.size)
    attempt = 0
    while pending.size:
        u1, u2, u3 = (uniform(words(flat[pending], attempt, i)) for i in range(3))
        normal = np.sqrt(-2 * np.log(u1)) * np.cos(2 * np.pi * u2)
        with np.errstate(invalid="ignore", divide="ignore"):
            log_v = 3 * np.log1p(c * normal)  # NaN where 1 + c normal is below 0: not accepted
            accepted = np.log(u3) < 0.5 * normal**2 + d * (log_v - np.expm1(log_v))
        result[pending[accepted]] = math.log(d) + log_v[accepted]
        pending = pending[~accepted]
        attempt += 1
    return result.reshape(key.shape)
