"""Filling packs: cutting documents that are too long, and choosing documents whose lengths add up to a full pack."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple


class Cut(NamedTuple):
    """A stretch of a document that fits in one pack."""

    first: int
    """Number of its first segment."""
    start: int
    """First token of that segment; not 0 only where a text too long for a pack was cut."""
    last: int
    """Number of its last segment."""
    stop: int
    """Token of the last segment that it ends before."""
    tokens: int
    """Positions that it takes, image tokens included."""
    panels: int
    """Images (sub-images count) that it needs."""


def cut_document(sizes: Sequence[tuple[int, int]], sequence_length: int, max_images: int) -> list[Cut]:
    """Stretches, in order, that cover a document and each fit in a pack.

    `sizes` are (tokens, panels) of its segments, panels 0 for text; no image alone may exceed a pack. Images and the
    text that follows them stay together, and cuts fall between such units. Only a unit that is longer than a whole pack
    is divided: between its images, and in its text at a token. An image is never divided.
    """
    cutter = _Cutter(sizes, sequence_length, max_images)
    begin = 0
    for number, (_, panels) in enumerate(sizes):
        if panels == 0 or number == len(sizes) - 1:
            cutter.add_unit(begin, number + 1)
            begin = number + 1
    cutter.close()
    return cutter.cuts


class _Cutter:
    """The stretch being filled, and those that are finished."""

    def __init__(self, sizes: Sequence[tuple[int, int]], sequence_length: int, max_images: int) -> None:
        self.cuts: list[Cut] = []
        self._sizes = sizes
        self._limits = sequence_length, max_images
        self._spans: list[tuple[int, int, int]] = []  # (segment, start, stop) of the stretch being filled
        self._tokens = self._panels = 0

    def add_unit(self, begin: int, end: int) -> None:
        """Append the segments begin..end-1, whole if a pack can hold them."""
        tokens = sum(size[0] for size in self._sizes[begin:end])
        panels = sum(size[1] for size in self._sizes[begin:end])
        if not self._fits(tokens, panels) and (panels or tokens <= self._limits[0]):
            self.close()
        for number in range(begin, end):
            length, needed = self._sizes[number]
            if needed:
                if not self._fits(length, needed):
                    self.close()
                self._append(number, 0, length, needed)
            else:
                self._add_text(number, length)

    def _add_text(self, number: int, length: int) -> None:
        """Append a text, cut wherever a pack is full."""
        start = 0
        while start < length:
            if self._tokens == self._limits[0]:
                self.close()
            stop = min(length, start + self._limits[0] - self._tokens)
            self._append(number, start, stop, 0)
            start = stop

    def _fits(self, tokens: int, panels: int) -> bool:
        return self._tokens + tokens <= self._limits[0] and self._panels + panels <= self._limits[1]

    def _append(self, number: int, start: int, stop: int, panels: int) -> None:
        self._spans.append((number, start, stop))
        self._tokens += stop - start
        self._panels += panels

    def close(self) -> None:
        """Finish the stretch being filled, if anything is in it."""
        if self._spans:
            (first, start, _), (last, _, stop) = self._spans[0], self._spans[-1]
            self.cuts.append(Cut(first, start, last, stop, self._tokens, self._panels))
        self._spans = []
        self._tokens = self._panels = 0


class SubsetSum:
    """Which of the items offered so far fill a space best: most tokens, within both budgets. Exact.

    All sums are one Python integer of `slots` + 1 rows: bit t of row c is set when some of the items have t tokens and
    c panels in all. An item shifts the integer by its tokens and rows, and a mask drops what left the space: a row is
    wide enough that no sum reaches the next. Thousands of sums move in three machine loops, without numpy.
    """

    def __init__(self, room: int, slots: int) -> None:
        """An empty space of `room` tokens and `slots` panels."""
        self._room, self._stride = room, 2 * room + 1
        self._inside, self._full = _masks(room, slots)
        self._sums = 1
        self._items: list[tuple[int, int]] = []
        self._before: list[int] = []  # sums before each item, to walk back from the best one
        self.exact = room == 0
        """Whether some of the items fill the room to the last token."""

    def __len__(self) -> int:
        """Items offered so far."""
        return len(self._items)

    def offer(self, tokens: int, panels: int) -> None:
        """One more item, of at least one token and at most the room, and at most the slots."""
        sums = self._sums
        self._before.append(sums)
        self._items.append((tokens, panels))
        more = (sums << (tokens + panels * self._stride)) & self._inside
        self._sums = sums | more
        if more & self._full:
            self.exact = True

    def best(self) -> list[int]:
        """Numbers of the items to take, in the order they were offered: earlier items wherever there is a choice."""
        tokens, panels = self._best_sum()
        taken = []
        for number in range(len(self._items) - 1, -1, -1):
            if not self._before[number] >> (tokens + panels * self._stride) & 1:
                taken.append(number)
                tokens -= self._items[number][0]
                panels -= self._items[number][1]
        return taken[::-1]

    def _best_sum(self) -> tuple[int, int]:
        """The most tokens, and the fewest panels that they come with."""
        best, panels, sums = 0, 0, self._sums
        row = (1 << (self._room + 1)) - 1
        for count in range(sums.bit_length() // self._stride + 1):
            tokens = (sums >> (count * self._stride) & row).bit_length() - 1
            if tokens > best:
                best, panels = tokens, count
        return best, panels


@lru_cache(maxsize=2048)
def _masks(room: int, slots: int) -> tuple[int, int]:
    """Bits of all sums inside a space, and of those that fill its room."""
    stride, rows = 2 * room + 1, 1
    first = 1  # the first bit of each row, doubled until there are enough
    while rows <= slots:
        first |= first << (rows * stride)
        rows *= 2
    first &= (1 << ((slots + 1) * stride)) - 1
    full = first << room
    # Borrowing fills each row below its bit of `full`: 2^room - 2^0 sets the bits 0 ... room - 1.
    return (full - first) | full, full
