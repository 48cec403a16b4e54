"""Where the arithmetic of an update happens, and what of the learning state lies in the memory of that place.

Masters, moments and P are host tensors. For a model on a CPU they are in its own memory and used where they are, so
many linears at a time as have 2**20 factors. On another device an update brings them there, as `learning_state` says:

    lean      the linears of one input at a time: masters, moments, gradient, and P in pieces of at most 1 MiB
    resident  all of an expert in whole slabs, which stay between updates with the slabs of the other active experts;
              a shared P stays there, too. A P for each layer comes in pieces, since 32 of them are 64 MiB

The host's slabs stay the truth either way: what an update has made is written back before it counts, and slabs on the
device are copies that are dropped when an update is.

For 32 layers, d 2048, r 8, P 256 wide and as many anchors this arithmetic takes 95 ms on one core of an EPYC, most of
it reading 192 MiB of P and anchors, and the cores are the server's; over a bus of 50 GB/s all that lean brings, 240
MiB, takes 5 ms. So it is never the host that computes for a device.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ogpstream.learner.binding import GradientSink
from ogpstream.learner.config import LearningState
from ogpstream.memory.basis import CHUNK, ProjectionBasis
from ogpstream.memory.experts import Expert
from ogpstream.memory.layout import Layout
from ogpstream.memory.pinned import host_copy, host_empty, host_zeros

# bytes of P or of anchors on the device at a time: 128 directions of width 2048. A copy takes 20 us of a bus of
# 50 GB/s, and the host as long for the two launches after it: a second buffer and stream for copies would gain nothing
PIECE = 2**20
# factors that a CPU steps at a time: 16 ms for Adam with its copies on one core of an EPYC
FACTORS = 2**20


def in_pieces(rows: Tensor, device: torch.device, dtype: torch.dtype) -> Iterator[Tensor]:
    """Rows `[M, D]` where a block on this device can be multiplied with them.

    All of them where they are in its memory already, else pieces of `PIECE` bytes, or 32 rows of a width over 8192. A
    piece is valid until the next one is asked for.
    """
    if rows.device == device:
        yield rows.to(dtype)
        return
    count = max(CHUNK, PIECE // (rows.element_size() * rows.shape[1]) // CHUNK * CHUNK)
    for piece in rows.split(count):
        yield brought(piece, device).to(dtype)


def parts(slab: Tensor) -> tuple[Tensor, ...]:
    """A slab `[n]` as views for one unit each: on a CPU of at most `FACTORS` numbers, on a device all of it."""
    return slab.split(FACTORS) if slab.device.type == "cpu" else (slab,)


def brought(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on a device; from pinned memory it is queued on the current stream."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device).copy_(tensor, non_blocking=True)


class Piece:
    """Linears whose factors are stepped together.

    Args:
        whole: layout of all linears of an expert.
        sites: numbers of those of the piece, in order.
        start: where the piece begins in a slab whose pieces lie one after the other.

    Attributes:
        layout: of these linears alone.
        span: of the piece in such a slab.
    """

    def __init__(self, whole: Layout, sites: Sequence[int], start: int) -> None:
        self.whole, self.sites = whole, tuple(sites)
        entire = len(sites) == len(whole.sites)
        self.layout = whole if entire else Layout([whole.sites[site] for site in sites], whole.rank)
        self.span = slice(start, start + self.layout.numel)

    def load(self, slab: Tensor, device: torch.device) -> Tensor:
        """This piece `[layout.numel]` of a slab `[whole.numel]`, copied to a device."""
        flat = torch.empty(self.layout.numel, dtype=slab.dtype, device=device)
        for own, theirs in self._pairs(flat, slab):
            own.copy_(theirs, non_blocking=True)
        return flat

    def save(self, flat: Tensor, slab: Tensor) -> None:
        """Write this piece into a slab `[whole.numel]`."""
        for own, theirs in self._pairs(flat, slab):
            theirs.copy_(own, non_blocking=True)

    def _pairs(self, flat: Tensor, slab: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        if self.layout is self.whole:
            yield flat, slab
            return
        for key in self.layout.bases:
            own, theirs = self.layout.members(key), self.whole.members(key)
            if len(own) == len(theirs):
                # contiguous on both sides: one copy, which pinned memory makes asynchronous
                yield self.layout.a_block(flat, key), self.whole.a_block(slab, key)
            else:
                yield from ((self.layout.a(flat, n), self.whole.a(slab, self.sites[n])) for n in own)
        for number, site in enumerate(self.sites):
            yield self.layout.b(flat, number), self.whole.b(slab, site)


class Staging:
    """Brings the learning state to where an update computes: for a model on a CPU everything is there already."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def pieces(self, layout: Layout, sites: Collection[int] | None = None) -> tuple[Piece, ...]:
        """The pieces that one step goes through, one after the other.

        Args:
            sites: those that take part in the step; None is all. Linears of one input take part together.
        """
        found: list[Piece] = []
        own: list[int] = []
        size = 0
        for site in (site for key in layout.bases for site in layout.members(key) if sites is None or site in sites):
            own.append(site)
            size += layout.rank * (layout.sites[site].d_in + layout.sites[site].d_out)
            if size >= FACTORS:
                found.append(Piece(layout, sorted(own), found[-1].span.stop if found else 0))
                own, size = [], 0
        if own:
            found.append(Piece(layout, sorted(own), found[-1].span.stop if found else 0))
        return tuple(found)

    def sink(self, expert: Expert) -> GradientSink:
        """A place for the gradient of one sample."""
        return GradientSink(expert.layout, expert.name, dtype=expert.factors.dtype, device=self.device)

    def total(self, piece: Piece, gradients: Sequence[Tensor]) -> Tensor:
        """The sum of one piece of several slabs of sinks on the device, to be changed in place."""
        total = piece.load(gradients[0], self.device)
        for gradient in gradients[1:]:
            total += gradient if piece.layout is piece.whole else piece.load(gradient, self.device)
        return total

    def aside(self, total: Tensor) -> Tensor:
        """Where such a sum waits for its step."""
        return total

    def gathered(self, layout: Layout, gradient: Tensor) -> Tensor:
        """A sink's slab in host RAM, in the order of the layout."""
        return gradient.cpu()

    def take(self, expert: Expert, name: str, piece: Piece) -> Tensor:
        """One piece of a slab of an expert on the device, to be changed in place; zeros where it has none yet."""
        slab: Tensor | None = getattr(expert, name)
        if slab is None:
            return torch.zeros(piece.layout.numel, dtype=expert.factors.dtype, device=self.device)
        return piece.load(slab, self.device)

    def keep(self, piece: Piece, flat: Tensor, slab: Tensor | None) -> Tensor:
        """Write a changed piece into a slab in host RAM; into a new one where there is none yet. Returns the slab."""
        if slab is None:
            if piece.layout is piece.whole:
                return flat
            slab = host_empty(piece.whole.numel, dtype=flat.dtype)
        piece.save(flat, slab)
        return slab

    def committed(self, expert: Expert, slabs: Mapping[str, Tensor], flats: Mapping[str, Tensor],
                  active: Collection[str]) -> None:
        """An update of an expert is made.

        Args:
            slabs: what `keep` returned, by name. The expert has another one where a fold has changed it since.
            flats: whole copies of these on the device.
            active: experts whose copies may stay there.
        """

    def rows(self, basis: ProjectionBasis, count: int, like: Tensor) -> Iterable[Tensor]:
        """The first rows of P.T, on the device and in the dtype of `like`: all of them, or in pieces."""
        return in_pieces(basis.rows()[:count], like.device, like.dtype)


class Lean(Staging):
    """One piece of an expert at a time on the device.

    Args:
        alone: each linear is a piece of its own, where otherwise those that share an input make one: of a P that all
            layers share, the block of one input is as wide as all of them.
    """

    def __init__(self, device: torch.device, *, alone: bool) -> None:
        super().__init__(device)
        self._alone = alone

    def pieces(self, layout: Layout, sites: Collection[int] | None = None) -> tuple[Piece, ...]:
        found: list[Piece] = []
        for key in layout.bases:
            members = layout.members(key)
            for own in [[one] for one in members] if self._alone else [members]:
                found.append(Piece(layout, own, found[-1].span.stop if found else 0))
        # where a piece begins is where the sinks have it
        return tuple(piece for piece in found if sites is None or not set(piece.sites).isdisjoint(sites))

    def sink(self, expert: Expert) -> GradientSink:
        return PieceSink(expert, self.pieces(expert.layout))

    def total(self, piece: Piece, gradients: Sequence[Tensor]) -> Tensor:
        total = brought(gradients[0][piece.span], self.device)
        for gradient in gradients[1:]:
            total += brought(gradient[piece.span], self.device)
        return total

    def aside(self, total: Tensor) -> Tensor:
        return host_copy(total)

    def gathered(self, layout: Layout, gradient: Tensor) -> Tensor:
        slab = torch.empty_like(gradient)
        for piece in self.pieces(layout):
            piece.save(gradient[piece.span], slab)
        return slab

    def keep(self, piece: Piece, flat: Tensor, slab: Tensor | None) -> Tensor:
        return super().keep(piece, flat, host_empty(piece.whole.numel, dtype=flat.dtype) if slab is None else slab)


class Resident(Staging):
    """Whole slabs on the device, kept between updates.

    Args:
        bases: keep these on the device, too.
    """

    def __init__(self, device: torch.device, *, bases: bool) -> None:
        super().__init__(device)
        self._bases = bases
        # of (expert, slab) the host's slab and its copy; of a basis' storage that, its version and its copy
        self._slabs: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
        self._rows: dict[int, tuple[Tensor, int, Tensor]] = {}

    def pieces(self, layout: Layout, sites: Collection[int] | None = None) -> tuple[Piece, ...]:
        # whole: a device steps 2**25 factors in the time that a CPU needs for 2**20
        return (Piece(layout, range(len(layout.sites)) if sites is None else sorted(sites), 0),)

    def take(self, expert: Expert, name: str, piece: Piece) -> Tensor:
        # given away: an update that is dropped leaves no copy, and the next one brings the host's again
        source, copy = self._slabs.pop((expert.name, name), (None, None))
        if copy is not None and source is getattr(expert, name) and piece.layout is piece.whole:
            return copy
        return super().take(expert, name, piece)

    def total(self, piece: Piece, gradients: Sequence[Tensor]) -> Tensor:
        if piece.layout is not piece.whole:
            return super().total(piece, gradients)
        # nobody reads them again, and one more is 4 MiB at 32 linears of width 2048
        for gradient in gradients[1:]:
            gradients[0].add_(gradient)
        return gradients[0]

    def keep(self, piece: Piece, flat: Tensor, slab: Tensor | None) -> Tensor:
        return host_copy(flat) if slab is None else super().keep(piece, flat, slab)

    def committed(self, expert: Expert, slabs: Mapping[str, Tensor], flats: Mapping[str, Tensor],
                  active: Collection[str]) -> None:
        for name, flat in flats.items():
            if getattr(expert, name) is slabs[name]:
                self._slabs[expert.name, name] = slabs[name], flat
        for place in [place for place in self._slabs if place[0] not in active]:
            del self._slabs[place]

    def rows(self, basis: ProjectionBasis, count: int, like: Tensor) -> Iterable[Tensor]:
        if not self._bases or like.device != self.device:
            return super().rows(basis, count, like)
        # a state that was loaded has another storage, and perhaps a version that another P had before
        source, version, copy = self._rows.get(id(basis), (None, -1, None))
        if copy is None or source is not basis.rows() or version != basis.version:
            copy = brought(basis.rows(), self.device)
            self._rows[id(basis)] = basis.rows(), basis.version, copy
        return [copy[:count].to(like.dtype)]


class PieceSink(GradientSink):
    """Gradients of a device's linears in host RAM: a piece is summed on the device and leaves it when it is complete.

    The `slab` is pinned and lies piece after piece. Read it when the device has been waited for.
    """

    def __init__(self, expert: Expert, pieces: Sequence[Piece]) -> None:
        self.layout, self.trained = expert.layout, expert.name
        self.slab = host_zeros(expert.layout.numel, dtype=expert.factors.dtype)
        self._piece = {site: piece for piece in pieces for site in piece.sites}
        self._sums: dict[Piece, tuple[Tensor, set[int]]] = {}
        self._left: set[Piece] = set()

    def add(self, index: int, dA: Tensor, dB: Tensor) -> None:
        """Add the gradients of one site, dA `[D_in, r]` and dB `[r, D_out]`."""
        piece = self._piece[index]
        if piece not in self._sums:
            # one that has left already is of a layer that is used twice: it comes back, behind its own copy
            first = torch.zeros(piece.layout.numel, dtype=self.slab.dtype, device=dA.device)
            if piece in self._left:
                first.copy_(self.slab[piece.span], non_blocking=True)
            self._sums[piece] = first, set()
        total, seen = self._sums[piece]
        number = piece.sites.index(index)
        piece.layout.a(total, number).add_(dA)
        piece.layout.b(total, number).add_(dB)
        seen.add(index)
        if len(seen) == len(piece.sites):
            self._leave(piece)

    def finish(self) -> None:
        """Take what is not complete: of linears that no token was routed to there is nothing more to come."""
        for piece in list(self._sums):
            self._leave(piece)

    def _leave(self, piece: Piece) -> None:
        total, _ = self._sums.pop(piece)
        self.slab[piece.span].copy_(total, non_blocking=True)
        self._left.add(piece)


def staging_for(device: torch.device, mode: LearningState, *, shared: bool) -> Staging:
    """How updates of a model on this device are made.

    Args:
        mode: `LearnerConfig.learning_state`.
        shared: one P for all linears of an input width.
    """
    if device.type == "cpu":
        return Staging(device)
    return Lean(device, alone=shared) if mode == "lean" else Resident(device, bases=shared)
