"""Failure policies on Redis: as on AMQP, with delays that pass in the server."""

from __future__ import annotations

import json
from time import monotonic
from typing import Any

import pytest

from greenconsume import DeadLetters, Requeue, Retry
from tests.integration.consumers import Recorder, consuming, green_connection
from tests.integration.redis.payloads import body_of, held_count, put
from tests.options import say
from tests.waiting import wait_until

pytestmark = pytest.mark.every_redis


class Failing(Recorder):
    """Fails a few times on each message, and notes when."""

    def __init__(self, url: str, queue: str, failures: int, on_error: Any, **options: Any) -> None:
        connection = green_connection(url, transport_options=options)
        super().__init__(connection, queue, self.fail)
        self.failures = failures
        self.times: list[float] = []
        say(self, on_error=on_error)

    def fail(self, body: Any, message: Any) -> None:
        self.times.append(monotonic())
        if len(self.times) <= self.failures:
            raise ValueError(f"failure {len(self.times)}")


def test_a_retry_waits_in_the_server(redis_url, server, queue_name):
    put(server, queue_name, "x")
    consumer = Failing(redis_url, queue_name, 2, Retry(delays=[0.3, 0.2]))
    with consuming(consumer):
        wait_until(lambda: server.zcard("_greenconsume.delayed_index") == 1)
        assert held_count(server) == 0
        [entry] = server.hvals("_greenconsume.delayed")
        assert body_of(entry.partition(b"\n")[2]) == "x"
        assert consumer.wait_for(1) == ["x"]
        wait_until(lambda: held_count(server) == 0)
    pauses = [b - a for a, b in zip(consumer.times, consumer.times[1:], strict=False)]
    assert 0.3 <= pauses[0] < 3.0
    assert 0.2 <= pauses[1] < 3.0
    assert server.exists("_greenconsume.delayed", "_greenconsume.delayed_index") == 0


def test_what_waits_comes_back_to_a_process_that_begins_later(redis_url, server, queue_name):
    put(server, queue_name, "x")
    with consuming(Failing(redis_url, queue_name, 1, Retry(delays=[0.5]))):
        wait_until(lambda: server.zcard("_greenconsume.delayed_index") == 1)
    assert server.llen(queue_name) == 0
    with consuming(consumer := Recorder(redis_url, queue_name)):
        assert consumer.wait_for(1) == ["x"]


def test_a_message_that_fails_too_often_is_kept_with_its_error(redis_url, server, queue_name):
    put(server, queue_name, "x")
    with consuming(Failing(redis_url, queue_name, 99, Retry(delays=[0.01, 0.01]))):
        wait_until(lambda: server.llen(f"{queue_name}.dead") == 1)
        wait_until(lambda: held_count(server) == 0)
    [dead] = server.lrange(f"{queue_name}.dead", 0, -1)
    headers = json.loads(dead)["headers"]
    assert headers["greenconsume-retries"] == 2
    assert headers["greenconsume-error"] == "failure 3"
    assert (headers["greenconsume-exchange"], headers["greenconsume-routing-key"]) == (
        *("other", "elsewhere"),
    )


def test_requeue_keeps_a_poison_message_with_its_error_before_the_limit(
    redis_url, server, queue_name
):
    put(server, queue_name, "x")
    consumer = Failing(redis_url, queue_name, 99, Requeue(delay=0.01), delivery_limit=4)
    with consuming(consumer):
        wait_until(lambda: server.llen(f"{queue_name}.dead") == 1)
    [dead] = server.lrange(f"{queue_name}.dead", 0, -1)
    headers = json.loads(dead)["headers"]
    assert headers["greenconsume-error-type"] == "ValueError"
    assert headers["greenconsume-queue"] == queue_name


def test_dead_letters_are_looked_at_and_left_where_they_are(redis_url, server, queue_name):
    before = put(server, f"{queue_name}.dead", *range(3))
    with DeadLetters(redis_url, f"{queue_name}.dead") as letters:
        assert letters.count == 3
        assert [letter.number for letter in letters] == [1, 2, 3]
        assert held_count(server) == 3
    wait_until(lambda: held_count(server) == 0)
    assert list(reversed(server.lrange(f"{queue_name}.dead", 0, -1))) == before
