"""The steps of the demo, one by one: making a market, features, decisions, one prediction.

Peers: LightGBM's own Booster.predict for the single row; the other steps have none and are held to a budget.
"""

from functools import partial

import lightgbm
import numpy as np
from common import header, options, rate_row, show, take_turns

from tradebook.backtest.replay import run_backtest
from tradebook.base.settings import load_settings
from tradebook.features.rows import FeatureStream, build_features
from tradebook.labels.barriers import make_labels
from tradebook.market.events import message_starts
from tradebook.market.quotes import quotes
from tradebook.market.synthetic import synthetic_market
from tradebook.policy.rules import rules_from
from tradebook.training.model import fit_direction
from tradebook.training.prediction import Predictor
from tradebook.training.publish import publish


def trained(market, features, settings, folder):
    "A published model of the market, ready to be asked"
    table = quotes(market.events)
    labels = make_labels(features.rows, table, settings.labels, 4.0, settings.features.max_age_ms)
    model = fit_direction(features.x, labels, features.feature_set, settings)
    return Predictor(publish(model, folder, "bench", 1, {}))


def by_message(market, stops):
    "The live path of features: one push a message"
    stream, start = FeatureStream(market.instrument), 0
    for stop in stops:
        stream.push(market.events, start, stop)
        start = stop


def one_by_one(call, x):
    "Ask about each row by itself"
    for row in x:
        call(row)


def main(folder):
    given = options(__doc__, hours=1.0)
    settings = load_settings(environment={})
    market = synthetic_market(duration_s=given.hours * 3600)
    events, features = market.events, build_features(market.events, market.instrument)
    predictor = trained(market, features, settings, folder)
    x = np.ascontiguousarray(features.x[features.n_nan == 0][:1000])
    booster = lightgbm.Booster(model_str=predictor.model.text)
    p, edge = predictor.predict(np.nan_to_num(features.x))
    rules = rules_from(settings, market.instrument)
    trade = partial(
        run_backtest,
        events,
        features,
        p,
        edge,
        rules,
        initial_equity_quote=1e4,
        latency_ns=50_000_000,
    )
    stops = np.append(message_starts(events)[1:], len(events)).tolist()
    cases = {
        "make a market": lambda: synthetic_market(duration_s=given.hours * 3600),
        "features, all at once": lambda: build_features(events, market.instrument),
        "features, by message": lambda: by_message(market, stops),
        "decisions": trade,
        "predict one row": lambda: one_by_one(predictor.predict_row, x),
        "Booster.predict": lambda: one_by_one(lambda r: booster.predict(r[None], num_threads=1), x),
    }
    took = take_turns(cases, given.rounds)
    rows = [
        rate_row("make a market", took, "make a market", len(events), "M events/s", 0.4),
        rate_row(
            "features, all at once", took, "features, all at once", len(events), "M events/s", 5
        ),
        rate_row(
            "features, by message",
            took,
            "features, by message",
            len(stops),
            "k messages/s",
            100,
            scale=1e3,
        ),
        rate_row(
            "decisions in a backtest",
            took,
            "decisions",
            len(features),
            "k decisions/s",
            17,
            scale=1e3,
        ),
        rate_row(
            "predict one row",
            took,
            "predict one row",
            len(x),
            "k rows/s",
            4,
            "Booster.predict",
            scale=1e3,
        ),
    ]
    show(header("numpy", "numba", "lightgbm", n_events=len(events)), rows, given.json)


if __name__ == "__main__":
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
