"""Choosing the documents of one pack."""

from collections.abc import Sequence

from mmtrain.config.schema import Data
from mmtrain.data.pack import SubsetSum
from mmtrain.data.window import Stream, Waiting

MAX_OFFERS = 512
"""Documents that the last quarter of a pack is chosen from, at most; a bound on time that is hardly ever met."""


class Filler:
    """Chooses the documents of one pack.

    Mixture order: the next document comes from the source with the least served tokens / share. A source may run
    ahead of its share by no more than its part of this pack plus half a pack (its first document excepted), whatever
    the subset sum would like; so over any stretch of packs the measured mixture is off by at most 1.5 packs a source.
    """

    def __init__(self, active: Sequence[Stream], data: Data) -> None:
        self.taken: list[tuple[Stream, int]] = []
        """Stream and number in its window, in pack order."""
        self._active = active
        self._room, self._slots = data.sequence_length, data.max_images
        self._reserve = data.sequence_length // 4
        least = min(stream.progress for stream in active)
        share = sum(stream.share for stream in active)
        self._ceiling = [
            stream.share * (least + data.sequence_length / share) + data.sequence_length / 2 for stream in active
        ]
        self._ahead = [stream.served for stream in active]  # served tokens if all that was offered were taken
        self._used: set[tuple[int, int]] = set()

    def take_overdue(self, entered: int) -> None:
        """Take documents that entered the window at or before `entered`, oldest first, all that fit.

        Why no document x waits for more than max_wait packs: let volume be tokens / sequence_length + images /
        max_images. The windows hold v packs' volume and one more document each, at most 2. Once x is overdue, only
        older documents go before it, and none of them is passed over for a younger one. The oldest of a pack did not
        fit in the pack before, so two neighbouring packs have a volume above 1: 2 (v + 2 sources) + 1 packs at most.
        """
        overdue = []
        for at, stream in enumerate(self._active):
            for number, document in enumerate(stream.waiting):
                if document.entered > entered:
                    break
                overdue.append((document.entered, stream.number, number, at))
        for _, _, number, at in sorted(overdue):
            document = self._active[at].waiting[number]
            if document.tokens <= self._room and document.panels <= self._slots:
                self._ahead[at] += document.tokens
                self._take(at, number, document)

    def _take(self, at: int, number: int, document: Waiting) -> None:
        self._room -= document.tokens
        self._slots -= document.panels
        self._used.add((at, number))
        self.taken.append((self._active[at], number))

    def fill(self) -> None:
        """Take documents in mixture order while more than the reserve stays free, then the best subset of the next."""
        ahead, room, slots = self._ahead, self._room, self._slots
        shares = [stream.share for stream in self._active]
        places = [0] * len(self._active)
        open_streams = list(range(len(self._active)))
        subset: SubsetSum | None = None
        offered: list[tuple[int, int]] = []
        while open_streams and room:
            at = min(open_streams, key=lambda i: ahead[i] / shares[i]) if len(open_streams) > 1 else open_streams[0]
            waiting, number = self._active[at].waiting, places[at]
            places[at] += 1
            if number == len(waiting):
                open_streams.remove(at)
                continue
            document = waiting[number]
            if document.tokens > room or document.panels > slots or (self._used and (at, number) in self._used):
                continue
            if self.taken and ahead[at] + document.tokens > self._ceiling[at]:
                open_streams.remove(at)
                continue
            ahead[at] += document.tokens
            if subset is None and (not self.taken or room - document.tokens >= self._reserve):
                self._take(at, number, document)
                room, slots = self._room, self._slots
                continue
            if subset is None:
                subset = SubsetSum(room, slots)
            subset.offer(document.tokens, document.panels)
            offered.append((at, number))
            if subset.exact or len(subset) == MAX_OFFERS:
                break
        if subset is not None:
            for number in subset.best():
                at, place = offered[number]
                self._take(at, place, self._active[at].waiting[place])
