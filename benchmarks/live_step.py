"""The live step: one event at a time through a whole feature set, with what it waits for at the median and in the tail.

A trader lives on this path: an event arrives, the book and all windows take it in, and a row is written when one is
due. Measured per event, Python's call included, and again for the events at which a row falls due (one a second):
ten beats, the row, and a copy of it for the caller. The last rows give the account: the call with no event, and the
kernel alone on the same events in one batch. The bound is the one of the plan: under 10 us at the median.

    python benchmarks/live_step.py [--json] [--seconds 1200] [--events 60000]
"""

import time

import numpy as np
from common import header, options, show

from tradebook.features.messages import MessageStream
from tradebook.features.rows import FeatureStream, build_features
from tradebook.features.schema import feature_set
from tradebook.market.events import FLAG_LAST, message_starts
from tradebook.market.synthetic import synthetic_market

BOUND_US = 10.0


def one_by_one(push, ends):
    "Microseconds of each call, and whether it gave rows"
    took, gave, begin = np.empty(len(ends)), np.zeros(len(ends), bool), 0
    clock = time.perf_counter_ns
    for k, end in enumerate(ends):
        t = clock()
        rows = push(begin, end)
        took[k] = clock() - t
        gave[k] = rows > 0
        begin = end
    return took / 1e3, gave


def row(name, us, goal=None):
    "One line of the result: a time in microseconds, held to a bound where there is one"
    ok = goal is None or us <= goal
    shown = {"row": name, "ours": us, "peer": None, "peer_name": "", "unit": "us", "ratio": None}
    return {**shown, "goal": goal or float("inf"), "ok": bool(ok)}


def of_set(name, events, of, n):
    "The live step of one feature set"
    features = feature_set(name)
    stream = FeatureStream(of, features)
    warm = int(message_starts(events)[len(message_starts(events)) // 10])
    stream.push(events, 0, warm)
    rest = events[warm : warm + n]
    took, gave = one_by_one(lambda a, b: len(stream.push(rest, a, b)), range(1, len(rest) + 1))
    whole = f"{name}, {len(features)} columns"
    alone = []
    for _ in range(7):
        t = time.perf_counter()
        build_features(rest, of, features)
        alone.append((time.perf_counter() - t) / len(rest) * 1e6)
    return [
        row(f"{whole}: an event", float(np.median(took)), BOUND_US),
        row("  its 99th percentile", float(np.percentile(took, 99))),
        row("  an event with a row due", float(np.median(took[gave]))),
        row("  an event in one batch", float(np.median(alone))),
    ]


def of_messages(events, n):
    "The live step of the set with a row at every message"
    stream, starts = MessageStream(), message_starts(events)
    stream.push(events[: starts[100]])
    rest = events[starts[100] : starts[100] + n]
    ends = (np.flatnonzero(rest["flags"] & FLAG_LAST) + 1).tolist()
    took, _ = one_by_one(lambda a, b: len(stream.push(rest[a:b])[0]), ends)
    return [row("messages, 42 columns: a row each", float(np.median(took)), BOUND_US)]


def main():
    "Measure and print"
    args = options(__doc__, seconds=1_200, events=60_000)
    market = synthetic_market(seed=7, duration_s=args.seconds)
    events, of = market.events, market.instrument
    rows = []
    for name in ("default", "desk"):
        build_features(events, of, feature_set(name))  # compile
        rows += of_set(name, events, of, args.events)
    MessageStream().push(events[:10_000])
    rows += of_messages(events, args.events)
    stream = FeatureStream(of)
    stream.push(events, 0, 100)
    nothing, _ = one_by_one(lambda a, b: len(stream.push(events, 100, 100)), range(20_000))
    rows.append(row("the call alone, no event", float(np.median(nothing))))
    show(header("numpy", "numba", events=args.events), rows, args.json)


if __name__ == "__main__":
    main()
