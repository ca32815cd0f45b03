"""Paired bootstrap over sequences: intervals for scores, their differences and recoveries.

Models are compared on the same sequences, and sequences differ from each other far more than
models do: the unpaired standard error of a perplexity is larger than the whole damage of a 4-bit
model. So every statistic of several models is computed on the same resampled sequences. The
intervals are percentiles (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, ch. 13)
and speak of the choice of hold-out sequences alone, not of the choice of training seed.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Float

LEVEL = 0.95
# A KL below this (nats) is rounding of the float32 forward pass, not damage.
KL_NOISE = 1e-6
WITHIN_NOISE = "PTQ damage within noise"


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate and its bootstrap interval at `LEVEL`."""

    value: float
    low: float
    high: float

    @property
    def includes_zero(self) -> bool:
        """Whether the data cannot tell the quantity from zero."""
        return self.low <= 0 <= self.high


@dataclasses.dataclass(frozen=True)
class Recovery:
    """The share of the PTQ damage that an arm removed.

    Attributes:
        damage: what PTQ cost, in units of the metric.
        share: 1 is all of it, 0 none, negative made it worse; None where `damage` is noise.
    """

    damage: Interval
    share: Interval | None

    @property
    def text(self) -> str:
        """`82 % [79, 85]`, or the reason why there is no number."""
        if self.share is None:
            return WITHIN_NOISE
        value, low, high = (100 * x for x in dataclasses.astuple(self.share))
        return f"{value:.0f} % [{low:.0f}, {high:.0f}]"


@dataclasses.dataclass(frozen=True)
class Sums:
    """A per-token quantity, summed within each of `N` sequences.

    Attributes:
        total: sum of the quantity.
        tokens: number of tokens that were summed.
    """

    total: Float[np.ndarray, " N"]
    tokens: Float[np.ndarray, " N"]

    def mean(self, weights: Float[np.ndarray, "S N"]) -> Float[np.ndarray, " S"]:
        """Mean over tokens, each sequence taken `weights` times."""
        return (weights @ self.total) / (weights @ self.tokens)

    def perplexity(self, weights: Float[np.ndarray, "S N"]) -> Float[np.ndarray, " S"]:
        """Exponential of the mean, for sums of negative log-likelihoods in nats."""
        return np.exp(self.mean(weights))


class Bootstrap:
    """One set of resamples of `num_items` items, shared by all statistics that are compared."""

    def __init__(self, num_items: int, *, samples: int, seed: int = 0) -> None:
        """Draws the resamples.

        Args:
            num_items: sequences in the hold-out.
            samples: resamples; 2,000 fix the ends of an interval to a few percent of its width.
            seed: the same seed and number of items always give the same resamples.
        """
        draw = np.random.default_rng(seed)
        self._all = np.ones((1, num_items))
        self._counts = draw.multinomial(
            num_items, np.full(num_items, 1 / num_items), size=samples
        ).astype(np.float64)

    def interval(self, statistic: Callable[[np.ndarray], np.ndarray]) -> Interval:
        """Estimate and interval of `statistic`, which maps weights [S, N] to values [S]."""
        low, high = np.quantile(statistic(self._counts), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Interval(float(statistic(self._all)[0]), float(low), float(high))

    def perplexity_recovery(self, *, reference: Sums, ptq: Sums, arm: Sums) -> Recovery:
        """(ppl_ptq - ppl_arm) / (ppl_ptq - ppl_reference).

        With the float base as `reference` and its PTQ as `ptq` this is the usual figure; with the
        further trained float model and its PTQ (the control) it is the matched one, which does not
        credit the arm with what more training does by itself.
        """

        def damage(weights):
            return ptq.perplexity(weights) - reference.perplexity(weights)

        def share(weights):
            return (ptq.perplexity(weights) - arm.perplexity(weights)) / damage(weights)

        return self._recovery(damage, share, noise=0.0)

    def kl_recovery(self, *, ptq: Sums, arm: Sums) -> Recovery:
        """1 - KL_arm / KL_ptq, both to the same float model."""

        def share(weights):
            return 1 - arm.mean(weights) / ptq.mean(weights)

        return self._recovery(ptq.mean, share, noise=KL_NOISE)

    def _recovery(
        self,
        damage: Callable[[np.ndarray], np.ndarray],
        share: Callable[[np.ndarray], np.ndarray],
        *,
        noise: float,
    ) -> Recovery:
        found = self.interval(damage)
        # Also where "PTQ" came out better than float for certain: there is nothing to recover.
        if found.low <= noise:
            return Recovery(found, None)
        return Recovery(found, self.interval(share))
