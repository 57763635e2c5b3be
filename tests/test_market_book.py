"""The compiled book agrees with a slow dictionary book after every event, whatever happens."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from tradebook.market.book import (
    BOOK_CROSSED,
    BOOK_INVALID,
    BOOK_LOCKED,
    BOOK_OK,
    BOOK_ONE_SIDED,
    HEAD_FREE,
    HEAD_REFUSED,
    KEY_MAX,
    N_PAGES,
    PAGE_SIZE,
    apply_event,
    apply_events,
    apply_until,
    best,
    book_status,
    is_valid,
    level_count,
    new_book,
    next_level,
    size_at,
    top,
)
from tradebook.market.events import (
    FLAG_LAST,
    KIND_CLEAR,
    KIND_GAP,
    KIND_LEVEL,
    KIND_QUOTE,
    KIND_TRADE,
    make_events,
)


class SlowBook:
    "Two dictionaries, searched from end to end: slow and beyond doubt"

    def __init__(self):
        self.levels, self.is_valid = ({}, {}), False

    def apply(self, kind, side, ticks, lots):
        if kind == KIND_GAP:
            self.is_valid = False
        elif kind == KIND_CLEAR:
            self.levels, self.is_valid = ({}, {}), True
        elif kind == KIND_LEVEL:
            levels = self.levels[0 if side > 0 else 1]
            levels.pop(ticks, None)
            if lots:
                levels[ticks] = lots

    def side(self, index):
        return sorted(self.levels[index].items(), reverse=index == 0)

    def status(self):
        bids, asks = self.levels
        if not self.is_valid:
            return BOOK_INVALID
        if not bids or not asks:
            return BOOK_ONE_SIDED
        if max(bids) == min(asks):
            return BOOK_LOCKED
        return BOOK_CROSSED if max(bids) > min(asks) else BOOK_OK


def assert_same(book, slow, prices=()):
    "Every question to the book has the dictionary's answer"
    n = max(len(levels) for levels in slow.levels) + 2
    arrays = [np.full(n, 77, np.int64) for _ in range(4)]
    found = top(book, n, *arrays)
    for index in range(2):
        levels = slow.side(index)
        ticks, lots = arrays[2 * index], arrays[2 * index + 1]
        assert found[index] == level_count(book, index) == len(levels)
        assert list(zip(ticks[: len(levels)], lots[: len(levels)], strict=True)) == levels
        assert (ticks[len(levels) :] == -1).all() and (lots[len(levels) :] == 0).all()
        assert best(book, index) == (levels[0][0] if levels else -1)
        for ticks in prices:
            assert size_at(book, index, ticks) == slow.levels[index].get(ticks, 0)
            worse = [t for t, _ in levels if (t < ticks if index == 0 else t > ticks)]
            assert next_level(book, index, ticks) == (worse[0] if worse else -1)
    assert book_status(book) == slow.status()
    assert is_valid(book) == slow.is_valid


near = st.integers(600_000, 600_012)
edges = st.builds(
    lambda page, off: page * PAGE_SIZE + off, st.sampled_from([146, 147, 148]), st.integers(-2, 2)
)
far = st.sampled_from([0, 1, 4095, 4096, 10_000_000, KEY_MAX - 4096, KEY_MAX - 1, KEY_MAX])
level = st.tuples(
    st.just(KIND_LEVEL),
    st.sampled_from([1, -1]),
    st.one_of(near, near, edges, far),
    st.one_of(st.just(0), st.integers(1, 9), st.just(1 << 62)),
)
other = st.one_of(
    *(st.just((kind, 0, 0, 5)) for kind in (KIND_CLEAR, KIND_GAP)),
    *(st.tuples(st.just(kind), st.just(1), near, st.just(3)) for kind in (KIND_TRADE, KIND_QUOTE)),
)
steps = st.lists(st.one_of(*[level] * 9, other), max_size=60)


@settings(max_examples=150, deadline=None)
@given(steps)
def test_agrees_with_a_dictionary_after_every_event(rows):
    book, slow, seen = new_book(), SlowBook(), set()
    for row in rows:
        apply_event(book, *row)
        slow.apply(*row)
        seen.add(row[2])
        assert_same(book, slow, sorted(seen)[:6])
    n_pages = len({(KEY_MAX - t) >> 12 for t in slow.levels[0]})
    n_pages += len({t >> 12 for t in slow.levels[1]})
    assert N_PAGES - 1 - book.head[HEAD_FREE] == n_pages  # every empty page went back


@settings(max_examples=60, deadline=None)
@given(steps.filter(bool), st.data())
def test_applying_in_pieces_is_applying_at_once(rows, data):
    kind, side, ticks, lots = map(list, zip(*rows, strict=True))
    events = make_events(
        ts_recv=np.arange(len(rows)),
        kind=kind,
        side=side,
        price_ticks=ticks,
        size_lots=lots,
        flags=FLAG_LAST,
    )
    whole, parts, timed = new_book(), new_book(), new_book()
    apply_events(whole, events, 0, len(events))
    cut = data.draw(st.integers(0, len(rows)))
    apply_events(parts, events, 0, cut)
    apply_events(parts, events, cut, len(events))
    cursor = apply_until(timed, events, 0, cut - 1)
    assert cursor == cut
    assert apply_until(timed, events, cursor, 1 << 60) == len(events)
    slow = SlowBook()
    for row in rows:
        slow.apply(*row)
    for book in (whole, parts, timed):
        assert_same(book, slow)


def random_market(n, seed):
    "A walking market with crossings, sweeps of one side, clears and gaps"
    rng = np.random.default_rng(seed)
    kind = rng.choice(
        [KIND_LEVEL, KIND_TRADE, KIND_CLEAR, KIND_GAP], n, p=[0.97, 0.027, 0.002, 0.001]
    )
    side = rng.choice([-1, 1], n)
    mid = 4096 * 147 + np.cumsum(rng.integers(-3, 4, n))  # walks over a page's border
    ticks = mid - side * (rng.geometric(0.15, n) - 3)
    lots = np.where(rng.random(n) < 0.45, 0, rng.integers(1, 1000, n))
    return make_events(
        ts_recv=np.arange(n),
        kind=kind,
        side=side,
        price_ticks=ticks,
        size_lots=lots,
        flags=FLAG_LAST,
    )


@pytest.mark.parametrize("seed", range(3))
def test_long_random_market(seed):
    events = random_market(6_000, seed)
    book, slow = new_book(), SlowBook()
    states = set()
    for i, e in enumerate(events):
        apply_events(book, events, i, i + 1)
        slow.apply(int(e["kind"]), int(e["side"]), int(e["price_ticks"]), int(e["size_lots"]))
        bids, asks = slow.levels
        assert best(book, 0) == max(bids, default=-1) and best(book, 1) == min(asks, default=-1)
        assert book_status(book) == slow.status()
        states.add(slow.status())
        if i % 500 == 0:
            assert_same(book, slow)
    assert {BOOK_OK, BOOK_CROSSED, BOOK_INVALID} <= states  # the test saw what it claims to test


def test_clear_and_refill_reuses_pages_for_ever():
    book = new_book()
    rng = np.random.default_rng(1)
    for _ in range(50):
        apply_event(book, KIND_CLEAR, 0, 0, 0)
        for page in rng.choice(
            500_000, 300, replace=False
        ):  # 15,000 pages in all, 4095 in the pool
            apply_event(book, KIND_LEVEL, 1, int(page) * PAGE_SIZE + 7, 5)
    assert book.head[HEAD_REFUSED] == 0 and is_valid(book) and level_count(book, 0) == 300
    apply_event(book, KIND_CLEAR, 0, 0, 0)
    assert not any(
        a.any() for a in (book.sizes[: 400 * PAGE_SIZE], book.bits, book.words, book.table)
    )
    assert len(set(book.free[: book.head[HEAD_FREE]])) == N_PAGES - 1  # each page once


def test_an_exhausted_pool_is_told_and_healed_by_a_clear():
    book = new_book()
    apply_event(book, KIND_CLEAR, 0, 0, 0)
    for i in range(N_PAGES + 5):
        apply_event(book, KIND_LEVEL, 1, i * PAGE_SIZE, 1)
    assert book.head[HEAD_REFUSED] == 6 and book_status(book) == BOOK_INVALID
    assert level_count(book, 0) == N_PAGES - 1 and not book.sizes[:PAGE_SIZE].any()
    apply_event(book, KIND_CLEAR, 0, 0, 0)
    apply_event(book, KIND_LEVEL, 1, 5, 1)
    apply_event(book, KIND_LEVEL, -1, 6, 1)
    assert book_status(book) == BOOK_OK and best(book, 0) == 5


def test_two_books_share_nothing():
    one, two = new_book(), new_book()
    apply_event(one, KIND_LEVEL, 1, 100, 5)
    assert best(one, 0) == 100 and best(two, 0) == -1


def test_a_compiled_caller_takes_the_book_as_an_argument():
    @njit
    def run(book, events):
        for i in range(len(events)):
            e = events[i]
            apply_event(book, e.kind, e.side, e.price_ticks, e.size_lots)
        return best(book, 0), best(book, 1), level_count(book, 0)

    events = random_market(2_000, 9)
    book = new_book()
    apply_events(book, events, 0, len(events))
    assert run(new_book(), events) == (best(book, 0), best(book, 1), level_count(book, 0))
