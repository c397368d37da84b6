"""Tests what one consumer's numbers are, and that the last minute is the last minute."""

from __future__ import annotations

import pytest

from greenconsume.tally import BOUNDS, MAX_ERRORS, OTHER_ERRORS, Tally, Timings


def test_quantiles_are_those_of_what_was_noted_to_a_quarter():
    timings = Timings(now=0.0)
    for number in range(1, 1001):
        timings.note(1.0, number / 1000)
    minute = timings.last_minute(now=2.0)
    assert minute.count == 1000
    assert minute.quantile(0.5) == pytest.approx(0.5, rel=0.25)
    assert minute.quantile(0.99) == pytest.approx(0.99, rel=0.25)


def test_without_anything_noted_there_is_no_quantile_and_no_rate():
    minute = Timings(now=0.0).last_minute(now=100.0)
    assert minute.quantile(0.5) is None
    assert minute.rate == 0


def test_the_rate_is_that_of_the_last_minute_not_of_the_whole_time():
    timings = Timings(now=0.0)
    for second in range(600):
        for _ in range(10 if second < 500 else 2):
            timings.note(float(second), 0.01)
    assert timings.last_minute(now=600.0).rate == pytest.approx(2, rel=0.2)


def test_what_was_before_a_long_silence_is_not_of_the_last_minute():
    timings = Timings(now=0.0)
    timings.note(1.0, 0.01)
    assert timings.last_minute(now=2.0).count == 1
    assert timings.last_minute(now=300.0).count == 0
    timings.note(600.0, 0.01)
    assert timings.last_minute(now=601.0).count == 1


def test_a_rate_counts_from_the_start_while_there_is_no_whole_minute():
    timings = Timings(now=100.0)
    for _ in range(50):
        timings.note(104.0, 0.01)
    assert timings.last_minute(now=105.0).rate == pytest.approx(10)


def test_buckets_count_what_is_no_longer_than_their_bound():
    timings = Timings(now=0.0)
    for seconds in (0.005, 0.0051, 0.2, 5000.0):
        timings.note(0.0, seconds)
    places = [BOUNDS.index(bound) for bound in (0.005, 0.01, 0.25, 10.0)]
    assert timings.cumulative(places) == [1, 2, 3, 3, 4]
    assert timings.count == 4
    assert timings.total == pytest.approx(5000.2101)


def test_the_bounds_grow():
    assert list(BOUNDS) == sorted(set(BOUNDS))


def test_errors_are_counted_by_class_and_the_number_of_classes_is_bounded():
    tally = Tally()
    for number in range(MAX_ERRORS + 5):
        tally.count_failure(type(f"Error{number}", (Exception,), {})(), timed_out=False)
    tally.count_failure(type("Error0", (Exception,), {})(), timed_out=True)
    assert (tally.failed, tally.timed_out) == (MAX_ERRORS + 5, 1)
    assert tally.errors["Error0"] == 2
    assert tally.errors[OTHER_ERRORS] == 5
    assert len(tally.errors) == MAX_ERRORS + 1


def test_times_are_kept_only_when_somebody_watches():
    tally = Tally()
    assert tally.timings is None
    tally.watch()
    timings = tally.timings
    tally.watch()
    assert tally.timings is timings
