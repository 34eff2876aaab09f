"""The order in which training sees samples: a pure function of (seed, batch number), so that a run can begin anywhere.

`Plan.batch` says what any batch of an endless stream holds without walking through those before it. The stream is the
same for every number of processes; rank r of a world of w takes batches r, r + w, r + 2 w, ... of it.

Three things are decided, each reproducibly:

- the shape of a batch, where samples have several (a bucket): in proportion to how many samples have it;
- the dataset of each place in it, where several are mixed: by their weights;
- the sample: the next of that dataset and shape in the shuffled order of its current epoch. Each dataset and shape (a
  cell) goes through an order of its own and is shuffled anew when it is exhausted, so no sample is left out: what does
  not fill a batch at the end of an epoch is filled from the next.

`spread` picks a few of many samples evenly: for tests, pictures and first looks.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Hashable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from worldloom.errors import WorldloomError

__all__ = ["Plan", "Turns", "permutation", "spread"]

_TURNS = 2**32 - 1  # keeps the seeds of turns apart from those of permutations


def permutation(samples: int, seed: int, epoch: int, cell: int = 0) -> np.ndarray:
    """The order of an epoch: a permutation of ``range(samples)``, a pure function of its arguments."""
    return np.random.default_rng(np.random.SeedSequence([seed, epoch, cell])).permutation(samples)


def spread(total: int, count: int) -> list[int]:
    """At most `count` indices, evenly spread over ``range(total)``."""
    return [int(i) for i in np.linspace(0, total - 1, min(count, total)).round()] if total else []


class Turns:
    """Whose turn it is: an endless sequence over choices in which each has its share, with access to any place.

    At the end of every block of places each choice has had its share of all turns, rounded; inside a block the turns
    are shuffled. A block is so long that the rarest choice has about one turn in it.

    Args:
        shares: positive weights; only their ratios count.
        seed: of the shuffling.
        tag: tells apart several sequences of one seed.
    """

    def __init__(self, shares: Sequence[float | Fraction], seed: int, tag: int = 0) -> None:
        exact = [Fraction(share) for share in shares]
        total = sum(exact)
        self._bounds = [Fraction(0)]  # of each choice's interval in [0, 1]
        for share in exact:
            self._bounds.append(self._bounds[-1] + share / total)
        self._length = int(-(-total // min(exact)))
        self._seed, self._tag = seed, tag
        self._blocks: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def at(self, place: int) -> tuple[int, int]:
        """(choice, how many turns it had before) at a place, from 0."""
        if len(self._bounds) == 2:
            return 0, place
        number, offset = divmod(place, self._length)
        choices, counts = self._block(number)
        return int(choices[offset]), int(counts[offset])

    def before(self, place: int) -> list[int]:
        """Turns of each choice in all blocks before the one that begins at `place`: its share, rounded."""
        marks = [int(bound * place + Fraction(1, 2)) for bound in self._bounds]
        return [high - low for low, high in itertools.pairwise(marks)]

    def _block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        if number not in self._blocks:
            first, last = self.before(number * self._length), self.before((number + 1) * self._length)
            turns = [high - low for low, high in zip(first, last, strict=True)]
            assert min(turns) >= 0, "the bounds of an interval move apart by one place or more, each rounded by a half"
            choices = np.repeat(np.arange(len(turns)), turns)
            counts = np.concatenate([np.arange(a, b) for a, b in zip(first, last, strict=True)])
            seed = np.random.SeedSequence([self._seed, number, self._tag, _TURNS])
            order = np.random.default_rng(seed).permutation(len(choices))
            choices = choices[order]
            # The turns of one choice stay in order: its n-th turn is the n-th place that it gets.
            places = np.argsort(choices, kind="stable")
            ordered = np.empty_like(counts)
            ordered[places] = counts
            if len(self._blocks) > 3:
                self._blocks.clear()
            self._blocks[number] = choices, ordered
        return self._blocks[number]


class Plan:
    """What every batch of an endless stream holds.

    Args:
        samples: how many there are, numbered from 0.
        batch: samples of a batch.
        seed: of all shuffling.
        shapes: a label of each sample; a batch holds samples of one label. None where all are alike.
        parts: the number of the dataset, from 0, that each sample belongs to; only needed with weights.
        weights: how often each dataset is drawn from, in any unit. None: all datasets are shuffled as one, and each
            sample comes as often as any other.

    Raises:
        WorldloomError: no samples, a weight that is not positive, or one for a dataset that has no samples.
    """

    def __init__(
        self,
        samples: int,
        batch: int,
        seed: int,
        *,
        shapes: Sequence[Hashable] | None = None,
        parts: Sequence[int] | np.ndarray | None = None,
        weights: Sequence[float] | None = None,
    ) -> None:
        if samples < 1 or batch < 1:
            raise WorldloomError("a plan needs samples, and batches of at least one", got=(samples, batch))
        self.samples, self.size, self.seed = samples, batch, seed
        self.labels, bucket = _numbered(shapes, samples)
        part = _parts(parts, weights, samples)
        each = [Fraction(w) / int(n) for w, n in zip(weights or [samples], np.bincount(part), strict=True)]
        self._cells: list[list[tuple[int, np.ndarray | None, int]]] = []  # per bucket: seed, members, how many
        shares: list[list[Fraction]] = []
        number = 0
        for b in range(len(self.labels)):
            self._cells.append([])
            shares.append([])
            for p in range(len(each)):
                members = None if len(self.labels) == len(each) == 1 else np.flatnonzero((bucket == b) & (part == p))
                count = samples if members is None else len(members)
                if count:
                    self._cells[b].append((number, members, count))
                    shares[b].append(each[p] * count)
                    number += 1
        self._buckets = Turns([sum(share) for share in shares], seed)
        self._mixes = [Turns(share, seed, 1 + b) for b, share in enumerate(shares)]
        self._orders: dict[tuple[int, int], np.ndarray] = {}
        facts = (samples, batch, seed, [str(share) for row in shares for share in row])
        self.digest = hashlib.sha256(repr(facts).encode() + bucket.tobytes() + part.tobytes()).hexdigest()[:16]

    def batch(self, number: int) -> list[tuple[int, int]]:
        """``(epoch, sample)`` of each place of a batch; the epoch is that of the sample's dataset and shape."""
        bucket, nth = self._buckets.at(number)
        return [self._sample(bucket, place) for place in range(nth * self.size, (nth + 1) * self.size)]

    def shape(self, number: int) -> Any:
        """The label that all samples of a batch have; None where there are none."""
        return self.labels[self._buckets.at(number)[0]]

    def counts(self) -> dict[Any, int]:
        """How many samples have each label; together, all."""
        return {label: sum(cell[2] for cell in cells) for label, cells in zip(self.labels, self._cells, strict=True)}

    def _sample(self, bucket: int, place: int) -> tuple[int, int]:
        part, nth = self._mixes[bucket].at(place)
        cell, members, count = self._cells[bucket][part]
        epoch, offset = divmod(nth, count)
        chosen = int(self._order(cell, count, epoch)[offset])
        return epoch, chosen if members is None else int(members[chosen])

    def _order(self, cell: int, count: int, epoch: int) -> np.ndarray:
        """The order of one cell; the newest two epochs of each are kept, for batches that lie in both."""
        if (cell, epoch) not in self._orders:
            for old in [key for key in self._orders if key[0] == cell and abs(key[1] - epoch) > 1]:
                del self._orders[old]
            self._orders[cell, epoch] = permutation(count, self.seed, epoch, cell).astype(np.uint32)
        return self._orders[cell, epoch]


def _numbered(shapes: Sequence[Hashable] | None, samples: int) -> tuple[list[Any], np.ndarray]:
    """The labels in a fixed order, and the number of each sample's."""
    if shapes is None:
        return [None], np.zeros(samples, np.int32)
    if len(shapes) != samples:
        raise WorldloomError("every sample has one shape", got=f"{len(shapes)} shapes of {samples} samples")
    labels = sorted(set(shapes), key=repr)
    numbers = {label: number for number, label in enumerate(labels)}
    return labels, np.fromiter((numbers[shape] for shape in shapes), np.int32, samples)


def _parts(parts: Sequence[int] | np.ndarray | None, weights: Sequence[float] | None, samples: int) -> np.ndarray:
    """The dataset of each sample, checked against the weights."""
    if weights is None:
        return np.zeros(samples, np.int32)
    part = np.zeros(samples, np.int32) if parts is None else np.asarray(parts, np.int32)
    if len(part) != samples or (len(part) and part.min() < 0) or part.max() >= len(weights):
        raise WorldloomError(
            "there must be one weight for each dataset",
            got=f"{len(weights)} weights, {int(part.max()) + 1} datasets",
            do="give as many weights as datasets, in the same order",
        )
    if not all(np.isfinite(w) and w > 0 for w in weights):
        raise WorldloomError("weights must be positive", got=list(weights), do="leave a dataset out instead")
    empty = [p for p in range(len(weights)) if not (part == p).any()]
    if empty:
        raise WorldloomError("a dataset that is mixed in has no samples", got=f"number {empty[0]} of {len(weights)}")
    return part
