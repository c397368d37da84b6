"""Drivers of frameworks that drain a kombu connection themselves, by their shapes, unchanged.

Which public programs have which shape is in docs/deviations.md.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import amqp
import gevent
import pytest
from flask import Flask, request
from kombu import Connection, Consumer, Exchange, Producer, Queue, uuid
from kombu.pools import connections, producers, reset

from greenconsume import ConsumerMixin
from greenconsume.transports import registry
from tests.brokers import RabbitMQ
from tests.integration.consumers import SOON, green_connection
from tests.messages import publish
from tests.waiting import wait_until

#: Else what is published as a connection is closed may be lost without a word, whatever the transport.
CONFIRMING = {"confirm_publish": True}


@pytest.fixture(autouse=True)
def clean_pools() -> Iterator[None]:
    registry.register()
    yield
    reset()


@contextmanager
def threaded(run: Callable[[], object], stop: Callable[[], object]) -> Iterator[None]:
    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop()
        thread.join(SOON)
        assert not thread.is_alive()


class Listener:
    """Drains with a timeout, after which it makes connection and consumer anew (mozillapulse)."""

    def __init__(self, url: str, exchange: str, name: str, patience: float) -> None:
        self.url, self.exchange, self.name, self.patience = url, exchange, name, patience
        self.connection: Connection | None = None
        self.heard: list[Any] = []
        self.listening_count = 0
        self.is_over = False

    def connect(self) -> Connection:
        if self.connection is None:
            self.connection = Connection(self.url)
        return self.connection

    def queue_exists(self) -> bool:
        queue = Queue(self.name, durable=True)
        try:
            queue(self.connect()).queue_declare(passive=True)
        except amqp.ChannelError as exc:
            if exc.reply_code == 404:
                return False
            raise
        return True

    def listen(self) -> None:
        while not self.is_over:
            connection = self.connect()
            exchange = Exchange(self.exchange, type="topic")
            exchange(connection).declare(passive=True)
            queue = Queue(self.name, exchange, routing_key="#", durable=True)
            consumer = connection.Consumer(queue, auto_declare=False, callbacks=[self.on_message])
            consumer.queues[0].queue_declare()
            consumer.queues[0].queue_bind()
            with consumer:
                self.listening_count += 1
                self.drain()

    def drain(self) -> None:
        while not self.is_over:
            try:
                self.connect().drain_events(timeout=self.patience)
            except socket.timeout:
                self.connect().release()
                self.connection = None
                return

    def on_message(self, body: Any, message: Any) -> None:
        self.heard.append(body)
        message.ack()

    def end(self) -> None:
        self.is_over = True


def test_a_listener_that_begins_anew_when_nothing_comes(amqp_url, queue_name):
    with green_connection(amqp_url) as other:
        exchange = Exchange(f"{queue_name}-x", "topic")(other.default_channel)
        exchange.declare()
        listener = Listener(amqp_url, exchange.name, queue_name, patience=0.2)
        assert not listener.queue_exists()
        with threaded(listener.listen, listener.end):
            wait_until(lambda: listener.listening_count >= 3, SOON)
            for number in range(5):
                other.Producer().publish(number, exchange=exchange, routing_key="a.b")
            wait_until(lambda: listener.heard == [0, 1, 2, 3, 4], SOON)
            assert Listener(amqp_url, exchange.name, queue_name, 1.0).queue_exists()
        listener.connect().release()


class PollingClient:
    """Asks over a queue of its own, and on a loss sets its consumer up again and goes on (Nameko's proxy)."""

    def __init__(self, url: str, service: str) -> None:
        self.connection = Connection(url, transport_options=CONFIRMING)
        self.service = service
        self.queue = Queue(f"{service}-replies-{uuid()}", expires=60.0)
        self.replies: dict[str, Any] = {}
        self.consumer: Consumer | None = None
        self.set_up()

    def set_up(self) -> None:
        if self.consumer is not None:
            try:
                self.consumer.cancel()
            except OSError:
                pass
        channel = self.connection.channel()
        self.queue = self.queue.bind(channel)
        self.queue.declare()
        self.consumer = Consumer(channel, [self.queue], no_ack=False)
        self.consumer.callbacks = [self.on_reply]
        self.consumer.consume()

    def on_reply(self, body: Any, message: Any) -> None:
        self.replies[message.properties["correlation_id"]] = body
        message.ack()

    def ask(self, number: int) -> Any:
        asked = uuid()
        with producers[self.connection.clone()].acquire(block=True) as producer:
            producer.publish(
                number,
                routing_key=self.service,
                reply_to=self.queue.name,
                correlation_id=asked,
                retry=True,
            )
        return self.reply_to(asked)

    def reply_to(self, asked: str) -> Any:
        try:
            while asked not in self.replies:
                assert self.consumer is not None
                self.consumer.connection.drain_events(timeout=SOON)
        except socket.timeout:
            raise
        except (OSError, amqp.ConnectionError):
            self.set_up()
            return self.reply_to(asked)
        return self.replies.pop(asked)


class Squares(ConsumerMixin):
    """Answers with squares, over a pool of producers."""

    def __init__(self, url: str, name: str) -> None:
        self.connection = Connection(url, transport_options=CONFIRMING)
        self.name = name

    def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
        return [Consumer([Queue(self.name)], callbacks=[self.on_number], prefetch_count=10)]

    def on_number(self, body: int, message: Any) -> None:
        with producers[self.connection.clone()].acquire(block=True) as producer:
            producer.publish(
                body * body,
                routing_key=message.properties["reply_to"],
                correlation_id=message.properties["correlation_id"],
                retry=True,
            )
        message.ack()

    def end(self) -> None:
        self.should_stop = True


def test_a_client_that_sets_its_consumer_up_again_when_it_is_lost(
    rabbitmq: RabbitMQ, amqp_url: str, queue_name: str
) -> None:
    squares = Squares(amqp_url, queue_name)
    with threaded(squares.run, squares.end):
        publish(amqp_url, queue_name, [])
        client = PollingClient(amqp_url, queue_name)
        for number in range(4):
            assert client.ask(number) == number * number
            rabbitmq.close_connections(amqp_url)
        assert client.ask(9) == 81
        client.connection.release()


class Driver:
    """Runs everything by `autoretry`, declares again on each revival, and looks after heartbeats by itself.

    It is oslo.messaging's driver, as nova and neutron have it.
    """

    def __init__(self, url: str, queues: list[Queue]) -> None:
        self.blocked: list[str] = []
        self.connection = Connection(
            url,
            heartbeat=4,
            failover_strategy="round-robin",
            transport_options={
                **CONFIRMING,
                "client_properties": {"capabilities": {"connection.blocked": True}},
                "on_blocked": self.blocked.append,
                "on_unblocked": lambda: self.blocked.append("no more"),
            },
        )
        self.queues, self.tags = queues, count(1)
        self.new: dict[str, Queue] = {}
        self.got: list[tuple[Any, Any]] = []
        self.channel: Any = None
        self.lock, self.is_over = threading.RLock(), threading.Event()
        self.connection.ensure_connection(max_retries=3)
        self.set_channel(self.connection.channel())
        self.pulse = threading.Thread(target=self.beat)
        self.pulse.start()

    def set_channel(self, channel: Any) -> None:
        if channel is self.channel:
            return
        if self.channel is not None:
            self.connection.maybe_close_channel(self.channel)
        self.channel = channel
        channel.basic_qos(0, 5, False)
        self.producer = Producer(channel)
        self.new = {f"{next(self.tags)}": queue for queue in self.queues}
        for queue in self.queues:
            queue(channel).declare()

    def ensure(self, method: Callable[[], Any]) -> Any:
        def execute(channel: Any) -> Any:
            self.set_channel(channel)
            return method()

        with self.lock:
            again = self.connection.autoretry(
                execute,
                channel=self.channel,
                interval_start=0,
                interval_max=0.1,
                on_revive=self.set_channel,
                errback=lambda _exc, _interval: None,
            )
            done, channel = again()
            self.set_channel(channel)
            return done

    def beat(self) -> None:
        while not self.is_over.wait(0.05):
            with self.lock:
                try:
                    self.connection.heartbeat_check(rate=2)
                    if not self.queues:
                        self.connection.drain_events(timeout=0.001)
                except socket.timeout:
                    pass
                except (*self.connection.connection_errors, OSError):
                    self.connection.ensure_connection()

    def consume_one(self) -> None:
        def consume() -> None:
            if not self.connection.connected:
                self.connection.maybe_switch_next()
                raise self.connection.recoverable_connection_errors[0]
            while self.new:
                tag, queue = self.new.popitem()
                queue(self.channel).consume(tag, callback=self.on_message)
            try:
                self.connection.drain_events(timeout=0.1)
            except socket.timeout:
                self.connection.heartbeat_check(rate=2)

        self.ensure(consume)

    def on_message(self, raw: Any) -> None:
        message = self.channel.message_to_python(raw)
        self.got.append((message.decode(), message.properties))
        message.ack()

    def send(self, body: Any, key: str, **properties: Any) -> None:
        exchange = Exchange("", passive=True)
        self.ensure(
            lambda: self.producer.publish(body, exchange=exchange, routing_key=key, **properties)
        )

    def end(self) -> None:
        self.is_over.set()
        self.pulse.join(SOON)
        self.connection.release()


def test_a_driver_with_reply_queues_and_heartbeats_of_its_own(
    rabbitmq: RabbitMQ, amqp_url: str, queue_name: str
) -> None:
    """Over three closed connections; what was sent meanwhile is there."""
    server = Driver(amqp_url, [Queue(queue_name)])
    asking = Driver(amqp_url, [])
    replies = Driver(amqp_url, [Queue(f"{queue_name}-reply", expires=60.0)])
    over = threading.Event()

    def serve() -> None:
        while not over.is_set():
            server.consume_one()
            while server.got:
                body, properties = server.got.pop()
                asking.send(body + 1, properties["reply_to"])

    def wait_for_replies() -> None:
        while not over.is_set():
            replies.consume_one()

    def answers() -> set[int]:
        return {body for body, _ in replies.got}

    with threaded(serve, over.set), threaded(wait_for_replies, over.set):
        for start in (0, 10, 20, 30):
            senders = [
                gevent.spawn(asking.send, n, queue_name, reply_to=f"{queue_name}-reply")
                for n in range(start, start + 10)
            ]
            gevent.joinall(senders, raise_error=True)
            wait_until(lambda start=start: answers() >= set(range(1, start + 11)), SOON)
            if start < 30:
                rabbitmq.close_connections(amqp_url)
    for driver in (server, asking, replies):
        driver.end()
        assert driver.blocked == []


class Proxy:
    """Drains by `Connection.ensure` what `kombu.pools` lends it; requeues before it runs (taskflow)."""

    def __init__(self, url: str, name: str) -> None:
        self.connection = Connection(url, transport_options=CONFIRMING)
        self.name = name
        self.exchange = Exchange(f"{name}-x", durable=False, auto_delete=True)
        self.running = threading.Event()
        self.got: list[Any] = []

    def queue(self, key: str) -> Queue:
        return Queue(
            f"{self.name}-{key}", self.exchange, routing_key=key, durable=False, auto_delete=True
        )

    def publish(self, body: Any, key: str) -> None:
        def send(producer: Producer) -> None:
            producer.publish(body, key, exchange=self.exchange, declare=[self.queue(key)])

        with connections[self.connection].acquire(block=True) as lent:
            with lent.Producer() as producer:
                lent.ensure(producer, send, max_retries=3, interval_start=0.1)(producer)

    def start(self) -> None:
        def drain(lent: Connection) -> None:
            try:
                lent.drain_events(timeout=0.2)
            except socket.timeout:
                pass

        with connections[self.connection].acquire(block=True) as lent:
            queue = self.queue("work")(lent)
            with lent.Consumer(queues=queue, callbacks=[self.on_message]) as consumer:
                safe = lent.ensure(consumer, drain, max_retries=3, interval_start=0.1)
                self.running.set()
                while self.running.is_set():
                    safe(lent)

    def on_message(self, body: Any, message: Any) -> None:
        if not self.running.is_set():
            message.requeue()
            return
        message.ack()
        self.got.append(body)


def test_a_proxy_that_drains_by_ensure(rabbitmq: RabbitMQ, amqp_url: str, queue_name: str) -> None:
    proxy = Proxy(amqp_url, queue_name)
    with threaded(proxy.start, proxy.running.clear):
        assert proxy.running.wait(SOON)
        for start in range(3):
            proxy.publish(start, "work")
            wait_until(lambda start=start: start in proxy.got, SOON)
            rabbitmq.close_connections(amqp_url)
        proxy.publish("last", "work")
        wait_until(lambda: "last" in proxy.got, SOON)


class Dispatcher(ConsumerMixin):
    """Hands its tasks to workers in turn, and answers commands itself (AWX's dispatcher)."""

    def __init__(self, connection: Connection, name: str) -> None:
        self.connection = connection
        self.queues = [
            Queue(name, Exchange(name)),
            Queue(f"{name}-all", Exchange(f"{name}-all", "fanout")),
        ]
        self.total_messages = 0
        self.workers = [gevent.queue.Queue() for _ in range(3)]
        self.pool = [gevent.spawn(self.work, each) for each in self.workers]
        self.done: list[Any] = []
        self.answers: list[str] = []

    def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
        return [Consumer(queues=self.queues, accept=["json"], callbacks=[self.process_task])]

    def process_task(self, body: Any, message: Any) -> None:
        if "control" in body:
            self.answers.append(f"{body['control']}: {self.total_messages}")
            message.ack()
            return
        self.workers[self.total_messages % len(self.workers)].put(body)
        self.total_messages += 1
        message.ack()

    def work(self, tasks: Any) -> None:
        for task in tasks:
            self.done.append(task["n"])

    def stop(self, _signum: int = 0, _frame: object = None) -> None:
        self.should_stop = True
        for each in self.workers:
            each.put(StopIteration)


def test_a_dispatcher_with_commands_and_workers(amqp_url, connection, queue_name):
    publish(amqp_url, queue_name, [{"n": n} for n in range(20)])
    dispatcher = Dispatcher(connection, queue_name)
    with threaded(dispatcher.run, dispatcher.stop):
        wait_until(lambda: len(dispatcher.done) == 20, SOON)
        with green_connection(amqp_url) as other:
            other.Producer().publish({"control": "status"}, exchange=f"{queue_name}-all")
            wait_until(lambda: dispatcher.answers == ["status: 20"], SOON)
    gevent.joinall(dispatcher.pool, timeout=SOON, raise_error=True)


class Camera(ConsumerMixin):
    """Captures events by `consume(limit=…, wakeup=…)` (Celery's events, Flower)."""

    def __init__(self, connection: Connection, name: str) -> None:
        self.connection = connection
        self.exchange = Exchange(name, "topic")
        self.queue = Queue(f"{name}-{uuid()}", self.exchange, routing_key="#", auto_delete=True)
        self.seen: list[Any] = []
        self.wakeups: list[bool] = []

    def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
        return [Consumer(queues=[self.queue], callbacks=[self.receive], no_ack=True)]

    def on_consume_ready(
        self, connection: Any, channel: Any, consumers: Any, wakeup: bool = False, **kwargs: Any
    ) -> None:
        self.wakeups.append(wakeup)

    def receive(self, body: Any, _message: Any) -> None:
        self.seen += body if isinstance(body, list) else [body]

    def capture(self, limit: int | None = None, timeout: float | None = None) -> None:
        for _ in self.consume(limit=limit, timeout=timeout, wakeup=True):
            pass


def test_a_camera_of_events(connection, queue_name):
    camera = Camera(connection, queue_name)
    with green_connection(connection.as_uri(include_password=True)) as other:
        capturing = threading.Thread(target=lambda: camera.capture(limit=3, timeout=SOON))
        capturing.start()
        wait_until(lambda: camera.wakeups == [True], SOON)
        for event in ("a", ["b", "c"], "d"):
            other.Producer().publish(event, exchange=camera.exchange, routing_key="task.sent")
        capturing.join(SOON)
    assert camera.seen == ["a", "b", "c", "d"]


def test_a_web_application_that_publishes_by_kombus_pools(amqp_url, queue_name):
    """Many requests at once, each with a producer of the pool for as long as it takes."""
    app, orders = Flask(__name__), Queue(queue_name)
    broker = Connection(amqp_url)
    producers[broker].limit = 5

    @app.post("/orders")
    def order() -> tuple[str, int]:
        with producers[broker].acquire(block=True, timeout=SOON) as producer:
            producer.publish(request.json, routing_key=queue_name, declare=[orders], retry=True)
        return "", 202

    requests = [gevent.spawn(app.test_client().post, "/orders", json={"n": n}) for n in range(100)]
    gevent.joinall(requests, timeout=SOON, raise_error=True)
    assert {each.value.status_code for each in requests} == {202}
    with green_connection(amqp_url) as other, other.SimpleQueue(queue_name) as simple:
        found = []
        for _ in range(100):
            message = simple.get(timeout=SOON)
            found.append(message.payload["n"])
            message.ack()
    assert sorted(found) == list(range(100))
