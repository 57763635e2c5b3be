"""Numbers without floats, and continuity: nothing missing between two holes, and no break unseen."""

from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tradebook.base.errors import DataError
from tradebook.features.rows import build_features
from tradebook.market.events import (
    KIND_FUNDING,
    KIND_GAP,
    KIND_MARK,
    KIND_OPEN_INTEREST,
    KIND_TRADE,
    check_events,
    from_table,
    make_events,
    merge_events,
    to_table,
)
from tradebook.market.instruments import CATALOGUE
from tradebook.market.quotes import quotes
from tradebook.market.synthetic import synthetic_market
from tradebook.venue.continuity import Continuity
from tradebook.venue.wire import OffGridError, Step, parse_decimal, step_of

STEPS = [0.1, 0.01, 0.5, 0.25, 1e-05, 1e-08, 1.0, 5.0, 10.0, 0.0001]
decimals = st.decimals(
    min_value=0, max_value=10**9, places=8, allow_nan=False, allow_infinity=False
)


# --- numbers


@given(decimals, st.integers(0, 20))
def test_text_becomes_the_decimal_it_says(value, zeros):
    text = format(value, "f")
    text += "0" * min(zeros, 24 - 8) if "." in text else ""
    mantissa, power = parse_decimal(text)
    assert Decimal(mantissa).scaleb(power) == value


@given(st.text(alphabet="0123456789.eE+-_ xn١", max_size=12))
def test_what_counts_as_a_number_is_narrower_than_what_python_takes(text):
    try:
        mantissa, power = parse_decimal(text)
    except DataError:
        return
    assert Decimal(text) == Decimal(mantissa).scaleb(power)
    assert text.isascii() and not set(text) & set(" _+xn") - (
        {"+"} if "e" in text.lower() else set()
    )


@pytest.mark.parametrize("size", STEPS)
@given(count=st.integers(0, 10**9))
def test_whole_steps_come_back_and_nothing_else_passes(size, count):
    step, grid = step_of(size), Decimal(repr(size))
    assert step.units(format(count * grid, "f")) == count
    between = count * grid + grid / 3
    with pytest.raises(OffGridError):
        step.units(format(between, ".20f"))
    assert step.size(format(between, ".20f")) == max(count, 1)
    assert step.nearest(format(-between, ".20f")) == -count


@pytest.mark.parametrize("of", CATALOGUE.values(), ids=lambda of: f"{of.venue} {of.symbol}")
@given(ticks=st.integers(0, 2**31 - 1))
def test_the_wire_and_the_instrument_mean_the_same_ticks(of, ticks):
    step = step_of(of.tick_size)
    text = format(Decimal(ticks) * step.multiple / Decimal(10) ** step.decimals, "f")
    assert step.units(text) == ticks == of.to_ticks(float(text))


def test_steps_are_what_people_wrote():
    assert [step_of(s) for s in (0.5, 1e-08, 10.0)] == [Step(5, 1), Step(1, 8), Step(10, 0)]


# --- continuity


@st.composite
def numberings(draw):
    "A numbered stream with losses, repeats and swaps: (rule, messages); a message is (first, last, previous)"
    rule, known, messages = draw(st.sampled_from(["range", "previous"])), 100, []
    for step, skip in draw(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3)), max_size=25)):
        first = known + 1 + (skip if rule == "previous" else 0)  # futures skip ids
        messages.append((first, first + step - 1, known))
        known = first + step - 1
    faults = st.tuples(
        st.sampled_from(["drop", "repeat", "swap"]), st.integers(0, max(0, len(messages) - 1))
    )
    for fault, i in draw(st.lists(faults, max_size=4)):
        if i >= len(messages):
            continue
        if fault == "drop":
            del messages[i]
        elif fault == "repeat":
            messages.insert(i, messages[i])
        elif i + 1 < len(messages):
            messages[i], messages[i + 1] = messages[i + 1], messages[i]
    return rule, messages


@settings(deadline=None)
@given(numberings())
def test_between_two_gaps_nothing_is_missing_and_no_break_is_unseen(case):
    rule, messages = case
    line = Continuity(rule)
    line.begin(100, 1)
    chain, is_fresh = 100, True
    for first, last, previous in messages:
        follows = previous == chain
        verdict = line.check(first, last, previous)
        if verdict == "ok":
            assert follows or (is_fresh and first <= chain <= last)  # straddles the snapshot
            chain, is_fresh = last, False
        elif verdict == "duplicate":
            assert last <= chain
        else:
            assert verdict == "gap" and not follows and last > chain
            line.interrupt(2)
            line.begin(last, 2)  # a snapshot that contains this change
            chain, is_fresh = last, True


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ok break reset snapshot".split()), st.integers(0, 50))))
def test_the_holes_add_up_to_the_time_without_a_book(story):
    line, now, number, known_until, hole = Continuity("range"), 1000, 1, None, 0
    holes, alive = [], False
    for what, wait in story:
        now += wait
        if what == "snapshot":
            if not alive and known_until is not None:
                hole += now - known_until
            holes.append(line.begin(number, now))
            alive, known_until = True, now
        elif what == "ok" and alive:
            number += 1
            assert line.check(number, number) == "ok"
            line.seen(now)
            known_until = now
        elif what == "break":
            if alive:
                hole += now - known_until
                known_until = now
            holes.append(line.interrupt(now))
            alive = False
        elif what == "reset":
            line.reset()
            alive = False
    rows = np.concatenate([np.zeros(0, make_events(ts_recv=1).dtype), *holes])
    assert rows["size_lots"].sum() == hole
    check_events(rows)
    assert (rows["kind"] == KIND_GAP).all()


def test_a_restart_is_told_from_an_old_message():
    line = Continuity("range")
    line.begin(50, 1)
    assert [line.check(n, n) for n in (51, 40, 1, 52)] == ["ok", "duplicate", "restart", "ok"]
    assert dict(line.counts) == {"duplicate": 1, "restart": 1}


# --- the new kinds of events


@settings(max_examples=3, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_mark_funding_and_open_interest_change_no_quote_and_no_feature(seed):
    market = synthetic_market(seed=3, duration_s=120)
    rng = np.random.default_rng(seed)
    ends = market.events[market.events["flags"] & 1 == 1]
    at = np.sort(rng.choice(len(ends), 200))
    slow = make_events(
        ts_recv=ends["ts_recv"][at],
        kind=rng.choice([KIND_MARK, KIND_FUNDING, KIND_OPEN_INTEREST], 200),
        price_ticks=rng.integers(0, 10**6, 200),
        size_lots=rng.integers(0, 10**9, 200),
        flags=1,
    )
    slow["size_lots"][slow["kind"] == KIND_FUNDING] *= -1
    mixed = merge_events(market.events, slow)
    check_events(mixed)
    assert from_table(to_table(mixed)).tobytes() == mixed.tobytes()
    assert quotes(mixed).tobytes() == quotes(market.events).tobytes()
    plain = build_features(market.events, market.instrument)
    with_slow = build_features(mixed, market.instrument)
    assert with_slow.rows.tobytes() == plain.rows.tobytes()
    assert np.array_equal(with_slow.x, plain.x, equal_nan=True)
    assert (mixed["kind"] == KIND_TRADE).sum() == (market.events["kind"] == KIND_TRADE).sum()
