"""Asking a model: one row, many rows, an ensemble, the load from the registry, and the tail beside a training job.

100 trees of 31 leaves over 60 columns, some values missing. Peers: LightGBM's own Booster.predict with one thread, and
the call of its C library that is made for single rows. Medians of the rounds, ratios within each round. The answers
are compared bit for bit before anything is timed.
"""

import ctypes
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import lightgbm
import numpy as np
from common import header, options, rate_row, show, take_turns

from tradebook.training.forest import Forest
from tradebook.training.ledger import facts_digest
from tradebook.training.prediction import Predictor
from tradebook.training.publish import promote, write_version
from tradebook.training.registry import Registry

N_COLUMNS, N_TREES, N_LEAVES = 60, 100, 31
TRAINING_JOB = """
import lightgbm, numpy as np
x = np.random.default_rng(0).normal(size=(100_000, 60))
data = lightgbm.Dataset(x, (x[:, 0] > 0).astype(float))
while True:
    lightgbm.train({"objective": "binary", "verbosity": -1, "num_threads": 2}, data, 50)
"""


def grown(x, seed):
    "A forest on drawn rows"
    rng = np.random.default_rng(seed)
    is_up = np.nan_to_num(x[:, 0]) + rng.normal(size=len(x)) > 0
    chosen = {"objective": "binary", "num_leaves": N_LEAVES, "verbosity": -1, "num_threads": 1}
    data = lightgbm.Dataset(x, is_up.astype(float))
    return lightgbm.train(chosen | {"seed": seed}, data, N_TREES).model_to_string()


def short_call(booster):
    "LightGBM's prepared call for one row"
    from lightgbm.basic import _LIB

    handle, n, p = ctypes.c_void_p(), ctypes.c_int64(), ctypes.c_double()
    row = np.zeros(N_COLUMNS)
    how = [
        ctypes.c_int(v) for v in (0, 0, -1, 1)
    ]  # a probability, from the first tree to the last, float64
    what = (booster._handle, *how, ctypes.c_int32(N_COLUMNS), ctypes.c_char_p(b"num_threads=1"))
    assert _LIB.LGBM_BoosterPredictForMatSingleRowFastInit(*what, ctypes.byref(handle)) == 0
    call = _LIB.LGBM_BoosterPredictForMatSingleRowFast
    call.argtypes = [ctypes.c_void_p] * 4
    where = (row.ctypes.data, ctypes.addressof(n), ctypes.addressof(p))

    def ask(x):
        row[:] = x
        call(handle, *where)
        return p.value

    return ask


def one_by_one(ask, rows):
    "Ask about each row by itself"
    return lambda: [ask(row) for row in rows] and None


def tail_us(ask, rows, share=0.99):
    "A high quantile of single calls, microseconds"
    took = np.empty(len(rows))
    for i, row in enumerate(rows):
        began = time.perf_counter_ns()
        ask(row)
        took[i] = time.perf_counter_ns() - began
    return float(np.quantile(took, share)) / 1e3


def latency_row(row, ours, goal, unit, peer=None, peer_name=""):
    "One result as a time, smaller is better; the goal is the longest that may be"
    ratio = peer / ours if peer else None
    found = {"row": row, "ours": ours, "peer": peer, "peer_name": peer_name, "unit": unit}
    return {**found, "ratio": ratio, "goal": goal, "ok": ours <= goal}


def published(folder, text):
    "A registry with that forest in force"
    import hashlib

    content = text.encode()
    facts = {
        "format": 2,
        "version": "20260101",
        "symbol_key": "bench_A-B",
        "feature_names": [f"Column_{i}" for i in range(N_COLUMNS)],
        "feature_set_hash": "0" * 16,
        "move_slope_bps": 10.0,
        "metrics": {},
        "ts_last": 0,
        "files": {
            "model.txt": {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        },
    }
    write_version(Path(folder), {**facts, "digest": facts_digest(facts)}, {"model.txt": text})
    promote(Path(folder), "bench_A-B", "20260101")
    return Registry(folder)


def beside_training(ways, rows, rounds):
    "Tails of single calls while a training job with two threads runs in another process"
    job = subprocess.Popen([sys.executable, "-c", TRAINING_JOB])
    try:
        time.sleep(3)
        return {
            name: statistics.median(tail_us(ask, rows) for _ in range(rounds))
            for name, ask in ways.items()
        }
    finally:
        job.kill()
        job.wait()


def main(folder):
    given = options(__doc__, rows=2_000)
    rng = np.random.default_rng(1)
    x = rng.normal(size=(20_000, N_COLUMNS))
    x[rng.uniform(size=x.shape) < 0.02] = np.nan
    texts = [grown(x, seed) for seed in range(5)]
    booster, forest, five = lightgbm.Booster(model_str=texts[0]), Forest(texts[0]), Forest(*texts)
    boosters = [lightgbm.Booster(model_str=text) for text in texts]
    registry, short = published(folder, texts[0]), short_call(booster)
    predictor, rows = Predictor(registry.current("bench_A-B")), list(x[: given.rows])

    expected = booster.predict(x, num_threads=1)
    assert forest.ask(x)[0].tobytes() == expected.tobytes()
    assert [predictor.predict_row(row)[0] for row in rows] == expected[: given.rows].tolist()
    assert [short(row) for row in rows] == expected[: given.rows].tolist()

    usual = lambda row: booster.predict(row[None], num_threads=1)[0]  # noqa: E731
    single = {
        "ours": one_by_one(predictor.predict_row, rows),
        "Booster.predict": one_by_one(usual, rows),
        "short C call": one_by_one(short, rows),
    }
    took = take_turns(single, given.rounds)
    alike = (took, "ours", len(rows), "M rows/s")
    found = [
        rate_row("one row, against the usual call", *alike, 6.0, "Booster.predict"),
        rate_row("one row, against the short call", *alike, 1.0, "short C call"),
    ]
    many = {
        "ours": lambda: forest.ask(x),
        "Booster.predict": lambda: booster.predict(x, num_threads=1),
    }
    took = take_turns(many, given.rounds)
    name = "many rows"
    found.append(rate_row(name, took, "ours", len(x), "M rows/s", 0.8, "Booster.predict"))
    together = {
        "ours": one_by_one(five.ask_row, rows),
        "five calls": one_by_one(
            lambda r: [b.predict(r[None], num_threads=1) for b in boosters], rows
        ),
    }
    took = take_turns(together, given.rounds)
    name = "mean and spread of five"
    found.append(rate_row(name, took, "ours", len(rows), "M rows/s", 6.0, "five calls"))

    load = {"ours": lambda: Predictor(registry.current("bench_A-B"))}
    seconds = statistics.median(take_turns(load, given.rounds)["ours"])
    found.append(latency_row("load from the registry", seconds * 1e3, 50.0, "ms"))
    ways = {"ours": predictor.predict_row, "one thread": usual}
    ways["default threads"] = lambda row: booster.predict(row[None])[0]
    alone = {
        k: statistics.median(tail_us(f, rows) for _ in range(given.rounds)) for k, f in ways.items()
    }
    busy = beside_training(ways, rows, given.rounds)
    for title, tails in (("p99 alone", alone), ("p99 beside training", busy)):
        for peer in ("one thread", "default threads"):
            named = f"{title}, {peer}"
            found.append(latency_row(named, tails["ours"], 100.0, "us", tails[peer], peer))
    facts = {"trees": N_TREES, "leaves": N_LEAVES, "columns": N_COLUMNS, "load": os.getloadavg()[0]}
    show(header("lightgbm", "numba", "numpy", **facts), found, given.json)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        main(place)
