"""Decisions are total, fail closed, and mirror; money adds up whatever is traded."""

import math
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tradebook.base.causes import Cause
from tradebook.base.errors import RiskError
from tradebook.base.settings import load_settings
from tradebook.market.book import BOOK_LOCKED
from tradebook.market.instruments import instrument
from tradebook.policy.account import Account, apply_fill, mark
from tradebook.policy.decide import decide
from tradebook.policy.rules import rules_from
from tradebook.policy.views import MarketView, Prediction
from tradebook.venue.orders import Fill

S = 1_000_000_000
OF = instrument("synthetic", "SYN/USDT:USDT")
RULES = rules_from(load_settings(environment={}), OF)

tenths = st.integers(-4000, 4000).map(
    lambda n: n / 10
)  # bps, on a grid, so that no float ties arise
odds = st.one_of(
    st.sampled_from([0.0, 0.25, 0.375, 0.5, 0.625, 0.75, 1.0]),
    st.integers(0, 1024).map(lambda n: n / 1024),
)

distances = st.sampled_from([math.nan, 0.0, 0.3, 0.5, 0.500001, 7.0, 1000.0])
deaths = st.sampled_from([None, 0, 0, 0, 1, 9])
predictions = st.builds(Prediction, odds, tenths, distances, st.just(""), deaths, st.just(""))


@st.composite
def markets(draw, is_sound=False):
    "A market: sound ones can be acted on, the others have anything wrong"
    bid = draw(st.integers(590_000, 610_000))
    ask = bid + draw(st.integers(0 if is_sound else -2, 400))
    ts = draw(st.integers(10 * S, 10_000 * S))
    age = draw(st.integers(0, RULES.max_age_ns if is_sound else 3 * RULES.max_age_ns))
    status = BOOK_LOCKED * (bid == ask) if is_sound else draw(st.integers(0, 4))
    spread = (ask - bid) / ((ask + bid) / 2) * 1e4
    volatility = draw(st.sampled_from([0.0, 5.0, 150.0, 250.0]))
    n_nan = 0 if is_sound else draw(st.sampled_from([0, 0, 0, 3]))
    if n_nan:
        volatility = math.nan
    has_book = is_sound or draw(st.booleans())
    since = draw(st.sampled_from([1.0, 300.0]))
    return MarketView(
        ts, ts - age if has_book else 0, bid, ask, status, spread, volatility, since, n_nan
    )


@st.composite
def accounts(draw, ts):
    "An account: flat, long or short, rich or poor, with or without an order on its way"
    equity = draw(st.sampled_from([-5.0, 12.0, 10_000.0]))
    is_pending = draw(st.sampled_from([False, False, False, True]))
    lots = draw(st.sampled_from([0, 0, 33, -33]))
    if not lots:
        return Account(equity, is_order_pending=is_pending)
    entry = draw(st.integers(594_000, 606_000)) * OF.tick_size
    since = ts - draw(st.integers(0, 60)) * S
    best = draw(st.sampled_from([0.0, 20.0, 45.0]))
    return Account(equity, lots, entry, since, best, is_pending)


def upside_down(market, prediction, account, pivot):
    "The same situation with up for down: prices mirrored at a pivot, bid for ask, long for short"
    turned = market._replace(bid_ticks=pivot - market.ask_ticks, ask_ticks=pivot - market.bid_ticks)
    back = prediction and prediction._replace(
        p_up=1 - prediction.p_up, edge_bps=-prediction.edge_bps
    )
    price = pivot * OF.tick_size - account.entry_price if account.position_lots else 0.0
    return turned, back, replace(account, position_lots=-account.position_lots, entry_price=price)


@settings(max_examples=600, deadline=None)
@given(data=st.data())
def test_a_mirrored_situation_gives_the_mirrored_decision(data):
    market = data.draw(markets(is_sound=data.draw(st.booleans())))
    account = data.draw(accounts(market.ts))
    prediction = data.draw(st.none() | predictions)
    pivot = market.bid_ticks + market.ask_ticks
    if (
        account.position_lots
    ):  # a gain is counted in bps of its own entry, which a mirror moves: no ties
        ticks = market.bid_ticks if account.side > 0 else market.ask_ticks
        gain = account.side * (ticks * OF.tick_size / account.entry_price - 1) * 1e4
        edges = (-RULES.stop_loss_bps, RULES.take_profit_bps, account.best_bps - RULES.trailing_bps)
        assume(all(abs(gain - edge) > 1.5 for edge in edges))
    there = decide(market, prediction, account, RULES)
    back = decide(*upside_down(market, prediction, account, pivot), RULES)
    assert (there.cause, there.action, there.side) == (back.cause, back.action, -back.side)
    assert abs(there.size_lots - back.size_lots) <= 1
    unsigned = [(g.name, g.is_passed) for g in there.gates if g.name != "short"]
    assert unsigned == [(g.name, g.is_passed) for g in back.gates if g.name != "short"]


@settings(max_examples=600, deadline=None)
@given(data=st.data())
def test_every_situation_has_a_cause_and_fails_closed(data):
    market = data.draw(markets())
    account = data.draw(accounts(market.ts))
    prediction = data.draw(st.none() | predictions)
    rules = RULES._replace(is_frozen=data.draw(st.booleans()))
    v = decide(market, prediction, account, rules)
    assert isinstance(v.cause, Cause)
    if v.action == "none":
        assert v.size_lots == 0
    if v.action == "enter":
        assert (
            account.position_lots == 0 and not account.is_order_pending and account.equity_quote > 0
        )
        assert prediction and not rules.is_frozen and v.cause is Cause.ENTER
        assert market.ts_book and market.age_ns <= rules.max_age_ns and market.status <= BOOK_LOCKED
        assert market.n_nan == 0 and v.gates and all(g.is_passed for g in v.gates)
        assert not prediction.n_dead and not prediction.outside > rules.max_outside
        assert v.side * prediction.edge_bps >= v.cost_bps + rules.min_edge_bps - 1e-9
        worth = v.size_lots * OF.lot_size * OF.price(market.ask_ticks)
        cap = rules.max_position_fraction * account.equity_quote
        assert OF.min_notional_quote <= worth <= cap * 1.05
    if v.action == "exit":
        assert v.size_lots == abs(account.position_lots) and v.side == -account.side
        assert not account.is_order_pending
    if v.gates and v.action == "none":
        shut = [g.cause for g in v.gates if not g.is_passed]
        assert (
            v.cause is shut[0] if shut else v.cause in (Cause.SIZE_BELOW_MINIMUM, Cause.NO_BALANCE)
        )


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_gate_holds_an_exit_back(data):
    market = data.draw(markets(is_sound=True))
    account = replace(data.draw(accounts(market.ts)), is_order_pending=False)
    assume(account.position_lots)
    free = decide(market, None, account, RULES)
    shut = RULES._replace(
        is_frozen=True,
        max_spread_bps=-1.0,
        max_volatility_bps=-1.0,
        min_edge_bps=1e9,
        min_confidence=0.5,
        standing_block=Cause.MODEL_EXPIRED,
    )
    broken = market._replace(n_nan=7, volatility_bps=math.nan)
    wild = Prediction(0.5, 0.0, 1000.0, "spread_bps was 9", 44, "spread_bps stood still")
    held = decide(broken, data.draw(st.sampled_from([None, wild])), account, shut)
    assert (free.cause, free.action, free.side, free.size_lots) == (
        held.cause,
        held.action,
        held.side,
        held.size_lots,
    )


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_stale_or_broken_book_never_triggers_a_price_exit(data):
    market = data.draw(markets())
    account = replace(data.draw(accounts(market.ts)), is_order_pending=False)
    assume(account.position_lots)
    is_bad = market.ts_book == 0 or market.age_ns > RULES.max_age_ns or market.status > BOOK_LOCKED
    assume(is_bad)
    cause = decide(market, None, account, RULES).cause
    assert cause not in (Cause.EXIT_STOP, Cause.EXIT_PROFIT, Cause.EXIT_TRAILING)


@settings(max_examples=200, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from([1, -1]), st.integers(1, 500), st.integers(590_000, 610_000)),
        max_size=40,
    )
)
def test_equity_is_start_plus_gross_minus_fees_and_equals_the_cash(steps):
    account, cash, lots = Account(10_000.0), 10_000.0, 0
    for n, (side, size, ticks) in enumerate(steps):
        price = float(OF.price(ticks))
        notional = price * size * OF.lot_size
        fill = Fill(f"x{n}", OF.symbol, side, size, price, notional, notional * 2e-4, n, n)
        if (lots + side * size) * lots < 0:  # would turn over
            with pytest.raises(RiskError):
                apply_fill(account, fill, OF)
            continue
        account = apply_fill(account, fill, OF)
        lots, cash = lots + side * size, cash - side * notional - fill.fee_quote
        assert account.position_lots == lots
        assert account.equity_quote == pytest.approx(
            10_000 + account.gross_quote - account.fees_quote, abs=1e-6
        )
        held = lots * OF.lot_size * account.entry_price
        assert account.equity_quote == pytest.approx(cash + held, abs=1e-5)
    if lots == 0:
        assert (account.entry_price, account.ts_entry, account.best_bps) == (0.0, 0, 0.0)


@settings(max_examples=100, deadline=None)
@given(
    bids=st.lists(st.integers(598_000, 604_000), min_size=2, max_size=20),
    side=st.sampled_from([1, -1]),
)
def test_the_best_gain_is_the_best_ever_seen(bids, side):
    account = Account(10_000.0, side * 10, 60_000.0)
    gains = [0.0]
    for n, bid in enumerate(bids):
        market = MarketView(n, n, bid, bid + 1, 0, 0.02, 5.0, 300.0, 0)
        account = mark(account, market, OF)
        price = (bid if side > 0 else bid + 1) * 0.1
        gains.append(side * (price / 60_000 - 1) * 1e4)
        assert account.best_bps == pytest.approx(max(gains), abs=1e-6)
