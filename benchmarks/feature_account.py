"""Where the time of a feature set goes: the book alone, each set, and each set without one of its groups.

Processor time, best of the rounds. The book is rebuilt from the same events; what a set costs beyond it is the copy of
ten levels at each message, the beats (ten a second) and the rows. A group that is left out shows its share, as far as
it can be left out: what the core's groups have in common is computed for any set.

    python benchmarks/feature_account.py [--json] [--seconds 3600] [--rounds 7]
"""

import json
import time

from common import header, options

from tradebook.features.rows import build_features
from tradebook.features.schema import feature_set
from tradebook.market.book import apply_events, new_book
from tradebook.market.synthetic import synthetic_market


def best_s(work, rounds):
    "Least processor time of several runs, after one to compile, seconds"
    work()
    took = []
    for _ in range(rounds):
        began = time.process_time()
        work()
        took.append(time.process_time() - began)
    return min(took)


def without(features, group):
    "The set without one group"
    from tradebook.features.columns import FAMILIES

    gone = {f.name for f in FAMILIES[group]}
    return features.only(*(name for name in features.names if name not in gone))


def main():
    "Measure and print"
    args = options(__doc__, seconds=3_600)
    market = synthetic_market(seed=7, duration_s=args.seconds)
    events, of = market.events, market.instrument
    cases = {"book alone": lambda: apply_events(new_book(), events, 0, len(events))}
    sets = {name: feature_set(name) for name in ("minimal", "default", "desk")}
    for name in ("default", "desk"):
        sets |= {f"{name} without {g}": without(sets[name], g) for g in sets[name].groups}
    for name, features in sets.items():
        label = f"{name}, {len(features)} columns"
        cases[label] = lambda fs=features: build_features(events, of, fs)
    head = header("numpy", "numba", events=len(events))
    print(json.dumps(head) if args.json else head["header"])
    for name, work in cases.items():
        seconds = best_s(work, args.rounds)
        row = {"row": name, "ns_event": seconds / len(events) * 1e9}
        row["M_events_s"] = len(events) / seconds / 1e6
        text = f"{name:42} {row['ns_event']:8.1f} ns/event {row['M_events_s']:8.1f} M events/s"
        print(json.dumps(row) if args.json else text)


if __name__ == "__main__":
    main()
