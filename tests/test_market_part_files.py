"""Files of events give back what they got, whatever repeats in them, and name what does not fit."""

import threading
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tradebook.base.errors import DataError
from tradebook.base.hands import N_HANDS, in_turn
from tradebook.market import part_files
from tradebook.market.book import new_book
from tradebook.market.events import FLAG_LAST, KIND_TRADE, make_events, to_table
from tradebook.market.part_files import (
    STAMP,
    read_columns,
    read_part,
    read_pieces,
    stamp_starts,
    stamps_path,
    write_part,
)
from tradebook.market.quotes import QUOTE, quotes
from tradebook.market.stored_quotes import cut_columns, replay_columns


def runs(lengths, seed):
    "Rows of which neighbours share times and numbers as often as not"
    rng = np.random.default_rng(seed)
    n = sum(lengths)
    own = np.repeat(np.arange(len(lengths)), lengths)
    return make_events(
        ts_recv=np.cumsum(rng.integers(0, 2, len(lengths)))[own],
        ts_event=rng.integers(-2, 2, len(lengths))[own],
        sequence=rng.integers(0, 2, len(lengths))[own],
        size_lots=rng.integers(0, 1 << 62, n) >> rng.integers(0, 62, n),
        price_ticks=rng.integers(0, 1 << 20, n),
        kind=rng.integers(0, 4, n),
        side=rng.choice([-1, 1], n),
        flags=rng.integers(0, 2, n) * FLAG_LAST,
    )


@pytest.fixture
def small_groups(monkeypatch):
    "Groups of seven rows, so that a few events fill several"
    monkeypatch.setattr(part_files, "GROUP_ROWS", 7)


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), max_size=12), seed=st.integers(0, 999))
def test_events_of_any_runs_come_back_in_groups(tmp_path_factory, lengths, seed):
    path, events = tmp_path_factory.mktemp("part") / "part.parquet", runs(lengths, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(part_files, "GROUP_ROWS", 7)
        write_part(events, path)
        starts = stamp_starts(events)
    assert read_part(path).tobytes() == events.tobytes()
    pieces = list(read_pieces(path))
    sizes = [len(p) for p in pieces]
    assert len(sizes) < 2 or len(sizes) % N_HANDS == 0
    assert all(max(sizes) - 1 <= size <= 7 for size in sizes)
    assert b"".join(p.tobytes() for p in pieces) == events.tobytes()
    groups = list(read_columns(path))
    assert sum(len(g.n_rows) for g in groups) == len(starts)
    for name in STAMP:
        whole = [np.repeat(getattr(g, name), g.n_rows) for g in groups]
        assert np.concatenate([*whole, []]).tolist() == events[name].tolist()
    assert all(len(g.kind) == g.n_rows.sum() for g in groups)


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=9), seed=st.integers(0, 999))
def test_quotes_of_cut_columns_are_those_of_cut_rows(tmp_path_factory, lengths, seed):
    path, events = tmp_path_factory.mktemp("part") / "part.parquet", runs(lengths, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(part_files, "GROUP_ROWS", 7)
        write_part(events, path)
    low, high = 1, int(events["ts_recv"][-1])
    book, carried, found = new_book(), np.zeros(2, np.int64), []
    for group in read_columns(path):
        group = cut_columns(group, low, high)
        out = np.zeros(np.count_nonzero(group.flags & FLAG_LAST), QUOTE)
        found.append(out[: replay_columns(book, carried, group, out)])
    first, stop = np.searchsorted(events["ts_recv"], [low, high])
    assert np.concatenate(found).tobytes() == quotes(events[first:stop]).tobytes()


def test_a_plain_file_is_read_as_well(tmp_path, small_groups):
    events = runs([3, 4, 5, 6], 1)
    pq.write_table(to_table(events), tmp_path / "plain.parquet", row_group_size=5)
    assert read_part(tmp_path / "plain.parquet").tobytes() == events.tobytes()
    assert [len(p) for p in read_pieces(tmp_path / "plain.parquet")] == [5, 5, 5, 3]


def test_files_of_the_former_layout_are_read(tmp_path, small_groups, monkeypatch):
    path, events = tmp_path / "part.parquet", runs([5, 9, 3, 8], 2)
    with monkeypatch.context() as patch:  # groups as they come, and differences of sides
        patch.setattr(part_files, "group_bounds", lambda n: np.append(np.arange(0, n, 10), n))
        patch.setitem(part_files._DELTAS, "side", "DELTA_BINARY_PACKED")
        write_part(events, path)
    with pq.ParquetFile(path) as file:
        assert file.num_row_groups == 3
        assert "DELTA_BINARY_PACKED" in file.metadata.row_group(0).column(4).encodings
    assert [len(piece) for piece in read_pieces(path)] == [10, 10, 5]
    assert read_part(path).tobytes() == events.tobytes()
    write_part(events, path)
    with pq.ParquetFile(path) as file:
        assert "RLE_DICTIONARY" in file.metadata.row_group(0).column(4).encodings
    assert read_part(path).tobytes() == events.tobytes()


def test_what_does_not_fit_is_named(tmp_path, small_groups):
    path, other = tmp_path / "part.parquet", tmp_path / "other.parquet"
    write_part(runs([9, 9], 1), path)
    write_part(runs([9, 3], 1), other)
    stamps_path(other).rename(stamps_path(path))
    with pytest.raises(DataError, match=r"part.stamps.parquet must have 4 groups .* was 2"):
        read_part(path)
    write_part(runs([9, 8], 1), other)
    stamps_path(other).rename(stamps_path(path))
    with pytest.raises(DataError, match="must stand for the 5 rows of group 1, was for 4"):
        list(read_columns(path))
    stamps_path(path).unlink()
    with pytest.raises(FileNotFoundError, match="part.stamps.parquet"):
        read_part(path)


def test_damage_in_the_last_group_is_an_error(tmp_path, small_groups):
    path = tmp_path / "part.parquet"
    write_part(make_events(ts_recv=np.arange(40), kind=KIND_TRADE, flags=FLAG_LAST), path)
    with pq.ParquetFile(path) as file:
        at = file.metadata.row_group(5).column(1).data_page_offset
    damaged = bytearray(path.read_bytes())
    damaged[at : at + 8] = b"\xff" * 8
    path.write_bytes(damaged)
    for _ in range(3):
        with pytest.raises((OSError, ValueError)):
            read_part(path)
    assert sum(t.name.startswith("hands") for t in threading.enumerate()) <= N_HANDS


def test_work_ahead_is_bounded_in_order_and_stops():
    begun = []
    results = in_turn(lambda i: begun.append(i) or i, 50)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    results.close()
    assert len(begun) <= 5  # three asked for, two ahead

    busy, shared = [0] * N_HANDS, []

    def uses_a_reader(i):
        "Use what belongs to every N_HANDS-th alone, as the readers of a part do"
        busy[i % N_HANDS] += 1
        time.sleep(0.001 * (i % 3))
        shared.append(busy[i % N_HANDS] > 1)
        busy[i % N_HANDS] -= 1

    assert len(list(in_turn(uses_a_reader, 20))) == 20
    assert not any(shared)

    def fails(i):
        "Break at the fourth"
        if i == 3:
            raise ValueError("the fourth")
        return i

    seen = []
    with pytest.raises(ValueError, match="the fourth"):
        for i in in_turn(fails, 50):
            seen.append(i)
    assert seen == [0, 1, 2]
