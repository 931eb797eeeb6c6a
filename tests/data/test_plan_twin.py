"""The plan against a slow twin: the same rules, written without windows kept over packs, bit sets or blocks."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmtrain.config.schema import Data
from mmtrain.data.ordering import Planned, SourceOrder
from mmtrain.data.pack import cut_document
from mmtrain.data.plan import Planner
from tests.data.plans import IMAGE, SIZER, entry_of, read, source, text

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


def pieces(name: str, number: int, rows: list, data: Data) -> Iterator[Piece]:
    """All that a source gives, in order, for ever."""
    order = SourceOrder(name, number, source(name, rows), SIZER, 0, data.open_shards, read)
    ordinal = 0
    while True:
        entry = entry_of(order[ordinal])
        sizes = [(SIZER.tokens(segment), SIZER.panels(segment)) for segment in entry.segments]
        cuts = cut_document(sizes, data.sequence_length, data.max_images)
        for cut in cuts:
            yield Piece((entry.key, cut if len(cuts) > 1 else None), cut.tokens, cut.panels)
        ordinal += 1


def best_subset(offered: Sequence[Piece], room: int, slots: int) -> list[int]:
    """Every sum that can be had, each the first way it was found; the most tokens with the fewest panels win."""
    ways: dict[tuple[int, int], list[int]] = {(0, 0): []}
    for number, piece in enumerate(offered):
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
    for made in range(count):
        least = min(served[s] / shares[s] for s in numbers)
        for s in numbers:
            if not windows[s] and served[s] / shares[s] > least + volume * length:
                continue
            while not windows[s] or (
                len(windows[s]) < data.window
                and sum(p.tokens * images + p.panels * length for _, p in windows[s])
                < shares[s] * volume * length * images
            ):
                windows[s].append((made, next(sources[s])))
        active = [s for s in numbers if windows[s]]
        least = min(served[s] / shares[s] for s in active)
        share = sum(shares[s] for s in active)
        ahead = list(served)
        pack: list[tuple[int, Piece]] = []

        def fits(piece: Piece, pack: Sequence[tuple[int, Piece]] = pack) -> bool:
            tokens, panels = (sum(getattr(p, name) for _, p in pack) for name in ("tokens", "panels"))
            return tokens + piece.tokens <= length and panels + piece.panels <= images

        overdue = [(entered, s, n) for s in active for n, (entered, _) in enumerate(windows[s])]
        for entered, s, n in sorted(overdue):
            if entered <= made - patience and fits(windows[s][n][1]):
                pack.append((s, windows[s][n][1]))
                ahead[s] += windows[s][n][1].tokens
        queues = {s: [p for _, p in windows[s] if not any(p is q for _, q in pack)] for s in active}
        offered: list[tuple[int, Piece]] = []
        choosing = False
        while queues and sum(p.tokens for _, p in pack) < length:
            s = min(queues, key=lambda n: ahead[n] / shares[n])
            while queues[s] and not fits(queues[s][0]):
                queues[s].pop(0)
            if not queues[s]:
                del queues[s]
                continue
            piece = queues[s].pop(0)
            if pack and ahead[s] + piece.tokens > shares[s] * (least + length / share) + length / 2:
                del queues[s]
                continue
            ahead[s] += piece.tokens
            room = length - sum(p.tokens for _, p in pack)
            slots = images - sum(p.panels for _, p in pack)
            choosing = choosing or bool(pack and room - piece.tokens < length // 4)
            if not choosing:
                pack.append((s, piece))
                continue
            offered.append((s, piece))
            chosen = [offered[n] for n in best_subset([p for _, p in offered], room, slots)]
            if sum(p.tokens for _, p in chosen) == room:
                break
        if offered:
            pack += chosen
        for s, piece in pack:
            served[s] += piece.tokens
            windows[s] = [(entered, p) for entered, p in windows[s] if p is not piece]
        yield [piece for _, piece in pack]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(SOURCE, min_size=1, max_size=3),
    st.lists(st.floats(0.05, 1), min_size=3, max_size=3),
    st.sampled_from([{}, {"max_images": 2, "window": 30}, {"sequence_length": 64, "max_wait": 22}]),
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
