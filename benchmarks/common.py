"""What every benchmark shares: runs that take turns, medians of ratios, one shape of result."""

import argparse
import gc
import json
import os
import platform
import statistics
import time
from importlib.metadata import version

os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def options(doc, **defaults):
    "Read the command line: --json, --rounds, and one option for each named default"
    parser = argparse.ArgumentParser(description=doc.strip().splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object a row")
    for name, value in {"rounds": 7, **defaults}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    return parser.parse_args()


def header(*packages, **facts):
    "Describe the machine, the versions and what is measured"
    return {
        "header": {
            "python": platform.python_version(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            **{name: version(name) for name in packages},
            **facts,
        }
    }


LEAST_S = 0.2  # A turn lasts at least so long: a second core takes some milliseconds to wake up


def seconds_of(case):
    "Seconds of one run: its own measure when it returns a float, else by the clock; what it made is let go"
    began = time.perf_counter()
    own = case()
    return own if isinstance(own, float) else time.perf_counter() - began


def take_turns(cases, rounds):
    "Seconds of each case in each round: all cases once a round, so that a busy moment hits them alike"
    took = {name: [] for name in cases}
    for case in cases.values():
        case()  # compile, fill caches
    for _ in range(rounds):
        for name, case in cases.items():
            gc.collect()
            turn, until = [], time.perf_counter() + LEAST_S
            while not turn or time.perf_counter() < until:
                turn.append(seconds_of(case))
            took[name].append(statistics.fmean(turn))
    return took


def rate_row(row, took, ours, n, unit, goal, peer=None, scale=1e6):
    "One result as a rate, with the median of the rounds' own ratios when there is a peer"
    rate = statistics.median(n / scale / s for s in took[ours])
    result = {"row": row, "ours": rate, "peer": None, "peer_name": "", "unit": unit, "ratio": None}
    measured = rate
    if peer:
        result["peer"] = statistics.median(n / scale / s for s in took[peer])
        result["peer_name"] = peer
        pairs = zip(took[ours], took[peer], strict=True)
        measured = result["ratio"] = statistics.median(theirs / mine for mine, theirs in pairs)
    return {**result, "goal": goal, "ok": bool(measured >= goal)}


def show(head, rows, is_json):
    "Print the header and the rows, as JSON lines or as a table"
    if is_json:
        for line in (head, *rows):
            print(json.dumps(line))
        return
    print("  ".join(f"{k} {v}" for k, v in head["header"].items()))
    for r in rows:
        beside = ""
        if r["peer"] is not None:
            beside = f"{r['peer_name']} {r['peer']:.4g}, {r['ratio']:.1f} times"
        verdict = "ok" if r["ok"] else "NOT REACHED"
        print(
            f"{r['row']:34} {r['ours']:9.4g} {r['unit']:12} {beside:38} goal {r['goal']:g}: {verdict}"
        )
