"""Files of others: what goes out comes back, damage is named by file and line, and the real hftbacktest agrees."""

import gzip
import json
import os
import zipfile

import numpy as np
import orjson
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from tradebook.base.errors import DataError
from tradebook.collector.capture_files import CAPTURE_WIRES, read_captures
from tradebook.collector.formats import FORMATS, recognise
from tradebook.collector.wire_files import read_frames, read_ob500
from tradebook.market.events import (
    EVENT,
    FLAG_LAST,
    FLAG_SNAPSHOT,
    KIND_CLEAR,
    KIND_GAP,
    KIND_LEVEL,
    KIND_QUOTE,
    KIND_TRADE,
    check_events,
    make_events,
    merge_events,
)
from tradebook.market.hftbacktest import (
    HFT_BUY,
    HFT_ROW,
    HFT_SELL,
    begin_whole,
    read_hftbacktest,
    write_hftbacktest,
)
from tradebook.market.instruments import instrument
from tradebook.market.json_snapshots import read_json_snapshots
from tradebook.market.quotes import quality, quotes
from tradebook.market.snapshots import read_snapshots
from tradebook.market.sources import Hints, infer_step
from tradebook.market.synthetic import synthetic_market
from tradebook.market.tardis import read_tardis, write_tardis

few = settings(max_examples=25, deadline=None)
START, US = 1_767_657_600_000_000_000, 1_000
OF = instrument("binance", "BTC/USDT")


@st.composite
def streams(draw):
    "Messages at whole, different microseconds: a snapshot, then changes, trades and holes with a snapshot behind"
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    n, ts, out = draw(st.integers(1, 12)), START, []
    for k in range(n):
        ts += int(rng.integers(1, 900_000)) * US
        what = 0 if k == 0 else int(rng.integers(0, 4))
        rows = int(rng.integers(1, 5))
        size = {"size_lots": rng.integers(0, 10**9, rows), "side": rng.choice([-1, 1], rows)}
        size["price_ticks"] = rng.choice(np.arange(6_000_000, 6_000_100), rows, replace=False)
        times = {"ts_event": ts - int(rng.integers(0, 5_000)) * US, "ts_recv": ts}
        if what == 3:  # a hole that only a snapshot ends
            ts += 2 * 10**9
            times = {"ts_event": ts, "ts_recv": ts}
            length = ts - int(out[-1]["ts_recv"][0]) if out else 0
            books = [m for m in out if m["kind"][0] != KIND_TRADE]
            length = ts - int(books[-1]["ts_recv"][0])
            gap = make_events(ts_recv=ts, kind=KIND_GAP, size_lots=length, flags=FLAG_LAST)
            out.append(gap)
        if what in (0, 3):
            flags = {"flags": FLAG_SNAPSHOT}
            clear = make_events(kind=KIND_CLEAR, **times, **flags)
            message = np.concatenate(
                [clear, make_events(kind=KIND_LEVEL, **times, **size, **flags)]
            )
            if k and what == 0:
                message = message[:0]
        elif what == 1:
            message = make_events(kind=KIND_LEVEL, **times, **size)
        else:
            size["side"] = rng.integers(-1, 2, rows)
            numbers = {"sequence": rng.integers(1, 10**12, rows)}
            message = make_events(kind=KIND_TRADE, **times, **size, **numbers)
        if len(message):
            message["flags"][-1] |= FLAG_LAST
            out.append(message)
    return np.concatenate(out)


def same_rows(a, b):
    "Tell that two streams are equal in every field"
    return a.dtype == b.dtype == EVENT and len(a) == len(b) and bool((a == b).all())


def with_trades_first(events):
    "The same events; at one microsecond trades before the book, as Tardis's two files are read"
    is_trade = events["kind"] == KIND_TRADE
    return merge_events(events[is_trade], events[~is_trade])


def in_microseconds(events):
    "What Tardis's columns can hold of a stream"
    out = events[np.isin(events["kind"], (KIND_CLEAR, KIND_LEVEL, KIND_TRADE))].copy()
    out["ts_event"] = np.where(out["ts_event"] > 0, out["ts_event"], out["ts_recv"]) // US * US
    out["ts_recv"] = out["ts_recv"] // US * US
    out["sequence"][out["kind"] != KIND_TRADE] = 0
    return with_trades_first(out)


# --- out and in again


@few
@given(streams())
def test_tardis_gives_back_what_it_was_given(tmp_path_factory, events):
    check_events(events)
    told = write_tardis(events, OF, tmp_path_factory.mktemp("tardis"))
    n_gaps = int((events["kind"] == KIND_GAP).sum())
    assert told["left_out"] == ({"gap": n_gaps} if n_gaps else {}) and told["n_merged"] == 0
    (made,) = read_tardis(told["files"][::-1])
    check_events(made.events)
    assert (made.instrument, made.report.refused) == (OF, {})
    assert same_rows(made.events, with_trades_first(events))  # holes too: told by the silence
    assert made.report.n_rows_read == told["n_rows"]


@few
@given(streams())
def test_hftbacktest_gives_back_what_it_was_given(tmp_path_factory, events):
    path = tmp_path_factory.mktemp("npz") / "x.npz"
    told = write_hftbacktest(events, OF, path)
    (made,) = read_hftbacktest([path], Hints(OF.venue, OF.symbol))
    check_events(made.events)
    assert made.report.refused == {} and made.report.n_rows_read == len(events)
    assert told["n_rows"] - made.report.notes["n_for_the_exchange_only"] == len(events)
    assert same_rows(made.events, events)


@few
@given(st.integers(-8, 2), st.sampled_from([1, 2, 5]), st.lists(st.integers(1, 10**6), min_size=1))
def test_an_inferred_step_divides_everything_and_no_larger_one_does(power, multiple, units):
    step = float(f"{multiple}e{power}")
    found = infer_step(np.array(units) * step)
    assert found >= step * (1 - 1e-12)
    ratio = np.array(units) * step / found
    assert np.abs(ratio - np.round(ratio)).max() < 1e-6


# --- the real hftbacktest


def best_of_hftbacktest(path, of):
    "Receive times, best ticks and their quantities after each feed message, from the real package"
    hbt = pytest.importorskip("hftbacktest")
    asset = hbt.BacktestAsset().data([str(path)]).linear_asset(1.0).risk_adverse_queue_model()
    asset.constant_order_latency(0, 0).no_partial_fill_exchange().trading_value_fee_model(0, 0)
    asset.tick_size(of.tick_size).lot_size(of.lot_size).last_trades_capacity(0)
    backtest, out = hbt.HashMapMarketDepthBacktest([asset]), []
    depth = backtest.depth(0)
    while backtest.wait_next_feed(False, 10**18) == 2:
        bid, ask = depth.best_bid_tick, depth.best_ask_tick
        quantities = depth.bid_qty_at_tick(bid), depth.ask_qty_at_tick(ask)
        out.append((backtest.current_timestamp, bid, ask, *quantities))
    backtest.close()
    return np.array(out)


def assert_same_best(path, events, of, at_least):
    "Compare wherever both sides of our book stand"
    theirs, ours = best_of_hftbacktest(path, of), quotes(events)
    last = np.append(theirs[1:, 0] != theirs[:-1, 0], True)
    theirs, once = theirs[last], np.append(np.diff(ours["ts_recv"]) != 0, True)
    ours = ours[once]
    ours = ours[(ours["bid_ticks"] >= 0) & (ours["ask_ticks"] >= 0)]
    _, left, right = np.intersect1d(theirs[:, 0], ours["ts_recv"], return_indices=True)
    assert len(left) >= len(ours) - 1  # it ends at the last message instead of telling it
    assert len(left) >= at_least
    for k, name in enumerate(("bid_ticks", "ask_ticks"), 1):
        assert (theirs[left, k] == ours[name][right]).all(), name
    for k, name in enumerate(("bid_lots", "ask_lots"), 3):
        lots = np.round(theirs[left, k] / of.lot_size).astype(np.int64)
        assert (lots == ours[name][right]).all(), name


def test_the_real_hftbacktest_sees_our_best_prices(tmp_path):
    "A market with two more snapshots and a hole in it"
    market = synthetic_market(seed=11, duration_s=40)
    events, of = market.events, market.instrument
    cuts = [int(events["ts_recv"][0]) + s * 10**9 for s in (12, 25)]
    parts = [events[events["ts_recv"] < cuts[0]]]
    middle = begin_whole(events[events["ts_recv"] < cuts[1]], cuts[0])
    late = begin_whole(events, cuts[1] + 3 * 10**9)
    hole = make_events(
        ts_recv=late["ts_recv"][0], kind=KIND_GAP, size_lots=3 * 10**9, flags=FLAG_LAST
    )
    joined = np.concatenate([*parts, middle, hole, late])
    check_events(joined)
    write_hftbacktest(joined, of, tmp_path / "x.npz")
    assert_same_best(tmp_path / "x.npz", joined, of, 200)


# --- damage


def test_wrong_rows_of_tardis_are_named_by_file_and_line(tmp_path):
    events = synthetic_market(seed=5, duration_s=10).events
    of = synthetic_market(seed=5, duration_s=10).instrument
    told = write_tardis(events, of, tmp_path)
    path = next(f for f in told["files"] if "incremental" in f)
    lines = gzip.open(path).read().splitlines()
    n_good, damage = len(lines) - 1, {}
    for line, (reason, change) in {
        40: ("not a row", lambda f: f[:-1]),
        50: ("value not readable", lambda f: [*f[:6], b"12.x", f[7]]),
        60: ("value not readable", lambda f: [*f[:5], b"up", *f[6:]]),
        70: ("value not readable", lambda f: [*f[:4], b"maybe", *f[5:]]),
        80: ("price off the grid", lambda f: [*f[:6], f[6] + b"3", f[7]]),
        90: ("size off the grid", lambda f: [*f[:7], b"-1"]),
        100: ("receive time went back", lambda f: [*f[:3], b"1600000000000000", *f[4:]]),
    }.items():
        lines[line - 1] = b",".join(change(lines[line - 1].split(b",")))
        damage.setdefault(reason, []).append(line)
    damaged = tmp_path / "damaged.csv"
    damaged.write_bytes(b"\n".join(lines) + b"\n")
    (made,) = read_tardis([damaged], Hints(known=lambda *_: of))
    check_events(made.events)
    found = {why: sorted(r["line"] for r in rows) for why, rows in made.refused_rows.items()}
    assert found == damage
    assert {r["file"] for rows in made.refused_rows.values() for r in rows} == {"damaged.csv"}
    n_levels = int((made.events["kind"] == KIND_LEVEL).sum())
    assert made.report.n_rows_read == n_good == n_levels + made.report.n_refused


def test_a_tardis_file_that_was_cut_off_gives_what_is_left(tmp_path):
    market = synthetic_market(seed=5, duration_s=60)
    told = write_tardis(market.events, market.instrument, tmp_path)
    path = next(f for f in told["files"] if "incremental" in f)
    cut = tmp_path / "cut.csv.gz"
    with open(path, "rb") as file:
        cut.write_bytes(file.read()[:-4_000])
    (made,) = read_tardis([cut], Hints(known=lambda *_: market.instrument))
    check_events(made.events)
    assert made.report.refused == {"file cut off": 1} and len(made.events) > 100
    whole = in_microseconds(market.events)
    whole = whole[whole["kind"] != KIND_TRADE]
    for name in set(EVENT.names) - {"flags"}:  # the last message may have lost its end
        assert (made.events[name] == whole[name][: len(made.events)]).all()


def test_wrong_rows_of_an_npz_are_named(tmp_path):
    market = synthetic_market(seed=5, duration_s=20)
    write_hftbacktest(market.events, market.instrument, tmp_path / "x.npz")
    rows = np.load(tmp_path / "x.npz")["data"]
    at = np.flatnonzero((rows["ev"] & np.uint64(0xFF)) == 1)[[10, 20, 30, 40, 50]]
    rows["px"][at[0]], rows["qty"][at[1]], rows["px"][at[2]] = np.nan, -1.0, 1e12
    rows["ev"][at[3]] = rows["ev"][at[3]] - 1 + 10  # an order was added
    rows["local_ts"][at[4]] = 5
    np.savez(tmp_path / "bad.npz", data=rows)
    of = market.instrument
    (made,) = read_hftbacktest([tmp_path / "bad.npz"], Hints(of.venue, of.symbol))
    check_events(made.events)
    assert {why: [r["row"] for r in found] for why, found in made.refused_rows.items()} == {
        "price off the grid": [at[0]],
        "size off the grid": [at[1]],
        "price beyond int32 ticks": [at[2]],
        "unknown kind of event": [at[3]],
        "receive time went back": [at[4]],
    }
    assert made.report.n_rows_read == len(made.events) + made.report.n_refused


def test_clears_of_one_side_do_what_the_real_hftbacktest_does(tmp_path):
    "As its own converters write snapshots: each side is cleared as far as the snapshot reaches"
    rng, rows, ts = np.random.default_rng(3), [], START
    for k in range(40):
        ts += 10**8
        if k % 8 == 0:
            reach = int(rng.integers(1, 6))
            for side, flag in ((-1, HFT_BUY), (1, HFT_SELL)):
                prices = [1_000 + side * j for j in range(1, reach + 1)]
                rows.append((3 | flag, ts, prices[-1], 0))
                rows += [
                    (4 | flag, ts, p, int(rng.integers(1, 9)))
                    for p in prices
                    if rng.random() < 0.8 or p == prices[0]
                ]
        else:
            side, flag = ((-1, HFT_BUY), (1, HFT_SELL))[int(rng.integers(0, 2))]
            rows.append(
                (1 | flag, ts, 1_000 + side * int(rng.integers(1, 9)), int(rng.integers(0, 5)))
            )
    data = np.zeros(len(rows), HFT_ROW)
    data["ev"] = np.array([r[0] for r in rows], np.uint64) | np.uint64(3 << 30)
    data["exch_ts"] = data["local_ts"] = [r[1] for r in rows]
    data["px"], data["qty"] = [r[2] * 0.5 for r in rows], [r[3] for r in rows]
    np.savez(tmp_path / "x.npz", data=data)
    hints = Hints("somewhere", "A/B:B", tick_size=0.5, lot_size=1.0)
    (made,) = read_hftbacktest([tmp_path / "x.npz"], hints)
    check_events(made.events)
    assert_same_best(tmp_path / "x.npz", made.events, made.instrument, 25)


def test_what_is_no_such_file_says_what_it_is(tmp_path):
    (tmp_path / "a.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match=r"a\.csv must be a Tardis CSV.*had a,b"):
        list(read_tardis([tmp_path / "a.csv"]))
    (tmp_path / "e.csv").write_text("")
    with pytest.raises(DataError, match="was empty"):
        list(read_tardis([tmp_path / "e.csv"]))
    with pytest.raises(DataError, match=r"a\.csv must be an npz"):
        list(read_hftbacktest([tmp_path / "a.csv"], Hints("a", "b/c")))


# --- saved books as JSON


@st.composite
def saved_books(draw):
    "Books of a few levels, a second apart, as an older collector saved them"
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    books = []
    for k in range(draw(st.integers(1, 8))):
        mid, n = int(rng.integers(9_000, 9_020)), int(rng.integers(1, 5))
        bids = {mid - 1 - int(j): int(rng.integers(1, 9)) for j in rng.choice(9, n, replace=False)}
        asks = {mid + 1 + int(j): int(rng.integers(1, 9)) for j in rng.choice(9, n, replace=False)}
        books.append((1_700_000_000 + k, bids, asks))
    return books


SPELLINGS = (
    (lambda s: s, lambda p, q: [f"{p * 0.01:.2f}", f"{q * 0.00001:.5f}"]),
    (lambda s: s * 1000, lambda p, q: [round(p * 0.01, 2), round(q * 0.00001, 5), 3]),
    (
        lambda s: f"{np.datetime64(s, 's')}Z",
        lambda p, q: {"price": f"{p * 0.01:.2f}", "qty": round(q * 0.00001, 5)},
    ),
)


@few
@given(saved_books(), st.sampled_from(range(3)), st.sampled_from(["one", "list", "lines"]))
def test_saved_books_are_the_same_books_however_they_are_spelled(
    tmp_path_factory, books, how, form
):
    time, level = SPELLINGS[how]
    folder, docs = tmp_path_factory.mktemp("json"), []
    for second, bids, asks in books:
        sides = {
            "bids": [level(*x) for x in bids.items()],
            "asks": [level(*x) for x in asks.items()],
        }
        docs.append({"timestamp": time(second), **sides})
    if form == "one":
        paths = [folder / f"{k}.json" for k in range(len(docs))]
        for path, doc in zip(paths, docs[::-1], strict=True):  # names in another order than times
            path.write_bytes(orjson.dumps(doc))
    else:
        paths = [folder / "all.json.gz"]
        text = orjson.dumps(docs) if form == "list" else b"\n".join(map(orjson.dumps, docs))
        paths[0].write_bytes(gzip.compress(text))
    (made,) = read_json_snapshots(paths, Hints(OF.venue, OF.symbol))
    check_events(made.events)
    assert made.report.refused == {} and made.report.n_rows_read == len(books)
    book, seen = {1: {}, -1: {}}, []
    for e in made.events:
        if e["kind"] == KIND_CLEAR:
            book = {1: {}, -1: {}}
        elif e["kind"] == KIND_LEVEL:
            book[int(e["side"])].pop(int(e["price_ticks"]), None)
            if e["size_lots"]:
                book[int(e["side"])][int(e["price_ticks"])] = int(e["size_lots"])
        if e["flags"] & FLAG_LAST and e["kind"] != KIND_GAP:
            seen.append((int(e["ts_recv"]) // 10**9, dict(book[1]), dict(book[-1])))
    assert seen == books


@pytest.mark.recordings
def test_a_real_recording_saved_as_json_gives_the_same_events(recordings, tmp_path):
    "StandX's snapshots written as an older collector would have, read back with the same holes"
    path = recordings / "standx/BTC-USD_book20_2026-01-07.parquet"
    raw = pd.read_parquet(path).iloc[:1_500]
    raw.to_parquet(tmp_path / path.name)
    wanted = read_snapshots(tmp_path / path.name)
    lines = []
    for row in raw.to_dict("records"):
        sides = {
            f"{side}s": [[row[f"{side}_px_{k}"], row[f"{side}_qty_{k}"]] for k in range(20)]
            for side in ("bid", "ask")
        }
        times = {"timestamp": row["ts_exch"].value, "received_at": row["ts_recv"].value}
        lines.append(orjson.dumps({**times, **sides}))
    lines[700] = lines[700][: len(lines[700]) // 2]
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines)))
    (made,) = read_json_snapshots([tmp_path / "x.jsonl.gz"], Hints("standx", "BTC/USD:USD"))
    check_events(made.events)
    assert {why: [r["line"] for r in rows] for why, rows in made.refused_rows.items()} == {
        "not JSON": [701]
    }
    ours, theirs = quotes(made.events), quotes(wanted.events)
    lost = theirs["ts_recv"] == raw["ts_recv"].iloc[700].value
    theirs = theirs[~lost]
    for name in ("ts_recv", "bid_ticks", "ask_ticks", "bid_lots", "ask_lots"):
        assert (ours[name] == theirs[name]).all(), name
    assert made.report.notes["n_gaps"] == wanted.report.notes["n_gaps"] > 5


# --- wires


@pytest.mark.recordings
def test_bybits_archive_is_the_book_of_a_dictionary(recordings):
    (made,) = read_ob500([recordings / "bybit/xrpusdt-ob500.data.zip"])
    check_events(made.events)
    of, plain, tops = made.instrument, {1: {}, -1: {}}, []
    assert (of.symbol, of.tick_size, of.lot_size) == ("XRP/USDT:USDT", 0.0001, 1.0)
    assert made.report.notes["tick_from"] == "inferred" and made.report.n_rows_read == 50
    with zipfile.ZipFile(recordings / "bybit/xrpusdt-ob500.data.zip") as archive:
        lines = archive.read(archive.namelist()[0]).splitlines()
    for content in map(orjson.loads, lines):
        if content["type"] == "snapshot":
            plain = {1: {}, -1: {}}
        for side, key in ((1, "b"), (-1, "a")):
            for price, size in content["data"][key]:
                plain[side].pop(float(price), None)
                if float(size):
                    plain[side][float(price)] = float(size)
        bid, ask = max(plain[1]), min(plain[-1])
        tops.append((bid, plain[1][bid], ask, plain[-1][ask]))
    touch = quotes(made.events)
    found = np.stack(
        [
            of.price(touch["bid_ticks"]), of.size(touch["bid_lots"]),
            of.price(touch["ask_ticks"]), of.size(touch["ask_lots"]),
        ], 1,
    )  # fmt: skip
    assert found.tolist() == np.array(tops).tolist()


@pytest.mark.recordings
def test_damage_in_bybits_archive_is_named_and_ends_the_book(recordings, tmp_path):
    with zipfile.ZipFile(recordings / "bybit/xrpusdt-ob500.data.zip") as archive:
        lines = archive.read(archive.namelist()[0]).splitlines()
    lines[20] = lines[20][:-40]
    lines.insert(5, b"no frame at all")
    (tmp_path / "x.data").write_bytes(b"\n".join(lines) + b"\n")
    (made,) = read_ob500([tmp_path / "x.data"], Hints(symbol="XRP/USDT"))
    check_events(made.events)
    assert made.report.symbol == "XRP/USDT" and made.report.n_rows_read == 51
    assert sorted(r["line"] for r in made.refused_rows["not a frame"]) == [6, 22]
    assert made.events["kind"][-1] == KIND_GAP  # numbering broke at the damage, no snapshot after


@pytest.mark.recordings
def test_every_line_of_a_real_capture_is_accounted_for(recordings, tmp_path):
    n_markets = {}
    for stem in CAPTURE_WIRES:
        paths = sorted((recordings / "wire").glob(f"{stem}.*"))
        made = list(read_captures(paths))
        n_lines = sum(
            1
            for path in paths
            if path.name != f"{stem}.0"
            for line in path.read_bytes().splitlines()
            if line
        )
        assert sum(one.report.n_rows_read for one in made) == n_lines
        for one in made:
            check_events(one.events)
            found = quality(one.events, one.instrument)
            assert (found["n_gaps"], found["n_crossed"], found["n_quote_mismatches"]) == (0, 0, 0)
        n_markets[stem] = len(made)
    assert n_markets == {
        "BINANCE_FUTURES": 4, "BYBIT": 10, "COINBASE": 10, "KRAKEN": 10, "KRAKEN_FUTURES": 10,
        "KUCOIN": 9, "OKX": 3,
    }  # fmt: skip


@pytest.mark.recordings
def test_damage_in_a_capture_is_named(recordings, tmp_path):
    for name in ("OKX.0", "OKX.ws.1.0"):
        (tmp_path / name).write_bytes((recordings / "wire" / name).read_bytes())
    lines = (tmp_path / "OKX.ws.1.0").read_bytes().splitlines()
    at = next(k for k, line in enumerate(lines) if b'"update"' in line)
    lines[at] = lines[at][:-30]
    lines.append(b"nothing that a capture holds")
    (tmp_path / "OKX.ws.1.0").write_bytes(b"\n".join(lines) + b"\n")
    made = list(read_captures([tmp_path / "OKX.ws.1.0"]))
    refused = {}
    for one in made:
        for why, rows in one.refused_rows.items():
            refused.setdefault(why, []).extend(r["line"] for r in rows)
    assert refused.pop("not a line of a capture") == [len(lines)]
    assert at + 1 in refused["not a frame"]
    assert sum(one.report.notes["n_gaps"] for one in made) >= 1  # the lost update ended a book


@pytest.mark.recordings
def test_real_frames_go_out_to_both_formats_and_come_back(recordings, tmp_path):
    "With the real hftbacktest in between: the best prices and sizes after every message are ours"
    made = read_frames(recordings / "binance/usdm_ethusdt_20240808.gz")
    of = made.instrument
    ends = np.flatnonzero(made.events["flags"] & FLAG_LAST) + 1
    events = made.events[: int(ends[np.searchsorted(ends, 100_000)])]
    told = write_hftbacktest(events, of, tmp_path / "x.npz")
    n_quotes = int((events["kind"] == KIND_QUOTE).sum())
    assert told["left_out"] == {"quote": n_quotes} and n_quotes > 1_000
    assert told["n_negative_latency"] > 10_000
    (back,) = read_hftbacktest([tmp_path / "x.npz"], Hints(of.venue, of.symbol))
    kept = events[events["kind"] != KIND_QUOTE]
    known = kept["ts_event"] > 0
    for name in set(EVENT.names) - {"ts_event"}:
        assert (back.events[name] == kept[name]).all(), name
    assert (back.events["ts_event"][known] == kept["ts_event"][known]).all()
    assert_same_best(tmp_path / "x.npz", kept, of, 1_000)
    told = write_tardis(events, of, tmp_path / "csv")
    assert told["left_out"] == {"quote": n_quotes}
    (again,) = read_tardis(told["files"])
    wanted = in_microseconds(events)
    for name in set(EVENT.names) - {"flags"}:
        assert (again.events[name] == wanted[name]).all(), name
    n_ends = [int((rows["flags"] & FLAG_LAST > 0).sum()) for rows in (wanted, again.events)]
    assert n_ends[0] - n_ends[1] == told["n_merged"]  # trades of one microsecond, read in one go
    is_book = wanted["kind"] != KIND_TRADE
    assert (again.events["flags"][is_book] == wanted["flags"][is_book]).all()


# --- the verbs


def verb(*words):
    "Exit code, answer as JSON, and what was said to a person"
    from tradebook.ops.cli import app

    done = CliRunner().invoke(app, [*map(str, words), "--json"])
    return done.exit_code, json.loads(done.stdout or "{}"), done.stderr


def test_a_market_goes_through_both_formats_by_the_verbs(tmp_path):
    market = synthetic_market(seed=5, duration_s=60)
    of, root = market.instrument, tmp_path / "root"
    write_hftbacktest(market.events, of, tmp_path / "day.npz")
    where, names = ("--data", root), ("--venue", "made", "--symbol", "FOO/USDT:USDT")
    code, told, _ = verb("import", "hftbacktest", tmp_path / "day.npz", *names, *where)
    assert code == 0 and told["imports"][0]["notes"]["tick_from"] == "inferred"
    code, told, _ = verb("export", "tardis", tmp_path / "csv", *where)
    assert code == 0 and told["symbol"] == "FOO/USDT:USDT" and told["left_out"] == {}
    other = ("--data", tmp_path / "other")
    code, again, _ = verb("import", "tardis", tmp_path / "csv", *other)
    assert code == 0 and again["imports"][0]["n_events"] == again["store"][0]["n_rows"]
    assert again["store"][0]["symbol"] == "FOO/USDT:USDT"  # our own names come back
    code, _, said = verb("export", "tardis", tmp_path / "csv", *where)
    assert code == 2 and "--overwrite" in said and "Next: " in said
    assert verb("export", "tardis", tmp_path / "csv", "--overwrite", *where)[0] == 0


def test_refused_rows_are_kept_and_told_by_the_verb(tmp_path):
    market = synthetic_market(seed=5, duration_s=10)
    told = write_tardis(market.events, market.instrument, tmp_path / "csv")
    path = next(f for f in told["files"] if "trades" in f)
    lines = gzip.open(path).read().splitlines()
    lines[3] = lines[3].replace(b",buy,", b",bye,").replace(b",sell,", b",bye,")
    (tmp_path / "bad.csv").write_bytes(b"\n".join(lines) + b"\n")
    code, told, _ = verb("import", "tardis", tmp_path / "bad.csv", "--data", tmp_path / "root")
    (report,) = told["imports"]
    assert code == 0 and report["refused"] == {"value not readable": 1}
    aside = (tmp_path / "root/refused/value_not_readable.jsonl").read_text().splitlines()
    assert [json.loads(row)["line"] for row in aside] == [4]


def test_each_file_of_a_mixed_folder_finds_its_own_reader(tmp_path):
    "No format is named: Tardis plain and gzip, an array, a book, candles, and what nobody can read"
    market, folder = synthetic_market(seed=5, duration_s=20), tmp_path / "my data ö"
    told = write_tardis(market.events, market.instrument, folder / "sub")
    trades = next(path for path in told["files"] if "trades" in path)
    (folder / "plain.csv").write_bytes(gzip.open(trades).read())
    os.remove(trades)
    write_hftbacktest(market.events, market.instrument, folder / "day.npz")
    book = {"timestamp": 1_700_000_000, "bids": [["1.5", "2"]], "asks": [["1.6", "2"]]}
    (folder / "book.json.gz").write_bytes(gzip.compress(json.dumps(book).encode()))
    candles = pd.DataFrame({"date": [1_700_000_000_000 // 3_600_000 * 3_600_000], "volume": 1.0})
    candles = candles.assign(open=1.5, high=1.5, low=1.5, close=1.5)
    candles.to_csv(folder / "binance_BTC_USDT-1h.csv", index=False)
    candles.to_feather(folder / "ETH_USDT-1h.feather")
    wrong = gzip.compress(b"exchange,symbol,timestamp,local_timestamp,ask_price\n1,2,3,4,5\n")
    (folder / "quotes.csv.gz").write_bytes(wrong)
    for name in ("empty.csv", "empty.gz", "empty.parquet", "empty.npz", "empty.zip"):
        (folder / name).write_bytes(b"")
    names = ("--venue", "made", "--symbol", "FOO/USDT:USDT", "--data", tmp_path / "root")
    (folder / "ETH_USDT-1h.feather").rename(tmp_path / "ETH_USDT-1h.feather")
    code, told, said = verb("import", folder, *names)
    assert code == 0, said
    kinds = {name: r["n_events"] for r in told["imports"] for name in r["sources"]}
    assert all(kinds[name] for name in ("plain.csv", "day.npz", "book.json.gz"))
    assert told["imports"][-1]["refused"] == {"unknown kind of file": 6}
    own = [r for r in told["imports"] if r["venue"] == market.instrument.venue]
    assert [len(r["sources"]) for r in own] == [2]  # Tardis names its market itself
    code, told, said = verb("import", tmp_path / "ETH_USDT-1h.feather", "--data", tmp_path / "two")
    assert code == 3 and "--venue" in said


@pytest.mark.parametrize("unit", ["ns", "ms", "s"])
def test_times_in_another_unit_are_refused_and_never_stored_in_1970(tmp_path, unit):
    "Tardis counts in microseconds, an array and raw frames in nanoseconds"
    market, root = synthetic_market(seed=5, duration_s=5), ("--data", tmp_path / "root")
    told = write_tardis(market.events, market.instrument, tmp_path / "csv")
    factor = {"ns": 1000, "ms": 1 / 1000, "s": 1 / 10**6}[unit]
    table = pd.read_csv(next(path for path in told["files"] if "book" in path))
    for name in ("timestamp", "local_timestamp"):
        table[name] = (table[name] * factor).astype(np.int64)
    table.to_csv(tmp_path / "book.csv", index=False)
    code, _, said = verb("import", tmp_path / "book.csv", *root)
    assert code == 3 and f"'time not in microseconds': {len(table)}" in said
    early = market.events.copy()
    early["ts_recv"] //= {"ns": 1000, "ms": 10**6, "s": 10**9}[unit]
    write_hftbacktest(early, market.instrument, tmp_path / "day.npz")
    code, _, said = verb("import", tmp_path / "day.npz", "--venue", "a", "--symbol", "A/B", *root)
    assert code == 3 and "day.npz must hold times" in said and "1970-01-" in said
    assert not (tmp_path / "root/market").exists()


@pytest.mark.recordings
def test_each_recording_is_recognised_by_its_content(recordings):
    found = {}
    for path in sorted(recordings.rglob("*")):
        if path.is_file() and path.parent.name != "fixtures":
            found.setdefault(path.parent.name, set()).add(recognise(path))
    assert found == {
        "data": {""}, "binance": {"binance-raw"}, "bybit": {"bybit-ob500"}, "coinbase": {"auto"},
        "standx": {"auto"}, "wire": {"cryptofeed"}, "binance_spot_1h": {"freqtrade"},
        "binance_spot_4h": {"freqtrade"}, "binance_usdm": {"freqtrade"},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("import", "tardi", "x"), 2, "did you mean 'tardis'"),
        (("import", "tardis"), 2, "was told none"),
        (("import", "tardis", "nowhere"), 3, "does not exist"),
        (("export", "tardiss", "x"), 2, "did you mean 'tardis'"),
        (("export", "hftbacktest", "x.csv"), 2, "must be an .npz file"),
    ],
)
def test_mistyped_words_say_what_to_do(tmp_path, words, code, told):
    found, _, said = verb(*words, "--data", tmp_path)
    assert found == code and told in said and "Next: " in said


def test_the_help_names_every_format():
    from tradebook.ops.cli import app

    text = CliRunner().invoke(app, ["import", "--help"]).stdout
    assert all(name in text for name in FORMATS), text
