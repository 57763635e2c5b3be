"""The clock: exact text, and a replay that cannot go back."""

from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tradebook.base.clock import NS_PER_S, SimulatedClock, parse_utc, utc_text
from tradebook.base.errors import DataError

LAST = 253_402_300_799 * NS_PER_S  # the end of the year 9999


@given(st.integers(-62_135_596_800 * NS_PER_S, LAST))
def test_there_and_back_is_exact(ns):
    assert parse_utc(utc_text(ns)) == ns


@given(st.datetimes(timezones=st.timezones()))
def test_it_reads_what_datetime_writes(at):
    text = at.isoformat()
    if len(text[19:].lstrip(".0123456789")) != 6:  # a historic zone with seconds in its offset
        return
    try:
        ours = parse_utc(text)
    except DataError:  # beyond the calendar after moving to UTC
        assert at.year in (1, 9999)
        return
    assert abs(ours - at.timestamp() * 1e9) <= max(1000, abs(ours) * 1e-15)


@pytest.mark.parametrize(
    "text", ["", "now", "2026-01-06T09:00", "09:00:00Z", "2026-13-01", "2026-01-06T25:00Z", "2026-01-06T09:00.5Z",
             "2026-01-06T09:00:00.1234567890Z", "1767690000"],
)  # fmt: skip
def test_a_vague_time_is_refused(text):
    with pytest.raises(DataError, match="time"):
        parse_utc(text)


def test_text_sorts_as_time_within_a_second():
    assert utc_text(1) < utc_text(2) < utc_text(10)
    assert datetime.fromisoformat(utc_text(5 * NS_PER_S)).timestamp() == 5


@given(st.lists(st.integers(0, 10**18), min_size=1))
def test_a_simulated_clock_only_goes_forward(times):
    clock = SimulatedClock(0)
    for ns in times:
        if ns < clock.now_ns():
            before = clock.now_ns()
            with pytest.raises(DataError, match="in order of ts_recv"):
                clock.advance_to(ns)
            assert clock.now_ns() == before
        else:
            clock.advance_to(ns)
            assert clock.now_ns() == ns
