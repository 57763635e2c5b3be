"""Starting: the feed begins with a true book, states follow their rule, a step that hangs is named."""

import itertools
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tradebook.base.causes import Cause
from tradebook.base.errors import DataError, SettingsError
from tradebook.base.journal import Journal
from tradebook.base.settings import load_settings
from tradebook.market.events import FLAG_LAST, KIND_GAP, make_events, message_starts
from tradebook.market.quotes import quotes
from tradebook.market.store import Store
from tradebook.market.synthetic import synthetic_market
from tradebook.trader.feed import StoreFeed, opening_snapshot
from tradebook.trader.session import trade_paper
from tradebook.trader.startup import StartupError, Step, run_steps
from tradebook.trader.states import SymbolState, classify, classify_universe

SEEN = ["ts_recv", "bid_ticks", "ask_ticks", "bid_lots", "ask_lots", "status"]


@pytest.fixture(scope="module")
def market():
    return synthetic_market(seed=5, duration_s=120)


def test_a_feed_that_begins_anywhere_sees_the_same_book(market, tmp_path):
    store = Store(tmp_path)
    store.write(market.events, market.instrument, "test")
    whole = quotes(market.events)
    starts = message_starts(market.events)
    for i in np.linspace(1, len(starts) - 2, 25).astype(int):
        at = int(market.events["ts_recv"][starts[i]])
        feed = StoreFeed(store, "synthetic", "SYN/USDT:USDT", at)
        late = quotes(feed.events)
        expected = whole[whole["ts_recv"] >= at][SEEN]
        assert (late[late["ts_recv"] >= at][SEEN] == expected).all()
        assert feed.events["ts_recv"][0] <= at and (np.diff(feed.events["ts_recv"]) >= 0).all()


def test_a_feed_never_opens_with_a_book_that_nobody_knew(market):
    "After a hole there is no book until the next snapshot, however much is known from before"
    half = market.events[: int(message_starts(market.events)[400])]
    ts = int(half["ts_recv"][-1]) + 10**9
    gap = make_events(ts_recv=ts, kind=KIND_GAP, size_lots=10**9, flags=FLAG_LAST)
    assert len(opening_snapshot(half)) > 50
    assert len(opening_snapshot(np.concatenate([half, gap]))) == 0


def test_the_opening_snapshot_knows_nothing_of_the_future(market):
    "Whatever comes after the moment, the snapshot is the same"
    cut = int(message_starts(market.events)[300])
    assert (
        opening_snapshot(market.events[:cut]) == opening_snapshot(market.events[:cut].copy())
    ).all()
    assert (
        opening_snapshot(market.events[:cut])["ts_recv"].max() <= market.events["ts_recv"][cut - 1]
    )


@given(has_model=st.booleans(), days=st.floats(0, 1000), least=st.floats(0, 1000))
def test_only_a_trained_symbol_with_enough_history_trades(has_model, days, least):
    state = classify(has_model, days, least)
    assert (state is SymbolState.TRAINED) == (has_model and days >= least)
    assert (state is SymbolState.UNTRAINED_SHORT_HISTORY) == (days < least)
    assert (state.cause is None) == (state is SymbolState.TRAINED)


def test_holes_do_not_count_as_history():
    day = 86_400 * 10**9
    row = {"venue": "v", "symbol": "S", "start_ns": 0, "end_ns": 10 * day, "coverage": 0.5}
    found = classify_universe([row], lambda *_: "m", 6.0)
    assert found[0].state is SymbolState.UNTRAINED_SHORT_HISTORY and found[0].history_days == 5


def test_a_hanging_step_is_cut_off_by_name():
    steps = [Step("one", "nothing", lambda f: 1), Step("two", "godot", lambda f: time.sleep(30))]
    begun, found = time.monotonic(), {}
    with pytest.raises(
        StartupError, match="'two' did not end within 0.3 s; it was waiting for godot"
    ) as e:
        run_steps(steps, 0.3, None, found)
    assert time.monotonic() - begun < 5 and e.value.step == "two" and found == {"one": 1}


def test_a_process_with_a_hanging_step_ends():
    "The thread that hangs must not keep the process alive"
    code = (
        "import time, sys\n"
        "from tradebook.trader.startup import Step, run_step\n"
        "try: run_step(Step('x', 'y', lambda f: time.sleep(60)), {}, 0.2)\n"
        "except Exception: sys.exit(9)"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=30)
    assert done.returncode == 9


def test_steps_run_in_order_and_stop_at_the_first_failure():
    ran = []

    def step(name, fails=False):
        def work(found):
            ran.append(name)
            if fails:
                raise DataError(f"{name} is empty")

        return Step(name, "data", work)

    with pytest.raises(DataError, match="b is empty"):
        run_steps([step("a"), step("b", fails=True), step("c")], 5)
    assert ran == ["a", "b"]
    with pytest.raises(SettingsError, match="different names"):
        run_steps([step("a"), step("a")], 5)


def session(root, market, **overrides):
    "One session on a small market without a model"
    chosen = load_settings(environment={}, overrides={"paths.data": str(root), **overrides})
    if not (root / "market").exists():
        Store(root / "market").write(market.events, market.instrument, "test")
    return trade_paper(chosen, "synthetic", "SYN/USDT:USDT")


def test_a_session_without_a_model_decides_and_opens_nothing(market, tmp_path):
    made = session(tmp_path, market)
    with Journal(tmp_path / "journal.db") as journal:
        causes = journal.count_by(made["run_id"], "cause")
        events = journal.events(made["run_id"])
    assert made["block"] == Cause.SYMBOL_UNTRAINED and made["n_orders"] == 0
    assert (
        causes.keys() <= {"SYMBOL_UNTRAINED", "NO_DATA"} and events[0]["code"] == "SYMBOL_UNTRAINED"
    )
    made = session(tmp_path, market, **{"trader.min_history_days": 3})
    assert made["block"] == Cause.SYMBOL_SHORT_HISTORY


def test_a_damaged_model_is_a_named_cause_and_no_crash(market, tmp_path):
    folder = tmp_path / "models" / "synthetic_SYN-USDT~USDT"
    folder.mkdir(parents=True)
    (folder / "current").write_text('{"version": "20260101T000000000000Z-00000000", "digest": "x"}')
    made = session(tmp_path, market)
    assert made["block"] == Cause.MODEL_CORRUPT and made["n_orders"] == 0 and made["detail"]


def test_a_start_that_overruns_its_deadline_is_on_record(market, tmp_path):
    with pytest.raises(StartupError, match="startup step '.*' did not end within 0.0001 s"):
        session(tmp_path, market, **{"trader.startup_deadline_s": 0.0001})
    session(tmp_path, market)  # and the next one starts
    with Journal(tmp_path / "journal.db") as journal:
        statuses = [r["status"] for r in journal.runs("paper")]
    assert statuses[0] == "ok"


def test_messages_of_a_feed_tile_its_events(market, tmp_path):
    store = Store(tmp_path)
    store.write(market.events, market.instrument, "test")
    pieces = list(StoreFeed(store, "synthetic", "SYN/USDT:USDT"))
    assert pieces[0][0] == 0 and pieces[-1][1] == len(market.events)
    assert all(a[1] == b[0] for a, b in itertools.pairwise(pieces))
