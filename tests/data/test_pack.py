from itertools import combinations, pairwise

from hypothesis import example, given
from hypothesis import strategies as st

from mmtrain.data.pack import SubsetSum, cut_document

LENGTH, IMAGES, IMAGE_TOKENS = 12, 3, 4
SEGMENTS = st.one_of(
    st.integers(1, 40).map(lambda tokens: (tokens, 0)), st.integers(1, 2).map(lambda n: (n * IMAGE_TOKENS, n))
)


@given(st.lists(SEGMENTS, min_size=1, max_size=12))
@example([(8, 2)] * 4 + [(30, 0)])
def test_cuts_cover_the_document_in_order_and_fit(sizes: list[tuple[int, int]]) -> None:
    covered = []
    for cut in cut_document(sizes, LENGTH, IMAGES):
        tokens = panels = 0
        for number in range(cut.first, cut.last + 1):
            start = cut.start if number == cut.first else 0
            stop = cut.stop if number == cut.last else sizes[number][0]
            assert sizes[number][1] == 0 or (start, stop) == (0, sizes[number][0]), "an image was divided"
            assert sizes[number][1] or stop > start
            covered += [(number, token) for token in range(start, stop)]
            tokens += stop - start
            panels += sizes[number][1]
        assert (tokens, panels) == (cut.tokens, cut.panels)
        assert 0 < tokens <= LENGTH and panels <= IMAGES
    assert covered == [(number, token) for number, size in enumerate(sizes) for token in range(size[0])]


@given(st.lists(SEGMENTS, min_size=1, max_size=12))
def test_a_unit_that_fits_in_a_pack_is_never_divided(sizes: list[tuple[int, int]]) -> None:
    cuts = cut_document(sizes, LENGTH, IMAGES)
    begins = {(cut.first, cut.start) for cut in cuts}
    unit: list[int] = []
    for number, (_, panels) in enumerate(sizes):
        unit.append(number)
        if panels == 0:
            fits = sum(sizes[n][0] for n in unit) <= LENGTH and sum(sizes[n][1] for n in unit) <= IMAGES
            inside = {(n, 0) for n in unit[1:]} | {(number, token) for token in range(1, sizes[number][0])}
            assert not fits or not inside & begins
            unit = []


def test_a_document_that_fits_is_one_stretch() -> None:
    cuts = cut_document([(4, 1), (3, 0), (5, 0)], LENGTH, IMAGES)
    assert [(cut.first, cut.start, cut.last, cut.stop) for cut in cuts] == [(0, 0, 2, 5)]


def test_a_text_longer_than_a_pack_fills_packs_to_the_last_token() -> None:
    cuts = cut_document([(11, 0), (30, 0)], LENGTH, IMAGES)
    assert [(cut.first, cut.start, cut.last, cut.stop) for cut in cuts] == [
        (0, 0, 1, 1),
        (1, 1, 1, 13),
        (1, 13, 1, 25),
        (1, 25, 1, 30),
    ]


def test_an_image_goes_with_the_text_after_it() -> None:
    cuts = cut_document([(7, 0), (4, 1), (6, 0)], LENGTH, IMAGES)
    assert [(cut.first, cut.last) for cut in cuts] == [(0, 0), (1, 2)]


@given(st.lists(SEGMENTS, min_size=1, max_size=12))
def test_no_other_cuts_between_units_are_fewer_or_more_even(sizes: list[tuple[int, int]]) -> None:
    ends = [n + 1 for n, (_, panels) in enumerate(sizes) if not panels or n == len(sizes) - 1]
    ways = []
    for size in range(len(ends)):
        for chosen in combinations(ends[:-1], size):
            stops = [0, *chosen, ends[-1]]
            parts = [
                tuple(sum(size[part] for size in sizes[begin:end]) for part in (0, 1)) for begin, end in pairwise(stops)
            ]
            if all(tokens <= LENGTH and panels <= IMAGES for tokens, panels in parts):
                ways.append((len(parts), max(parts)[0]))
    if ways:
        cuts = cut_document(sizes, LENGTH, IMAGES)
        assert (len(cuts), max(cut.tokens for cut in cuts)) == min(ways)


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 3)), max_size=8), st.integers(1, 30), st.integers(0, 6))
def test_subset_sum_is_the_best_of_all_subsets(items: list[tuple[int, int]], room: int, slots: int) -> None:
    space = SubsetSum(room, slots)
    exact = space.offer(0, [tokens for tokens, _ in items], [panels for _, panels in items], 0, 99)
    best = [number for _, number in space.best()]
    assert best == sorted(set(best))
    assert sum(items[n][1] for n in best) <= slots
    sums = [
        (sum(t for t, _ in subset), -sum(p for _, p in subset))
        for size in range(len(items) + 1)
        for subset in combinations(items, size)
        if sum(p for _, p in subset) <= slots
    ]
    assert sum(items[n][0] for n in best) == max(tokens for tokens, _ in sums if tokens <= room)
    assert exact == (room in [tokens for tokens, _ in sums])


@given(st.lists(st.integers(1, 12), max_size=9), st.integers(1, 30))
def test_one_row_is_enough_where_panels_cannot_run_out(items: list[int], room: int) -> None:
    both = [SubsetSum(room, slots) for slots in (None, 9)]
    for space in both:
        space.offer(0, items, [1] * len(items), 0, 99)
    totals = [sum(items[n] for _, n in space.best()) for space in both]
    assert totals[0] == totals[1]


def test_earlier_items_are_preferred() -> None:
    space = SubsetSum(10, 0)
    assert space.offer(0, [4, 6, 4, 6, 10], [0] * 5, 0, 9)
    assert space.best() == [(0, 0), (0, 1)]


def test_offers_end_at_the_slack_or_when_there_are_enough() -> None:
    space = SubsetSum(100, None, slack=3)
    assert not space.offer(5, [90, 7, 200, 91, 5], [0] * 5, 2, 1)  # from number 2 on
    assert space.best() == [(5, 3), (5, 4)]
    assert space.offer(6, [1, 100], [0, 0], 0, 9)  # 91 + 5 + 1: within the slack, the 100 is not looked at
    assert space.best() == [(5, 3), (5, 4), (6, 0)]
    many = SubsetSum(100, None)
    many.offer(0, [60] * 9, [0] * 9, 0, 2)
    assert many.offer(1, [40], [0], 0, 2) and many.best() == [(0, 0), (1, 0)]
    few = SubsetSum(100, 3)
    assert not few.offer(0, [99, 99, 99, 99, 1], [0] * 5, 0, 2)  # two, then as many as hold twice the room
    assert few.best() == [(0, 0)]
