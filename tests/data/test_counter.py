"""Counter-based random numbers: pure, and distributed as they should be."""

from __future__ import annotations

import numpy as np
import pytest

from kernelmeta.data import counter


def test_words_are_a_function_of_key_and_counters():
    whole = counter.words(7, np.arange(100)[:, None], np.arange(20))
    assert (counter.words(7, np.arange(40, 60)[:, None], np.arange(3, 9)) == whole[40:60, 3:9]).all()
    assert (counter.words(counter.words(7, np.arange(100)[:, None]), np.arange(20)) == whole).all()
    assert len(np.unique(whole)) == whole.size
    assert not (counter.words(8, np.arange(100)[:, None], np.arange(20)) == whole).any()


def test_the_hash_does_not_change():
    # Runs that are resumed with a later version must see the same episodes.
    assert counter.words(0, 0).item() == 9248179162272254404
    assert counter.words(3, np.arange(2), 5).tolist() == [4722443849275062725, 7637988710077000029]


def test_bits_are_balanced_and_neighbours_unrelated():
    words = counter.words(1, np.arange(20_000))
    bits = np.unpackbits(words.view(np.uint8).reshape(-1, 8), axis=1)
    assert abs(bits.mean(0) - 0.5).max() < 5 * 0.5 / np.sqrt(20_000)
    uniform = counter.uniform(words)
    assert 0 < uniform.min() <= uniform.max() < 1
    assert abs(np.corrcoef(uniform[:-1], uniform[1:])[0, 1]) < 5 / np.sqrt(20_000)


def test_below_covers_its_range_evenly():
    drawn = counter.below(counter.words(2, np.arange(70_000)), 7)
    counts = np.bincount(drawn, minlength=7)
    assert len(counts) == 7
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 30  # chi-square, 6 degrees of freedom: p = 4e-5


@pytest.mark.parametrize("shape", [1.0, 1.3, 2.0, 9.5, 1e6])
def test_log_gamma_has_its_mean_and_variance(shape):
    n = 40_000
    logs = counter.log_gamma(counter.words(5, np.arange(n)), shape)
    drawn = np.exp(logs)
    assert abs(drawn.mean() - shape) < 5 * np.sqrt(shape / n)
    # Var(sample variance) = (kurtosis - (n-3)/(n-1)) variance^2 / n, kurtosis 3 + 6 / shape
    assert abs(drawn.var() - shape) < 5 * shape * np.sqrt((2 + 6 / shape) / n)
    assert (counter.log_gamma(counter.words(5, np.arange(100, 103)), shape) == logs[100:103]).all()


@pytest.mark.parametrize("seed", [-1, 2**64, 10**40])
def test_what_is_no_seed_is_refused(seed):
    with pytest.raises(ValueError, match="seed: expected 0 to"):
        counter.check_seed(seed)
    counter.check_seed(2**64 - 1)
