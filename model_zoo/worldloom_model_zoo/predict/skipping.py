"""Skipping most of the network on sampler steps that change little.

Between neighbouring steps the blocks of a diffusion transformer add nearly the same to its tokens. What the first block
adds is cheap to compute and foretells the rest: where it has hardly changed since the last whole computation, what the
other blocks added then is added again. TeaCache (Liu et al. 2024) decides by the modulated input; with the first block
as the judge it is known as first-block caching.
"""

from __future__ import annotations

from torch import Tensor


class FirstBlockCache:
    """The contributions of one sample's last whole computation. Make a new one for every sample.

    Args:
        threshold: relative change of what the first block adds, up to which the rest is reused.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.computed = 0
        """Steps computed whole."""
        self.skipped = 0
        """Steps of which only the first block was computed."""
        self._added: Tensor | None = None  # by the first block
        self._after: Tensor | None = None  # the tokens after the first block, until `keep`
        self._rest: Tensor | None = None  # added by the others

    def recall(self, before: Tensor, after: Tensor) -> Tensor | None:
        """The tokens after the last block, or None where they have to be computed; then `keep` follows.

        Args:
            before: tokens ``(b, ...)`` before the first block.
            after: the same after it. The row that changed most decides for the whole batch.
        """
        added = after - before
        if self._rest is not None and self._added is not None and self._rest.shape == added.shape:
            change = (added - self._added).flatten(1).abs().mean(dim=1) / self._added.flatten(1).abs().mean(dim=1)
            if float(change.max()) <= self.threshold:
                self.skipped += 1
                return after + self._rest
        self._added, self._after = added, after
        return None

    def keep(self, tokens: Tensor) -> None:
        """Take the tokens after the last block."""
        assert self._after is not None
        self._rest = tokens - self._after
        self._after = None
        self.computed += 1

    @property
    def share(self) -> float:
        """Share of the steps that were skipped."""
        return self.skipped / max(self.skipped + self.computed, 1)
