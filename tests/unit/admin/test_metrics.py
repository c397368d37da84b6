"""Tests the metrics against the parser that Prometheus' own client has."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from greenconsume.admin.metrics import BUCKETS, exposition
from greenconsume.admin.status import LagStatus
from greenconsume.tally import BOUNDS, PublishTally, Timings
from tests.unit.admin.fakes import consumer, link, process


def parsed(status):
    text = exposition(status).decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def samples(status, name):
    found = parsed(status)
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in found.values()
        for sample in family.samples
        if sample.name == name
    }


def test_counters_and_gauges_carry_consumer_and_queue():
    status = process(consumer(received=5, in_progress=2, queues=("a", "b")))
    labels = (("consumer", "Orders-1"), ("queue", "a,b"))
    name = "greenconsume_received_messages_total"
    assert samples(status, name) == {(name, *labels): 5}
    name = "greenconsume_received_messages_in_process"
    assert samples(status, name) == {(name, *labels): 2}


def test_outcomes_and_errors_are_told_apart():
    status = process(consumer(outcomes={"ok": 7, "failed": 1}, errors={"ValueError": 1}))
    name = "greenconsume_received_processed_messages_total"
    assert {dict(key[1:])["status"]: value for key, value in samples(status, name).items()} == {
        "ok": 7,
        "failed": 1,
    }
    name = "greenconsume_received_processed_messages_exceptions_total"
    (key,) = samples(status, name)
    assert dict(key[1:])["exception_type"] == "ValueError"


def test_a_histogram_has_growing_buckets_a_count_and_a_sum():
    timings = Timings(now=0.0)
    for seconds in (0.001, 0.2, 400.0):
        timings.note(0.0, seconds)
    status = process(consumer(timings=timings), lag=LagStatus(timings=timings))
    for name in (
        "greenconsume_received_processed_messages_duration_seconds",
        "greenconsume_hub_lag_seconds",
    ):
        family = parsed(status)[name]
        assert family.type == "histogram"
        buckets = [s.value for s in family.samples if s.name.endswith("_bucket")]
        assert len(buckets) == len(BUCKETS) + 1
        assert buckets == sorted(buckets)
        assert buckets[-1] == 3
        assert [s.value for s in family.samples if s.name.endswith("_count")] == [3]


def test_links_and_what_is_published_carry_the_broker_without_its_password():
    tally = PublishTally("amqp://guest:**@host//")
    for _ in range(3):
        tally.note(0.0, None)
    status = process(links=(link(blocked=True, reconnects=2),), published=(tally,))
    name = "greenconsume_link_blocked"
    (key,) = samples(status, name)
    assert dict(key[1:])["broker"] == "amqp://guest:**@127.0.0.1//"
    name = "greenconsume_published_messages_total"
    assert list(samples(status, name).values()) == [3]


def test_what_would_break_the_text_is_escaped():
    odd = 'a"b\\c\nd'
    status = process(consumer("Orders-1", queues=(odd,)))
    (key,) = samples(status, "greenconsume_waiting_messages")
    assert dict(key[1:])["queue"] == odd


def test_the_bounds_of_the_histograms_are_kept_exactly():
    assert set(BUCKETS) <= set(BOUNDS)
