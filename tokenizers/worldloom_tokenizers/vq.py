"""Vector quantisation with a straight-through gradient (van den Oord et al. 2017, arXiv:1711.00937, section 3.2).

Vectors and codes are compared on the unit sphere (Yu et al. 2022, arXiv:2110.04627, section 3.2): no code can be out of
reach because of its length. The codebook is a parameter that a loss trains, so it is saved, averaged and resumed like
every other weight, and nothing about it has to be remembered between steps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from worldloom.errors import WorldloomError

_TEMPERATURE = 0.1  # of the soft choices


class Quantized(NamedTuple):
    """What `VectorQuantizer` makes of vectors ``(n, d)``."""

    codes: Tensor
    """``(n, d)``: the nearest codes, of unit length, or in training some vectors as they were; their gradient goes to
    the vectors unchanged."""
    indices: Tensor
    """int64 ``(n,)``."""
    loss: Tensor
    """Codebook, commitment and balance; a scalar."""


class VectorQuantizer(nn.Module):
    """A codebook of unit vectors.

    Args:
        codes: size of the codebook.
        dim: size of a code.
        commitment: weight of the term that keeps vectors near their codes.
        balance: weight of the term that spreads vectors over the codes: the entropy of the mean of soft choices (Yu et
            al. 2023, arXiv:2310.05737, section 3.2), which an early collapse of the choice to one code makes small.
        bypass: share of the vectors that training lets through as they are. What is behind the codebook then works on
            the whole sphere, its gradient moves vectors from one code's region into another's, and the codes follow to
            where vectors gather. Straight-through gradients, which know the codes only, do so slowly with few codes.

    Raises:
        WorldloomError: fewer than two codes or dimensions.
    """

    def __init__(
        self, codes: int, dim: int, commitment: float = 0.25, balance: float = 0.0, bypass: float = 0.0
    ) -> None:
        super().__init__()
        if min(codes, dim) < 2:
            raise WorldloomError("a codebook has at least two codes of two dimensions", got=(codes, dim))
        self.commitment, self.balance, self.bypass = commitment, balance, bypass
        self.codebook = nn.Parameter(torch.randn(codes, dim))

    @torch.no_grad()
    def initialise(self, vectors: Tensor, rounds: int = 20) -> None:
        """Put the codes at the means that k-means on the sphere finds among vectors ``(n, d)``.

        Each start is the vector farthest from those before it (Gonzalez 1985), so that the result is a function of the
        vectors alone.
        """
        vectors = F.normalize(vectors, dim=1)
        chosen = [0]
        while len(chosen) < len(self.codebook):
            chosen.append(int((vectors @ vectors[chosen].T).amax(dim=1).argmin()))
        book = vectors[chosen]
        for _ in range(rounds):
            members = F.one_hot((vectors @ book.T).argmax(dim=1), len(book)).to(vectors)  # (n, codes)
            book = F.normalize(members.T @ vectors + 1e-6 * book, dim=1)
        self.codebook.copy_(book)

    def lookup(self, indices: Tensor) -> Tensor:
        """Indices ``(n,)`` -> codes ``(n, d)``."""
        return F.normalize(self.codebook, dim=1)[indices]

    def forward(self, vectors: Tensor, generator: torch.Generator | None = None) -> Quantized:
        """The nearest code of each vector ``(n, d)``.

        Args:
            generator: in training, draws which vectors bypass the codebook, and revives codes: one that no vector of
                the batch chose is drawn towards a vector that this picks, until it is the nearest of some.
        """
        vectors, book = F.normalize(vectors, dim=1), F.normalize(self.codebook, dim=1)
        similarity = vectors @ book.T
        indices = similarity.argmax(dim=1)
        chosen = book[indices]
        loss = (chosen - vectors.detach()).square().sum(dim=1).mean()
        loss = loss + self.commitment * (vectors - chosen.detach()).square().sum(dim=1).mean()
        share = (similarity / _TEMPERATURE).softmax(dim=1).mean(dim=0)
        loss = loss + self.balance * torch.special.xlogy(share, share).sum()
        if generator is not None:
            unused = torch.bincount(indices, minlength=len(book)) == 0
            picked = torch.randint(len(vectors), (len(book),), generator=generator).to(vectors.device)
            pull = (book - vectors[picked].detach()).square().sum(dim=1)
            loss = loss + (pull * unused).sum() / len(book)
            free = torch.rand(len(vectors), 1, generator=generator).to(vectors.device) < self.bypass
            chosen = torch.where(free, vectors, chosen)
        return Quantized(vectors + (chosen - vectors).detach(), indices, loss)
