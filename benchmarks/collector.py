"""A recording of order-book messages from a socket to the disk, beside ccxt.pro and beside websockets with gzip.

A server on one core writes prepared orderbook.50 messages as fast as they are read. Each client has another core to
itself, in a process of its own: the whole collector (sockets, decoding, checks, raw frames and events to disk), what
ccxt.pro's watch_order_book absorbs without keeping anything, and the usual recorder: websockets, json, gzip.open.
The whole takes two minutes on two free cores. No run lasts longer than RUN_S, and no round begins after --most-s
seconds: a machine that others use gives fewer rounds, and what a starved client lost is counted as lost.

    python benchmarks/collector.py [--json] [--rounds 3] [--messages 400000] [--most-s 150]
"""

import asyncio
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from common import header, options, show
from frames import bybit_frames

from tradebook.market.instruments import Instrument
from tradebook.market.synthetic import synthetic_market

SYMBOL = "BTC/USDT:USDT"
OF = Instrument("bybit", SYMBOL, 0.1, 0.001, 2.0, 5.5)
CORES = sorted(os.sched_getaffinity(0))
PEER_SHARE = 0.2  # The peers that are slow get this share of the messages
RUN_S = 45.0  # No run lasts longer


def cpu_s():
    "CPU seconds of this process so far, all threads"
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def write_frames(folder, n):
    "Make messages of a synthetic market, no trades among them"
    market = synthetic_market(duration_s=n / 6, seed=5)
    frames, _ = bybit_frames(market.events, OF)
    books = [f for f in frames if f.startswith(b'{"topic":"orderbook')][:n]
    for name, chosen in (("all", books), ("few", books[: int(n * PEER_SHARE)])):
        (folder / name).write_bytes(b"\n".join(chosen))
    return len(books), sum(map(len, books)) / len(books)


# What runs in a process of its own


def ours(port, n, folder, is_raw_kept):
    "The collector; time counts until everything is on disk"
    from tradebook.collector.session import Session, collect_live

    made, said = [], {}

    def make():
        made.append(
            Session(folder, "bybit", {SYMBOL: OF}, ("book",), address=f"http://127.0.0.1:{port}",
                    is_raw_kept=is_raw_kept)
        )  # fmt: skip
        said.update(cpu=cpu_s())
        threading.Thread(target=watch, daemon=True).start()
        return made[0]

    def watch():
        session = made[0]
        collector, feed = session.recorders[0].collectors[SYMBOL], session.feeds[0]
        while not feed.counts["n_frames"]:
            time.sleep(0.002)
        said.update(began=time.perf_counter())
        while collector.counts["n_messages"] < n and not is_lost(feed):
            time.sleep(0.01)
        said.update(seconds=time.perf_counter() - said["began"], cpu=cpu_s() - said["cpu"])
        session.stopped.set()

    def is_lost(feed):
        "The server says its snapshot once: behind a hole nothing can be stored"
        return feed.tallies[SYMBOL]["n_dropped"] or feed.shards[0].n_opened > 1

    account = collect_live(make, for_s=RUN_S, is_compacted=False)
    row, recorder = account["symbols"][SYMBOL], account["recorders"][0]
    size = {
        name: sum(p.stat().st_size for p in Path(folder, name).rglob("*") if p.is_file())
        for name in ("segments", "raw")
    }
    dropped = recorder.get("n_events_dropped", 0) + recorder.get("n_frames_dropped", 0)
    return {**said, "n": row["n_messages"], "gaps": row["n_gaps"], "dropped": dropped, **size}


def ccxt_pro(port, n):
    "ccxt.pro's own book, kept in memory only"
    import ccxt.pro

    from tradebook.venue.rehearsal_streams import ccxt_urls

    async def run():
        client = ccxt.pro.bybit({"urls": ccxt_urls(port), "newUpdates": True})
        market = client.safe_market_structure({
            "id": "BTCUSDT", "symbol": SYMBOL, "base": "BTC", "quote": "USDT", "settle": "USDT", "type": "swap",
            "swap": True, "spot": False, "future": False, "option": False, "contract": True, "linear": True,
            "inverse": False, "active": True, "precision": {"amount": 0.001, "price": 0.1},
        })  # fmt: skip
        client.set_markets([market])
        last, began = int(os.environ["LAST_MS"]), None
        try:
            while True:
                book = await client.watch_order_book(SYMBOL, 50)
                if began is None:
                    began, cpu = time.perf_counter(), cpu_s()
                if book["timestamp"] >= last:
                    return {"seconds": time.perf_counter() - began, "cpu": cpu_s() - cpu, "n": n}
        finally:
            await client.close()

    return asyncio.run(asyncio.wait_for(run(), RUN_S))


def usual(port, n, folder):
    "websockets, json to know the type, gzip.open with its usual level"
    import gzip

    import websockets

    async def run():
        url = f"ws://127.0.0.1:{port}/v5/public/linear"
        async with websockets.connect(url, compression=None, max_size=None) as socket:
            await socket.send(json.dumps({"op": "subscribe", "args": ["orderbook.50.BTCUSDT"]}))
            await socket.recv()
            began, cpu = time.perf_counter(), cpu_s()
            with gzip.open(Path(folder) / "raw.gz", "wb") as file:
                for _ in range(n):
                    frame = await socket.recv(decode=False)
                    json.loads(frame)
                    file.write(b"%d %s\n" % (time.time_ns(), frame))
            return {"seconds": time.perf_counter() - began, "cpu": cpu_s() - cpu, "n": n}

    return asyncio.run(asyncio.wait_for(run(), RUN_S))


def alone_on(core):
    "Give a process a core; its threads must take turns, which they never do under SCHED_FIFO"
    os.sched_setaffinity(0, {core})
    if os.sched_getscheduler(0) == os.SCHED_FIFO:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_getparam(0))


def one(case, folder, n):
    "Run one case: the server on one core, the client on another"
    few = int(n * PEER_SHARE)
    name, n = ("all", n) if case.startswith("ours") else ("few", few)
    here, last = (
        Path(__file__).parent,
        json.loads((folder / name).read_bytes().rsplit(b"\n", 1)[-1]),
    )
    env = {**os.environ, "PYTHONPATH": str(here), "LAST_MS": str(last["ts"])}
    with tempfile.TemporaryDirectory() as room:
        with subprocess.Popen(
            [sys.executable, here / "flood.py", folder / name, "0"], stdout=subprocess.PIPE, text=True,
            preexec_fn=lambda: alone_on(CORES[-1]),
        ) as server:  # fmt: skip
            try:
                port = server.stdout.readline().strip()
                done = subprocess.run(
                    [sys.executable, __file__, "--child", case, port, str(n), room],
                    capture_output=True, text=True, timeout=2 * RUN_S, env=env,
                    preexec_fn=lambda: alone_on(CORES[0]),
                )  # fmt: skip
            finally:
                server.terminate()
    if done.returncode:
        sys.exit(f"{case} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def delay(folder, rate=2000, seconds=20):
    "From receiving a message to another process reading it from disk: the longest and the median"
    from tradebook.collector.segments import SUFFIX, read_segment

    here, late = Path(__file__).parent, []
    seconds = min(seconds, (folder / "few").read_bytes().count(b"\n") / rate - 1)
    with tempfile.TemporaryDirectory() as room:
        with subprocess.Popen(
            [sys.executable, here / "flood.py", folder / "few", str(rate)], stdout=subprocess.PIPE, text=True
        ) as server:  # fmt: skip
            port = server.stdout.readline().strip()
            recording = subprocess.Popen(
                [sys.executable, __file__, "--child", "ours", port, str(10**9), room],
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(here)},
            )  # fmt: skip
            end = time.time() + 60
            while time.time() < end:
                for path in Path(room).rglob(f"*{SUFFIX}"):
                    if len(rows := read_segment(path)[0]):
                        end = min(end, rows["ts_recv"][0] / 1e9 + seconds)
                        late.append((time.time_ns() - int(rows["ts_recv"][-1])) / 1e9)
                time.sleep(0.05)
            recording.terminate()
            recording.wait(30)
            server.terminate()
    return max(late), statistics.median(late)


def main():
    args, began = options(__doc__, rounds=3, messages=400_000, most_s=150.0), time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        n, size = write_frames(folder, args.messages)
        one("ours", folder, n)  # compiles
        cases = ("ours", "ours-events", "ccxt.pro", "usual")
        runs = {case: [] for case in cases}
        for i in range(args.rounds):
            if i and time.monotonic() - began > args.most_s:
                break
            for case in cases:
                runs[case].append(one(case, folder, n))
        longest, usual_delay = delay(folder)

    def rate(case):
        return [r["n"] / r["seconds"] for r in runs[case]]

    def per_message(case):
        return [r["cpu"] / r["n"] for r in runs[case]]

    def row(name, mine, unit, goal, peer="", theirs=None, is_less=False):
        value, other = statistics.median(mine), statistics.median(theirs) if theirs else None
        ratio = statistics.median(b / a if is_less else a / b for a, b in zip(mine, theirs, strict=True)) if theirs else None  # noqa: E501  # fmt: skip
        ok = (value if ratio is None else ratio) >= goal
        return {"row": name, "ours": value, "peer": other, "peer_name": peer, "unit": unit, "ratio": ratio,
                "goal": goal, "ok": bool(ok)}  # fmt: skip

    lost = sum(r["dropped"] + r["gaps"] + n - r["n"] for r in runs["ours"] + runs["ours-events"])
    rows = [
        row("socket to disk, raw and events", rate("ours"), "messages/s", 50_000),
        row("socket to disk, events only", rate("ours-events"), "messages/s", 50_000),
        row("beside ccxt.pro's book", rate("ours"), "messages/s", 2, "ccxt.pro", rate("ccxt.pro")),
        row("CPU seconds a message", per_message("ours"), "s", 5, "websockets, gzip",
            per_message("usual"), is_less=True),
        {"row": "longest delay, written to readable", "ours": longest, "peer": usual_delay,
         "peer_name": "median", "unit": "s", "ratio": 2 / longest, "goal": 1, "ok": longest < 2},
        {"row": "messages dropped or torn", "ours": lost, "peer": None, "peer_name": "", "unit": "messages",
         "ratio": None, "goal": 0, "ok": lost == 0},
    ]  # fmt: skip
    facts = {"rounds": len(runs["ours"]), "messages": n, "bytes": f"{size:.0f} a message"}
    last = runs["ours"][-1]
    facts["on disk"] = f"{last['segments'] / n:.1f} + {last['raw'] / n:.1f} (raw) bytes a message"
    show(header("numpy", "numba", "picows", "ccxt", "websockets", **facts), rows, args.json)


def child(case, port, n, room):
    "Run a client and print what it measured"
    work = {
        "ours": lambda: ours(port, n, room, True),
        "ours-events": lambda: ours(port, n, room, False),
        "ccxt.pro": lambda: ccxt_pro(port, n),
        "usual": lambda: usual(port, n, room),
    }
    print(json.dumps(work[case]()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
    else:
        main()
