"""Choosing the documents of one pack. This code runs for every document of a run: it is written for speed."""

from collections.abc import Sequence
from math import inf

from mmtrain.config.schema import Data
from mmtrain.data.pack import SubsetSum
from mmtrain.data.window import Stream

SLACK = 1024
"""A pack is full enough when less than this part of it stays free."""

MIN_OFFERS = 32
"""Documents that each source offers for the end of a pack: more find little, and cost time."""


class Filler:
    """Chooses the documents of packs.

    A pack is filled in three steps: documents that have waited too long; then documents in mixture order (the next one
    is the oldest of the source with the least served tokens / share) until the next would leave less than a quarter
    of the pack free; then the subset of what the sources offer that fills the rest best, earlier offers first. In the
    last two steps a source may run ahead of its share by no more than its part of this pack plus one pack, the first
    document of a pack excepted; mmtrain.data.plan says what that means for the measured mixture.
    """

    def __init__(self, streams: Sequence[Stream], data: Data, image_tokens: int) -> None:
        """Fill from the windows of `streams`, whose lists stay the same objects. `image_tokens`: of one panel."""
        self._streams = streams
        self._shares = [stream.share for stream in streams]
        self._tokens = [stream.tokens for stream in streams]
        self._panels = [stream.panels for stream in streams]
        self._length, self._images = data.sequence_length, data.max_images
        self._reserve, self._slack = data.sequence_length // 4, data.sequence_length // SLACK
        self._image_tokens = image_tokens

    def choose(self, clock: list[float], overdue: int) -> list[tuple[int, int]]:
        """The pack, in order: number of the stream, number of the document in its window.

        `clock` is served tokens / share of each stream, infinite for those that have nothing waiting; not all are.
        Documents that entered a window at or before `overdue` go first.
        """
        taken: list[tuple[int, int]] = []
        served = [stream.served for stream in self._streams]
        shares = sum([share for share, time in zip(self._shares, clock, strict=True) if time < inf])
        allowed = min(clock) + self._length / shares
        ceiling = [share * allowed + self._length for share in self._shares]
        following = [0] * len(clock)
        room, slots = self._length, self._images
        for at, number in self._overdue(overdue):
            tokens, panels = self._tokens[at][number], self._panels[at][number]
            following[at] = number + 1
            if tokens <= room and panels <= slots:
                served[at] += tokens
                clock[at] = served[at] / self._shares[at]
                room -= tokens
                slots -= panels
                taken.append((at, number))
        least = min(clock)
        while least < inf:
            at = clock.index(least)
            number = following[at]
            if number == len(self._tokens[at]):
                clock[at] = inf
            else:
                tokens, panels = self._tokens[at][number], self._panels[at][number]
                after = served[at] + tokens
                if taken and (room - tokens < self._reserve or panels > slots or after > ceiling[at]):
                    break
                served[at] = after
                clock[at] = after / self._shares[at]
                following[at] = number + 1
                room -= tokens
                slots -= panels
                taken.append((at, number))
            least = min(clock)
        if room:
            # A source that could not fill the room alone within its share offers nothing.
            going = [at for at, top in enumerate(ceiling) if served[at] + room <= top]
            going.sort(key=[had / share for had, share in zip(served, self._shares, strict=True)].__getitem__)
            taken += self._best_end(going, following, room, slots)
        return taken

    def _overdue(self, entered: int) -> list[tuple[int, int]]:
        """Documents that entered their window at or before `entered`, oldest first; the pack takes all that fit.

        Why no document x waits for more than max_wait packs: let volume be tokens / sequence_length + images /
        max_images. The windows hold v packs' volume and one more document each, at most 2. Once x is overdue, only
        older documents go before it, and none of them is passed over for a younger one. The oldest of a pack did not
        fit in the pack before, so two neighbouring packs have a volume above 1: 2 (v + 2 sources) + 1 packs at most.
        """
        overdue = []
        for at, stream in enumerate(self._streams):
            if stream.entered and stream.entered[0] <= entered:
                for number, since in enumerate(stream.entered):
                    if since > entered:
                        break
                    overdue.append((since, at, number))
        return [(at, number) for _, at, number in sorted(overdue)]

    def _best_end(self, going: list[int], following: list[int], room: int, slots: int) -> list[tuple[int, int]]:
        """What fills `room` and `slots` best of the documents that the sources `going`, in this order, still have.

        Each offers its next MIN_OFFERS that fit, or as many as hold twice the room, until some fill it exactly.
        """
        unbound = room // self._image_tokens <= slots  # what fits the room fits the slots
        subset = SubsetSum(room, None if unbound else slots, min(self._slack, room - 1))
        for at in going:
            if subset.offer(at, self._tokens[at], self._panels[at], following[at], MIN_OFFERS):
                break
        return subset.best()
