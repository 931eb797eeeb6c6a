"""A source's window: documents drawn in order, and not yet in a pack."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from mmtrain.config.errors import DataError
from mmtrain.config.schema import Data
from mmtrain.data.ordering import Drawn, Sizer, SourceOrder
from mmtrain.data.pack import Cut, cut_document
from mmtrain.data.record import IndexEntry


class Planned(NamedTuple):
    """One document, or a stretch of a long one, in a pack."""

    source: int
    """Number of the source in the recipe's order."""
    shard: str
    """Path of the tar."""
    entry: IndexEntry
    """The sample."""
    cut: Cut | None
    """The stretch, None for the whole document."""
    tokens: int
    """Positions that it takes in the pack."""
    panels: int
    """Images (sub-images count) that it brings."""
    withheld: str = ""
    """Why its place stays padding although nothing is wrong with it; empty for a document that is read."""


class Skipped(NamedTuple):
    """A sample that the index calls unusable, where its turn would have been."""

    source: int
    """Number of the source in the recipe's order."""
    shard: str
    """Path of the tar."""
    entry: IndexEntry
    """The sample; `entry.unusable` is the reason."""


class Waiting(NamedTuple):
    """A document, or a stretch of a long one, that was drawn and is in no pack yet."""

    ordinal: int
    """Its number in the source's order."""
    drawn: Drawn
    """What the order says about it."""
    part: int
    """Number of the stretch."""
    tokens: int
    """Positions."""
    panels: int
    """Images (sub-images count)."""
    entered: int
    """Packs made before it was drawn."""
    cut: Cut | None
    """The stretch, None for the whole document."""


class Stream:
    """One source: its place in the order, and the window of documents drawn but not yet packed."""

    def __init__(
        self, number: int, order: SourceOrder, share: float, data: Data, sizer: Sizer, volume: float, limit: int | None
    ) -> None:
        """`share` of all tokens; the window holds at most its share of `volume` packs, and data.window documents."""
        self.number = number
        """Number in the recipe's order."""
        self.order = order
        """The documents, by ordinal."""
        self.share = share
        """Share of the mixture, as a fraction of 1."""
        self.limit = limit
        """Documents that it gives at most; None for ever."""
        self.served = 0
        """Tokens packed so far."""
        self.waiting: list[Waiting] = []
        """The window, in drawing order."""
        self._ordinal = self._part = 0
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

    def ended(self) -> bool:
        """Whether a limited source has given all that it had to."""
        return self.limit is not None and self._ordinal >= self.limit and not self.waiting

    def refill(self, packs: int, least: float, skipped: list[Skipped]) -> None:
        """Draw documents until the window is full: in number, or in packs that it would make.

        `least` is the smallest `progress` of all sources. A source far ahead of it draws nothing: its document would
        only wait, and be forced into a pack that its share does not allow yet.
        """
        waiting = self.waiting
        if not waiting and self.progress > least + self._ahead:
            return
        while not waiting or (len(waiting) < self._window and self._volume < self._most):
            document = self._draw(packs, skipped)
            if document is None:
                return
            waiting.append(document)
            self._volume += self._size(document)

    def _size(self, document: Waiting) -> int:
        return document.tokens * self._images + document.panels * self._tokens

    def _draw(self, packs: int, skipped: list[Skipped]) -> Waiting | None:
        """The next document or stretch of one; None at the limit."""
        for _ in range(2 * self.order.samples):  # unusable ones may end one epoch and begin the next
            if self.limit is not None and self._ordinal >= self.limit:
                return None
            ordinal = self._ordinal
            drawn = self.order[ordinal]
            if drawn.tokens == 0:
                skipped.append(Skipped(self.number, self.order.shard_path(drawn.shard), self.order.entry(drawn)))
                self._ordinal += 1
                continue
            if drawn.tokens <= self._tokens and drawn.panels <= self._images:
                self._ordinal += 1
                return Waiting(ordinal, drawn, 0, drawn.tokens, drawn.panels, packs, None)
            part = self._part
            cuts = self._cuts_of(ordinal, drawn)
            self._part += 1
            if self._part == len(cuts):
                self._ordinal, self._part = ordinal + 1, 0
            return Waiting(ordinal, drawn, part, cuts[part].tokens, cuts[part].panels, packs, cuts[part])
        raise DataError(f"data.sources.{self.order.name}: none of its {self.order.samples} samples is usable")

    def _cuts_of(self, ordinal: int, drawn: Drawn) -> list[Cut]:
        """The stretches of a document that is too long."""
        if self._cuts[0] != ordinal:
            sizes = [(self._sizer.tokens(s), self._sizer.panels(s)) for s in self.order.entry(drawn).segments]
            self._cuts = ordinal, cut_document(sizes, self._tokens, self._images)
        return self._cuts[1]

    def planned(self, document: Waiting) -> Planned:
        """The record that leaves the planner."""
        drawn = document.drawn
        path, entry = self.order.shard_path(drawn.shard), self.order.entry(drawn)
        return Planned(self.number, path, entry, document.cut, document.tokens, document.panels)

    def remove(self, numbers: set[int]) -> None:
        """Take documents out of the window, and count them as served."""
        for number in numbers:
            document = self.waiting[number]
            self.served += document.tokens
            self._volume -= self._size(document)
        self.waiting = [document for number, document in enumerate(self.waiting) if number not in numbers]

    def state(self) -> dict[str, Any]:
        """Counters, and the window as text: a document is its ordinal, part and entry, less the one's before it."""
        rows, ordinal, entered = [], 0, 0
        for document in self.waiting:
            rows.append(f"{document.ordinal - ordinal} {document.part} {document.entered - entered}")
            ordinal, entered = document.ordinal, document.entered
        return {"next": [self._ordinal, self._part], "served": self.served, "waiting": ",".join(rows)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Undo `state`."""
        self._ordinal, self._part = state["next"]
        self.served = state["served"]
        self.waiting, self._volume = [], 0
        ordinal = entered = 0
        for row in filter(None, state["waiting"].split(",")):
            step, part, later = map(int, row.split())
            ordinal, entered = ordinal + step, entered + later
            drawn = self.order[ordinal]
            whole = drawn.tokens <= self._tokens and drawn.panels <= self._images
            cut = None if whole else self._cuts_of(ordinal, drawn)[part]
            tokens, panels = (drawn.tokens, drawn.panels) if cut is None else (cut.tokens, cut.panels)
            self.waiting.append(Waiting(ordinal, drawn, part, tokens, panels, entered, cut))
            self._volume += self._size(self.waiting[-1])
