"""Tests that what a process tells of itself is so, on each kind of broker."""

from __future__ import annotations

import json

import gevent
import pytest
from kombu import Connection, Queue

from greenconsume import ConsumerMixin, ConsumerOptions, Publisher, Runtime
from greenconsume.admin.status import to_json
from tests.waiting import wait_until


@pytest.fixture(params=["amqp", "redis", "memory"])
def url(request):
    if request.param == "memory":
        return "memory://"
    return request.getfixturevalue("amqp_url" if request.param == "amqp" else "redis_url")


def test_a_consumer_shows_what_it_holds(url, queue_name):
    let = gevent.event.Event()

    class Orders(ConsumerMixin):
        options = ConsumerOptions(concurrency=2)

        def __init__(self, connection):
            self.connection = connection

        def get_consumers(self, Consumer, channel):
            return [Consumer([Queue(queue_name)], callbacks=[self.on_order])]

        def on_order(self, body, message):
            let.wait()
            message.ack()

    runtime = Runtime(url)
    runtime.spawn(Orders)
    with runtime, Publisher(url, routing_key=queue_name) as publisher:
        runtime.control.watch()
        for _ in range(6):
            publisher.publish({"order": 7})
        seen = lambda: runtime.control.status().consumers[0]  # noqa: E731
        wait_until(lambda: seen().in_progress == 2)
        consumer = json.loads(to_json(runtime.control.status()))["consumers"][0]
        assert consumer["queues"] == [queue_name]
        # Without an inbox nothing is taken ahead but the one that waits for a handler.
        wait_until(lambda: seen().unsettled >= (3 if url == "memory://" else 4))
        assert seen().prefetch > 0
        if url != "memory://":  # which has no link
            # Those of brokers that other tests had are not this one's.
            every = runtime.control.status().links
            links = [link for link in every if link.uri == publisher.uri]
            assert links
            assert all(link.up and not link.blocked for link in links)
        assert "amqp:" not in url or seen().oldest_unsettled is not None
        let.set()
        wait_until(lambda: seen().outcomes["ok"] == 6)
        wait_until(lambda: seen().unsettled == 0)
        (published,) = [
            each for each in runtime.control.status().published if each.uri == publisher.uri
        ]
        assert published.outcomes["confirmed"] >= 6
        assert "guest:guest" not in published.uri


@pytest.mark.parametrize("broker", ["amqp_url", "redis_url"])
def test_a_link_that_a_plain_connection_has_by_itself_is_shown_while_it_is_open(broker, request):
    url = request.getfixturevalue(broker)
    control = Runtime(url).control
    with Connection(url) as connection:
        uri = connection.as_uri()
        seen = lambda: [each for each in control.status().links if each.uri == uri]  # noqa: E731
        before = len(seen())
        connection.connect()
        assert len(seen()) == before + 1
        assert seen()[-1].up
        assert seen()[-1].sessions == 1
    wait_until(lambda: len(seen()) == before)
