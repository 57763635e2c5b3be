"""Every column of the widest set against its definition, written anew from raw tables, with holes and without."""

import math
from itertools import pairwise

import numpy as np
import pyarrow.parquet as pq
import pytest

from tradebook.features.rows import build_features
from tradebook.features.schema import feature_set
from tradebook.market.instruments import instrument
from tradebook.market.snapshots import Books, Trades, snapshot_events

STANDX = instrument("standx", "BTC/USD:USD")
S, BEAT, MINUTES, EVERY = 10**9, 10**8, 5, 3
FIRST = 1_767_710_100 * S  # 2026-01-06 14:35 UTC: New York has just opened
TICK, LOT = 0.01, 0.0001
LIVES = {"ofi": (1, 5, 20), "intensity": (1, 10)}


def between(table, column):
    "The rows of a table that were received in the minutes looked at, ordered by receipt"
    ts = table.column(column).to_numpy().astype("datetime64[ns]").view(np.int64)
    at = np.argsort(ts, kind="stable")
    at = at[(ts[at] >= FIRST) & (ts[at] < FIRST + MINUTES * 60 * S)]
    return at, ts[at]


@pytest.fixture(scope="module")
def raw(recordings):
    "Books and trades as the venue sent them: times, prices in ticks, sizes in lots; a book is the first"
    day = recordings / "standx"
    table = pq.read_table(day / "BTC-USD_book20_2026-01-06.parquet")
    at, ts = between(table, "ts_recv")
    names = [
        [f"{side}_{what}_{k}" for k in range(20)]
        for side in ("bid", "ask")
        for what in ("px", "qty")
    ]
    sides = [np.stack([table.column(n).to_numpy()[at] for n in group], axis=1) for group in names]
    ticks = np.stack([np.rint(sides[0] / TICK), np.rint(sides[2] / TICK)]).astype(np.int64)
    lots = np.stack([np.rint(sides[1] / LOT), np.rint(sides[3] / LOT)]).astype(np.int64)
    books = {"ts": ts, "ticks": ticks, "lots": lots}
    table = pq.read_table(day / "BTC-USD_trades_2026-01-06.parquet")
    at, ts = between(table, "received_at")
    at, ts = at[ts > books["ts"][0]], ts[ts > books["ts"][0]]
    price, size = (table.column(c).to_numpy()[at] for c in ("price", "quantity"))
    trades = {
        "ts": ts,
        "ticks": np.rint(price / TICK).astype(int),
        "lots": np.rint(size / LOT).astype(int),
    }
    return books, trades


# --- the definitions ----------------------------------------------------------------------------------------------


def push(was, now, side):
    "What one level's change does to the price: the sum of Cont, Kukanov and Stoikov"
    (p0, q0), (p1, q1) = was, now
    if side > 0:
        return (p1 >= p0) * q1 - (p1 <= p0) * q0
    return (p1 >= p0) * q0 - (p1 <= p0) * q1


def placed_and_left(was, now, side):
    "Sizes that appeared and that went, at prices within reach of both ten-level books"
    worst = max if side > 0 else min
    reach = worst(min(was) if side > 0 else max(was), min(now) if side > 0 else max(now))
    seen = [p for p in {*was, *now} if (p >= reach if side > 0 else p <= reach)]
    change = [now.get(p, 0) - was.get(p, 0) for p in seen]
    return sum(c for c in change if c > 0), -sum(c for c in change if c < 0)


class Tape:
    "All trades with their signs: by the quote before, then by the last change of the price"

    def __init__(self, books, trades, resets):
        self.ts, self.p, self.q = trades["ts"], trades["ticks"], trades["lots"]
        self.book = np.searchsorted(books["ts"], self.ts, side="right") - 1
        bid, ask = books["ticks"][0, self.book, 0], books["ticks"][1, self.book, 0]
        self.bid, self.ask, self.mid = bid, ask, (bid + ask) / 2
        self.sign, last, change, begun = np.zeros(len(self.ts), int), None, 0, 0
        for i, (t, p) in enumerate(zip(self.ts, self.p, strict=True)):
            now = np.searchsorted(resets, t, side="right")
            if now != begun:
                last, change, begun = None, 0, now
            if last is not None and p != last:
                change = int(np.sign(p - last))
            last = p
            self.sign[i] = np.sign(p - self.mid[i]) or change


def slow_columns(books, trades, has_holes):
    "Every column of the set `desk` at each third second, from lists of all that happened"
    ts, ticks, lots = books["ts"], books["ticks"], books["lots"]
    silent = np.flatnonzero(np.diff(ts) > 1.5 * S) + 1 if has_holes else np.zeros(0, int)
    resets = np.array([ts[0], *ts[silent]])
    tape = Tape(books, trades, resets)
    end = max(ts[-1], tape.ts[-1])
    beats = np.arange(-(-ts[0] // BEAT) * BEAT, end + 1, BEAT)
    at = np.searchsorted(ts, beats, side="right") - 1  # the book of each beat
    mid = (ticks[0, at, 0] + ticks[1, at, 0]) / 2
    size = np.array([np.mean(lots[:, k, :5]) for k in at])
    big = lots[:, at, 0].astype(float)
    micro = (ticks[0, at, 0] * big[1] + ticks[1, at, 0] * big[0]) / big.sum(axis=0)
    segment = np.searchsorted(resets, beats, side="right") - 1
    first = np.searchsorted(segment, np.arange(len(resets)))  # first beat of each segment
    seen = np.arange(len(beats)) - first[segment]
    lost = np.zeros(len(beats), int)  # when it was told that a beat lay in a hole, else 0
    for k in silent:
        lost[(beats > ts[k - 1]) & (beats < ts[k])] = ts[k]
    flow = book_flow(books, silent)
    past = {"ts": ts, "ticks": ticks, "lots": lots, "at": at, "mid": mid, "size": size, "lost": lost,
            "micro": micro, "seen": seen, "first": first, "segment": segment, "beats": beats}  # fmt: skip
    past |= {"resets": resets, "tape": tape, "flow": flow, "silent": silent}
    past |= {"sweeps": sweeps(books, tape, silent), "candles": candles(tape, resets, end)}
    past |= {"stoikov": stoikov(past)}
    rows = np.flatnonzero(beats % S == 0)
    chosen = np.arange(len(rows)) % EVERY == EVERY - 1
    return beats[rows], chosen, [row_of(past, int(n)) for n in rows[chosen]]


def book_flow(books, silent):
    "Pushes of ten levels, size placed and size that left of each book, against the one before"
    n, out = (
        len(books["ts"]),
        {"push": np.zeros((len(books["ts"]), 10)), "turn": np.zeros((len(books["ts"]), 4))},
    )
    for i in range(1, n):
        if i in silent:
            continue
        pair = [[list(zip(books["ticks"][s, k, :10].tolist(), books["lots"][s, k, :10].tolist(), strict=True))
                 for s in (0, 1)] for k in (i - 1, i)]  # fmt: skip
        was, now = pair
        for k in range(10):
            out["push"][i, k] = push(was[0][k], now[0][k], 1) + push(was[1][k], now[1][k], -1)
        for s in (0, 1):
            out["turn"][i, 2 * s : 2 * s + 2] = placed_and_left(
                dict(was[s]), dict(now[s]), 1 - 2 * s
            )
    return out


def sweeps(books, tape, silent):
    "Sweeps as (time, side, five levels before, and after)"
    out = []
    for i in range(1, len(books["ts"])):
        if i in silent:
            continue
        hits = (tape.ts < books["ts"][i]) & (tape.ts >= books["ts"][i - 1])
        for s in (0, 1):
            was, now = (int(books["ticks"][s, k, 0]) for k in (i - 1, i))
            before, after = (int(books["lots"][s, k, :5].sum()) for k in (i - 1, i))
            retreats = now < was if s == 0 else now > was
            if retreats and after <= 0.9 * before and (tape.sign[hits] == 2 * s - 1).any():
                out.append((int(books["ts"][i]), s, before, after))
    return out


def candles(tape, resets, end):
    "Whole candles of ten seconds by number: (high, low, open, close)"
    out, step = {}, 10 * S
    for number in range(-(-int(resets[0]) // step) + 1, int(end) // step + 1):
        begin, stop = (number - 1) * step, number * step
        if ((resets > begin) & (resets <= stop)).any() or resets[0] > begin:
            continue
        last = resets[resets <= begin][-1]
        before = tape.p[(tape.ts >= last) & (tape.ts <= begin)]
        now = tape.p[(tape.ts > begin) & (tape.ts <= stop)]
        prices = [*before[-1:], *now]
        if prices:
            out[number] = max(prices), min(prices), prices[0], prices[-1]
    return out


def fading(past, values, n, life_s):
    "Sum of the values of each beat since the last reset, halved every `life_s` seconds"
    begin = past["first"][past["segment"][n]]
    weights = 0.5 ** (np.arange(n - begin, -1, -1) / (10 * life_s))
    return weights @ values[begin : n + 1], weights.sum()


def stoikov(past):
    "The table of expected moves, learnt beat by beat"
    told, weight = np.zeros((2, 5)), np.zeros((2, 5))
    open_visits, spread, norm, last, out = [], 0.0, 0.0, None, np.zeros(len(past["beats"]))
    decay = 0.5 ** (1 / 600)

    def state(k):
        bid, ask = (int(past["ticks"][s, past["at"][k], 0]) for s in (0, 1))
        b, a = (int(past["lots"][s, past["at"][k], 0]) for s in (0, 1))
        lean = (b - a) / (b + a)
        is_wide = norm > 0 and ask - bid > 1.25 * spread / norm
        return int(is_wide), min(int(abs(lean) * 5), 4), lean, abs(lean) * (ask - bid)

    def expected(k):
        w, c, lean, prior = state(k)
        return np.sign(lean) * (told[w, c] + 20 * prior) / (weight[w, c] + 20)

    for k in range(len(past["beats"])):
        if past["seen"][k] == 0:
            open_visits, last = [], None
        mid_2 = 2 * past["mid"][k]
        bid, ask = (int(past["ticks"][s, past["at"][k], 0]) for s in (0, 1))
        spread, norm = spread * decay + ask - bid, norm * decay + 1
        if last is not None and mid_2 != last:
            target = mid_2 - last + expected(k)
            told *= 0.999
            weight *= 0.999
            for w, c, sign in open_visits:
                told[w, c] += sign * target
                weight[w, c] += 1
            open_visits = []
        w, c, lean, _ = state(k)
        open_visits.append((w, c, np.sign(lean)))
        last, out[k] = mid_2, 1e4 * expected(k) / mid_2
    return out


def row_of(past, n):
    "One row, from everything that was received by then"
    x = {}
    for part in (
        of_book,
        of_depth,
        of_prices,
        of_flow,
        of_trades,
        of_cost,
        of_volume,
        of_candles,
        of_time,
    ):
        part(past, n, x)
    return x


def share(a, b):
    "The one side's share, from -1 to 1"
    return (a - b) / (a + b) if a + b else 0.0


def window(past, n, window_s):
    "First beat of a window and its length in beats; None while it is too young to speak"
    seen = past["seen"][n]
    if seen < 10 * min(window_s, 5):
        return None, 0
    back = min(seen, 10 * window_s)
    return n - back, back


def typical(past, n):
    "Size of a level, memory of a minute"
    total, weight = fading(past, past["size"], n, 60)
    return total / weight


def of_book(past, n, x):
    k, mid = past["at"][n], past["mid"][n]
    ticks, lots, usual = past["ticks"][:, k], past["lots"][:, k].astype(float), typical(past, n)
    (bid, ask), (b, a) = ticks[:, 0], lots[:, 0]
    x["spread_bps"] = (ask - bid) / mid * 1e4
    x["microprice_offset_bps"] = ((bid * a + ask * b) / (a + b) - mid) / mid * 1e4
    for levels, name in ((1, "touch_depth"), (5, "depth_5"), (20, "depth_20")):
        x[f"imbalance_{levels}"] = share(*lots[:, :levels].sum(axis=1))
        x[name] = lots[:, :levels].mean() / usual
    away = [np.average(abs(ticks[s] - mid), weights=lots[s]) for s in (0, 1)]
    x["depth_distance_bps"] = sum(away) / 2 / mid * 1e4
    x["distance_skew"] = share(away[1], away[0])
    for levels in (5, 20):
        price = [np.average(ticks[s, :levels], weights=lots[s, :levels]) for s in (0, 1)]
        total = lots[:, :levels].sum(axis=1)
        weighted = (price[0] * total[1] + price[1] * total[0]) / total.sum()
        x[f"weighted_mid_{levels}_bps"] = (weighted - mid) / mid * 1e4
    for name, value in (("10k", 10_000), ("100k", 100_000)):
        for s, side in ((1, "buy"), (0, "sell")):
            coins = value / (mid * TICK)
            left, paid = coins, 0.0
            for p, q in zip(ticks[s] * TICK, lots[s] * LOT, strict=True):
                taken = min(left, q)
                left, paid, last = left - taken, paid + taken * p, p
            mean = (paid + left * last) / coins / TICK
            x[f"{side}_impact_{name}_bps"] = abs(mean - mid) / mid * 1e4
    x["stoikov_offset_bps"] = past["stoikov"][n]


def of_depth(past, n, x):
    k, mid, t = past["at"][n], past["mid"][n], past["beats"][n]
    ticks, lots, usual = past["ticks"][:, k], past["lots"][:, k].astype(float), typical(past, n)
    away = abs(ticks - mid)
    for width in (5, 10, 25):
        is_in = away * 10_000 <= width * mid
        value = [(ticks[s] * lots[s])[is_in[s]].sum() for s in (0, 1)]
        x[f"imbalance_{width}bps"], x[f"depth_{width}bps"] = (
            share(*value),
            lots[is_in].sum() / usual,
        )
    pressure, reset = [], past["resets"][past["segment"][n]]
    for s, side in enumerate(("bid", "ask")):
        distance, total = away[s] / mid * 1e4, np.cumsum(lots[s]) / usual
        x[f"{side}_slope"] = distance @ total / (distance @ distance)
        x[f"{side}_curvature"] = 2 * lots[s][2 * away[s] <= away[s, -1]].sum() / lots[s].sum() - 1
        pressure.append(
            sum(q / (d or away[s, 1] / 2) for q, d in zip(lots[s], away[s], strict=True))
        )
        x[f"{side}_queue"] = lots[s, 0] / usual
        best, i = past["ticks"][s, :, 0], k
        while i > 0 and best[i - 1] == best[k] and past["ts"][i] > reset:
            i -= 1
        x[f"{side}_age_s"] = min((t - max(past["ts"][i], reset)) / 1e9, 60)
        mine = [
            w for w in past["sweeps"] if w[1] == s and reset <= w[0] <= t and t - w[0] <= 60 * S
        ]
        back = [(lots[s, :5].sum() - w[3]) / (w[2] - w[3]) for w in mine[-1:]]
        x[f"{side}_resilience"] = min(max(back[0], 0), 2) if back else 1.0
    x["book_pressure"], x["level_count"], x["level_imbalance"] = share(*pressure), 40, 0
    when = [w[0] for w in past["sweeps"] if reset <= w[0] <= t]
    x["since_sweep_s"] = min((t - max([reset, *when])) / 1e9, 60)


def of_prices(past, n, x):
    "Returns, volatilities and what is made of moves over a second"
    mid, seen, lost, t = past["mid"], past["seen"], past["lost"], past["beats"][n]
    for w in (1, 5, 20, 60):
        a, _ = window(past, n, w)
        x[f"return_{w}s_bps"] = np.nan if a is None else (mid[n] - mid[a]) / mid[n] * 1e4
    for w in (10, 60, 300):
        used = [mid[i] - mid[i - 10] for i in range(max(n - 10 * w, 0) + 1, n + 1)
                if seen[i] >= 10 and not 0 < lost[i] <= t]  # fmt: skip
        root = math.sqrt(w * np.mean(np.square(used))) if len(used) >= 40 else np.nan
        x[f"volatility_{w}s_bps"] = root / mid[n] * 1e4
    short, middle, long = (x[f"volatility_{w}s_bps"] for w in (10, 60, 300))
    x["volatility_ratio"] = short * math.sqrt(30) / long if long else 1.0
    x["trend_20s"] = (
        x["return_20s_bps"] / (middle / math.sqrt(3)) if middle else 0 * x["return_20s_bps"]
    )
    begin = past["first"][past["segment"][n]]
    for w in (60, 300):
        a, back = window(past, n, w)
        pairs = [(mid[i] - mid[i - 10], mid[i - 10] - mid[i - 20])
                 for i in range(n - back + 1, n + 1) if i - 20 >= begin]  # fmt: skip
        r = np.array(pairs).T if pairs else np.zeros((2, 0))
        smooth, rough = math.pi / 2 * np.abs(r[0] * r[1]).sum(), np.square(r[0]).sum()
        x[f"bipower_{w}s_bps"] = (
            math.sqrt(w * smooth / len(pairs)) / mid[n] * 1e4 if pairs else np.nan
        )
        x[f"jump_share_{w}s"] = max(1 - smooth / rough, 0) if rough else 0 * x[f"bipower_{w}s_bps"]
        if w == 60:
            x["jump_sign_60s"] = (
                (r[0] * abs(r[0])).sum() / rough if rough else 0 * x["bipower_60s_bps"]
            )
    is_young = window(past, n, 60)[0] is None
    squares = np.zeros((3, len(mid)))
    for i in range(begin + 10, n + 1):
        squares[:, i] = (
            (past["micro"][i] - past["micro"][i - 10]) ** 2,
            (mid[i] - mid[i - 10]) ** 2,
            1,
        )
    a, b, weight = (fading(past, one, n, 60)[0] for one in squares)
    x["micro_volatility_60s_bps"] = (
        np.nan if is_young else math.sqrt(60 * a / weight) / mid[n] * 1e4
    )
    x["micro_ratio_60s"] = np.nan if is_young else math.sqrt(a / b) if b else 1.0


def books_between(past, a, n):
    "Books that came in a window of beats"
    return slice(*np.searchsorted(past["ts"], [past["beats"][a], past["beats"][n]], side="right"))


def of_flow(past, n, x):
    usual, begin = typical(past, n), past["first"][past["segment"][n]]
    reset = past["resets"][past["segment"][n]]
    pushes = np.zeros((len(past["beats"]), 10))
    for i in range(begin, n + 1):
        since = past["beats"][i - 1] if i > begin else reset
        pushes[i] = past["flow"]["push"][
            (past["ts"] > since) & (past["ts"] <= past["beats"][i])
        ].sum(axis=0)
    for levels in (1, 5, 10):
        for life in LIVES["ofi"]:
            total, _ = fading(past, pushes[:, :levels].sum(axis=1), n, life)
            is_young = window(past, n, life)[0] is None
            x[f"ofi_{levels}_{life}s"] = np.nan if is_young else total / levels / usual
    a, back = window(past, n, 5)
    for k in range(5):
        x[f"ofi_level_{k + 1}_5s"] = (
            np.nan if a is None else fading(past, pushes[:, k], n, 5)[0] / usual
        )
    deep = pushes @ np.exp(-np.arange(10) / 2)
    x["ofi_decayed_5s"] = np.nan if a is None else fading(past, deep, n, 5)[0] / usual
    names = (
        "add_rate_5s",
        "remove_rate_5s",
        "add_imbalance_20s",
        "remove_imbalance_20s",
        "cancel_share_20s",
    )
    x.update(dict.fromkeys(names, np.nan))
    if a is None:
        return
    turn = past["flow"]["turn"][books_between(past, a, n)].sum(axis=0)
    x["add_rate_5s"], x["remove_rate_5s"] = (
        turn[[k, k + 2]].sum() * 10 / back / usual for k in (0, 1)
    )
    a, _ = window(past, n, 20)
    turn = past["flow"]["turn"][books_between(past, a, n)].sum(axis=0)
    x["add_imbalance_20s"], x["remove_imbalance_20s"] = (
        share(turn[0], turn[2]),
        share(turn[1], turn[3]),
    )
    hit, left = past["tape"].q[trades_between(past, a, n)].sum(), turn[1] + turn[3]
    x["cancel_share_20s"] = min(max(1 - hit / left, 0), 1) if left else 0.0


def trades_between(past, a, n):
    "Trades that came in a window of beats"
    return slice(
        *np.searchsorted(past["tape"].ts, [past["beats"][a], past["beats"][n]], side="right")
    )


def of_trades(past, n, x):
    tape, usual = past["tape"], typical(past, n)
    for w in (1, 5, 20, 60):
        a, back = window(past, n, w)
        i = trades_between(past, a, n) if a is not None else slice(0)
        signed, volume = (tape.sign[i] * tape.q[i]).sum(), tape.q[i].sum()
        values = {
            "trade_flow": signed / usual,
            "trade_imbalance": signed / volume if volume else 0.0,
        }
        values |= {
            "trade_volume": volume * 10 / max(back, 1) / usual,
            "trade_rate": len(tape.q[i]) * 10 / max(back, 1),
        }
        for name, value in values.items():
            x[f"{name}_{w}s"] = np.nan if a is None else value
    t, reset = past["beats"][n], past["resets"][past["segment"][n]]
    mine = (tape.ts >= reset) & (tape.ts <= t)
    for life in LIVES["intensity"]:
        for sign, side in ((1, "buy"), (-1, "sell")):
            ages = (t - tape.ts[mine & (tape.sign == sign)]) / 1e9
            value = math.log(2) / life * (0.5 ** (ages / life)).sum()
            x[f"{side}_intensity_{life}s"] = np.nan if window(past, n, life)[0] is None else value
    short, long = (x[f"buy_intensity_{w}s"] + x[f"sell_intensity_{w}s"] for w in (1, 10))
    x["intensity_burst"] = short / long if long else 1.0
    a, _ = window(past, n, 60)
    if a is None:
        return x.update(trade_clustering_60s=np.nan, sign_persistence_60s=np.nan)
    edges = np.searchsorted(tape.ts, past["beats"][a : n + 1], side="right")
    counts = np.diff(edges)
    x["trade_clustering_60s"] = counts.var() / counts.mean() if counts.any() else 1.0
    known = np.flatnonzero(mine & (tape.sign != 0))
    pairs = [tape.sign[i] == tape.sign[j] for j, i in pairwise(known)
             if tape.ts[i] > past["beats"][a]]  # fmt: skip
    x["sign_persistence_60s"] = 2 * np.mean(pairs) - 1 if pairs else 0.0


def of_cost(past, n, x):
    tape, mid = past["tape"], past["mid"]
    for w in (20, 60):
        a, _ = window(past, n, w)
        i = trades_between(past, a, n) if a is not None else slice(0)
        i = np.arange(len(tape.q))[i][tape.sign[i] != 0]
        paid = 2 * (tape.sign[i] * tape.q[i] * (tape.p[i] - tape.mid[i])).sum()
        value = paid / tape.q[i].sum() / mid[n] * 1e4 if len(i) else x["spread_bps"]
        x[f"effective_spread_{w}s_bps"] = np.nan if a is None else value
    a, _ = window(past, n, 60)
    names = "realised_spread_60s_bps", "price_impact_60s_bps", "roll_60s_bps"
    x.update(dict.fromkeys(names, np.nan if a is None else 0.0))
    if a is None:
        return
    i = trades_between(past, a, n - 50) if a <= n - 50 else slice(0)
    i = np.arange(len(tape.q))[i][tape.sign[i] != 0]
    if len(i):
        later = mid[np.searchsorted(past["beats"], tape.ts[i]) + 50]
        scale = 2e4 / tape.q[i].sum() / mid[n]
        kept = (tape.sign[i] * tape.q[i] * (tape.p[i] - later)).sum()
        moved = (tape.sign[i] * tape.q[i] * (later - tape.mid[i])).sum()
        x["realised_spread_60s_bps"], x["price_impact_60s_bps"] = kept * scale, moved * scale
    reset = past["resets"][past["segment"][n]]
    mine = np.flatnonzero((tape.ts >= reset) & (tape.ts <= past["beats"][n]))
    steps = [0, *np.diff(tape.p[mine])]  # the first trade after a reset has no step before it
    used = [
        (steps[k], steps[k - 1]) for k in range(1, len(mine)) if tape.ts[mine[k]] > past["beats"][a]
    ]
    if len(used) >= 10:
        one, two = np.array(used).T
        covariance = np.mean(one * two) - np.mean(one) ** 2
        x["roll_60s_bps"] = 2e4 * math.sqrt(max(-covariance, 0)) / mid[n]


def of_volume(past, n, x):
    "Who is informed: lambda, illiquidity, buckets of volume, trades beyond the best price"
    names = ("kyle_lambda_60s_bps", "amihud_60s_bps", "vpin", "bucket_s", "aggressor_ratio_60s",
             "trade_size_60s", "through_rate_20s", "through_flow_60s")  # fmt: skip
    a, back = window(past, n, 60)
    if a is None:
        return x.update(dict.fromkeys(names, np.nan))
    tape, usual, mid = past["tape"], typical(past, n), past["mid"]
    begin, cross, square = past["first"][past["segment"][n]], *np.zeros((2, len(mid)))
    moves = []
    for i in range(begin + 10, n + 1):
        k = trades_between(past, i - 10, i)
        flow, move = (tape.sign[k] * tape.q[k]).sum() / usual, (mid[i] - mid[i - 10]) / mid[n] * 1e4
        cross[i], square[i] = flow * move, flow * flow
        moves += [abs(move)] * int(i > a)
    (c, _), (s, _) = fading(past, cross, n, 60), fading(past, square, n, 60)
    k = trades_between(past, a, n)
    signs, q, volume = tape.sign[k], tape.q[k], tape.q[k].sum()
    x["kyle_lambda_60s_bps"] = c / s if s else 0.0
    x["amihud_60s_bps"] = np.mean(moves) / (volume * 10 / back / usual) if volume else 0.0
    x["vpin"], x["bucket_s"] = buckets(past, n)
    x["aggressor_ratio_60s"] = share((signs > 0).sum(), (signs < 0).sum())
    x["trade_size_60s"] = q.mean() / usual if len(q) else 0.0
    beyond = np.where(tape.sign > 0, tape.p > tape.ask, tape.p < tape.bid) & (tape.sign != 0)
    x["through_flow_60s"] = (signs * q)[beyond[k]].sum() / volume if volume else 0.0
    a, back = window(past, n, 20)
    x["through_rate_20s"] = beyond[trades_between(past, a, n)].sum() * 10 / back


def buckets(past, n):
    "Mean one-sidedness of the last 50 full buckets of twenty typical levels, and the time the last one took"
    tape, begin = past["tape"], past["first"][past["segment"][n]]
    reset, room, sides, began, uneven, took = (
        past["resets"][past["segment"][n]],
        0,
        [0, 0],
        0,
        [],
        0,
    )
    for i in np.flatnonzero((tape.ts >= reset) & (tape.ts <= past["beats"][n])):
        left, t = int(tape.q[i]), int(tape.ts[i])
        last = np.searchsorted(past["beats"], t) - 1  # the beat before the trade
        for _ in range(50):
            if room == 0:
                if last < begin:
                    break
                room, began = max(int(20 * typical(past, last)), 2), began or t
            taken = min(left, room - sum(sides))
            bought = {1: taken, -1: 0, 0: taken // 2}[int(tape.sign[i])]
            sides, left = [sides[0] + bought, sides[1] + taken - bought], left - taken
            if sum(sides) == room:
                uneven.append(abs(sides[0] - sides[1]) / room)
                took, began, room, sides = t - began, t, 0, [0, 0]
            if not left:
                break
    return np.mean(uneven[-50:]) if uneven else 0.0, min(took / 1e9, 300)


def of_candles(past, n, x):
    last, made = int(past["beats"][n]) // (10 * S), past["candles"]
    mine = [k for k in range(last - 29, last + 1) if k in made]
    names = "parkinson_300s_bps", "garman_klass_300s_bps", "corwin_schultz_300s_bps"
    if len(mine) < 4:
        return x.update(dict.fromkeys(names, np.nan))
    high, low, begin, close = np.log(np.array([made[k] for k in mine], float)).T
    x[names[0]] = 1e4 * math.sqrt(30 * np.mean((high - low) ** 2) / (4 * math.log(2)))
    each = (high - low) ** 2 / 2 - (2 * math.log(2) - 1) * (close - begin) ** 2
    x[names[1]] = 1e4 * math.sqrt(max(30 * np.mean(each), 0))
    spreads, k = [], 3 - 2 * math.sqrt(2)
    for i in range(1, len(mine)):
        if mine[i] == mine[i - 1] + 1:
            beta = (high[i] - low[i]) ** 2 + (high[i - 1] - low[i - 1]) ** 2
            gamma = (max(high[i - 1 : i + 1]) - min(low[i - 1 : i + 1])) ** 2
            alpha = (math.sqrt(2 * beta) - math.sqrt(beta)) / k - math.sqrt(gamma / k)
            spreads.append(max(2 * (math.exp(alpha) - 1) / (1 + math.exp(alpha)), 0))
    x[names[2]] = 1e4 * np.mean(spreads) if spreads else 0.0


def of_time(past, n, x):
    t, tape, ts = int(past["beats"][n]), past["tape"], past["ts"]
    reset, day = past["resets"][past["segment"][n]], (t / 1e9) % 86_400
    best = past["ticks"][:, :, 0]
    moved = np.flatnonzero((np.diff(best, axis=1) != 0).any(axis=0)) + 1
    moved = ts[[k for k in moved if k not in past["silent"]]]
    x["since_book_s"] = (t - ts[past["at"][n]]) / 1e9
    for name, stamps in (("since_trade_s", tape.ts), ("since_quote_change_s", moved)):
        x[name] = min((t - max([reset, *stamps[stamps <= t][-1:]])) / 1e9, 60)
    x["since_gap_s"] = min((t - reset) / 1e9, 300)
    a, back = window(past, n, 5)
    rates = {"quote_rate_5s": moved, "message_rate_5s": ts, "volume": tape.ts}
    for name, stamps in rates.items():
        lo, hi = np.searchsorted(stamps, [past["beats"][a or 0], t], side="right")
        total = tape.q[lo:hi].sum() if name == "volume" else hi - lo
        rates[name] = np.nan if a is None else total * 10 / back
    x["quote_rate_5s"], x["message_rate_5s"] = rates["quote_rate_5s"], rates["message_rate_5s"]
    a, back = window(past, n, 60)
    lo, hi = np.searchsorted(ts, [past["beats"][a or 0], t], side="right")
    long = {"message_rate_5s": hi - lo}
    lo, hi = np.searchsorted(tape.ts, [past["beats"][a or 0], t], side="right")
    long["volume"] = tape.q[lo:hi].sum()
    for name, of in (("message_burst", "message_rate_5s"), ("volume_burst", "volume")):
        rate = long[of] * 10 / max(back, 1)
        x[name] = np.nan if a is None else rates[of] / rate if rate else 1.0
    x["day_sin"], x["day_cos"] = (
        math.sin(day / 86_400 * math.tau),
        math.cos(day / 86_400 * math.tau),
    )
    monday = 4 * 86_400  # 5 January 1970
    x["week_share"] = ((t / 1e9 - monday) % (7 * 86_400)) / (7 * 86_400)
    x["to_eighth_hour_s"] = 28_800 - day % 28_800


# --- the comparison -----------------------------------------------------------------------------------------------


@pytest.mark.recordings
@pytest.mark.parametrize("has_holes", [True, False])
def test_every_column_equals_its_definition_on_a_real_market(raw, has_holes):
    books, trades = raw
    ts = books["ts"]
    given = Books(ts, ts, books["ticks"].astype(np.int32), books["lots"])
    tape = Trades(trades["ts"], trades["ts"], trades["ticks"], trades["lots"])
    events = snapshot_events(given, tape, max_silence_ms=1_500 if has_holes else 10**9)
    made = build_features(events, STANDX, feature_set("desk"))
    when, chosen, slow = slow_columns(books, trades, has_holes)
    np.testing.assert_array_equal(made.rows["ts"], when)
    assert (made.rows["segment"][-1] >= 5) == has_holes and len(made) > 60 * MINUTES - 5
    wrong = {}
    for name in made.feature_set.names:
        must, was = np.array([x[name] for x in slow]), made.column(name)[chosen]
        close = 1e-6 if name == "vpin" else 1e-9  # whose buckets are rounded to millionths
        near = np.isclose(was, must, rtol=1e-9, atol=close, equal_nan=True)
        if not near.all():
            k = int(np.argmin(near))
            wrong[name] = int((~near).sum()), k, float(was[k]), float(must[k])
    assert not wrong, wrong
