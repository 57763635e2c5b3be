"""The feature pass beside pandas and polars: the same windows from the same derived columns, equal to 1e-6.

The peers cannot keep a book, so all three are given what the kernel derives from the events at each beat (mid, typical
level size, order-flow pressure, trades, counts) and compute the windows. The first row of the result is the whole pass
from raw events, book included, which has no peer here.

    python benchmarks/features.py [--json] [--seconds 14400] [--rounds 9]
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import pandas as pd
from numba import njit

try:
    import polars as pl
except ModuleNotFoundError:
    sys.exit("polars is not installed; it comes with: pip install 'tradebook[bench]'")

from tradebook.features.columns import FAMILIES
from tradebook.features.flow import emit_flow, flow_beat
from tradebook.features.price import MID, emit_price
from tradebook.features.rows import FeatureStream, build_features
from tradebook.features.schema import feature_set
from tradebook.features.shape import depth_step, level_size, typical_size
from tradebook.features.state import new_state
from tradebook.features.tape import SIGNED, TRADES, VOLUME, emit_tape
from tradebook.features.timing import CHANGES, MESSAGES, emit_timing
from tradebook.features.volatility import emit_volatility, volatility_beat
from tradebook.market.events import message_starts
from tradebook.market.synthetic import synthetic_market

COUNTS = {
    "signed": SIGNED,
    "volume": VOLUME,
    "trades": TRADES,
    "changes": CHANGES,
    "messages": MESSAGES,
}
SETTLED = 301 * 10 + 1  # beats after which every window of the peers is full
FAST = feature_set(interval_ms=100)


def derive(events, of):
    "What the kernel knows at each beat, collected with the kernel itself"
    stream, begin, out = FeatureStream(of, FAST), 0, []
    first, last = int(events["ts_recv"][0]), int(events["ts_recv"][-1])
    before = stream.state.totals.copy()
    for t in range(-(-first // 10**8) * 10**8, last + 1, 10**8):
        end = int(np.searchsorted(events["ts_recv"], t, side="right"))
        stream.push(events, begin, end)
        s = stream.state
        fresh, delta = s.fresh.copy(), s.totals - before
        before = s.totals.copy()
        stream.advance_to(t)
        size = level_size(s.levels[s.clock[5]])
        out.append((s.totals[MID], size, *fresh, *(delta[k] for k in COUNTS.values())))
        begin = end
    names = ["mid_2", "size", "push_1", "push_5", "push_10", *COUNTS]
    return pd.DataFrame(np.array(out, float), columns=names)


@njit(cache=True, nogil=True)
def _windows(state, derived, columns, best, out):
    "Our families over derived columns: one pass, a row at every beat"
    n_decay = len(state.decay) - 1
    for i in range(len(derived)):
        d = derived[i]
        state.totals[MID] = np.int64(d[0])
        for k in range(3):
            state.fresh[k] += np.int64(d[2 + k])
        for k in range(len(columns)):
            state.totals[columns[k]] += np.int64(d[5 + k])
        depth_step(state.depth, d[1], state.decay[n_decay])
        flow_beat(state.sums, state.fresh, state.decay[:n_decay])
        volatility_beat(state.totals, state.ring, i, i, 10)
        for k in range(len(state.totals)):
            state.ring[i & (len(state.ring) - 1), k] = state.totals[k]
        typical = typical_size(state.depth)
        at = emit_price(out[i], 0, best, state.ring, i, i, 10)
        at = emit_flow(out[i], at, state.sums, typical, i, 10)
        at = emit_tape(out[i], at, state.ring, i, typical, i, 10)
        at = emit_volatility(out[i], at, state.ring, i, i, 10)
        emit_timing(out[i], at, i, state.stamps, state.ring, i, i, 10)


def with_ours(derived):
    "The window columns with the compiled families"
    names = [f.name for k in ("price", "flow", "tape", "volatility", "timing") for f in FAMILIES[k]]
    out, best = np.empty((len(derived), len(names))), np.array([1, 1, 2, 1])
    _windows(new_state(FAST), derived, np.array(list(COUNTS.values())), best, out)
    return names, out


def with_pandas(d):
    "The window columns in pandas"
    x, n = {}, np.arange(1, len(d) + 1)
    typical = d["size"].ewm(alpha=1 - 0.5 ** (1 / 600), adjust=True).mean()
    for w in (1, 5, 20, 60):
        x[f"return_{w}s_bps"] = 1e4 * d.mid_2.diff(w * 10) / d.mid_2
        x[f"trade_flow_{w}s"] = d.signed.rolling(w * 10).sum() / typical
    for k in (1, 5, 10):
        for life in (1, 5, 20):
            f = 0.5 ** (1 / (10 * life))
            total = d[f"push_{k}"].ewm(alpha=1 - f, adjust=True).mean() * (1 - f**n) / (1 - f)
            x[f"ofi_{k}_{life}s"] = total / (k * typical)
    for w in (20, 60):
        volume = d.volume.rolling(w * 10).sum()
        x[f"trade_imbalance_{w}s"] = (d.signed.rolling(w * 10).sum() / volume).where(
            volume > 0, 0.0
        )
    for w in (5, 60):
        x[f"trade_volume_{w}s"] = d.volume.rolling(w * 10).sum() / w / typical
        x[f"trade_rate_{w}s"] = d.trades.rolling(w * 10).sum() / w
    squares = d.mid_2.diff(10) ** 2
    for w in (10, 60, 300):
        x[f"volatility_{w}s_bps"] = 1e4 * np.sqrt(squares.rolling(w * 10).mean() * w) / d.mid_2
    x["volatility_ratio"] = x["volatility_10s_bps"] * np.sqrt(30) / x["volatility_300s_bps"]
    x["trend_20s"] = x["return_20s_bps"] / (x["volatility_60s_bps"] / np.sqrt(3))
    for name in ("quote_rate_5s", "message_rate_5s"):
        column = d.changes if name == "quote_rate_5s" else d.messages
        x[name] = column.rolling(50).sum() / 5
    return pd.DataFrame(x)


def with_polars(d):
    "The window columns in polars, as one lazy query"
    c, n = pl.col, pl.int_range(1, pl.len() + 1)
    typical = c("size").ewm_mean(alpha=1 - 0.5 ** (1 / 600), adjust=True)
    x, mid = {}, c("mid_2")

    def total(column, w):
        return c(column).rolling_sum(w * 10)

    for w in (1, 5, 20, 60):
        x[f"return_{w}s_bps"] = 1e4 * mid.diff(w * 10) / mid
        x[f"trade_flow_{w}s"] = total("signed", w) / typical
    for k in (1, 5, 10):
        for life in (1, 5, 20):
            f = 0.5 ** (1 / (10 * life))
            mean = c(f"push_{k}").ewm_mean(alpha=1 - f, adjust=True)
            grown = 1 - (n.cast(pl.Float64) * np.log(f)).exp()
            x[f"ofi_{k}_{life}s"] = mean * grown / (1 - f) / (k * typical)
    for w in (20, 60):
        volume = total("volume", w)
        x[f"trade_imbalance_{w}s"] = (
            pl.when(volume > 0).then(total("signed", w) / volume).otherwise(0.0)
        )
    for w in (5, 60):
        x[f"trade_volume_{w}s"] = total("volume", w) / w / typical
        x[f"trade_rate_{w}s"] = total("trades", w) / w
    vol = {
        w: 1e4 * ((mid.diff(10) ** 2).rolling_mean(w * 10) * w).sqrt() / mid for w in (10, 60, 300)
    }
    x |= {f"volatility_{w}s_bps": v for w, v in vol.items()}
    x["volatility_ratio"] = vol[10] * np.sqrt(30) / vol[300]
    x["trend_20s"] = x["return_20s_bps"] / (vol[60] / np.sqrt(3))
    x["quote_rate_5s"] = total("changes", 5) / 5
    x["message_rate_5s"] = total("messages", 5) / 5
    return d.lazy().select(**x).collect()


def same(ours, theirs, who):
    "Stop when a settled value differs by more than 1e-6 of its size; ours: name -> column"
    for name in theirs.columns:
        a, b = ours[name][SETTLED:], np.asarray(theirs[name])[SETTLED:]
        off = np.nanmax(np.abs(a - b) / (1 + np.abs(b)))
        if not off < 1e-6 or np.isnan(a).any() != np.isnan(b).any():
            sys.exit(f"{who}: {name} differs by {off}; the benchmark compares nothing")
    return len(theirs.columns)


def timed(rounds, *functions):
    "Median seconds of each function, in alternating rounds after one to warm up"
    took = [[] for _ in functions]
    for k in range(rounds + 1):
        for f, seconds in zip(functions, took, strict=True):
            t = time.perf_counter()
            f()
            if k:
                seconds.append(time.perf_counter() - t)
    return [float(np.median(seconds)) for seconds in took]


def cold_start_s():
    "Seconds from nothing compiled to the first row, in a process of its own, imports not counted"
    code = (
        "import time; from tradebook.features.rows import build_features;"
        "from tradebook.market.events import make_events;"
        "from tradebook.market.instruments import instrument;"
        "e = make_events(ts_recv=[10**18], kind=1, flags=1); i = instrument('synthetic', 'SYN/USDT:USDT');"
        "t = time.perf_counter(); build_features(e, i); print(time.perf_counter() - t)"
    )
    with tempfile.TemporaryDirectory() as cache:
        env = {**os.environ, "NUMBA_CACHE_DIR": cache}
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
        )
    return float(done.stdout)


def push_us(events, of):
    "Median microseconds of pushing one message"
    ends = np.r_[message_starts(events)[1:], len(events)][:30_000].tolist()
    stream, took, begin = FeatureStream(of), [], 0
    for end in ends:
        t = time.perf_counter_ns()
        stream.push(events, begin, end)
        took.append(time.perf_counter_ns() - t)
        begin = end
    return float(np.median(took)) / 1e3


def row(name, ours, unit, goal, peer=None, peer_name=""):
    "One line of the result: with a peer the goal is a ratio (how many times faster), without one a bound of ours"
    ratio = peer / ours if peer else None
    is_rate = unit.endswith("/s")
    ok = ratio >= goal if peer else (ours >= goal if is_rate else ours <= goal)
    shown = {"row": name, "ours": ours, "peer": peer, "peer_name": peer_name, "unit": unit}
    return {**shown, "ratio": ratio, "goal": goal, "ok": bool(ok)}


def show(rows, head, is_json):
    "Print the header row and the rows, as JSON lines or as text"
    if is_json:
        for r in ({"header": head}, *rows):
            print(json.dumps(r))
        return
    print(head)
    for r in rows:
        peer = (
            f"{r['peer_name']} {r['peer']:.4g} {r['unit']}, {r['ratio']:.1f} times"
            if r["peer"]
            else ""
        )
        verdict = "ok" if r["ok"] else "NOT REACHED"
        print(
            f"{r['row']:34} {r['ours']:9.4g} {r['unit']:10} {peer:38} goal {r['goal']:g}: {verdict}"
        )


def main():
    "Measure and print"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=14_400, help="length of the market")
    parser.add_argument("--rounds", type=int, default=9, help="runs to take the median of")
    parser.add_argument("--json", action="store_true", help="one object a row")
    args = parser.parse_args()
    market = synthetic_market(seed=7, duration_s=args.seconds)
    events, of = market.events, market.instrument
    frame = derive(events, of)
    lazy, derived = pl.from_pandas(frame), np.ascontiguousarray(frame.to_numpy())
    peers = {"pandas": with_pandas(frame), "polars": with_polars(lazy)}
    kernel = build_features(events, of, FAST)
    kernel = {name: kernel.x[:, k] for k, name in enumerate(FAST.names)}
    names, out = with_ours(derived)
    alone = {name: out[:, k] for k, name in enumerate(names)}
    n = [same(o, p, who) for who, p in peers.items() for o in (kernel, alone)]
    pass_s, ours_s, pandas_s, polars_s = timed(
        args.rounds,
        lambda: build_features(events, of),
        lambda: with_ours(derived),
        lambda: with_pandas(frame),
        lambda: with_polars(lazy),
    )
    head = {
        "events": len(events), "beats": len(frame), "columns_compared": min(n),
        "equal_to": 1e-6, "rounds": args.rounds, "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores", "numpy": np.__version__,
        "pandas": pd.__version__, "polars": pl.__version__,
    }  # fmt: skip
    rows = [
        row("events to rows, one a second", len(events) / pass_s / 1e6, "M events/s", 5.0),
        row("windows at every beat", ours_s, "s", 3.0, pandas_s, f"pandas {pd.__version__}"),
        row("windows at every beat", ours_s, "s", 1.5, polars_s, f"polars {pl.__version__}"),
        row("one message pushed", push_us(events, of), "us", 10.0),
        row("cold compile", cold_start_s(), "s", 8.0),
    ]
    show(rows, head, args.json)


if __name__ == "__main__":
    main()
