"""The plan: which documents make up which pack, from metadata alone.

Packs are a pure function of (indexes, data section, seed, number of the pack). Nothing here knows of ranks, workers or
restarts; a restart continues from a cursor of counters and of the few documents that wait in the window.

How far the measured mixture may be from the weights, while no source has ended. Let w be the weights as fractions of 1,
and c the least served / w of all sources, so that a source has served w c + u tokens, u >= 0. u never exceeds
u_max = `Stream.most_ahead`. All together have served c + sum(u), so a source is off its share of that by
d = u - w sum(u), and -w (sum of the others' u_max) <= d <= (1 - w) u_max. What a stretch of packs serves is off by how
much d changes: at most (1 - w) u_max + w (sum of the others' u_max) tokens, however long the stretch.
"""

import math
from collections.abc import Callable, Container, Mapping, Sequence
from functools import cached_property
from math import inf
from typing import Any, NamedTuple

from mmtrain.config.errors import ConfigError, DataError
from mmtrain.config.schema import CURSOR_BYTES, Data
from mmtrain.data.columns import Index
from mmtrain.data.fill import Filler
from mmtrain.data.index import Shard, read_index
from mmtrain.data.ordering import Planned, Sizer, SourceOrder
from mmtrain.data.window import Skipped, Stream

CURSOR_VERSION = 2
"""2: documents longer than a pack are cut evenly, so a stretch's number means another one than in 1."""

QUARANTINED = "in quarantine"
"""Why a sample that data.quarantine names is not read."""


class Plan(NamedTuple):
    """The packs of one global step."""

    packs: list[list[Planned]]
    """global_batch packs; a finite run ends with empty ones."""
    skipped: list[Skipped]
    """Unusable samples passed by."""


class Planner:
    """Makes the packs of one run, in order, for all lanes at once."""

    def __init__(
        self,
        shards: Mapping[str, Sequence[Shard]],
        data: Data,
        seed: int,
        sizer: Sizer,
        weights: Mapping[str, float],
        passes: Mapping[str, int] | None = None,
        caps: Mapping[str, int] | None = None,
        quarantine: Container[tuple[str, int]] = (),
        read: Callable[[str], Index] = read_index,
    ) -> None:
        """Plan `weights` (source -> share, in the recipe's order) over `shards` (source -> its shards).

        `passes` ends the plan when the sources it names have given that many documents; empty packs follow. Without it
        the plan ends only when all sources have given what `caps` (source -> documents) allows. `quarantine` holds
        samples, as path of the index and row, whose places stay padding. `read` gives an index by its path. ConfigError
        if a pack cannot hold an image, or the window is too small or too large.
        """
        names = [name for name, weight in weights.items() if weight > 0]
        self._data, self._sizer, self._seed = data, sizer, seed
        self._packs = 0
        self._skip_packs = frozenset(data.skip_packs)
        self._quarantine = quarantine
        total = sum(weights[name] for name in names)
        self._check(names, sizer, data)
        # Bound on the wait: see Filler._overdue. A quarter of it is window, the rest is freedom to choose.
        volume = (data.max_wait - 4 * len(names) - 2) / 4
        self._patience = data.max_wait - math.ceil(2 * (volume + 2 * len(names)) + 2)
        self._skipped: list[Skipped] = []
        self._streams = []
        for number, name in enumerate(weights):
            if name in names:
                order = SourceOrder(name, number, shards[name], sizer, seed, data, read)
                share = weights[name] / total
                limits = [limit[name] for limit in (passes or {}, caps or {}) if name in limit]
                self._streams.append(Stream(order, share, data, volume, min(limits, default=None)))
        self._last = [stream for stream in self._streams if stream.order.name in (passes or names)]  # the plan's end
        self._endless = all(stream.limit is None for stream in self._streams)
        self._filler = Filler(self._streams, data, sizer.image_tokens)

    @staticmethod
    def _check(names: Sequence[str], sizer: Sizer, data: Data) -> None:
        """ConfigError with the numbers if no plan can hold its promises."""
        if not names:
            raise ConfigError("data.sources: no source has a weight above 0; give at least one")
        panels = 1 + sizer.canvas.sub_images
        if panels * sizer.image_tokens > data.sequence_length or panels > data.max_images:
            raise ConfigError(
                f"data: one image becomes up to {panels} panels of {sizer.image_tokens} tokens, but a pack holds "
                f"{data.sequence_length} tokens and {data.max_images} images; raise data.sequence_length to at least "
                f"{panels * sizer.image_tokens} and data.max_images to at least {panels}"
            )
        least, most = data.least_wait(len(names)), data.most_window(len(names))
        if data.max_wait < least:
            raise ConfigError(
                f"data.max_wait is {data.max_wait}, but {len(names)} sources need at least {least} packs to keep their "
                f"mixture; set data.max_wait={least} or more"
            )
        if not 1 <= data.window <= most:
            raise ConfigError(
                f"data.window is {data.window}, but with {len(names)} sources it must lie in 1 ... {most}, so that the "
                f"state stays under {CURSOR_BYTES // 1024} KiB; set data.window={max(1, min(data.window, most))}"
            )

    @property
    def packs(self) -> int:
        """Packs made so far."""
        return self._packs

    @property
    def longest_wait(self) -> int:
        """Packs that the oldest document in the windows has waited for."""
        entered = [stream.entered[0] for stream in self._streams if stream.waiting]
        return self._packs - min(entered, default=self._packs)

    def mixture_bound(self) -> dict[str, float]:
        """Source -> tokens by which any stretch of packs is off its share at most, while no source has ended."""
        most = [stream.most_ahead() for stream in self._streams]
        return {
            stream.order.name: own + stream.share * (sum(most) - 2 * own)
            for stream, own in zip(self._streams, most, strict=True)
        }

    def longest_lasting(self) -> str:
        """The source whose documents last longest, by tokens / weight; reads every index once."""
        return max(self._streams, key=lambda stream: stream.order.total_tokens() / stream.share).order.name

    @property
    def served(self) -> dict[str, int]:
        """Source -> tokens planned so far, image tokens included."""
        return {stream.order.name: stream.served for stream in self._streams}

    @property
    def epochs(self) -> dict[str, float]:
        """Source -> passes over it that have been drawn so far."""
        return {stream.order.name: stream.drawn / stream.order.samples for stream in self._streams}

    @property
    def finished(self) -> bool:
        """Whether only empty packs can follow."""
        return all(stream.ended() for stream in self._last)

    def next_step(self) -> Plan:
        """The packs of the next global step."""
        self._skipped = []
        packs = []
        for number in range(self._packs, self._packs + self._data.global_batch):
            pack = self._next_pack()
            if self._quarantine:
                pack = [self._held_back(planned) for planned in pack]
            if number in self._skip_packs:
                pack = [planned._replace(withheld=f"pack {number} is in data.skip_packs") for planned in pack]
            packs.append(pack)
        return Plan(packs, self._skipped)

    def _held_back(self, planned: Planned) -> Planned:
        """The document, marked if it is in quarantine."""
        bad = (planned.index, planned.row) in self._quarantine
        return planned._replace(withheld=QUARANTINED) if bad else planned

    def _next_pack(self) -> list[Planned]:
        """The next pack, empty when the plan has ended."""
        streams = self._streams
        clock = [stream.served / stream.share for stream in streams]
        if self._endless:
            least = min(clock)
        else:
            least = min([inf if stream.ended() else time for stream, time in zip(streams, clock, strict=True)])
        for at, stream in enumerate(streams):
            stream.refill(self._packs, least, self._skipped)
            if not stream.waiting:
                clock[at] = inf
        pack: list[Planned] = []
        if min(clock) < inf and (self._endless or not self.finished):
            numbers: list[list[int]] = [[] for _ in streams]
            for at, number in self._filler.choose(clock, self._packs - self._patience):
                pack.append(streams[at].waiting[number])
                numbers[at].append(number)
            for stream, of_stream in zip(streams, numbers, strict=True):
                if of_stream:
                    stream.remove(of_stream)
        self._packs += 1
        return pack

    def shards(self) -> tuple[list[Shard], list[Shard]]:
        """Shards that the next packs are read from, and those that come after them; some may come twice."""
        each = [stream.shards() for stream in self._streams if not stream.ended()]
        now, following = ([shard for of_stream in each for shard in of_stream[part]] for part in (0, 1))
        return now, following

    def cursor(self) -> dict[str, Any]:
        """State after the packs made so far, as JSON."""
        return {
            "version": CURSOR_VERSION,
            "packs": self._packs,
            "plan": self._identity,
            "sources": {stream.order.name: stream.state() for stream in self._streams},
        }

    def restore(self, cursor: Mapping[str, Any]) -> None:
        """Continue after `cursor`; DataError, naming what differs, if it belongs to another plan."""
        mine = {"format": CURSOR_VERSION, **self._identity}
        theirs = {"format": cursor.get("version"), **cursor.get("plan", {})}
        if mine != theirs:
            differing = [f"{key} was {theirs.get(key)}, is {mine[key]}" for key in mine if mine[key] != theirs.get(key)]
            differing += [f"{key} was {theirs[key]}, is gone" for key in theirs if key not in mine]
            raise DataError(
                f"data: the checkpoint's place in the stream belongs to another plan ({'; '.join(differing)}); restore "
                "these, or start a new run from its weights with init_from"
            )
        self._packs = cursor["packs"]
        for stream in self._streams:
            stream.load(cursor["sources"][stream.order.name])

    @cached_property
    def _identity(self) -> dict[str, Any]:
        """What a cursor's counters mean something for. Weights, windows and batch sizes may change in between."""
        data, canvas = self._data, self._sizer.canvas
        return {
            "seed": self._seed,
            "sequence_length": data.sequence_length,
            "max_images": data.max_images,
            "open_shards": data.open_shards,
            "image_tokens": self._sizer.image_tokens,
            "sub_images": [canvas.height, canvas.width, canvas.sub_images] if canvas.sub_images else 0,
            **{f"source {stream.order.name}": stream.order.identity() for stream in self._streams},
        }
