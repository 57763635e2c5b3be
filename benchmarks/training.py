"""What our training costs over plain LightGBM, what a walk forward saves, and what a reason takes.

The peer is the loop that a LightGBM user writes: `lightgbm.train` on a new data set for each fold, with default bins
and all cores, and the same trees otherwise; nobody stops early, so that both grow as many. Both forecast the same
rows, and the AUC of both is printed: a walk that is faster because it is worse proves nothing. The interval of the
difference comes from redrawn blocks of time.

A recorded day is used where recordings lie beside the project (`--data`); the synthetic rows are made here.

    python benchmarks/training.py [--json] [--rounds 3] [--rows 60000] [--data ../shared/data/standx]
"""

import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import lightgbm
import numpy as np
from common import header, options, rate_row, show, take_turns

from tradebook.base.settings import load_settings
from tradebook.collector.folder import import_folder
from tradebook.features.rows import build_features
from tradebook.features.schema import feature_set
from tradebook.labels.barriers import make_labels
from tradebook.market.quotes import quotes
from tradebook.market.store import Store
from tradebook.ops.recording import fit_settings
from tradebook.training.learners import (
    Learner,
    Lesson,
    direction_lesson,
    fit,
    learner_of,
    parameters,
)
from tradebook.training.metrics import auc, bootstrap, level_folds, time_blocks
from tradebook.training.reasons import Reasons
from tradebook.training.splits import PurgedWalkForward
from tradebook.training.walking import fast, walk

FOLDS = PurgedWalkForward(8, embargo_ns=60 * 10**9)


def made(n, n_columns=60, seed=3):
    "Rows of a market with a little to be learnt in lines, products and steps"
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, n_columns))
    lean = 0.5 * x[:, 0] + 0.35 * x[:, 1] * x[:, 2] + 0.4 * np.tanh(2 * x[:, 3])
    lean -= 0.3 * (x[:, 4] > 0.7) * x[:, 5]
    y = rng.random(n) < 1 / (1 + np.exp(-0.5 * lean))
    start = np.arange(n) * 10**9
    names = tuple(f"c{k}" for k in range(n_columns))
    return Lesson(x, y * 1.0, names, start, start + 30 * 10**9)


def recorded(folder):
    "Rows of one recorded day, with the labels of the settings"
    settings = load_settings(environment={})
    with tempfile.TemporaryDirectory() as root:
        day = Path(root) / "day"
        day.mkdir()
        for path in sorted(folder.glob("*2026-01-06*")):
            (day / path.name).symlink_to(path.resolve())
        store = Store(Path(root) / "market")
        import_folder(day, store, Path(root))
        row = store.listing()[0]
        events = store.read(row["venue"], row["symbol"])
        of = store.instrument(row["venue"], row["symbol"])
        holes = store.holes(row["venue"], row["symbol"])
    settings, _ = fit_settings(settings, row["start_ns"], row["end_ns"], holes)
    chosen = settings.features
    features = build_features(
        events, of, feature_set(chosen.set, chosen.interval_ms), chosen.max_age_ms
    )
    cost_bps = 2 * (of.taker_fee_bps + settings.backtest.slippage_bps)
    volatility = features.column("volatility_60s_bps")
    given = settings.labels, cost_bps, chosen.max_age_ms, volatility
    labels = make_labels(features.rows, quotes(events), *given)
    return direction_lesson(features.x, labels, features.feature_set.names)[0]


def plain_train(learner, lesson):
    "What a LightGBM user writes"
    given = parameters(learner, len(lesson.y))
    data = lightgbm.Dataset(lesson.x, lesson.y, feature_name=list(lesson.names))
    return lightgbm.train(given, data, learner.rounds).model_to_string()


def naive_walk(learner, lesson):
    "The loop over folds that a LightGBM user writes"
    out = np.full(len(lesson.y), np.nan)
    for train, test in FOLDS.split(lesson.ts_start, lesson.ts_end):
        given = {**parameters(learner, len(train)), "num_threads": os.cpu_count()}
        data = lightgbm.Dataset(lesson.x[train], lesson.y[train])
        out[test] = lightgbm.train(given, data, learner.rounds).predict(lesson.x[test])
    return out


def difference(lesson, ours, theirs):
    "AUC of both, folds levelled, and the interval of the difference"
    fold, seen = np.full(len(lesson.y), -1), np.isfinite(ours)
    for k, (_, test) in enumerate(FOLDS.split(lesson.ts_start, lesson.ts_end)):
        fold[test] = k
    y, (a, b) = lesson.y[seen] > 0, (level_folds(p[seen], fold[seen]) for p in (ours, theirs))
    orders = [np.argsort(score, kind="stable") for score in (a, b)]
    block = time_blocks(lesson.ts_start[seen], lesson.ts_end[seen])
    gap = bootstrap(lambda w: auc(a, y, w, orders[0]) - auc(b, y, w, orders[1]), block, 100)
    scores = f"{auc(a, y):.4f} ours, {auc(b, y):.4f} naive"
    return f"{scores}, difference {gap.value:+.4f} ({gap.low:+.4f} to {gap.high:+.4f})", gap


def processor(case):
    "Processor seconds of a case of one thread: what it costs, however busy the machine is"

    def run():
        began = time.process_time()
        case()
        return time.process_time() - began

    return run


def counted(case, spent):
    "A case that also notes its processor seconds, all threads together"

    def run():
        spent.append(processor(case)())

    return run


def walk_rows(name, lesson, learner, rounds):
    "Measure a walk forward beside the naive loop"
    workers = min(2, os.cpu_count() or 1)
    forecasts = walk(fast(learner), lesson, FOLDS, workers).out_of_fold, naive_walk(learner, lesson)
    text, gap = difference(lesson, *forecasts)
    spent = {"ours": [], "naive refits": []}
    cases = {
        "ours": lambda: walk(fast(learner), lesson, FOLDS, workers),
        "naive refits": lambda: naive_walk(learner, lesson),
    }
    took = take_turns({k: counted(case, spent[k]) for k, case in cases.items()}, rounds)
    what = ("ours", 8, "folds/s", 2.0, "naive refits")
    row = rate_row(f"walk forward, {name}", took, *what, scale=1)
    row["ok"] = bool(row["ok"] and gap.high >= 0)  # not faster by being worse
    cpu = [statistics.median(s[1:]) for s in spent.values()]
    text += f"; processor {cpu[0]:.1f} s ours, {cpu[1]:.1f} s naive, {cpu[1] / cpu[0]:.2f} times"
    return row, {f"AUC, {name}": text, f"rows, {name}": len(lesson.y)}


def main():
    "Measure and print"
    args = options(__doc__, rows=60_000, data="../shared/data/standx")
    rounds, results, facts = min(args.rounds, 5), [], {}
    learner = replace(learner_of(load_settings(environment={})), threads=1, patience=0)
    lesson = made(args.rows)
    part = lesson.take(np.arange(args.rows // 3))
    if (
        fit(learner, part).texts[0].split("parameters:")[0]
        != plain_train(learner, part).split("parameters:")[0]
    ):
        sys.exit("our forest is not plain LightGBM's; the benchmark compares nothing")
    took = take_turns(
        {
            "ours": processor(lambda: fit(learner, part)),
            "lightgbm.train": processor(lambda: plain_train(learner, part)),
        },
        rounds,
    )
    n = len(part.y)
    results.append(
        rate_row("training, processor", took, "ours", n, "M rows/s", 0.95, "lightgbm.train")
    )
    row, found = walk_rows("synthetic", lesson, learner, rounds)
    results, facts = [*results, row], facts | found
    if Path(args.data).exists():
        row, found = walk_rows("StandX day", recorded(Path(args.data)), learner, rounds)
        results, facts = [*results, row], facts | found
    forest = fit(Learner(rounds=100, leaves=31, min_rows_leaf=20), part)
    reasons, asked = Reasons(forest.texts, forest.names), part.x[:500]
    took = take_turns({"ours": processor(lambda: [reasons.text(x) for x in asked])}, rounds)
    results.append(
        rate_row("reasons, 100 trees, processor", took, "ours", 500, "k/s", 0.5, scale=1e3)
    )
    show(header("numpy", "lightgbm", rounds=rounds, **facts), results, args.json)


if __name__ == "__main__":
    main()
