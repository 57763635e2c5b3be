"""Record a rehearsal exchange while something breaks every few seconds; every hole must have its fault.

    python benchmarks/soak.py [MINUTES] [SEED] [--venue=kraken] [--each | --no-faults]

Prints each fault, the memory of the recording process each half minute, and at the end what every hole was.
With --each every fault happens once, in order, spread over the time; otherwise they are drawn.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter

from tradebook.collector.incidents import incident_file, read_incidents

PERPETUALS = {"BTC/USDT:USDT": "BTCUSDT", "ETH/USDT:USDT": "ETHUSDT"}
SYMBOLS = {  # by the venue's own names, as faults call them
    "bybit": PERPETUALS,
    "binance": PERPETUALS,
    "kraken": {"BTC/USDT": "XBT/USDT", "ETH/USDT": "ETH/USDT"},
}
FAULTS = [  # code, fields; the seconds are longer than the bound that must find them
    ("drop", {}), ("drop", {"count": 3}), ("duplicate", {"count": 5}), ("reorder", {}), ("malformed", {}),
    ("cross_book", {"count": 30}), ("silence", {"until": "resubscribe"}), ("silence", {"until": "reconnect"}),
    ("freeze_book", {"seconds": 8}), ("freeze_timestamps", {"seconds": 6}), ("late_snapshot", {"seconds": 5}),
    ("restart_numbering", {}), ("close", {}), ("abort", {}), ("half_open", {}), ("clock_skew", {"seconds": 5}),
    ("burst", {"seconds": 3, "value": 10}), ("slow", {"seconds": 4, "value": 300}),
    ("accept_then_close", {"seconds": 4}), ("rate_limit", {"seconds": 5, "way": "both"}),
    ("checksum", {}), ("checksum", {"way": "sum"}),
]  # fmt: skip
OF_SOCKETS = ("close", "abort", "half_open", "rate_limit")  # these hit every symbol of a socket
OF_SUMMED = {  # more of it, where times and sums stand for numbers
    "SEQ_GAP": {"cross_book", "clock_skew", "freeze_timestamps"},
}
OF_ALL = {"kraken": ("malformed",)}  # unnumbered: what cannot be read may have been of any book
CAUSED_BY = {  # which faults may lead to which cause of a hole
    "SEQ_GAP": {"drop", "reorder", "malformed"},
    "CHECKSUM_BAD": {"checksum", "drop", "reorder", "late_snapshot"},
    "FRAME_MALFORMED": {"malformed"},
    "WS_SILENT": {"silence", "half_open", "freeze_book", "rate_limit", "accept_then_close"},
    "NEVER_STARTED": {"silence", "late_snapshot"},
    "SNAPSHOT_FAILED": {"silence", "late_snapshot"},
    "BOOK_FROZEN": {"freeze_book", "silence", "half_open"},
    "TIMES_FROZEN": {"freeze_timestamps", "clock_skew"},
    "CROSSED_BOOK": {"cross_book", "malformed", "freeze_book"},
    "WS_CLEAN_END": {"close", "accept_then_close"},
    "WS_LOST": {"abort", "silence", "accept_then_close"},
    "WS_HALF_OPEN": {"half_open"},
}


def command(*words):
    "Start the command line in a process of its own"
    return subprocess.Popen(
        [sys.executable, "-m", "tradebook", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def post(url, body):
    "Break something; None for what this wire cannot have"
    request = urllib.request.Request(f"{url}/rehearsal/fault", json.dumps(body).encode())
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        print(f"         refused: {json.load(error)['error']}", flush=True)
        return None


def memory_mib(pid):
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmRSS"))


def main(minutes=15.0, seed=7, has_faults=True, venue="bybit", is_each=False):
    chance, seconds, symbols = random.Random(seed), minutes * 60, SYMBOLS[venue]
    exchange = command(
        "rehearse", "--venue", venue, "--port", "0", "--speed", "4x", "--for", f"{seconds + 120:.0f}s",
        "--json",
    )  # fmt: skip
    url = json.loads(exchange.stderr.readline())["url"]
    root = tempfile.mkdtemp(prefix="soak-")
    recording = command(
        "collect", "--venue", venue, "--symbols", ",".join(symbols), "--streams", "book,trade", "--for",
        f"{seconds:.0f}s", "--at", url, "--data", root, "--set", "collector.segment_s=60", "--json",
    )  # fmt: skip
    began, memory, next_fault, next_look = time.time(), [], time.time() + 15, 0.0
    n_faults = 0
    while recording.poll() is None:
        now = time.time()
        if now >= next_look:
            next_look = now + 30
            memory.append(memory_mib(recording.pid))
            print(f"{now - began:6.0f} s  {memory[-1]:7.1f} MiB", flush=True)
        if has_faults and now >= next_fault and now < began + seconds - 45:
            next_fault = (
                now + (seconds - 60) / len(FAULTS) if is_each else now + chance.uniform(8, 20)
            )
            if is_each and n_faults == len(FAULTS):
                continue
            code, fields = FAULTS[n_faults] if is_each else chance.choice(FAULTS)
            n_faults += 1
            symbol = chance.choice(list(symbols.values()))
            made = post(url, {"code": code, "symbol": symbol, **fields})
            if made is None:
                next_fault = now  # another one at once
            else:
                print(
                    f"{now - began:6.0f} s  {made['number']:3} {code} {symbol} {fields}", flush=True
                )
        time.sleep(0.2)
    out, err = recording.communicate()
    with urllib.request.urlopen(f"{url}/rehearsal/faults", timeout=5) as answer:
        faults = json.load(answer)
    exchange.terminate()
    exchange.communicate(timeout=20)
    if recording.returncode:
        sys.exit(f"the recording failed: {err}")
    account = json.loads(out)
    print(json.dumps({s: row for s, row in account["symbols"].items()}, indent=1))
    checked = command("data", "check", "--data", root, "--json").communicate(timeout=300)[0]
    report(root, venue, faults, json.loads(checked), memory)


def report(root, venue, faults, checked, memory):
    "Set every hole beside the faults that were acting"
    tally, without, of_all = Counter(), [], OF_SOCKETS + OF_ALL.get(venue, ())
    for symbol, id in SYMBOLS[venue].items():
        for row in read_incidents(incident_file(root, venue, symbol)):
            if "also" not in row:
                continue
            end = lambda f: (f["stop_ns"] or 2**63) + 40_000_000_000  # noqa: E731 what it broke heals later
            acting = [
                f for f in faults if f["start_ns"] <= row["until_ns"] and end(f) >= row["ts_ns"]
            ]
            mine = [f for f in acting if f["symbol"] in ("", id) or f["code"] in of_all]
            causes = CAUSED_BY.get(row["code"], set())
            if venue in OF_ALL:
                causes = causes | OF_SUMMED.get(row["code"], set())
            found = [f["code"] for f in mine if f["code"] in causes]
            tally[row["code"], found[-1] if found else "NO FAULT"] += 1
            if not found:
                without.append((symbol, row, [f["code"] for f in acting]))
    print(f"\n{len(faults)} faults: {dict(Counter(f['code'] for f in faults))}")
    for (code, fault), n in sorted(tally.items()):
        print(f"{n:4} holes {code:<18} after {fault}")
    for symbol, row, acting in without:
        print("WITHOUT A FAULT", symbol, row, acting)
    print("data check:", json.dumps(checked, indent=1)[:3000])
    if len(memory) > 4:
        first, last = memory[len(memory) // 3], memory[-1]
        print(
            f"memory: {first:.1f} MiB after a third, {last:.1f} MiB at the end ({last - first:+.1f})"
        )
    print("every hole has its fault" if not without else f"{len(without)} holes WITHOUT a fault")


if __name__ == "__main__":
    words = [w for w in sys.argv[1:] if not w.startswith("--")]
    main(
        *(float(w) if i == 0 else int(w) for i, w in enumerate(words)),
        has_faults="--no-faults" not in sys.argv,
        is_each="--each" in sys.argv,
        venue=next((w[8:] for w in sys.argv if w.startswith("--venue=")), "bybit"),
    )
