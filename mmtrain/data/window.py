"""A source's window: documents drawn in order, and not yet in a pack."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mmtrain.config.errors import DataError
from mmtrain.config.schema import Data
from mmtrain.data.ordering import Block, Planned, Sizer, SourceOrder
from mmtrain.data.pack import Cut, cut_document


class Skipped(NamedTuple):
    """A sample that the index calls unusable, where its turn would have been."""

    source: int
    """Number of the source in the recipe's order."""
    shard: str
    """Path of the tar."""
    key: str
    """Name of the sample."""
    reason: str
    """What is wrong with it."""


class Stream:
    """One source: its place in the order, and the window of documents drawn but not yet packed."""

    def __init__(
        self, order: SourceOrder, share: float, data: Data, sizer: Sizer, volume: float, limit: int | None
    ) -> None:
        """`share` of all tokens; the window holds at most its share of `volume` packs, and data.window documents."""
        self.order = order
        """The documents, by ordinal."""
        self.share = share
        """Share of the mixture, as a fraction of 1."""
        self.limit = limit
        """Documents that it gives at most; None for ever."""
        self.served = 0
        """Tokens packed so far."""
        self.waiting: list[Planned] = []
        """The window, in drawing order."""
        self.entered: list[int] = []
        """For each of them, packs made before it was drawn."""
        self._next = self._part = 0  # what is drawn next: ordinal, and stretch of it
        self._block = Block(0, [])  # around what is drawn next
        self._sizer = sizer
        self._tokens, self._images, self._window = data.sequence_length, data.max_images, data.window
        self._volume = 0  # of the window, in 1 / (sequence_length * max_images) packs
        self._most = share * volume * self._tokens * self._images
        self._ahead = volume * self._tokens
        self._cuts: tuple[int, list[Cut]] = (-1, [])

    @property
    def progress(self) -> float:
        """Tokens that all sources together have had when this one has had what it has: its clock in the mixture."""
        return self.served / self.share

    @property
    def drawn(self) -> int:
        """Documents drawn so far, unusable ones included."""
        return self._next

    def ended(self) -> bool:
        """Whether a limited source has given all that it had to."""
        return self.limit is not None and self._next >= self.limit and not self.waiting

    def refill(self, packs: int, least: float, skipped: list[Skipped]) -> None:
        """Draw documents until the window is full: in number, or in packs that it would make.

        `least` is the smallest `progress` of all sources. A source far ahead of it draws nothing: its document would
        only wait, and be forced into a pack that its share does not allow yet.
        """
        waiting = self.waiting
        if not waiting and self.progress > least + self._ahead:
            return
        room, slots = self._tokens, self._images
        unusable = 0  # in a row
        while not waiting or (len(waiting) < self._window and self._volume < self._most):
            ordinal = self._next
            if self.limit is not None and ordinal >= self.limit:
                return
            place = ordinal - self._block.first
            if not 0 <= place < len(self._block.documents):
                self._block = self.order.block(ordinal)
                place = ordinal - self._block.first
            document = self._block.documents[place]
            tokens, panels = document.tokens, document.panels
            if tokens == 0:
                self._next += 1
                skipped.append(self._skipped(document))
                unusable += 1
                if unusable > 2 * self.order.samples:  # the rest of an epoch, and a whole one
                    raise DataError(f"data.sources.{self.order.name}: none of its {unusable // 2} samples is usable")
                continue
            if tokens <= room and panels <= slots:
                self._next += 1
            else:
                document = self._stretch(document)
                tokens, panels = document.tokens, document.panels
            unusable = 0
            waiting.append(document)
            self.entered.append(packs)
            self._volume += tokens * slots + panels * room

    def _stretch(self, document: Planned) -> Planned:
        """The next stretch of a document that is too long."""
        part, cuts = self._part, self._cuts_of(document)
        self._part += 1
        if self._part == len(cuts):
            self._next, self._part = self._next + 1, 0
        return document._replace(tokens=cuts[part].tokens, panels=cuts[part].panels, part=part, cut=cuts[part])

    def _cuts_of(self, document: Planned) -> list[Cut]:
        """The stretches of a document that is too long."""
        if self._cuts[0] != document.ordinal:
            sizes = [(self._sizer.tokens(s), self._sizer.panels(s)) for s in self.order.entry(document).segments]
            self._cuts = document.ordinal, cut_document(sizes, self._tokens, self._images)
        return self._cuts[1]

    def _skipped(self, document: Planned) -> Skipped:
        """The record of a sample that is passed by."""
        entry = self.order.entry(document)
        return Skipped(self.order.number, self.order.shard_path(document), entry.key, entry.unusable or "no tokens")

    def remove(self, numbers: Sequence[int]) -> None:
        """Take documents out of the window, by their numbers in it, and count them as served."""
        for number in sorted(numbers, reverse=True):
            document = self.waiting.pop(number)
            del self.entered[number]
            self.served += document.tokens
            self._volume -= document.tokens * self._images + document.panels * self._tokens

    def state(self) -> dict[str, Any]:
        """Counters, and the window as text: a document is its ordinal, part and entry, less the one's before it."""
        rows, ordinal, before = [], 0, 0
        for document, entered in zip(self.waiting, self.entered, strict=True):
            rows.append(f"{document.ordinal - ordinal} {document.part} {entered - before}")
            ordinal, before = document.ordinal, entered
        return {"next": [self._next, self._part], "served": self.served, "waiting": ",".join(rows)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Undo `state`."""
        self.waiting, self.entered, self._volume = [], [], 0
        ordinal = entered = 0
        for row in filter(None, state["waiting"].split(",")):
            step, part, later = map(int, row.split())
            ordinal, entered = ordinal + step, entered + later
            document = self.order[ordinal]
            if document.tokens > self._tokens or document.panels > self._images:
                cut = self._cuts_of(document)[part]
                document = document._replace(tokens=cut.tokens, panels=cut.panels, part=part, cut=cut)
            self.waiting.append(document)
            self.entered.append(entered)
            self._volume += document.tokens * self._images + document.panels * self._tokens
        self._next, self._part = state["next"]
        self.served = state["served"]
