"""Choosing the documents of one pack. This code runs for every document of a run: it is written for speed."""

from collections.abc import Sequence

from mmtrain.config.schema import Data
from mmtrain.data.pack import SubsetSum
from mmtrain.data.window import Stream

MAX_OFFERS = 512
"""Documents that the last quarter of a pack is chosen from, at most; a bound on time that is hardly ever met."""


class Filler:
    """Chooses the documents of one pack.

    Mixture order: the next document comes from the source with the least served tokens / share. A source may run
    ahead of its share by no more than its part of this pack plus half a pack (its first document excepted), whatever
    the subset sum would like; so over any stretch of packs the measured mixture is off by at most 1.5 packs a source.
    """

    def __init__(self, active: Sequence[Stream], data: Data) -> None:
        self.taken: list[tuple[int, int]] = []
        """Number of the stream in `active`, and number of the document in its window, in pack order."""
        self._active = active
        self._room, self._slots = data.sequence_length, data.max_images
        self._reserve = data.sequence_length // 4
        self._shares = [stream.share for stream in active]
        least = min([stream.progress for stream in active])
        allowed, half = least + data.sequence_length / sum(self._shares), data.sequence_length / 2
        self._ceiling = [share * allowed + half for share in self._shares]
        self._ahead = [stream.served for stream in active]  # served tokens if all that was offered were taken

    def take_overdue(self, entered: int) -> None:
        """Take documents that entered the window at or before `entered`, oldest first, all that fit.

        Why no document x waits for more than max_wait packs: let volume be tokens / sequence_length + images /
        max_images. The windows hold v packs' volume and one more document each, at most 2. Once x is overdue, only
        older documents go before it, and none of them is passed over for a younger one. The oldest of a pack did not
        fit in the pack before, so two neighbouring packs have a volume above 1: 2 (v + 2 sources) + 1 packs at most.
        """
        overdue = []
        for at, stream in enumerate(self._active):
            if stream.entered[0] > entered:
                continue
            for number, since in enumerate(stream.entered):
                if since > entered:
                    break
                overdue.append((since, at, number))
        for _, at, number in sorted(overdue):
            document = self._active[at].waiting[number]
            if document.tokens <= self._room and document.panels <= self._slots:
                self._ahead[at] += document.tokens
                self._room -= document.tokens
                self._slots -= document.panels
                self.taken.append((at, number))

    def fill(self) -> None:
        """Take documents in mixture order while more than the reserve stays free, then the best subset of the next."""
        ahead, ceiling, shares, taken = self._ahead, self._ceiling, self._shares, self.taken
        room, slots, reserve = self._room, self._slots, self._reserve
        used = set(taken)
        clock = [served / share for served, share in zip(ahead, shares, strict=True)]
        unseen = [enumerate(stream.waiting) for stream in self._active]
        going = list(range(len(unseen)))
        subset: SubsetSum | None = None
        offered: list[tuple[int, int]] = []
        while going and room:
            at = min(going, key=clock.__getitem__) if len(going) > 1 else going[0]
            for number, document in unseen[at]:
                tokens, panels = document.tokens, document.panels
                if tokens <= room and panels <= slots and (not used or (at, number) not in used):
                    break
            else:
                going.remove(at)
                continue
            if taken and ahead[at] + tokens > ceiling[at]:
                going.remove(at)
                continue
            ahead[at] += tokens
            clock[at] = ahead[at] / shares[at]
            if subset is None:
                if not taken or room - tokens >= reserve:
                    taken.append((at, number))
                    room -= tokens
                    slots -= panels
                    continue
                subset = SubsetSum(room, slots)
            subset.offer(tokens, panels)
            offered.append((at, number))
            if subset.exact or len(subset) == MAX_OFFERS:
                break
        if subset is not None:
            taken.extend([offered[number] for number in subset.best()])
