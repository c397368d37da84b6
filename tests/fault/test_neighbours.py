"""A consumer whose mistake closes the connection costs that consumer alone (law 10, HAZARDS row 30)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import amqp
import pytest
from kombu import Queue

from greenconsume import (
    ConsumerMixin,
    ConsumerOptions,
    Reject,
    Requeue,
    RestartPolicy,
    Retry,
    Runtime,
)
from greenconsume.errors import LinkClosedError, PoisonMessageError
from greenconsume.events import ConsumerRefused, ConsumerRestarting, HandlerFailed, LinkDown
from tests.fault.consumers import Collector, connection_to, everything, observing
from tests.fault.mistakes import MISTAKES, OF_4_3, flow_off, stream_rejected, unknown_exchange_type
from tests.messages import declare, publish, queue_depth
from tests.peer import RABBITMQ_4_3
from tests.waiting import wait_until

NEIGHBOURS = 10


class Culprit(ConsumerMixin):
    """Makes a mistake each time it sets up its consumers."""

    def __init__(self, connection: Any, queue: str, mistake: Callable[[Any, str], object]) -> None:
        self.connection, self.queue, self.mistake = connection, queue, mistake

    def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
        self.mistake(channel, self.queue)
        return [Consumer([Queue(self.queue, durable=True)], callbacks=[self.on_task])]

    def on_task(self, body: Any, message: Any) -> None:
        message.ack()


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_mistake_costs_the_neighbours_their_link_once_at_most(
    rabbitmq, amqp_url, queue_name, mistake
):
    closes_channel = mistake is unknown_exchange_type and rabbitmq.version >= (4,)
    ignored = mistake is stream_rejected and rabbitmq.version >= (4,)  # it says nothing
    handled: Counter[Any] = Counter()
    declare(amqp_url, queue_name)
    declare(amqp_url, f"{queue_name}-other")
    with (
        observing(LinkDown) as lost,
        observing(ConsumerRestarting) as restarts,
        observing(ConsumerRefused) as refusals,
        Runtime(connection_to(amqp_url), restart=RestartPolicy(backoff=0.1)) as runtime,
    ):
        runtime.spawn(lambda c: Collector(c, queue_name, handled), replicas=NEIGHBOURS)
        wait_until(lambda: all(child.started for child in runtime.children))
        (culprit,) = runtime.spawn(lambda c: Culprit(c, f"{queue_name}-other", mistake))
        wait_until(lambda: ignored or len(refusals if closes_channel else restarts) >= 3)
        publish(amqp_url, queue_name, 50)
        wait_until(everything(handled, 50))
        assert sum(handled.values()) == 50
        if closes_channel or ignored:
            # RabbitMQ 4 says 406 of an unknown type, which concerns the channel alone.
            assert lost == []
            return
        shared = [event for event in lost if event.consumers > 1]
        assert len(shared) <= 1
        assert {event.consumer for event in restarts} == {culprit.name}
        assert {type(event.error) for event in restarts} == {LinkClosedError}
        assert culprit.restart_count >= 3


@pytest.mark.parametrize("mistake", OF_4_3, ids=lambda mistake: mistake.__name__)
def test_what_rabbitmq_4_3_refuses_costs_the_neighbours_their_link_once_at_most(make_peer, mistake):
    peer = make_peer(answers=RABBITMQ_4_3, rabbitmq="4.3.0")
    with (
        observing(LinkDown) as lost,
        observing(ConsumerRestarting) as restarts,
        Runtime(connection_to(peer.url), restart=RestartPolicy(backoff=0.1)) as runtime,
    ):
        runtime.spawn(lambda c: Collector(c, "q"), replicas=NEIGHBOURS)
        wait_until(lambda: all(child.started for child in runtime.children))
        (culprit,) = runtime.spawn(lambda c: Culprit(c, "other", mistake))
        wait_until(lambda: len(restarts) >= 3)
        wait_until(lambda: all(child.started for child in runtime.children[:-1]))
        assert len([event for event in lost if event.consumers > 1]) <= 1
        assert {event.consumer for event in restarts} == {culprit.name}
        assert any(
            word in str(restarts[0].error) for word in ("durable=True", "apply_global=False")
        )


class Offender(Collector):
    """A consumer whose handler makes the broker close the connection, on its message's own channel."""

    def on_task(self, body: Any, message: Any) -> None:
        flow_off(message.channel, "")


def test_a_handlers_mistake_costs_the_neighbours_their_link_once_at_most(amqp_url, queue_name):
    handled: Counter[Any] = Counter()
    declare(amqp_url, queue_name)
    declare(amqp_url, f"{queue_name}-other")
    with (
        observing(LinkDown) as lost,
        observing(ConsumerRestarting) as restarts,
        Runtime(connection_to(amqp_url), restart=RestartPolicy(backoff=0.1)) as runtime,
    ):
        runtime.spawn(lambda c: Collector(c, queue_name, handled), replicas=NEIGHBOURS)
        (culprit,) = runtime.spawn(lambda c: Offender(c, f"{queue_name}-other"))
        wait_until(lambda: all(child.started for child in runtime.children))
        publish(amqp_url, f"{queue_name}-other", 1)
        wait_until(lambda: len(restarts) >= 3)
        publish(amqp_url, queue_name, 50)
        wait_until(everything(handled, 50))
        assert len([event for event in lost if event.consumers > 1]) <= 1
        assert {event.consumer for event in restarts} == {culprit.name}
        assert sum(handled.values()) == 50


class Poisoned(Collector):
    """Publishes, for one of its messages, what has the broker close the connection, and acknowledges it."""

    def on_task(self, body: Any, message: Any) -> None:
        if body == POISON:
            self.handled[POISON] += 1
            message.channel.basic_publish(amqp.Message("x"), routing_key="nobody", immediate=True)
            message.ack()
        else:
            super().on_task(body, message)


POISON = "poison"


@pytest.mark.parametrize("concurrency", [None, 20])
@pytest.mark.parametrize(
    ("policy", "times", "is_dead"),
    [(Requeue(0.1), 4, True), (Retry(1, [0.1]), 4, True), (Reject(), 2, False)],
    ids=["requeue", "retry", "reject"],
)
def test_a_message_that_closes_the_link_meets_its_policy_when_it_comes_again(
    amqp_url, queue_name, concurrency, policy, times, is_dead
):
    handled: Counter[Any] = Counter()
    queue, dead = f"{queue_name}-other", f"{queue_name}-other.dead"
    declare(amqp_url, queue_name)
    declare(amqp_url, queue)
    declare(amqp_url, dead)
    options = ConsumerOptions(on_error=policy, concurrency=concurrency)
    with (
        observing(LinkDown) as lost,
        observing(ConsumerRestarting) as restarts,
        observing(HandlerFailed) as failures,
        Runtime(
            connection_to(amqp_url), restart=RestartPolicy(max_restarts=20, backoff=0.1)
        ) as runtime,
    ):
        runtime.spawn(lambda c: Collector(c, queue_name, handled), replicas=NEIGHBOURS)
        (culprit,) = runtime.spawn(lambda c: Poisoned(c, queue, handled), options=options)
        wait_until(lambda: all(child.started for child in runtime.children))
        publish(amqp_url, queue, [*range(100, 110), POISON, *range(110, 120)])
        publish(amqp_url, queue_name, 50)
        told = (
            (lambda: bool(failures)) if not is_dead else (lambda: queue_depth(amqp_url, dead) == 1)
        )
        wait_until(told, within=30)
        wait_until(everything(handled, 50))
        wait_until(lambda: all(handled[body] for body in range(100, 120)))
        wait_until(lambda: queue_depth(amqp_url, queue) == 0)
        assert {type(event.error) for event in failures} == {PoisonMessageError}
        assert handled[POISON] == times
        assert len([event for event in lost if event.consumers > 1]) <= 1
        assert {event.consumer for event in restarts} <= {culprit.name}
