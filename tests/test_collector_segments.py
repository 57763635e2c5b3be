"""A recorder that is killed at any moment loses the last moment and nothing else."""

import inspect
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tradebook.base.errors import DataError
from tradebook.collector.collector import Collector, collect, sort_messages
from tradebook.collector.segments import SegmentWriter, is_in_use, read_segment
from tradebook.market.events import (
    FLAG_LAST,
    KIND_CLEAR,
    KIND_GAP,
    KIND_LEVEL,
    KIND_TRADE,
    check_events,
    make_events,
    message_starts,
)
from tradebook.market.instruments import instrument
from tradebook.market.store import Store

OF = instrument("synthetic", "SYN/USDT:USDT")
S = 1_000_000_000
T0 = 1_700_000_000 * S


def messages(first, stop, seed=0):
    "Messages number `first` to `stop`, three rows each, a tenth of a second apart; numbered by sequence"
    i = np.arange(first, stop)
    rng = np.random.default_rng(seed)
    return make_events(
        ts_recv=np.repeat(T0 + i * S // 10, 3),
        sequence=np.repeat(i, 3),
        kind=np.tile([KIND_CLEAR, KIND_LEVEL, KIND_LEVEL], len(i)),
        side=np.tile([0, 1, -1], len(i)),
        price_ticks=np.tile([0, 600_000, 600_001], len(i)),
        size_lots=rng.integers(0, 1 << 62, 3 * len(i)),
        flags=np.tile([0, 0, FLAG_LAST], len(i)),
    )


# A child process has the same messages, without loading the test tools.
CHILD = """
import sys
import numpy as np
from tradebook.market.events import *
S = 1_000_000_000
T0 = 1_700_000_000 * S
""" + inspect.getsource(messages)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    data=st.data(),
    seed=st.integers(0, 9),
)
def test_cut_or_damaged_at_any_byte_the_whole_frames_before_it_are_read(
    tmp_path_factory, sizes, data, seed
):
    folder = tmp_path_factory.mktemp("segment")
    frames = [messages(i, i + n, seed) for i, n in enumerate(sizes)]
    ends = []
    with SegmentWriter(folder, T0) as writer:
        for rows in frames:
            writer.append(rows)
            ends.append(writer.n_bytes)
    content = writer.path.read_bytes()
    at = data.draw(st.integers(0, len(content) - 1))
    n_whole = sum(end <= at for end in ends)
    expected = b"".join(f.tobytes() for f in frames[:n_whole])
    writer.path.write_bytes(content[:at])
    rows, n_torn = read_segment(writer.path)
    assert rows.tobytes() == expected
    assert n_torn == at - (ends[n_whole - 1] if n_whole else min(8, at) if at >= 8 else 0)
    if at >= 8:  # inside the header it is no segment at all
        flipped = bytearray(content)
        flipped[at] ^= 1 << data.draw(st.integers(0, 7))
        writer.path.write_bytes(bytes(flipped))
        assert read_segment(writer.path)[0].tobytes() == expected


def test_two_writers_never_share_a_file(tmp_path):
    with SegmentWriter(tmp_path, T0) as one, SegmentWriter(tmp_path, T0) as two:
        one.append(messages(0, 5))
        two.append(messages(5, 7))
        assert one.path != two.path
    assert len(read_segment(one.path)[0]) == 15 and len(read_segment(two.path)[0]) == 6


def test_a_full_disk_leaves_only_whole_frames(tmp_path):
    code = """
import resource, signal
from tradebook.collector.segments import SegmentWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000))  # the disk ends inside a frame
writer, n = SegmentWriter(sys.argv[1], T0), 0
try:
    for n in range(1000):
        writer.append(messages(n, n + 1))
except OSError as error:
    print(n, type(error).__name__)
"""
    done = subprocess.run(
        [sys.executable, "-c", CHILD + code, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    n, error = done.stdout.split()
    (path,) = tmp_path.glob("*.segment")
    rows, n_torn = read_segment(path)
    assert error == "OSError" and n_torn == 0
    assert len(rows) == 3 * int(n)
    assert rows["sequence"].tolist() == np.repeat(np.arange(int(n)), 3).tolist()


RECORDER = """
from pathlib import Path
from tradebook.collector.collector import Collector
from tradebook.market.instruments import instrument
from tradebook.market.store import Store

root, of = Path(sys.argv[1]), instrument("synthetic", "SYN/USDT:USDT")
collector = Collector(Store(root / "store"), of, root / "segments", segment_s=30)
start = (collector.last_ns - 1_700_000_000 * 10**9) // 10**8 + 1 if collector.last_ns else 0
for i in range(start, 5_000):
    collector.take(messages(i, i + 1))
    print(i, flush=True)  # from here on it must never be lost
    if i % 700 == 699:
        collector.compact(with_running=False)
"""


def run_until_killed(root, after_s):
    "Run the recorder as a real process, kill it without warning; the last message it acknowledged"
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD + RECORDER, str(root)], stdout=subprocess.PIPE, text=True
    )
    first = child.stdout.readline()
    assert first, "the recorder did not start"
    time.sleep(after_s)
    os.kill(child.pid, signal.SIGKILL)
    rest = child.stdout.read().split("\n")
    assert child.wait() == -signal.SIGKILL
    whole = [line for line in [first.strip(), *rest[:-1]] if line]
    return int(whole[-1])


def test_killed_again_and_again_nothing_acknowledged_is_lost(tmp_path):
    rng, acknowledged, store = random.Random(7), [], Store(tmp_path / "store")
    for _ in range(3):
        acknowledged.append(run_until_killed(tmp_path, rng.uniform(0.05, 0.4)))
    collector = Collector(store, OF, tmp_path / "segments", segment_s=30)
    collector.compact()
    held = store.read(OF.venue, OF.symbol)
    check_events(held)
    book = held[held["kind"] != KIND_GAP]
    numbers = book["sequence"][::3]
    assert (np.diff(numbers) == 1).all() and numbers[0] == 0  # each message once, in order
    assert numbers[-1] >= acknowledged[-1] > acknowledged[0]
    n_gaps = int((held["kind"] == KIND_GAP).sum())
    assert n_gaps == 2 == len(store.holes(OF.venue, OF.symbol))  # one for each restart
    assert collector.segments() == [] and store.verify() == []
    assert collector.compact() == []
    assert store.read(OF.venue, OF.symbol).tobytes() == held.tobytes()
    collector.close()


def test_compaction_done_twice_gives_the_same_rows(tmp_path):
    store = Store(tmp_path / "store")
    collector = Collector(store, OF, tmp_path / "segments", segment_s=60)
    collector.take(messages(0, 2_000))
    collector._end_segment()
    kept = {path: path.read_bytes() for path in collector.segments()}
    assert len(kept) > 3
    first = collector.compact()
    held = store.read(OF.venue, OF.symbol)
    assert held.tobytes() == messages(0, 2_000).tobytes()
    for path, content in kept.items():  # as if the power had failed before the segments went
        path.write_bytes(content)
    assert collector.compact() == first
    assert store.read(OF.venue, OF.symbol).tobytes() == held.tobytes()
    assert collector.segments() == []


def test_a_torn_segment_is_compacted_up_to_the_tear_and_counted(tmp_path):
    store = Store(tmp_path / "store")
    collector = Collector(store, OF, tmp_path / "segments")
    collector.take(messages(0, 5))
    collector.take(messages(5, 8))
    collector._end_segment()
    (path,) = collector.segments()
    path.write_bytes(path.read_bytes()[:-1])
    collector.compact()
    assert store.read(OF.venue, OF.symbol).tobytes() == messages(0, 5).tobytes()
    assert collector.counts["n_torn_bytes"] == 8 + 9 * 40 - 1


def test_a_segment_that_contradicts_the_store_is_kept_and_does_not_block_the_others(tmp_path):
    store = Store(tmp_path / "store")
    store.write(messages(0, 10, seed=5), OF, "somebody else")
    folder = tmp_path / "segments"
    for first in (3, 100):
        with SegmentWriter(folder / "synthetic" / "SYN-USDT~USDT", T0 + first) as writer:
            writer.append(messages(first, first + 5))
    collector = Collector(store, OF, folder)
    parts = collector.compact()
    assert [p.n_rows for p in parts] == [15]
    assert len(list(collector.folder.glob("*.refused"))) == 1
    assert "overlap" in next(iter(collector.refused))


def test_a_running_segment_of_another_process_is_left_alone(tmp_path):
    folder = tmp_path / "synthetic" / "SYN-USDT~USDT"
    with SegmentWriter(folder, T0) as writer:
        writer.append(messages(0, 3))
        assert is_in_use(writer.path)
        collector = Collector(Store(tmp_path / "store"), OF, tmp_path)
        assert collector.compact() == [] and writer.path.exists()
    assert [p.n_rows for p in collector.compact()] == [9]


def test_one_collector_a_market(tmp_path):
    first = Collector(Store(tmp_path / "store"), OF, tmp_path)
    with pytest.raises(DataError, match="must have one collector"):
        Collector(Store(tmp_path / "store"), OF, tmp_path)
    Collector(Store(tmp_path / "store"), instrument("standx", "BTC/USD:USD"), tmp_path).close()
    first.close()
    Collector(Store(tmp_path / "store"), OF, tmp_path).close()


DAMAGE = [("kind", 200), ("size_lots", -5), ("price_ticks", -1), ("side", 9), ("ts_recv", 5)]


@settings(max_examples=40, deadline=None)
@given(
    damaged=st.lists(st.integers(1, 19), unique=True, max_size=6),
    how=st.sampled_from(DAMAGE),
    cuts=st.lists(st.integers(1, 19), unique=True, max_size=4),
)
def test_refused_messages_are_counted_kept_and_leave_a_gap(tmp_path_factory, damaged, how, cuts):
    root = tmp_path_factory.mktemp("collector")
    store = Store(root / "store")
    collector = Collector(store, OF, root / "segments")
    events = messages(0, 20)
    name, value = how
    for i in damaged:
        events[name][3 * i : 3 * i + 3] = value
    n_refused = sum(
        collector.take(rows) for rows in np.split(events, [3 * c for c in sorted(cuts)])
    )
    collector.compact()
    collector.close()
    assert n_refused == len(damaged) == sum(collector.refused.values())
    held = store.read(OF.venue, OF.symbol)
    good = np.delete(events, [3 * i + k for i in damaged for k in range(3)])
    assert held[held["kind"] != KIND_GAP].tobytes() == good.tobytes()
    runs = sum(
        i - 1 not in damaged and any(j not in damaged for j in range(i, 20)) for i in damaged
    )
    assert int((held["kind"] == KIND_GAP).sum()) == runs  # one gap for each run of refusals
    aside = [read_segment(p)[0] for p in (collector.folder / "refused").glob("*.segment")]
    assert sum(len(message_starts(rows)) for rows in aside) == len(damaged)


def test_sorting_loses_no_row():
    events = messages(0, 30)
    events["kind"][7], events["ts_recv"][31] = 99, T0 + 999 * S
    runs = sort_messages(events, 0)
    assert np.concatenate([rows for rows, _ in runs]).tobytes() == events.tobytes()
    assert sum(bool(reason) for _, reason in runs) == 2


def test_a_feed_that_breaks_is_stored_up_to_there(tmp_path):
    def feed():
        yield messages(0, 500)
        yield messages(500, 900)
        raise ConnectionError("the line is dead")

    store = Store(tmp_path / "store")
    with pytest.raises(ConnectionError):
        collect(feed(), Collector(store, OF, tmp_path / "segments", segment_s=60))
    assert len(store.read(OF.venue, OF.symbol)) == 2_700
    seen = []
    again = Collector(store, OF, tmp_path / "segments", segment_s=60)
    account = collect([messages(950, 2_000)], again, seen.append)
    assert seen == [3 * 1_050 + 1] and account["n_gaps_added"] == 1 and account["refused"] == {}
    assert store.holes(OF.venue, OF.symbol) == [(T0 + 899 * S // 10, T0 + 95 * S)]
    trade = make_events(ts_recv=T0, kind=KIND_TRADE, flags=FLAG_LAST)
    late = Collector(store, OF, tmp_path / "segments")
    assert late.take(trade) == 1  # older than what is recorded
