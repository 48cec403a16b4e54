"""The adapted linears of a model, and where the factors of each lie in the flat slab of an expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class SiteShape:
    """One adapted linear; `basis` is the key of the ProjectionBasis of its input."""

    name: str
    d_in: int
    d_out: int
    basis: str


class Layout:
    """Where the A and B of each site lie in the flat slab of an expert of one rank.

    The A of the sites that share a basis lie side by side as one `[D_in, n * r]` block, so that the block can
    be projected against that basis in one call; the B of all sites follow after all blocks. Views alias the
    slab.

    Raises:
        ValueError: no site, two sites of one name, a width or rank < 1, or two widths on one basis.
    """

    def __init__(self, sites: Sequence[SiteShape], rank: int) -> None:
        if not sites or rank < 1:
            raise ValueError(f"a layout needs sites and a rank of at least 1, got {len(sites)} sites of rank {rank}")
        if len({site.name for site in sites}) != len(sites):
            raise ValueError("two sites have the same name: give each adapted linear its own")
        self.sites = tuple(sites)
        self.rank = rank
        self._members: dict[str, tuple[int, ...]] = {}
        for index, site in enumerate(self.sites):
            if site.d_in < 1 or site.d_out < 1:
                raise ValueError(f"site {site.name!r} has the shape {site.d_in} x {site.d_out}: widths start at 1")
            self._members[site.basis] = (*self._members.get(site.basis, ()), index)
        self._block: dict[str, int] = {}
        self._column = [0] * len(self.sites)
        offset = 0
        for basis, members in self._members.items():
            widths = {self.sites[index].d_in for index in members}
            if len(widths) > 1:
                raise ValueError(f"the sites of basis {basis!r} have several input widths {sorted(widths)}")
            self._block[basis] = offset
            for position, index in enumerate(members):
                self._column[index] = position * rank
            offset += widths.pop() * len(members) * rank
        self.a_numel = offset
        self._b_offset: list[int] = []
        for site in self.sites:
            self._b_offset.append(offset)
            offset += rank * site.d_out
        self.numel = offset

    @property
    def bases(self) -> tuple[str, ...]:
        """The basis keys, in the order of their blocks."""
        return tuple(self._members)

    def members(self, basis: str) -> tuple[int, ...]:
        """Indices of the sites whose A lie in the block of `basis`, from left to right."""
        return self._members[basis]

    def a_block(self, slab: Tensor, basis: str) -> Tensor:
        """View `[D_in, n * r]` of the A of all sites of one basis, rows contiguous."""
        members = self._members[basis]
        d_in, columns = self.sites[members[0]].d_in, len(members) * self.rank
        return slab[self._block[basis] :][: d_in * columns].view(d_in, columns)

    def a(self, slab: Tensor, index: int) -> Tensor:
        """View `[D_in, r]` of one site's A, a column range of its basis' block."""
        start = self._column[index]
        return self.a_block(slab, self.sites[index].basis)[:, start : start + self.rank]

    def b(self, slab: Tensor, index: int) -> Tensor:
        """View `[r, D_out]` of one site's B, contiguous."""
        d_out = self.sites[index].d_out
        return slab[self._b_offset[index] :][: self.rank * d_out].view(self.rank, d_out)
