"""What one symbol-day costs: features, labels, training; and what 500 symbols and a year would take on N workers.

Each case runs in a process of its own, so that its processor time and its memory are its own. Compiling is done
first on a short stretch, since a worker compiles once and then does many days. Processor time is what is counted:
other programs may be running. A training is the whole of it: canaries, five folds walking forward, the final
fit, its measures.

Two kinds of day: the synthetic market's, and recordings beside the project where there are any, one of a venue that
sends a book each second, one of a venue that sends a hundred messages a second, of which there are minutes only.

    python benchmarks/scale.py [--json] [--hours 24] [--symbols 500] [--days 365]
"""

import json
import tempfile
import time
from pathlib import Path

import numpy as np
from common import header, options

from tradebook.base.settings import load_settings
from tradebook.features.rows import build_features
from tradebook.features.schema import feature_set
from tradebook.labels.barriers import make_labels
from tradebook.market.quotes import quotes
from tradebook.market.store import Store
from tradebook.training.canaries import fit_checked
from tradebook.training.scale import run_each, values

RECORDINGS = Path(__file__).resolve().parents[2] / "shared" / "data"
WORKERS = (1, 8, 32, 128)


def synthetic(hours):
    "A made-up market"
    from tradebook.market.synthetic import synthetic_market

    market = synthetic_market(seed=7, duration_s=hours * 3_600)
    return market.events, market.instrument


def slow_venue(day):
    "A recorded day of a venue that sends its book each second"
    from tradebook.market.snapshots import read_snapshots

    paths = [RECORDINGS / f"standx/BTC-USD_{kind}_{day}.parquet" for kind in ("book20", "trades")]
    imported = read_snapshots(*paths)
    return imported.events, imported.instrument


def fast_venue(name):
    "Recorded minutes of a venue that sends many messages"
    from tradebook.collector.wire_files import read_frames

    imported = read_frames(RECORDINGS / f"binance/{name}.gz")
    return imported.events, imported.instrument


def measured(work):
    "Run something and say what processor time it took"
    began = time.process_time()
    return work(), time.process_time() - began


def price(case):
    "Cost of one stretch: processor seconds of each stage, rows, bytes"
    source, argument, horizon_s, is_trained = case
    settings = load_settings(environment={}, overrides={"labels.horizon_s": horizon_s})
    columns = feature_set(settings.features.set, settings.features.interval_ms)
    events, of = source(argument)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        _, write_s = measured(lambda: store.write(events, of, "benchmark"))
        disk_mb = sum(p.stat().st_size for p in Path(folder).rglob("*.parquet")) / 1e6
        events, read_s = measured(lambda: store.read(of.venue, of.symbol, None, None))

    def features_of(part):
        return build_features(part, of, columns, settings.features.max_age_ms)

    def labels_of(part, features):
        volatility = features.column("volatility_60s_bps")
        chosen = settings.labels
        return make_labels(features.rows, quotes(part), chosen, 5.0, 2_000, volatility)

    short = events[:20_000]
    labels_of(short, features_of(short))  # compile
    features, features_s = measured(lambda: features_of(events))
    labels, labels_s = measured(lambda: labels_of(events, features))
    training_s, n_train = None, None
    if is_trained:
        model, training_s = measured(lambda: fit_checked(features, labels, settings))
        n_train = model.metrics["n_train"]
    span_s = (events["ts_recv"][-1] - events["ts_recv"][0]) / 1e9
    return {
        "events": len(events),
        "hours": span_s / 3_600,
        "rows": len(features),
        "columns": features.x.shape[1],
        "known": int(np.count_nonzero(labels["is_valid"])),
        "write_s": write_s,
        "read_s": read_s,
        "disk_mb": disk_mb,
        "features_s": features_s,
        "labels_s": labels_s,
        "training_s": training_s,
        "n_train": n_train,
        "event_mb": events.nbytes / 1e6,
        "row_mb": (features.x.nbytes + features.rows.nbytes + labels.nbytes) / 1e6,
    }


def cases(hours):
    "What is measured: name -> source, argument, horizon, whether a model can be trained on it"
    found = {f"synthetic, {hours:g} h": (synthetic, hours, 30.0, True)}
    if RECORDINGS.exists():
        found["a book each second, 24 h"] = (slow_venue, "2026-01-06", 10.0, True)
        found["fast futures, 6 min"] = (fast_venue, "usdm_btcusdt_20240808", 30.0, False)
    return found


def a_day(one):
    "The same stretch as a whole day: events and rows grow with the time, and so does the work"
    times = 24 / one["hours"]
    costs = ("read_s", "features_s", "labels_s", "disk_mb", "event_mb", "row_mb")
    return {k: one[k] * times for k in ("events", "rows", *costs)}


def plan(day, training_s, args):
    "Processor hours of all symbols and days, and days of waiting on N workers"
    n = args.symbols * args.days
    making_h = n * (day["read_s"] + day["features_s"] + day["labels_s"]) / 3_600
    training_h = n * training_s / 3_600  # each day is trained on once: windows follow each other
    whole_h = making_h + training_h
    return {
        "making_h": making_h,
        "training_h": training_h,
        "disk_tb": n * day["disk_mb"] / 1e6,
        "rows_tb": n * day["row_mb"] / 1e6,
        "days_on": {w: whole_h / w / 24 for w in WORKERS},
    }


def main():
    "Measure and print"
    args = options(__doc__, hours=24.0, symbols=500, days=365)
    chosen = cases(args.hours)
    done = []
    for name, case in chosen.items():  # one after another: each has the machine to itself
        done += run_each(price, [case], [name], workers=1)
    values(done)
    training = {  # processor seconds a day of rows
        o.name: o.value["training_s"] * 24 / o.value["hours"] for o in done if o.value["training_s"]
    }
    rows = []
    for one in done:
        day = a_day(one.value)
        # a stretch too short to train on has as many rows a day as the synthetic one
        cost = training.get(one.name, training[done[0].name])
        row = {"case": one.name, **one.value, "peak_mb": one.peak_mb, "day": day}
        rows.append({**row, **plan(day, cost, args)})
    head = header("numpy", "numba", "lightgbm", symbols=args.symbols, days=args.days)
    if args.json:
        for line in (head, *rows):
            print(json.dumps(line))
        return
    print("  ".join(f"{k} {v}" for k, v in head["header"].items()))
    for r in rows:
        print(
            f"\n{r['case']}: {r['events']:,} events, {r['rows']:,} rows of {r['columns']} columns"
        )
        told = (
            "-" if r["training_s"] is None else f"{r['training_s']:.1f} s of {r['n_train']:,} rows"
        )
        print(
            f"  processor: features {r['features_s']:.2f} s, labels {r['labels_s']:.2f} s, ", end=""
        )
        print(f"training {told}; from the store {r['read_s']:.2f} s; peak {r['peak_mb']:,.0f} MB")
        d = r["day"]
        print(
            f"  a symbol-day: {d['features_s']:.1f} s features, {d['labels_s']:.2f} s labels, ",
            end="",
        )
        print(f"{d['disk_mb']:,.0f} MB on disk, {d['row_mb']:,.1f} MB of rows")
        print(
            f"  {args.symbols} symbols, {args.days} days: {r['making_h']:,.0f} processor hours to ",
            end="",
        )
        print(f"make, {r['training_h']:,.0f} to train; {r['disk_tb']:.1f} TB on disk")
        print("  days on N workers: " + ", ".join(f"{w}: {t:.1f}" for w, t in r["days_on"].items()))


if __name__ == "__main__":
    main()
