"""Outcomes: the same for traded and blocked, a mirror mirrors, holes hide, and it agrees with a slow reference."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tradebook.base.errors import DataError
from tradebook.learning.outcomes import candidates, outcomes
from tradebook.market.quotes import QUOTE, quotes
from tradebook.market.synthetic import synthetic_market

S = 10**9
COST, HORIZON = 4.0, 10.0


def made_quotes(seed, n=200):
    "A walk of the best quotes, about one a second"
    rng = np.random.default_rng(seed)
    table = np.zeros(n, QUOTE)
    table["ts_recv"] = np.cumsum(rng.integers(S // 2, 3 * S // 2, n))
    table["bid_ticks"] = 10_000 + np.cumsum(rng.integers(-3, 4, n))
    table["ask_ticks"] = table["bid_ticks"] + rng.integers(0, 3, n)  # locked at times
    table["bid_lots"] = table["ask_lots"] = 1
    return table


def decision(table, i, side, **more):
    "A decision made on quote i"
    row = {"n": i, "symbol": "S", "ts_decided": int(table["ts_recv"][i]), "side": side}
    row |= {
        "price_ticks_bid": int(table["bid_ticks"][i]),
        "price_ticks_ask": int(table["ask_ticks"][i]),
    }
    return {**row, "cause": "EDGE_BELOW_COST", "action": "none", **more}


def slow(table, row):
    "What the trade would have made, by looking"
    t = row["ts_decided"]
    i = np.flatnonzero(table["ts_recv"] <= t)[-1]
    j = np.flatnonzero(table["ts_recv"] <= t + int(HORIZON * S))[-1]
    bid_0, ask_0, bid_1, ask_1 = (
        float(x)
        for x in (
            table["bid_ticks"][i],
            table["ask_ticks"][i],
            table["bid_ticks"][j],
            table["ask_ticks"][j],
        )
    )
    mid = (bid_0 + ask_0) / 2
    gross = row["side"] * ((bid_1 + ask_1) / 2 - mid) / mid * 1e4
    left = bid_1 - ask_0 if row["side"] > 0 else bid_0 - ask_1
    return gross, left / mid * 1e4 - COST


@given(seed=st.integers(0, 10**6), side=st.sampled_from([1, -1]), i=st.integers(0, 150))
def test_agrees_with_looking(seed, side, i):
    table = made_quotes(seed)
    row = decision(table, i, side)
    found = outcomes([row], table, HORIZON, COST).iloc[0]
    gross, net = slow(table, row)
    assert np.isclose(found.gross_bps, gross) and np.isclose(found.net_bps, net)
    assert found.net_bps <= found.gross_bps - COST + 1e-9, "the spread can only cost"


@given(seed=st.integers(0, 10**6), i=st.integers(0, 150))
def test_both_sides_together_pay_two_costs_and_two_spreads(seed, i):
    table = made_quotes(seed)
    found = outcomes([decision(table, i, 1), decision(table, i, -1)], table, HORIZON, COST)
    assert np.isclose(found.gross_bps.sum(), 0) and found.net_bps.sum() <= -2 * COST + 1e-9


def test_blocked_and_traded_get_the_same_outcome():
    table = made_quotes(1)
    rows = [decision(table, 20, 1), decision(table, 20, 1, cause="ENTER", action="enter")]
    found = outcomes(rows, table, HORIZON, COST)
    assert found.net_bps.nunique() == 1 and found.is_executed.tolist() == [False, True]


@given(hole=st.integers(21, 28))
def test_a_hole_in_the_window_hides_the_outcome(hole):
    table = made_quotes(2)
    table["segment"][hole:] = 1
    assert np.isnan(outcomes([decision(table, 20, 1)], table, HORIZON, COST).net_bps[0])


def test_what_is_no_candidate_is_left_out():
    table = made_quotes(3)
    rows = [decision(table, 9, 1, action="exit"), decision(table, 8, 0), decision(table, 7, None)]
    assert candidates(rows) == [] and len(outcomes(rows, table, HORIZON, COST)) == 0


def test_decisions_on_another_market_are_refused():
    table = made_quotes(4)
    row = decision(table, 9, 1)
    row["price_ticks_bid"] -= 50
    with pytest.raises(DataError, match="rows and quotes must come from the same events"):
        outcomes([row], table, HORIZON, COST)


def test_the_planted_pressure_shows_in_the_outcomes():
    "Followed on the side of the hidden push, candidates earn before costs; on the other side they lose the same"
    market = synthetic_market(seed=4, duration_s=3600, strength=1.0)
    table = quotes(market.events)
    rows = []
    for t, pressure in zip(
        market.truth["ts"][60:-60:5], market.truth["pressure"][60:-60:5], strict=True
    ):
        i = int(np.searchsorted(table["ts_recv"], t, side="right")) - 1
        rows.append({**decision(table, i, 1 if pressure > 0 else -1), "ts_decided": int(t)})
    found = outcomes(rows, table, 30.0, COST)
    assert found.gross_bps.notna().mean() > 0.95
    assert 2.5 < found.gross_bps.mean() < 9.0
