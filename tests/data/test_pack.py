from itertools import combinations

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


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 3)), max_size=8), st.integers(0, 30), st.integers(0, 6))
def test_subset_sum_is_the_best_of_all_subsets(items: list[tuple[int, int]], room: int, slots: int) -> None:
    items = [(tokens, panels) for tokens, panels in items if tokens <= room and panels <= slots]
    space = SubsetSum(room, slots)
    for tokens, panels in items:
        space.offer(tokens, panels)
    best = space.best()
    assert best == sorted(set(best))
    assert sum(items[n][1] for n in best) <= slots
    sums = [
        sum(t for t, _ in subset)
        for size in range(len(items) + 1)
        for subset in combinations(items, size)
        if sum(p for _, p in subset) <= slots
    ]
    assert sum(items[n][0] for n in best) == max(total for total in sums if total <= room)
    assert space.exact == (room in sums)


def test_earlier_items_are_preferred() -> None:
    space = SubsetSum(10, 0)
    for tokens in (4, 6, 4, 6, 10):
        space.offer(tokens, 0)
    assert space.best() == [0, 1]
