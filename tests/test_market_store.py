"""The store gives back exactly what it got, survives crashes, and stays within memory."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tradebook.base.errors import DataError
from tradebook.market.events import (
    EVENT,
    FLAG_LAST,
    KIND_GAP,
    KIND_LEVEL,
    KIND_TRADE,
    check_events,
    make_events,
)
from tradebook.market.instruments import instrument
from tradebook.market.part_files import stamps_path
from tradebook.market.store import DAY_NS, Store, holes_of

OF = instrument("synthetic", "SYN/USDT:USDT")
START = 20_000 * DAY_NS


def events_at(ts, seed=0):
    "One-row messages at given times, every field used to its limits"
    rng = np.random.default_rng(seed)
    n = len(ts)
    return make_events(
        ts_recv=ts,
        ts_event=rng.integers(-(1 << 62), 1 << 62, n),
        sequence=rng.integers(-(1 << 62), 1 << 62, n),
        size_lots=rng.integers(0, 1 << 62, n),
        price_ticks=rng.integers(0, (1 << 31) - 1, n),
        flags=rng.integers(0, 1 << 15, n) | FLAG_LAST,
        kind=rng.integers(KIND_LEVEL, 5, n),
        side=rng.integers(-1, 2, n),
    )


@settings(max_examples=25, deadline=None)
@given(steps=st.lists(st.integers(0, DAY_NS), min_size=1, max_size=12), seed=st.integers(0, 99))
def test_any_events_come_back_bit_for_bit(tmp_path_factory, steps, seed):
    events = events_at(START + np.cumsum(steps, dtype=np.int64), seed)
    store = Store(tmp_path_factory.mktemp("store"))
    parts = store.write(events, OF, "test")
    assert store.read(OF.venue, OF.symbol).tobytes() == events.tobytes()
    assert store.write(events, OF, "again") == parts
    assert store.verify() == []
    assert len({p.date for p in parts}) == len(np.unique(events["ts_recv"] // DAY_NS))
    low, high = sorted(np.random.default_rng(seed).choice(events["ts_recv"], 2))
    inside = (events["ts_recv"] >= low) & (events["ts_recv"] < high + 1)
    found = store.read(OF.venue, OF.symbol, int(low), int(high) + 1)
    assert found.tobytes() == events[inside].tobytes()


def test_parts_of_one_day_in_any_order_of_writing(tmp_path):
    events = events_at(START + np.arange(90) * 1_000)
    store = Store(tmp_path)
    for piece in (2, 0, 1):
        store.write(np.split(events, 3)[piece], OF, f"piece {piece}")
    assert store.read(OF.venue, OF.symbol).tobytes() == events.tobytes()


@pytest.mark.parametrize("first, n", [(0, 10), (5, 1), (-3, 20), (9, 5)])
def test_a_second_story_about_the_same_time_is_refused(tmp_path, first, n):
    store = Store(tmp_path)
    events = events_at(START + np.arange(10) * 1_000)
    store.write(events, OF, "one")
    other = events_at(START + (first + np.arange(n)) * 1_000, seed=1)
    if first == 9:  # they only touch at the last instant: a recorder changed its file there
        store.write(other, OF, "two")
        assert len(store.read(OF.venue, OF.symbol)) == 15
        return
    with pytest.raises(DataError, match="events from two overlap part-"):
        store.write(other, OF, "two")
    assert store.read(OF.venue, OF.symbol).tobytes() == events.tobytes()


def test_holes_and_coverage_over_days(tmp_path):
    hour = 3600 * 10**9
    ts = START + np.array([0, 20, 30, 47]) * hour
    events = events_at(ts)
    events["kind"] = [KIND_TRADE, KIND_GAP, KIND_GAP, KIND_TRADE]
    events["size_lots"][1:3] = [20 * hour, 5 * hour]
    store = Store(tmp_path)
    store.write(events, OF, "test")
    assert store.holes(OF.venue, OF.symbol) == [tuple(h) for h in holes_of(events)]
    assert store.coverage(OF.venue, OF.symbol) == pytest.approx(1 - 25 / 47)
    assert store.listing()[0]["n_days"] == 2


def test_a_damaged_part_or_manifest_is_named(tmp_path):
    store = Store(tmp_path)
    (part,) = store.write(events_at(START + np.arange(1000)), OF, "test")
    day = store.day(OF.venue, OF.symbol, part.date)
    manifest = json.loads((day / "manifest.json").read_text())
    manifest["parts"][0]["sha256"] = "0" * 64
    (day / "manifest.json").write_text(json.dumps(manifest))
    assert [w.split(": ")[1] for w in store.verify()] == ["rows differ from the manifest"]
    stamps_path(day / part.file).unlink()
    (sentence,) = store.verify()
    assert "not readable" in sentence and ".stamps.parquet" in sentence
    (day / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="must be a manifest of the store"):
        store.read(OF.venue, OF.symbol)


def test_many_writers_of_one_day_lose_nothing(tmp_path):
    events = events_at(START + np.arange(400) * 1_000)
    failed = []

    def write(piece):
        try:
            Store(tmp_path).write(piece, OF, "thread")
        except Exception as error:
            failed.append(error)

    pieces = np.split(events, 8)
    threads = [threading.Thread(target=write, args=(p,)) for p in [*pieces, *pieces]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert Store(tmp_path).read(OF.venue, OF.symbol).tobytes() == events.tobytes()


KILLED_WRITER = """
import os, signal, sys
import numpy as np
from tradebook.market import store as module
from tradebook.market.events import FLAG_LAST, KIND_TRADE, make_events
from tradebook.market.instruments import instrument
from tradebook.market.store import DAY_NS, Store

steps = 0
def die_at(call, name):
    real = getattr(os, name)
    def step(*args, **kw):
        global steps
        steps += 1
        if steps == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kw)
    setattr(os, name, step)
for name in ("fsync", "replace"):
    die_at(int(sys.argv[2]), name)
events = make_events(ts_recv=20_000 * DAY_NS + np.arange(5000), kind=KIND_TRADE, flags=FLAG_LAST)
Store(sys.argv[1]).write(events, instrument("synthetic", "SYN/USDT:USDT"), "killed")
"""


@pytest.mark.parametrize("step", range(1, 10))
def test_a_writer_killed_at_any_step_leaves_all_or_nothing(tmp_path, step):
    done = subprocess.run([sys.executable, "-c", KILLED_WRITER, str(tmp_path), str(step)])
    assert done.returncode == -9
    store = Store(tmp_path)
    assert store.verify() == []
    assert [p.n_rows for p in store.parts()] in ([], [5000])
    events = make_events(ts_recv=START + np.arange(5000), kind=KIND_TRADE, flags=FLAG_LAST)
    store.write(events, OF, "after the crash")  # doing it again heals it
    assert store.read(OF.venue, OF.symbol).tobytes() == events.tobytes()
    (part,) = store.parts()
    names = {part.file, stamps_path(Path(part.file)).name}
    assert {p.name for p in tmp_path.rglob("*.parquet")} == names


def test_what_is_no_stream_is_not_stored(tmp_path):
    events = events_at(START + np.arange(5))
    check_events(events)
    events["ts_recv"][2] = 0
    with pytest.raises(DataError, match="must never decrease"):
        Store(tmp_path).write(events, OF, "test")
    with pytest.raises(DataError, match="dtype EVENT"):
        Store(tmp_path).write(np.zeros(3), OF, "test")
    assert Store(tmp_path).parts() == [] and EVENT.itemsize == 40
