"""Names of queues beside a queue: they always fit, and two queues never share one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kombu import Queue

from greenconsume import Requeue, Retry
from greenconsume.failures.delivery_limits import last_count, limit_of, version_of
from greenconsume.failures.queue_names import dead_letter_queue, retry_prefix
from greenconsume.failures.retry_queues import delay_queue

NEW = {"product": "RabbitMQ", "version": "4.0.5"}
OLD = {"product": "RabbitMQ", "version": "3.10.8"}


def test_a_name_that_fits_is_the_queues_own_and_ours_behind_it():
    assert dead_letter_queue("{queue}.dead", "orders") == "orders.dead"
    assert dead_letter_queue("graveyard", "orders") == "graveyard"
    assert delay_queue("orders", 1.5) == "orders.retry.1500"


@given(st.text(min_size=1, max_size=255).filter(lambda name: len(name.encode()) <= 255))
def test_whatever_a_queue_is_called_the_names_beside_it_are_taken(name):
    for beside in (dead_letter_queue("{queue}.dead", name), delay_queue(name, 4294967.0)):
        assert len(beside.encode()) <= 255
        assert not beside.startswith("amq.")
        assert beside != name


def test_two_long_names_that_begin_alike_get_different_queues():
    one, two = "x" * 250 + "a", "x" * 250 + "b"
    assert dead_letter_queue("{queue}.dead", one) != dead_letter_queue("{queue}.dead", two)
    assert retry_prefix(one) != retry_prefix(two)


@pytest.mark.parametrize("policy", [Requeue, Retry])
@pytest.mark.parametrize(
    ("name", "complaint"), [("", "another queue"), ("{queue}", "another"), ("x" * 200, "too long")]
)
def test_a_name_that_can_be_none_is_refused(policy, name, complaint):
    with pytest.raises(ValueError, match=complaint):
        policy(dead_letter=name)


@pytest.mark.parametrize("count", [1, 0, -1, 1.5, True])
def test_a_number_of_deliveries_that_makes_no_sense_is_refused(count):
    with pytest.raises(ValueError, match="max_deliveries"):
        Requeue(max_deliveries=count)


@pytest.mark.parametrize(
    ("arguments", "server", "limit"),
    [
        ({"x-delivery-limit": 5}, OLD, 5),
        ({"x-delivery-limit": 5}, NEW, 5),
        ({}, OLD, None),
        ({}, NEW, 20),
        (None, NEW, 20),
        ({"x-delivery-limit": 0}, NEW, 0),
        ({"x-delivery-limit": -1}, NEW, None),
        ({"x-delivery-limit": -1}, OLD, 0),
        ({"x-dead-letter-exchange": ""}, NEW, None),
        ({"x-delivery-limit": 5, "x-dead-letter-exchange": "dlx"}, OLD, None),
        ({}, {"product": "LavinMQ", "version": "4.0.5"}, None),
        ({}, {}, None),
    ],
)
def test_the_limit_is_the_queues_own_or_its_brokers(arguments, server, limit):
    assert limit_of(Queue("q", queue_arguments=arguments), server) == limit


@pytest.mark.parametrize(
    ("limit", "last"), [(20, 15), (8, 6), (5, 4), (3, 2), (2, 1), (1, 1), (0, 1)]
)
def test_a_quarter_of_the_ways_back_is_left(limit, last):
    assert last_count(limit) == last


def test_a_version_is_that_of_rabbitmq():
    assert version_of({"product": "RabbitMQ", "version": "4.1.0-rc.2"}) == (4, 1)
    assert version_of({"product": "RabbitMQ", "version": "unknown"}) == ()
