"""Intervals cover what they should, and a recovery of nothing is never a number."""

import numpy as np
import pytest

from gemmaqat.evaluation import statistics
from gemmaqat.evaluation.statistics import Bootstrap, Sums

N = 96


def sums(nll_per_token, tokens=20):
    tokens = np.full(len(nll_per_token), float(tokens))
    return Sums(np.asarray(nll_per_token) * tokens, tokens)


@pytest.fixture(scope="module")
def sequences():
    """Sequences that differ by 0.5 nats among themselves, as real ones do."""
    return 2.0 + 0.5 * np.random.default_rng(0).normal(size=N)


@pytest.fixture(scope="module")
def bootstrap():
    return Bootstrap(N, samples=2000, seed=1)


def test_interval_of_a_mean_has_the_width_of_its_standard_error(bootstrap, sequences):
    found = bootstrap.interval(sums(sequences).mean)
    error = np.std(sequences) / np.sqrt(N)
    assert found.value == pytest.approx(np.mean(sequences))
    # 2,000 resamples fix each end to about 0.06 standard errors.
    assert found.low == pytest.approx(found.value - 1.96 * error, abs=0.25 * error)
    assert found.high == pytest.approx(found.value + 1.96 * error, abs=0.25 * error)


def test_intervals_of_a_mean_cover_the_truth_as_often_as_they_say():
    draw = np.random.default_rng(3)
    trials, covered = 300, 0
    for trial in range(trials):
        bootstrap = Bootstrap(40, samples=400, seed=trial)
        found = bootstrap.interval(sums(draw.normal(size=40)).mean)
        covered += found.low <= 0 <= found.high
    # 0.95 less the known optimism of percentiles at 40 items; binomial error 0.014.
    assert 0.89 <= covered / trials <= 0.98


def test_long_sequences_weigh_by_their_tokens(bootstrap):
    tokens = np.r_[np.full(N - 1, 1.0), 905.0]
    scores = Sums(np.r_[np.zeros(N - 1), 905.0], tokens)
    assert bootstrap.interval(scores.mean).value == pytest.approx(0.905)


def test_pairing_resolves_a_damage_far_below_the_spread_of_sequences(bootstrap, sequences):
    damage = 0.02 + 0.01 * np.random.default_rng(2).normal(size=N)
    good, bad = sums(sequences), sums(sequences + damage)
    difference = bootstrap.interval(lambda w: bad.mean(w) - good.mean(w))
    assert not difference.includes_zero
    assert difference.high - difference.low < 0.01
    single = bootstrap.interval(bad.mean)
    assert single.high - single.low > 0.1, "unpaired, the damage would drown"


def test_recovery_is_the_known_share(bootstrap, sequences):
    base = np.exp(np.mean(sequences))
    shift = np.log((base + 10) / base), np.log((base + 2.5) / base)
    found = bootstrap.perplexity_recovery(
        reference=sums(sequences), ptq=sums(sequences + shift[0]), arm=sums(sequences + shift[1])
    )
    assert found.damage.value == pytest.approx(10)
    assert found.share.value == pytest.approx(0.75)
    assert found.share.low <= 0.75 <= found.share.high
    assert found.text.startswith("75 % [")


def test_an_arm_worse_than_ptq_has_a_negative_recovery(bootstrap, sequences):
    found = bootstrap.perplexity_recovery(
        reference=sums(sequences), ptq=sums(sequences + 0.5), arm=sums(sequences + 0.6)
    )
    assert found.share.high < 0


@pytest.mark.parametrize("damage", [0.0, 1e-3, -0.3], ids=["none", "in the noise", "negative"])
def test_recovery_of_no_proven_damage_is_no_number(bootstrap, sequences, damage):
    noise = 0.05 * np.random.default_rng(4).normal(size=N)
    noise -= np.mean(noise)  # so that the sign of the estimate is that of the damage
    found = bootstrap.perplexity_recovery(
        reference=sums(sequences), ptq=sums(sequences + damage + noise), arm=sums(sequences)
    )
    assert found.share is None
    assert found.text == "PTQ damage within noise"


def test_kl_recovery_is_one_minus_the_ratio(bootstrap, sequences):
    kl = np.abs(sequences)
    found = bootstrap.kl_recovery(ptq=sums(kl), arm=sums(0.3 * kl))
    assert found.share.value == pytest.approx(0.7)
    # The two arms are proportional in every sequence: pairing leaves no uncertainty at all.
    assert found.share.high - found.share.low < 1e-9


def test_kl_of_rounding_size_counts_as_no_damage(bootstrap):
    found = bootstrap.kl_recovery(ptq=sums(np.full(N, 5e-7)), arm=sums(np.full(N, 1e-7)))
    assert found.text == statistics.WITHIN_NOISE


def test_resamples_repeat_with_their_seed(sequences):
    found = [Bootstrap(N, samples=50, seed=s).interval(sums(sequences).mean) for s in (7, 7, 8)]
    assert found[0] == found[1] != found[2]
