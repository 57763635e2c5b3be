"""What the rehearsal says, held against the recorded samples: the same keys, the same kinds of value, the same book."""

import json
import zipfile

import numpy as np
import pytest

from tradebook.market.events import KIND_CLEAR, KIND_LEVEL, KIND_TRADE
from tradebook.venue.rehearsal_market import Market, open_topic, speak
from tradebook.venue.rehearsal_source import Source, synthetic_listings
from tradebook.venue.rehearsal_wire import DEPTHS

LISTINGS = synthetic_listings(duration_s=60)


def played(topics, n=10**6, listing=LISTINGS[0]):
    "All frames of a market with these topics open, and the market"
    source = Source([listing], speed=float("inf"))
    source.open(0)
    market = Market(listing, source.books[0], u=1000)
    speak(market, next(source.take(0, 1)))
    frames = [f for topic in topics for f in open_topic(market, topic)]
    frames += [f for update in source.take(0, n) for f in speak(market, update)]
    return frames, market


def shape(value):
    "Keys and kinds of a message, without its values"
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return type(value).__name__


@pytest.mark.recordings
@pytest.mark.parametrize(
    ("sample", "topic"),
    [
        ("ws_orderbook_snapshot", "orderbook.1.BTCUSDT"),
        ("ws_kline", "kline.5.BTCUSDT"),
        ("ws_ticker_linear", "tickers.BTCUSDT"),
        ("ws_public_trade", "publicTrade.BTCUSDT"),
    ],
)
def test_frames_have_every_key_of_the_samples(recordings, sample, topic):
    wanted = shape(json.loads((recordings / f"bybit/fixtures/{sample}.json").read_text()))
    frames, _ = played([topic], 400)
    has = shape(json.loads(frames[0].encode()))
    both = {**has, "data": {}}, {**wanted, "data": {}}
    assert set(both[1]) <= set(both[0]) | {"id"}
    data, sampled = (
        m["data"][0] if isinstance(m["data"], list) else m["data"] for m in (has, wanted)
    )
    constants = {"tickDirection", "fundingIntervalHour"}
    missing = set(sampled) - set(data) - constants
    assert not missing
    assert {k: data[k] for k in sampled if k in data} == {
        k: v for k, v in sampled.items() if k in data
    }


@pytest.mark.recordings
def test_deltas_look_like_the_public_archive(recordings):
    with zipfile.ZipFile(recordings / "bybit/xrpusdt-ob500.data.zip") as archive:
        lines = archive.read(archive.namelist()[0]).splitlines()
    frames, _ = played(["orderbook.500.BTCUSDT"], 50)
    for kind in ("snapshot", "delta"):
        theirs = next(m for m in map(json.loads, lines) if m["type"] == kind)
        ours = next(f.message for f in frames if f.message["type"] == kind)
        assert list(ours["data"]) == list(theirs["data"])
        assert set(theirs) <= set(ours)


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_client_keeps_the_true_window_and_sees_no_gap(depth):
    frames, market = played([f"orderbook.{depth}.BTCUSDT"])
    held, last = {}, None
    for frame in frames:
        data = frame.message["data"]
        if frame.message["type"] == "snapshot":
            assert last is None or data["u"] in (last, last + 1)
            held = {"b": {}, "a": {}}
        else:
            assert data["u"] == last + 1
        last = data["u"]
        for side in "ba":
            for price, size in data[side]:
                if size == "0":
                    held[side].pop(price, None)
                else:
                    held[side][price] = size
    for side, (ticks, lots) in zip("ba", market.channels[depth].shown, strict=True):
        assert held[side] == dict(market.words.levels(ticks[ticks >= 0], lots[ticks >= 0]))
        assert len(held[side]) <= depth


def test_a_deep_window_says_the_source_level_for_level():
    listing = LISTINGS[1]
    frames, market = played(["orderbook.500.ETHUSDT"], listing=listing)
    events, said = listing.events, []
    for frame in frames[1:]:
        data, of = frame.message["data"], listing.of
        for side, key in ((1, "b"), (-1, "a")):
            said += [(side, int(of.to_ticks(float(p))), int(of.to_lots(float(v))), frame.message["ts"])
                     for p, v in data[key]]  # fmt: skip
    first = np.flatnonzero(events["flags"] & 1)[0] + 1
    rows = events[first:]
    rows = rows[rows["kind"] == KIND_LEVEL]
    names = ("side", "price_ticks", "size_lots")
    true = [(*r, int(t) // 10**6) for r, t in
            zip(zip(*(rows[n].tolist() for n in names), strict=True), rows["ts_event"], strict=True)]  # fmt: skip
    assert not (events[first:]["kind"] == KIND_CLEAR).any()
    assert sorted(said, key=lambda r: (r[3], r)) == sorted(true, key=lambda r: (r[3], r))


def test_every_trade_is_said_once_with_its_side():
    frames, _ = played(["publicTrade.BTCUSDT"])
    said = [t for f in frames for t in f.message["data"]]
    rows = LISTINGS[0].events
    rows = rows[rows["kind"] == KIND_TRADE]
    assert [t["S"] for t in said] == ["Buy" if s > 0 else "Sell" for s in rows["side"]]
    assert [t["T"] for t in said] == (rows["ts_event"] // 10**6).tolist()
    assert len({t["i"] for t in said}) == len(said)
