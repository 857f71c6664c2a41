"""Sizes seen at probing batch and sequence lengths become products of axes: coefficient * batch^i * sequence^j, by
divisibility.

The probing lengths are primes p for which (p - 1) / 2 is prime too, and which divide no dimension of a parameter: a
size that p divides is a multiple of the axis, and one that p - 1 or p + 1 divides belongs to a shifted sequence (labels
one position on), so that no dimension of a parameter may be a multiple of those either.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from cosim.graph import Axis, Dim

BATCHES = (263, 179, 347, 227, 383)
SEQUENCES = (1019, 983, 887, 719, 587, 503, 479, 359, 107, 83, 59, 47, 23)


def probe_batches(dimensions: Iterable[int]) -> tuple[int, int]:
    """Two batch sizes that divide none of the dimensions."""
    known = list(dimensions)
    allowed = [p for p in BATCHES if _divides_none(p, known)]
    allowed += BATCHES
    return allowed[0], allowed[1]


def probe_sequences(dimensions: Iterable[int], longest: int | None) -> list[tuple[int, int]]:
    """Pairs of sequence lengths to try, longest first.

    None is above `longest` (None: unknown) and none divides a dimension. The two of a pair are far apart, so that what
    rounds to blocks differs.
    """
    known = list(dimensions)
    allowed = [p for p in SEQUENCES if (longest is None or p <= longest) and _divides_none(p, known)]
    pairs = []
    for longest_tried in (SEQUENCES[0], 120):
        within = [p for p in allowed if p <= longest_tried]
        apart = [p for p in within if p < 0.75 * within[0]]
        pairs += [(within[0], apart[0])] if apart else []
    return pairs


def _divides_none(prime: int, dimensions: list[int]) -> bool:
    return not any(size and any(size % near == 0 for near in (prime - 1, prime, prime + 1)) for size in dimensions)


@dataclass(slots=True)
class SizeDecoder:
    """Factors sizes into axes; `batch` or `sequence` is None where that axis is fixed.

    `shifted` collects the sizes that were one off a sequence length and were taken for it.
    """

    batch: int | None
    sequence: int | None
    shifted: set[int] = field(default_factory=set)
    _known: dict[int, tuple[int, int, int]] = field(default_factory=dict)

    def factors(self, size: int) -> tuple[int, int, int]:
        """(powers of batch, powers of sequence, coefficient); the coefficient is in elements of the other axes."""
        known = self._known.get(size)
        if known is None:
            known = self._known[size] = self._factor(size)
        return known

    def _factor(self, size: int) -> tuple[int, int, int]:
        if size == 0:
            return 0, 0, 0
        batches = sequences = 0
        rest = size
        while self.batch is not None and rest % self.batch == 0:
            rest //= self.batch
            batches += 1
        while self.sequence is not None and rest % self.sequence == 0:
            rest //= self.sequence
            sequences += 1
        if self.sequence is not None and sequences == 0:
            for near in (self.sequence - 1, self.sequence + 1):
                telling = near // 2 if near < self.sequence else near
                if rest % telling == 0 and rest % near == 0:
                    self.shifted.add(size)
                    return batches, 1, rest // near
        return batches, sequences, rest

    def dim(self, size: int) -> Dim:
        """The size as a product of axes, its coefficient as one anonymous axis."""
        batches, sequences, rest = self.factors(size)
        return ("batch",) * batches + ("sequence",) * sequences + (() if rest == 1 else (anonymous(rest),))


def anonymous(size: int) -> Axis:
    """The name of an axis of which only the size is known."""
    return f"size_{size}"
