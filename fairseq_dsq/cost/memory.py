"""What a training step holds, by part, and the largest batch that fits in a memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Held:
    """Bytes that a training step holds.

    Attributes:
        weights: as they are held, float or codes and scales.
        gradients: of the weights.
        states: the optimizer's.
        stash: what the GEMMs packed for backward.
        saved: what autograd keeps for backward beside the stash.
    """

    weights: int
    gradients: int
    states: int
    stash: int
    saved: int

    @property
    def total(self) -> int:
        """All at once: gradients that are there from an earlier batch beside all that backward needs."""
        return self.weights + self.gradients + self.states + self.stash + self.saved


def largest_batch(measure: Callable[[int], int], limit: int, period: int) -> int:
    """The most sentences that fit.

    Args:
        measure: bytes of so many sentences; more take more, and every ``period`` more take as many again: a box along
            the tokens is full or short after each period alike.
        limit: bytes that there are.
        period: in sentences.

    Returns:
        n with measure(n) <= limit < measure(n + 1); 0 where not one fits.
    """
    measure = cache(measure)
    fits, skipped, room = 0, 0, limit
    if measure(period) <= limit:
        growth = measure(2 * period) - measure(period)
        periods = (limit - measure(period)) // growth
        fits, skipped, room = period, periods * period, limit - periods * growth
    over = fits + period
    while over - fits > 1:
        middle = (fits + over) // 2
        if measure(middle) <= room:
            fits = middle
        else:
            over = middle
    return skipped + fits
