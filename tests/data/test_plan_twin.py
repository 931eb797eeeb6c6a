"""The plan against a slow twin: the same rules, written without windows kept over packs, bit sets or blocks."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmtrain.config.schema import Data
from mmtrain.data.fill import MIN_OFFERS
from mmtrain.data.ordering import Planned, SourceOrder
from mmtrain.data.pack import Cut, cut_document
from mmtrain.data.plan import Planner
from tests.data.plans import IMAGE, IMAGE_TOKENS, SIZER, entry_of, read, room, source, text

DATA = Data(tokenizer="", sequence_length=40, max_images=4, global_batch=1, window=12, max_wait=40, open_shards=2)
SEGMENT = st.one_of(st.integers(1, 60).map(text), st.just(IMAGE))
DOCUMENT = st.one_of(
    st.integers(1, 30).map(lambda n: [text(n)]),
    st.integers(1, 20).map(lambda n: [IMAGE, text(n)]),
    st.lists(SEGMENT, min_size=1, max_size=9),
    st.none(),
)
SOURCE = st.lists(DOCUMENT, min_size=1, max_size=20).filter(any)


class Piece(NamedTuple):
    """A document, or a stretch of one."""

    name: tuple[str, object]
    tokens: int
    panels: int


def cut(sizes: Sequence[tuple[int, int]], data: Data) -> list[Cut]:
    """As `cut_document`, every limit tried in turn."""
    fewest = len(cut_document(sizes, data.sequence_length, data.max_images))
    units, begin = [], 0
    for end in range(1, len(sizes) + 1):
        if not sizes[end - 1][1] or end == len(sizes):
            units.append((begin, end))
            begin = end
    for limit in range(1, data.sequence_length + 1):
        cuts: list[Cut] = []
        for begin, end in units:
            tokens, panels = (sum(size[part] for size in sizes[begin:end]) for part in (0, 1))
            if tokens > limit or panels > data.max_images:
                break
            one = Cut(begin, 0, end - 1, sizes[end - 1][0], tokens, panels)
            if cuts and cuts[-1].tokens + tokens <= limit and cuts[-1].panels + panels <= data.max_images:
                first, before = cuts[-1].first, cuts.pop()
                one = one._replace(first=first, tokens=before.tokens + tokens, panels=before.panels + panels)
            cuts.append(one)
        else:
            if len(cuts) == fewest:
                return cuts
    return cut_document(sizes, data.sequence_length, data.max_images)  # a unit is longer than a pack


def pieces(name: str, number: int, rows: list, data: Data) -> Iterator[Piece]:
    """All that a source gives, in order, for ever."""
    order = SourceOrder(name, number, source(name, rows), SIZER, 0, data, read)
    ordinal = 0
    while True:
        entry = entry_of(order.document(ordinal))
        sizes = [room(segment) for segment in entry.segments]
        cuts = cut(sizes, data) if sizes else []
        for one in cuts:
            yield Piece((entry.key, one if len(cuts) > 1 else None), one.tokens, one.panels)
        ordinal += 1


def extend(ways: dict[tuple[int, int], list[int]], number: int, piece: Piece, room: int, slots: int) -> list[int]:
    """Add the sums that one more piece makes, each the first way it is found; of all, the fullest, fewest panels."""
    for (tokens, panels), way in list(ways.items()):
        longer = tokens + piece.tokens, panels + piece.panels
        if longer[0] <= room and longer[1] <= slots:
            ways.setdefault(longer, [*way, number])
    return ways[max(ways, key=lambda total: (total[0], -total[1]))]


def twin(sources: list[Iterator[Piece]], shares: Sequence[float], data: Data, count: int) -> Iterator[list[Piece]]:
    """The first `count` packs."""
    length, images, numbers = data.sequence_length, data.max_images, range(len(sources))
    volume = (data.max_wait - 4 * len(sources) - 2) / 4
    patience = data.max_wait - math.ceil(2 * (volume + 2 * len(sources)) + 2)
    windows: list[list[tuple[int, Piece]]] = [[] for _ in sources]
    served = [0] * len(sources)

    def full(s: int, part: float) -> bool:
        """Whether this part of a window is full, in documents or in packs (times length times images)."""
        packs = sum(p.tokens * images + p.panels * length for _, p in windows[s])
        return len(windows[s]) >= part * data.window or packs >= part * (shares[s] * volume * length * images)

    for made in range(count):
        least = min(served[s] / shares[s] for s in numbers)
        for s in numbers:
            ahead = served[s] > least * shares[s] + min(2, shares[s] * volume) * length
            if not full(s, 0.75) and not ahead:
                while not full(s, 1):
                    windows[s].append((made, next(sources[s])))
        active = [s for s in numbers if windows[s]]
        least = min(served[s] / shares[s] for s in active)
        share = sum(shares[s] for s in active)
        most = {s: shares[s] * (least + length / share) + length for s in active}
        pack: list[tuple[int, Piece]] = []

        def free(pack: Sequence[tuple[int, Piece]] = pack) -> tuple[int, int]:
            return length - sum(p.tokens for _, p in pack), images - sum(p.panels for _, p in pack)

        def had(s: int, pack: Sequence[tuple[int, Piece]] = pack) -> int:
            return served[s] + sum(p.tokens for source, p in pack if source == s)

        following = dict.fromkeys(active, 0)
        overdue = [(entered, s, n) for s in active for n, (entered, _) in enumerate(windows[s])]
        for entered, s, n in sorted(overdue):
            piece = windows[s][n][1]
            if entered <= made - patience:
                following[s] = n + 1
                if piece.tokens <= free()[0] and piece.panels <= free()[1]:
                    pack.append((s, piece))
        while going := [s for s in active if following[s] < len(windows[s])]:
            s = min(going, key=lambda n: had(n) / shares[n])
            piece = windows[s][following[s]][1]
            left, slots = free()
            if pack and (left - piece.tokens < length // 4 or piece.panels > slots or had(s) + piece.tokens > most[s]):
                break
            pack.append((s, piece))
            following[s] += 1
        left, slots = free()
        counted = left // IMAGE_TOKENS > slots  # else tokens run out before panels do
        ways: dict[tuple[int, int], list[int]] = {(0, 0): []}
        offered: list[tuple[int, Piece]] = []
        chosen: list[int] = []
        for s in sorted(active, key=lambda n: had(n) / shares[n]):
            if had(s) + left > most[s]:
                continue
            own: list[Piece] = []
            for _, piece in windows[s][following[s] :]:
                if not left or sum(offered[n][1].tokens for n in chosen) >= left - min(length // 1024, left - 1):
                    break
                if len(own) >= MIN_OFFERS and sum(p.tokens for p in own) >= 2 * left:
                    break
                if piece.tokens <= left and piece.panels <= slots:
                    own.append(piece)
                    offered.append((s, piece))
                    chosen = extend(ways, len(offered) - 1, piece if counted else piece._replace(panels=0), left, slots)
        pack += [offered[n] for n in chosen]
        for s, piece in pack:
            served[s] += piece.tokens
            windows[s] = [(entered, p) for entered, p in windows[s] if p is not piece]
        yield [piece for _, piece in pack]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(SOURCE, min_size=1, max_size=3),
    st.lists(st.floats(0.05, 1), min_size=3, max_size=3),
    st.sampled_from([{}, {"max_images": 2, "window": 40}, {"sequence_length": 64, "max_wait": 22}]),
)
def test_the_plan_equals_its_slow_twin(documents: list, weights: list[float], changes: dict) -> None:
    data = replace(DATA, **changes)
    shards = {f"s{n}": source(f"s{n}", rows) for n, rows in enumerate(documents)}
    plan = Planner(shards, data, 0, SIZER, dict(zip(shards, weights, strict=False)), read=read)
    total = sum(weights[: len(shards)])
    shares = [weight / total for weight in weights[: len(shards)]]
    made = [pieces(name, n, rows, data) for n, (name, rows) in enumerate(zip(shards, documents, strict=True))]
    for expected in twin(made, shares, data, 40):
        (pack,) = plan.next_step().packs
        assert [as_piece(planned) for planned in pack] == expected


def as_piece(planned: Planned) -> Piece:
    return Piece((entry_of(planned).key, planned.cut), planned.tokens, planned.panels)
