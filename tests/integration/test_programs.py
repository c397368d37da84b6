"""Programs that are written for kombu's mixins, by their shapes, unchanged but for the import.

Which public programs have which shape is in docs/deviations.md.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gevent
from gevent.pool import Pool
from kombu import Connection, Consumer, Exchange, Producer, Queue, eventloop, uuid
from kombu.pools import connections, producers, reset

from greenconsume import ConsumerMixin, ConsumerProducerMixin
from tests.brokers import RabbitMQ
from tests.integration.consumers import SOON
from tests.messages import declare, publish, queue_depth
from tests.waiting import wait_until


@contextmanager
def in_thread(program: Any) -> Iterator[None]:
    """Run a program as those with a web server beside it do, and stop it by `should_stop`."""
    thread = threading.Thread(target=program.run)
    thread.start()
    try:
        yield
    finally:
        program.should_stop = True
        thread.join(SOON)
        assert not thread.is_alive()


class Worker(ConsumerMixin):
    """The worker of kombu's documentation."""

    def __init__(self, connection: Connection, queues: list[Queue]) -> None:
        self.connection = connection
        self.queues = queues
        self.done: list[Any] = []
        self.is_consuming = False

    def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
        return [Consumer(queues=self.queues, accept=["json", "pickle"], callbacks=[self.on_task])]

    def on_consume_ready(self, *args: Any, **kwargs: Any) -> None:
        self.is_consuming = True

    def on_task(self, body: Any, message: Any) -> None:
        self.done.append(body)
        message.ack()


def test_a_worker_of_an_exchange(connection, queue_name):
    exchange = Exchange(f"{queue_name}-x", type="topic")
    worker = Worker(connection, [Queue(queue_name, exchange, routing_key="user.#")])
    worker.connect_max_retries = 3
    with in_thread(worker):
        # While two bind a queue to a topic exchange, the broker may answer one of them before the binding
        # works: RabbitMQ 4.0 drops two in a hundred such messages, py-amqp's too.
        wait_until(lambda: worker.is_consuming, SOON)
        with Connection(connection.as_uri(include_password=True)) as other:
            other.Producer().publish(
                {"n": 1}, exchange=exchange, routing_key="user.read", declare=worker.queues
            )
            wait_until(lambda: worker.done == [{"n": 1}], SOON)


def call(name: str, *args: int) -> dict[str, Any]:
    return {"fun": divmod, "name": name, "args": args}


class TaskQueue(Worker):
    """Runs pickled functions, and acknowledges whatever becomes of them (kombu's simple_task_queue)."""

    def on_task(self, body: Any, message: Any) -> None:
        try:
            self.done.append(body["fun"](*body["args"]))
        except ZeroDivisionError as exc:
            self.done.append(str(exc))
        message.ack()


def test_a_queue_of_pickled_tasks_fed_by_kombus_pools(connection, queue_name):
    exchange = Exchange(f"{queue_name}-tasks", type="direct")
    queues = [Queue(f"{queue_name}-{key}", exchange, routing_key=key) for key in ("hi", "lo")]
    worker = TaskQueue(connection, queues)
    with in_thread(worker):
        pool = connections[Connection(connection.as_uri(include_password=True))]
        with pool.acquire(block=True) as lent, producers[lent].acquire(block=True) as producer:
            for key, divisor in (("hi", 2), ("lo", 0)):
                producer.publish(
                    call("divide", 7, divisor),
                    serializer="pickle",
                    compression="bzip2",
                    exchange=exchange,
                    declare=[exchange, *queues],
                    routing_key=key,
                )
        wait_until(lambda: len(worker.done) == 2, SOON)
        reset()
    assert (3, 1) in worker.done


class Fibonacci(ConsumerProducerMixin):
    """The RPC server of kombu's rpc-tut6."""

    def __init__(self, connection: Connection, name: str) -> None:
        self.connection = connection
        self.queue = Queue(name)

    def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
        request = {"on_message": self.on_request, "accept": {"application/json"}}
        return [Consumer(queues=[self.queue], prefetch_count=1, **request)]

    def on_request(self, message: Any) -> None:
        a, b = 0, 1
        for _ in range(message.payload["n"]):
            a, b = b, a + b
        self.producer.publish(
            {"result": a},
            exchange="",
            routing_key=message.properties["reply_to"],
            correlation_id=message.properties["correlation_id"],
            serializer="json",
            retry=True,
        )
        message.ack()


class Caller:
    """The client of that: an exclusive queue, and `drain_events` until the answer is there."""

    def __init__(self, connection: Connection, name: str) -> None:
        self.connection = connection
        self.name = name
        self.replies = Queue(uuid(), exclusive=True, auto_delete=True)

    def on_reply(self, message: Any) -> None:
        if message.properties["correlation_id"] == self.asked:
            self.answer = message.payload["result"]

    def ask(self, number: int) -> Any:
        self.answer, self.asked = None, uuid()
        with Producer(self.connection) as producer:
            producer.publish(
                {"n": number},
                exchange="",
                routing_key=self.name,
                declare=[self.replies],
                reply_to=self.replies.name,
                correlation_id=self.asked,
            )
        reader = Consumer(
            self.connection, on_message=self.on_reply, queues=[self.replies], no_ack=True
        )
        with reader:
            while self.answer is None:
                self.connection.drain_events(timeout=SOON)
        return self.answer


def test_a_server_of_calls_and_its_client(amqp_url, connection, queue_name):
    declare(amqp_url, queue_name)
    with in_thread(Fibonacci(connection, queue_name)), Connection(amqp_url) as other:
        caller = Caller(other, queue_name)
        assert [caller.ask(n) for n in (1, 10, 30)] == [1, 55, 832040]


def test_a_worker_that_asks_another_before_it_runs(amqp_url, connection, queue_name):
    """It drains the connection that it consumes from later, as its modules ask for their configuration."""
    declare(amqp_url, queue_name)
    declare(amqp_url, f"{queue_name}-work")
    with in_thread(Fibonacci(connection, queue_name)), Connection(amqp_url) as other:
        worker = Worker(other, [Queue(f"{queue_name}-work")])
        assert Caller(other, queue_name).ask(10) == 55
        publish(amqp_url, f"{queue_name}-work", 3)
        with in_thread(worker):
            wait_until(lambda: worker.done == [0, 1, 2], SOON)


class Dispatcher(Worker):
    """Acknowledges at once, and has a bounded pool do the work."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.pool = Pool(3)

    def on_task(self, body: Any, message: Any) -> None:
        message.ack()
        self.pool.spawn(self.work, body)

    def work(self, body: Any) -> None:
        gevent.sleep(0)
        self.done.append(body)


def test_a_dispatcher_with_a_pool_of_its_own(amqp_url, connection, queue_name):
    publish(amqp_url, queue_name, 50)
    dispatcher = Dispatcher(connection, [Queue(queue_name)])
    with in_thread(dispatcher):
        wait_until(lambda: len(dispatcher.done) == 50, SOON)
    dispatcher.pool.join()
    assert sorted(dispatcher.done) == list(range(50))


class Limited(Worker):
    """Stops itself after so many messages, from its callback."""

    limit = 3

    def on_task(self, body: Any, message: Any) -> None:
        super().on_task(body, message)
        if len(self.done) == self.limit:
            self.should_stop = True


def test_a_worker_that_stops_itself_after_so_many(amqp_url, connection, queue_name):
    publish(amqp_url, queue_name, 10)
    worker = Limited(connection, [Queue(queue_name)])
    worker.run()
    assert worker.done == [0, 1, 2]
    wait_until(lambda: queue_depth(amqp_url, queue_name) == 7, SOON)


class Events(ConsumerMixin):
    """Has a callback of its own for each queue, some without acks, and several consumers of one channel."""

    def __init__(self, connection: Connection, name: str) -> None:
        self.connection = connection
        self.name = name
        self.seen: list[tuple[str, Any]] = []
        self.calls: list[str] = []

    def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
        return [
            Consumer(Queue(f"{self.name}.mail"), callbacks=[self.on_mail]),
            Consumer(Queue(f"{self.name}.view"), callbacks=[self.on_view], no_ack=True),
        ]

    def on_mail(self, body: Any, message: Any) -> None:
        self.seen.append(("mail", body))
        message.ack()

    def on_view(self, body: Any, message: Any) -> None:
        self.seen.append(("view", body))

    def on_consume_ready(
        self, connection: Any, channel: Any, consumers: Any, **kwargs: Any
    ) -> None:
        self.calls.append("ready")

    def on_consume_end(self, connection: Any, channel: Any) -> None:
        self.calls.append("end")
        super().on_consume_end(connection, channel)


def test_a_consumer_for_each_kind_of_event(amqp_url, connection, queue_name):
    for kind in ("mail", "view"):
        publish(amqp_url, f"{queue_name}.{kind}", 2)
    events = Events(connection, queue_name)
    with in_thread(events):
        wait_until(lambda: len(events.seen) == 4, SOON)
    assert events.calls == ["ready", "end"]


class Reporter(ConsumerProducerMixin):
    """Acknowledges a long request first, and publishes its results to a fanout exchange, with retry."""

    def __init__(self, connection: Connection, name: str) -> None:
        self.connection = connection
        self.name = name
        self.results = Exchange(f"{name}-results", "fanout", durable=False)

    def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
        return [Consumer([Queue(self.name)], on_message=self.on_request, prefetch_count=1)]

    def on_request(self, message: Any) -> None:
        message.ack()
        for part in range(message.payload):
            self.producer.publish(
                part, exchange=self.results, declare=[self.results], retry=True, routing_key=""
            )


def test_a_reporter_of_results(amqp_url, connection, queue_name):
    reporter = Reporter(connection, queue_name)
    with Connection(amqp_url) as other, in_thread(reporter):
        results = Worker(other, [Queue(f"{queue_name}-all", reporter.results)])
        results.queues[0](other.default_channel).declare()
        with in_thread(results):
            publish(amqp_url, queue_name, [5])
            wait_until(lambda: results.done == [0, 1, 2, 3, 4], SOON)


class Mover(ConsumerProducerMixin):
    """Moves what one queue has into another, confirmed, and ends when nothing more comes."""

    def __init__(self, connection: Connection, name: str) -> None:
        self.connection = connection
        self.old = Queue(name)
        self.new = Queue(f"{name}-quorum", queue_arguments={"x-queue-type": "quorum"})

    def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
        return [Consumer([self.old], on_message=self.move, prefetch_count=10)]

    def move(self, message: Any) -> None:
        self.producer.publish(
            message.payload, routing_key=self.new.name, exchange="", declare=[self.new]
        )
        message.ack()

    def move_all(self) -> None:
        try:
            for _ in self.consume(limit=None, timeout=3):
                pass
        except socket.timeout:
            pass
        finally:
            self.producer_connection.close()


def test_a_mover_from_an_old_queue_to_a_new_one(amqp_url, queue_name):
    publish(amqp_url, queue_name, 20)
    options = {"confirm_publish": True}
    with Connection(amqp_url, transport_options=options) as connection:
        Mover(connection, queue_name).move_all()
    wait_until(lambda: queue_depth(amqp_url, f"{queue_name}-quorum") == 20, SOON)
    assert queue_depth(amqp_url, queue_name) == 0


def test_a_worker_comes_back_by_itself(
    rabbitmq: RabbitMQ, amqp_url: str, connection: Connection, queue_name: str
) -> None:
    publish(amqp_url, queue_name, 1)
    worker = Worker(connection, [Queue(queue_name)])
    with in_thread(worker):
        wait_until(lambda: worker.done == [0], SOON)
        rabbitmq.close_connections(amqp_url)
        publish(amqp_url, queue_name, ["after"])
        wait_until(lambda: "after" in worker.done, SOON)


def test_a_loop_without_a_mixin(amqp_url, connection, queue_name):
    """kombu's complete_receive: `eventloop` over a connection."""
    publish(amqp_url, queue_name, 3)
    done: list[Any] = []

    def on_task(body: Any, message: Any) -> None:
        done.append(body)
        message.ack()

    with Consumer(connection, [Queue(queue_name)], callbacks=[on_task], accept=["json"]):
        for _ in eventloop(connection, limit=3, timeout=SOON):
            pass
    assert done == [0, 1, 2]
