"""Filling packs: cutting documents that are too long, and choosing documents whose lengths add up to a full pack."""

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
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
    text that follows them stay together, and cuts fall between such units: as few as there can be, so placed that the
    longest stretch is as short as it can be (a stretch that nearly fills a pack leaves a gap that nothing fits in).
    Only where a unit is longer than a whole pack is it divided, between its images, and in its text at a token; then
    stretches are as long as they can be. An image is never divided.
    """
    if len(sizes) == 1 and not sizes[0][1]:  # one long text: most of what is cut
        total = sizes[0][0]
        starts = range(0, total, sequence_length)
        return [Cut(0, at, 0, min(at + sequence_length, total), min(sequence_length, total - at), 0) for at in starts]
    last = len(sizes) - 1
    ends = [0, *(number + 1 for number, (_, panels) in enumerate(sizes) if panels == 0 or number == last)]
    sums = ([0, *accumulate(size[part] for size in sizes)] for part in (0, 1))
    tokens, panels = ([totals[end] for end in ends] for totals in sums)  # of all units before each
    longest = _stops(tokens, panels, sequence_length, max_images)
    if not longest:
        cutter = _Cutter(sizes, sequence_length, max_images)
        for begin, end in pairwise(ends):
            cutter.add_unit(begin, end)
        cutter.close()
        return cutter.cuts
    low, high = -(-tokens[-1] // len(longest)), sequence_length
    while low < high:
        middle = (low + high) // 2
        if 0 < len(_stops(tokens, panels, middle, max_images)) <= len(longest):
            high = middle
        else:
            low = middle + 1
    stops = _stops(tokens, panels, high, max_images)
    return [
        Cut(ends[at], 0, ends[to] - 1, sizes[ends[to] - 1][0], tokens[to] - tokens[at], panels[to] - panels[at])
        for at, to in zip([0, *stops], stops, strict=False)
    ]


def _stops(tokens: Sequence[int], panels: Sequence[int], length: int, images: int) -> list[int]:
    """Units before each cut and the end if stretches are as long as the limits let them be; [] if a unit is longer.

    `tokens` and `panels` are sums over the units before each unit, and over all.
    """
    stops = [0]
    while stops[-1] < len(tokens) - 1:
        at = stops[-1]
        to = min(bisect_right(tokens, tokens[at] + length), bisect_right(panels, panels[at] + images)) - 1
        if to == at:
            return []
        stops.append(to)
    return stops[1:]


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

    All sums are one Python integer of `slots` + 1 rows: a bit of row c says that some of the items leave r tokens free
    and have c panels in all, and r is its place in the row. An item shifts the integer, by its tokens to the right and
    by its panels' rows to the left, and a mask drops what left the space: a row begins with as many unused bits as a
    shift can cross. Thousands of sums move in three machine loops, without numpy. Where panels cannot run out there is
    one row, and nothing to drop: what does not fit falls off the end.
    """

    def __init__(self, room: int, slots: int | None, slack: int = 0) -> None:
        """An empty space of `room` > 0 tokens and `slots` panels; None if any items that fit the room fit them too.

        `slack` < room: tokens that may stay free without looking for a better filling.
        """
        self._room, self._slots = room, slots
        self._enough = (2 << slack) - 1
        if slots is None:
            self._sums = 1 << room
        else:
            self._stride = 2 * room + 1
            self._inside, full = _masks(room, slots)
            self._sums, self._enough = 1 << 2 * room, (full << (slack + 1)) - full
        self._before: list[int] = []  # sums before each item, to walk back from the best one
        self._numbers: list[int] = []  # of each item in its window
        self._windows: list[tuple[int, int, Sequence[int], Sequence[int]]] = []  # items before it, and what was offered

    def offer(self, window: int, tokens: Sequence[int], panels: Sequence[int], begin: int, least: int) -> bool:
        """Offer items of a window from number `begin` on; returns whether some items now fill all but the slack.

        Ends there, or after `least` items that fit alone if these hold twice the room. Items have at least one token.
        """
        numbers, before = self._numbers, self._before
        self._windows.append((len(before), window, tokens, panels))
        sums, room, slots, enough = self._sums, self._room, self._slots, self._enough
        missing, least = 2 * room, len(before) + least
        if slots is not None:
            stride, inside = self._stride, self._inside
        for number in range(begin, len(tokens)):
            shift = tokens[number]
            if shift > room:
                continue
            missing -= shift
            if slots is None:
                before.append(sums)
                sums |= sums >> shift
            else:
                rows = panels[number]
                if rows > slots:
                    continue
                before.append(sums)
                sums |= (sums << (rows * stride - shift) if rows else sums >> shift) & inside
            numbers.append(number)
            if sums & enough:
                self._sums = sums
                return True
            if missing <= 0 and len(before) >= least:
                break
        self._sums = sums
        return False

    def best(self) -> list[tuple[int, int]]:
        """Window and number of the items to take, in the order of offering: earlier ones wherever there is a choice."""
        at = self._best_sum()
        taken = []
        before, numbers, stop = self._before, self._numbers, len(self._before)
        for first, window, tokens, panels in reversed(self._windows):
            for item in range(stop - 1, first - 1, -1):
                if not before[item] >> at & 1:
                    number = numbers[item]
                    taken.append((window, number))
                    at += tokens[number]
                    if self._slots is not None:
                        at -= panels[number] * self._stride
            stop = first
        return taken[::-1]

    def _best_sum(self) -> int:
        """The bit of the fewest tokens left, and of the fewest panels that these come with."""
        sums = self._sums
        if self._slots is None:
            return (sums & -sums).bit_length() - 1
        found, left, row = 0, self._room + 1, (1 << (self._room + 1)) - 1
        for start in range(self._room, sums.bit_length(), self._stride):
            leaves = sums >> start & row
            if leaves and (least := (leaves & -leaves).bit_length() - 1) < left:
                found, left = start + least, least
        return found


@lru_cache(maxsize=2048)
def _masks(room: int, slots: int) -> tuple[int, int]:
    """Bits of all sums inside a space, and of those that leave nothing free."""
    stride, rows = 2 * room + 1, 1
    full = 1 << room  # the first bit of each row's sums, doubled until there are enough
    while rows <= slots:
        full |= full << (rows * stride)
        rows *= 2
    full &= (1 << ((slots + 1) * stride)) - 1
    # Borrowing fills each row up to its bit of the most tokens: 2^(r + 1) - 2^0 sets the bits 0 ... r.
    return (full << (room + 1)) - full, full
