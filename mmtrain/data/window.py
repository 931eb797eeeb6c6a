"""A source's window: documents drawn in order, and not yet in a pack."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mmtrain.config.errors import DataError
from mmtrain.config.schema import Data
from mmtrain.data.index import Shard
from mmtrain.data.ordering import Block, Planned, SourceOrder

REFILL = 0.75
"""A window is filled up when less than this part of it is left: seldom, because every time has its cost."""


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

    def __init__(self, order: SourceOrder, share: float, data: Data, volume: float, limit: int | None) -> None:
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
        self.tokens: list[int] = []
        """Of each of them."""
        self.panels: list[int] = []
        """Of each of them."""
        self.entered: list[int] = []
        """For each of them, packs made before it was drawn."""
        self._block = Block(0, 0, [], [], [], [0], [0])  # around what is drawn next, and its place there
        self._at = 0
        self._length, self._images, self._window = data.sequence_length, data.max_images, data.window
        self._volume = 0  # of the window, in 1 / (sequence_length * max_images) packs
        self._most = share * volume * self._length * self._images
        self._ahead = min(2.0, share * volume) * self._length  # tokens

    def most_ahead(self) -> float:
        """Tokens by which it can ever be ahead of its share of what the source that lags most has had.

        It draws only while it is no more than `_ahead` ahead, and only documents that were drawn are packed: its
        share of the window's packs at most, and the document that filled it.
        """
        return self._ahead + self._most / self._images + self._length

    @property
    def drawn(self) -> int:
        """Documents drawn so far, unusable ones included."""
        return self._next()[0]

    def shards(self) -> tuple[list[Shard], list[Shard]]:
        """Shards that waiting documents and the next to be drawn lie in, and those of the block after that."""
        now: list[Shard] = []
        for first, shards in self.order.blocks(self.waiting[0].ordinal if self.waiting else self.drawn):
            if self.limit is not None and first >= self.limit:
                break
            if first > self.drawn:
                return now, shards
            now += shards
        return now, []

    def _next(self) -> tuple[int, int]:
        """Ordinal and stretch of what is drawn next."""
        if self._at == len(self._block.documents):
            return self._block.stop, 0
        document = self._block.documents[self._at]
        return document.ordinal, document.part

    def ended(self) -> bool:
        """Whether a limited source has given all that it had to."""
        return self.limit is not None and not self.waiting and self.drawn >= self.limit

    def refill(self, packs: int, least: float, skipped: list[Skipped]) -> None:
        """Draw documents until the window is full, in number or in packs that it would make, once it is not nearly so.

        `least` is the smallest served tokens / share of all sources. A source far ahead of it draws nothing: its
        documents would only wait, and be forced into packs that its share does not allow yet.
        """
        full = len(self.waiting) >= REFILL * self._window or self._volume >= REFILL * self._most
        if full or self.served > least * self.share + self._ahead:
            return
        unusable = 0  # in a row
        while not self.waiting or (len(self.waiting) < self._window and self._volume < self._most):
            if self.limit is not None and self.drawn >= self.limit:
                return
            block, at = self._block, self._at
            if at == len(block.documents):
                self._block, self._at = self.order.block(block.stop), 0
                continue
            stop = block.unusable[bisect_left(block.unusable, at)]
            if self.limit is not None and self.limit < block.stop:
                stop = min(stop, block.place(self.limit))
            if stop == at:
                self._at += 1
                skipped.append(self._skipped(block.documents[at]))
                unusable += 1
                if unusable > 2 * self.order.samples:  # the rest of an epoch, and a whole one
                    raise DataError(f"data.sources.{self.order.name}: none of its {unusable // 2} samples is usable")
                continue
            unusable = 0
            full = bisect_left(block.volumes, self._most - self._volume + block.volumes[at], at + 1)
            self._draw(max(at + 1, min(stop, full, at + self._window - len(self.waiting))), packs)

    def _draw(self, stop: int, packs: int) -> None:
        """Move the block's documents before place `stop` into the window."""
        block, at = self._block, self._at
        self.waiting += block.documents[at:stop]
        self.tokens += block.tokens[at:stop]
        self.panels += block.panels[at:stop]
        self.entered += [packs] * (stop - at)
        self._volume += block.volumes[stop] - block.volumes[at]
        self._at = stop

    def _skipped(self, document: Planned) -> Skipped:
        """The record of a sample that is passed by."""
        entry = self.order.entry(document)
        return Skipped(self.order.number, self.order.shard_path(document), entry.key, entry.unusable or "no tokens")

    def remove(self, numbers: Sequence[int]) -> None:
        """Take documents out of the window, by their ascending numbers in it, and count them as served."""
        first = 0  # documents at the window's beginning: most of what goes, and goes at once
        while first < len(numbers) and numbers[first] == first:
            first += 1
        tokens, panels = sum(self.tokens[:first]), sum(self.panels[:first])
        for number in reversed(numbers[first:]):
            tokens += self.tokens.pop(number)
            panels += self.panels.pop(number)
            del self.waiting[number], self.entered[number]
        del self.tokens[:first], self.panels[:first], self.waiting[:first], self.entered[:first]
        self.served += tokens
        self._volume -= tokens * self._images + panels * self._length

    def state(self) -> dict[str, Any]:
        """Counters, and the window as text: a document is its ordinal, part and entry, less the one's before it."""
        rows, ordinal, before = [], 0, 0
        for document, entered in zip(self.waiting, self.entered, strict=True):
            rows.append(f"{document.ordinal - ordinal} {document.part} {entered - before}")
            ordinal, before = document.ordinal, entered
        return {"next": list(self._next()), "served": self.served, "waiting": ",".join(rows)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Undo `state`."""
        for column in (self.waiting, self.tokens, self.panels, self.entered):
            column.clear()
        ordinal = entered = 0
        for row in filter(None, state["waiting"].split(",")):
            step, part, later = map(int, row.split())
            ordinal, entered = ordinal + step, entered + later
            self.waiting.append(self.order.document(ordinal, part))
            self.entered.append(entered)
        self.tokens += [document.tokens for document in self.waiting]
        self.panels += [document.panels for document in self.waiting]
        self._volume = sum(self.tokens) * self._images + sum(self.panels) * self._length
        self.served = state["served"]
        self._block = self.order.block(state["next"][0])
        self._at = self._block.place(*state["next"])
