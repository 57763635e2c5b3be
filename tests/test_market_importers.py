"""The importers: the book they lead to is the venue's book, holes are seen, and every row is accounted for."""

import gzip
import json

import numpy as np
import orjson
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tradebook.base.errors import DataError
from tradebook.collector.folder import import_folder, plan_imports
from tradebook.collector.wire_files import read_frames
from tradebook.market.book import apply_event, best, book_status, new_book, next_level, size_at
from tradebook.market.events import (
    FLAG_LAST,
    KIND_CLEAR,
    KIND_GAP,
    KIND_LEVEL,
    KIND_QUOTE,
    KIND_TRADE,
    check_events,
)
from tradebook.market.importing import ImportReport, detect, to_units
from tradebook.market.instruments import CATALOGUE, instrument
from tradebook.market.level2 import read_level2
from tradebook.market.quotes import quality, quotes
from tradebook.market.snapshots import read_snapshots
from tradebook.market.store import Store

MS = 1_000_000
START = 1_767_657_600_000_000_000  # 2026-01-06
few = settings(max_examples=25, deadline=None)


def sides_of(book):
    "All levels of a book as two dictionaries"
    found = []
    for side in (0, 1):
        levels, ticks = {}, best(book, side)
        while ticks >= 0:
            levels[ticks] = int(size_at(book, side, ticks))
            ticks = next_level(book, side, ticks)
        found.append(levels)
    return tuple(found)


def books_after_messages(events):
    "Levels after each message that touches the book, with its row"
    book, touched = new_book(), False
    for i, e in enumerate(events):
        apply_event(
            book, int(e["kind"]), int(e["side"]), int(e["price_ticks"]), int(e["size_lots"])
        )
        touched |= e["kind"] in (KIND_LEVEL, KIND_CLEAR)
        if e["flags"] & FLAG_LAST and touched:
            touched = False
            yield i, sides_of(book), book_status(book)


# --- onto the grid


@example(("binance", "BTC/USDT"), 0, 0)
@example(("binance", "BTC/USDT"), 0, 1)
@given(st.sampled_from(sorted(CATALOGUE)), st.integers(0, 2**31 - 1), st.integers(0, 10**9))
def test_what_is_on_the_grid_comes_back_exactly(key, ticks, lots):
    of = CATALOGUE[key]
    got_ticks, got_lots, reason = to_units([ticks * of.tick_size], [lots * of.lot_size], of)
    is_kept = ticks > 0 or lots == 0  # nothing can rest at a price of zero
    expected = (ticks, lots, 0) if is_kept else (0, 0, 5)
    assert (got_ticks[0], got_lots[0], reason[0]) == expected


@pytest.mark.parametrize(
    ("price", "size", "reason"),
    [
        (1.005, 1, 1),
        (-1, 1, 1),
        (np.nan, 1, 1),
        (np.inf, 1, 1),
        (3e7, 1, 2),
        (1, 1e-9, 3),
        (1, np.nan, 3),
        (1, -1, 3),
    ],
)
def test_what_is_not_is_refused_by_name(price, size, reason):
    assert to_units([price], [size], instrument("coinbase", "BTC/USD"))[2][0] == reason


def test_a_report_is_plain_and_adds_up():
    report = ImportReport(("a",), "v", "s", 9, 5, {"x": 3, "y": 1}, {"n_gaps": 0})
    assert json.loads(json.dumps(report.to_dict()))["n_refused"] == 4


# --- repeated snapshots


@st.composite
def snapshot_days(draw):
    "Snapshots of three levels with some repeats and holes, and trades, some out of order"
    n = draw(st.integers(1, 12))
    step = draw(st.lists(st.sampled_from([250, 260, 1_400, 1_600, 7_000]), min_size=n, max_size=n))
    recv = START + np.cumsum(step) * MS
    rows = []
    for _ in range(n):
        if rows and draw(st.booleans()):
            rows.append(rows[-1])
            continue
        bid, gaps = (
            draw(st.integers(90_000, 90_010)),
            st.lists(st.integers(1, 3), min_size=3, max_size=3),
        )
        lots = draw(st.lists(st.integers(1, 4), min_size=6, max_size=6))
        bids = bid - np.cumsum(draw(gaps))
        asks = bid - 1 + np.cumsum(draw(gaps))
        rows.append((bids, asks, lots))
    n_trades = draw(st.integers(0, 6))
    at = draw(st.lists(st.integers(0, 30_000), min_size=n_trades, max_size=n_trades, unique=True))
    return recv, rows, START + np.array(at, np.int64) * MS + 1


def write_day(folder, recv, rows, traded):
    "Write a made day as StandX writes its own"
    table = {"ts_exch": recv - 300 * MS, "ts_recv": recv}
    for k in range(3):
        for side, which, part in (("bid", 0, 0), ("ask", 1, 3)):
            table[f"{side}_px_{k}"] = [round(float(row[which][k] * 0.01), 2) for row in rows]
            table[f"{side}_qty_{k}"] = [round(row[2][part + k] * 0.0001, 4) for row in rows]
    books, trades = (
        folder / "BTC-USD_book3_2026-01-06.parquet",
        folder / "BTC-USD_trades_2026-01-06.parquet",
    )
    frame = pd.DataFrame(table)
    for name in ("ts_exch", "ts_recv"):
        frame[name] = pd.to_datetime(frame[name])
    frame.to_parquet(books)
    stamps = pd.to_datetime(traded, utc=True).as_unit("ns")
    pd.DataFrame(
        {"timestamp": stamps, "received_at": stamps, "price": 900.01, "quantity": 0.0002}
    ).to_parquet(trades)
    return books, trades


@few
@given(snapshot_days())
def test_changes_lead_to_the_snapshots(tmp_path_factory, day):
    recv, rows, traded = day
    made = read_snapshots(*write_day(tmp_path_factory.mktemp("day"), recv, rows, traded))
    events = made.events
    check_events(events)
    assert made.report.n_refused == 0 and made.report.n_rows_read == len(recv) + len(traded)
    found = list(books_after_messages(events))
    assert [
        int(events["ts_recv"][i]) for i, _, _ in found
    ] == recv.tolist()  # equal books are told too
    for (_, (bids, asks), _), (bid_ticks, ask_ticks, lots) in zip(found, rows, strict=True):
        assert bids == dict(zip(bid_ticks.tolist(), lots[:3], strict=True))
        assert asks == dict(zip(ask_ticks.tolist(), lots[3:], strict=True))
    gaps = events[events["kind"] == KIND_GAP]
    silence = np.diff(recv)
    assert gaps["size_lots"].tolist() == silence[silence > 1_500 * MS].tolist()
    assert gaps["ts_recv"].tolist() == recv[1:][silence > 1_500 * MS].tolist()
    trades = events[events["kind"] == KIND_TRADE]
    assert trades["ts_recv"].tolist() == sorted(traded.tolist()) and (trades["side"] == 0).all()


def test_the_day_before_decides_about_midnight(tmp_path):
    row = (np.array([90_000, 89_999, 89_998]), np.array([90_001, 90_002, 90_003]), [1] * 6)
    files = write_day(tmp_path, np.array([START + 100 * MS]), [row], np.zeros(0, np.int64))
    kinds = {
        before: int((read_snapshots(*files, after_ns=before).events["kind"] == KIND_GAP).sum())
        for before in (0, START - 1_000 * MS, START - 9_000 * MS)
    }
    assert list(kinds.values()) == [0, 0, 1]
    late = read_snapshots(*files, after_ns=START + 200 * MS)
    assert len(late.events) == 0
    assert late.report.refused == {"received before the previous file ended": 1}


# --- raw frames


def line(ts, **data):
    "One line as the recorder writes it"
    body = data if "lastUpdateId" in data else {"stream": "x", "data": data}
    return str(ts).encode() + b" " + orjson.dumps(body) + b"\n"


def pairs(levels):
    return [[f"{t * 0.01:.2f}", f"{q * 0.00001:.5f}"] for t, q in levels.items()]


def coarser(levels):
    "The same ticks and lots, on the grid of the perpetual"
    return [[f"{float(p) * 10:.1f}", f"{float(q) * 100:.3f}"] for p, q in levels]


@st.composite
def frame_streams(draw):
    "A true book and its stream: changes of several ids, one snapshot somewhere, one change lost or none"
    seed = draw(st.integers(0, 2**32))
    is_futures, n = draw(st.booleans()), 30
    rng = np.random.default_rng(seed)
    bids = {int(t): 5 for t in rng.integers(9_000, 9_100, 8)}
    asks = {int(t): 5 for t in rng.integers(9_101, 9_200, 8)}
    at, truth, changes, previous = 100, {}, [], 100
    states = {100: (dict(bids), dict(asks))}
    for _ in range(n):
        first = at + 1 + (int(rng.integers(0, 3)) if is_futures else 0)
        changed = ({}, {})
        at = first - 1
        for _ in range(int(rng.integers(1, 5))):
            at += 1
            side = int(rng.integers(0, 2))
            ticks = int(rng.integers(9_000, 9_101) if side == 0 else rng.integers(9_101, 9_200))
            lots = int(rng.integers(0, 4))
            levels = (bids, asks)[side]
            levels.pop(ticks, None)
            if lots:
                levels[ticks] = lots
            changed[side][ticks] = lots
            states[at] = (dict(bids), dict(asks))
        truth[at] = (dict(bids), dict(asks))
        body = {
            "e": "depthUpdate",
            "E": at,
            "s": "BTCUSDT",
            "U": first,
            "u": at,
            "b": pairs(changed[0]),
            "a": pairs(changed[1]),
        }
        if is_futures:
            body |= {"pu": previous, "T": at}
        previous = at
        changes.append(body)
    snap_after = draw(st.integers(1, 10))  # the snapshot is received after this many changes
    reach = draw(st.integers(max(0, snap_after - 3), snap_after - 1))  # and is older or as new
    ids = [s for s in states if changes[reach]["U"] - (not is_futures) <= s <= changes[reach]["u"]]
    snap_id = draw(st.sampled_from(ids))
    lost = draw(st.one_of(st.none(), st.integers(snap_after, n - 1)))
    return is_futures, changes, states, truth, snap_after, snap_id, lost


@few
@given(frame_streams())
def test_a_rebuilt_book_is_the_true_book_or_says_that_it_is_not(tmp_path_factory, stream):
    is_futures, changes, states, truth, snap_after, snap_id, lost = stream
    scale = coarser if is_futures else list  # BTC/USDT:USDT has a tick of 0.1 and a lot of 0.001
    lines = []
    for i, change in enumerate(changes):
        if i == snap_after:
            bids, asks = states[snap_id]
            snap = {"bids": scale(pairs(bids)), "asks": scale(pairs(asks))}
            lines.append(line(START + i * MS - 1, lastUpdateId=snap_id, **snap))
        if i != lost:
            lines.append(
                line(START + i * MS, **change | {"b": scale(change["b"]), "a": scale(change["a"])})
            )
    path = tmp_path_factory.mktemp("frames") / "x.gz"
    path.write_bytes(gzip.compress(b"".join(lines)))
    made = read_frames(path)
    check_events(made.events)
    assert made.report.n_refused == 0
    n_seen = 0
    for i, levels, _ in books_after_messages(made.events):
        update_id = int(made.events["sequence"][i])
        if made.events["kind"][i] == KIND_LEVEL and update_id in truth and update_id != snap_id:
            assert levels == truth[update_id]
            n_seen += 1
    gaps = made.events[made.events["kind"] == KIND_GAP]
    is_seen = lost is not None and lost < len(changes) - 1 and changes[lost]["u"] > snap_id
    assert len(gaps) == (1 if is_seen else 0)
    if is_seen:  # nothing is believed after the hole, for no snapshot follows
        assert gaps["ts_recv"][0] == START + (lost + 1) * MS
        assert made.events["kind"][-1] == KIND_GAP
    else:
        assert n_seen >= len(changes) - snap_after - (lost is not None)


def test_damaged_lines_and_foreign_frames_are_set_aside(tmp_path):
    change = dict(e="depthUpdate", E=1, s="BTCUSDT", U=1, u=2, b=[], a=[["61837.64", "1"]])
    lines = [
        line(10, **change),
        b'11 {"stream":"x","da\n',
        b"\n",
        line(9, **change),
        line(12, **change | {"s": "ETHUSDT"}),
        line(13, e="forceOrder", s="BTCUSDT"),
        line(14, e="trade", E=1, T=1, s="BTCUSDT", t=5, p="61837.645", q="1", m=True),
        line(15, e="trade", E=1, T=1, s="BTCUSDT", t=6, p="61837.64", q="1", m=True),
    ]
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(b"".join(lines)))
    made = read_frames(path)
    assert made.report.refused == {
        "not a frame": 2,
        "receive time went back": 1,
        "other symbol": 1,
        "unknown kind of frame": 1,
        "price off the grid": 1,
    }
    assert made.report.n_rows_read == len(lines)
    assert made.events["kind"].tolist() == [KIND_TRADE] and made.events["side"].tolist() == [-1]


@pytest.mark.parametrize(
    "market",
    [
        "cm_btcusd_perp",
        "cm_ethusd_perp",
        "spot_btcusdt",
        "spot_ethusdt",
        "usdm_btcusdt",
        "usdm_ethusdt",
    ],
)
@pytest.mark.recordings
def test_real_books_equal_the_venues_own_quotes(recordings, market):
    "At equal update ids: price and size, both sides, without exception"
    made = read_frames(sorted((recordings / "binance").glob(f"{market}_*.gz")))
    events = made.events
    check_events(events)
    found = quality(events, made.instrument)
    assert (found["n_gaps"], found["n_crossed"], found["n_locked"]) == (0, 0, 0)
    assert (
        -1.3 < made.report.notes["latency_median_s"] < -1.2
        and made.report.notes["n_negative_latency"] > 10_000
    )
    assert set(made.report.refused) <= {"size off the grid"} and made.report.n_refused <= 7
    ends = np.flatnonzero(events["flags"] & FLAG_LAST)
    ids = events["sequence"][ends[np.isin(events["kind"][ends], (KIND_CLEAR, KIND_LEVEL))]]
    touch = quotes(events)
    for side, name in ((1, "bid"), (-1, "ask")):
        own = events[(events["kind"] == KIND_QUOTE) & (events["side"] == side)]
        _, ours, venues = np.intersect1d(ids, own["sequence"], return_indices=True)
        assert len(ours) > 500
        assert (touch[f"{name}_ticks"][ours] == own["price_ticks"][venues]).all()
        assert (touch[f"{name}_lots"][ours] == own["size_lots"][venues]).all()
    assert found["n_quotes_compared"] > 1_000 and found["n_quote_mismatches"] == 0


@pytest.mark.recordings
def test_the_second_day_alone_has_no_book(recordings):
    "Without the snapshot of the first file nothing may be believed"
    made = read_frames(recordings / "binance/spot_ethusdt_20240809.gz")
    assert not np.isin(made.events["kind"], (KIND_LEVEL, KIND_CLEAR)).any()
    assert made.report.notes["n_changes_without_book"] == 3036


# --- a real day of snapshots


@pytest.mark.recordings
def test_a_real_day_is_accounted_for(recordings):
    files = [recordings / f"standx/BTC-USD_{k}_2026-01-06.parquet" for k in ("book20", "trades")]
    found = read_snapshots(*files).report.to_dict()
    assert found["n_rows_read"] == 261_470 + 165_660 and found["n_refused"] == 0
    assert found["notes"]["n_gaps"] == 4_183 and found["notes"]["n_trades_reordered"] == 37_830


@pytest.mark.recordings
def test_a_real_hour_of_snapshots_level_by_level(recordings, tmp_path):
    path = recordings / "standx/BTC-USD_book20_2026-01-07.parquet"
    raw = pd.read_parquet(path).iloc[:3_000]
    raw.to_parquet(tmp_path / path.name)
    made = read_snapshots(tmp_path / path.name)
    found = list(books_after_messages(made.events))
    assert len(found) == len(raw)
    for (_, sides, _), row in list(zip(found, raw.to_dict("records"), strict=True))[::37]:
        for side, levels in zip(("bid", "ask"), sides, strict=True):
            ticks = [round(row[f"{side}_px_{k}"] * 100) for k in range(20)]
            lots = [round(row[f"{side}_qty_{k}"] * 10_000) for k in range(20)]
            assert levels == dict(zip(ticks, lots, strict=True))


# --- full depth


@pytest.mark.recordings
def test_full_depth_equals_a_dictionary_of_prices(recordings):
    files = [
        recordings / f"coinbase/coinbase_BTC-USD_{k}_2018-04-24.parquet"
        for k in ("snapshot", "l2update")
    ]
    made = read_level2(*files)
    check_events(made.events)
    assert made.report.refused == {"price beyond int32 ticks": 21}
    plain = {"buy": {}, "sell": {}}
    for table in (pd.read_parquet(f) for f in files):
        for side, price, size in zip(table["side"], table["price"], table["size"], strict=True):
            if price * 100 <= 2**31 - 1:
                plain[side].pop(round(price * 100), None)
                if size:
                    plain[side][round(price * 100)] = round(size * 1e8)
    book = new_book()
    for e in made.events:
        apply_event(
            book, int(e["kind"]), int(e["side"]), int(e["price_ticks"]), int(e["size_lots"])
        )
    assert sides_of(book) == (plain["buy"], plain["sell"])
    assert quality(made.events, made.instrument)["n_crossed"] == 0


# --- folders


@pytest.mark.recordings
def test_every_file_of_a_real_folder_is_accounted_for(recordings, tmp_path):
    (tmp_path / "in").mkdir()
    names = ["binance/usdm_ethusdt_20240808.gz", "README.md", "bybit/xrpusdt-ob500.data.zip"]
    names += [f"coinbase/coinbase_BTC-USD_{k}_2018-04-24.parquet" for k in ("snapshot", "l2update")]
    for name in names:
        (tmp_path / "in" / name.rpartition("/")[2]).symlink_to(recordings / name)
    store, told = Store(tmp_path / "market"), []
    reports = import_folder(
        tmp_path / "in", store, tmp_path / "out", lambda *args: told.append(args)
    )
    assert sorted(s for r in reports for s in r.sources) == sorted(
        n.rpartition("/")[2] for n in names
    )
    assert [r.venue for r in reports] == ["binance", "coinbase", ""]
    assert reports[-1].refused == {"unknown kind of file": 2}
    assert told[-1] == (3, 3, "") and store.verify() == []
    for report in reports[:2]:
        assert len(store.read(report.venue, report.symbol)) == report.n_events
    aside = (tmp_path / "out/refused/price_beyond_int32_ticks.jsonl").read_text().splitlines()
    assert len(aside) == 21 and json.loads(aside[0])["source"].startswith("coinbase")
    before = store.listing()
    import_folder(tmp_path / "in", store, tmp_path / "out")
    assert store.listing() == before  # the same again adds nothing


@pytest.mark.recordings
def test_what_a_file_is_shows_in_its_content(recordings):
    for venue in ("standx", "binance", "coinbase"):
        files = sorted((recordings / venue).iterdir())
        assert {detect(file) for file in files} == {venue}
    assert len(plan_imports(recordings / "binance")) == 6


def test_nothing_to_import_says_so(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match="must hold recordings"):
        import_folder(tmp_path, Store(tmp_path / "s"), tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        plan_imports(tmp_path / "none")
