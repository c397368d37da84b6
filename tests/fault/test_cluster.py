"""A cluster of three nodes, quorum queues and failover URLs: nodes are killed, stopped and cut off."""

from __future__ import annotations

import json
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from time import monotonic
from typing import Any

import gevent
import pytest
from kombu import Connection, Exchange, Queue
from kombu.utils.url import parse_url

from greenconsume import ConsumerMixin, ConsumerOptions, Publisher, PublishError, Runtime
from greenconsume.errors import StoppedError
from tests.brokers import RabbitMQ
from tests.cluster import Cluster
from tests.fault.consumers import duplicates
from tests.gunicorns import Gunicorn
from tests.messages import declare, publish
from tests.rounds import rounds
from tests.servers import MissingServerError, missing
from tests.waiting import wait_until

#: How often the node that the consumers are on is killed.
KILLS = rounds(1)
QUORUM = {"x-queue-type": "quorum"}
SINGLE = {"x_queue_type": "quorum", "x_single_active_consumer": True}

pytestmark = [pytest.mark.slow, pytest.mark.rabbitmq, pytest.mark.timeout(300 + 60 * KILLS)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    try:
        cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    except MissingServerError as exc:
        missing(exc)
    with closing(cluster):
        cluster.start()
        yield cluster


@pytest.fixture(autouse=True)
def whole(cluster) -> Iterator[None]:
    yield
    for node in cluster.nodes:
        node.recover()
    cluster.wait_whole()


class Ledger(ConsumerMixin):
    """Counts the messages of a quorum queue, each acknowledged after a moment of work."""

    options = ConsumerOptions(concurrency=50)

    def __init__(self, url: str, queue: str, handled: Counter[Any]) -> None:
        self.connection = Connection(url, heartbeat=2, transport_options={"close_timeout": 0.2})
        self.queue = Queue(queue, queue_arguments=QUORUM)
        self.handled = handled

    def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
        return [Consumer([self.queue], callbacks=[self.on_entry])]

    def on_entry(self, body: Any, message: Any) -> None:
        gevent.sleep(0.01)
        message.ack()
        self.handled[body] += 1


def on_node(cluster: Cluster, runtime: Runtime) -> RabbitMQ | None:
    """Return the node that a runtime's consumers are connected to, as the nodes tell."""
    for node in cluster.running():
        names = node.eval(
            "[N || P <- rabbit_networking:local_connections(), "
            "{_, N} <- rabbit_networking:connection_info(P, [channels]), N > 0]"
        )
        if names != "[]":
            return node
    return None


class Load:
    """Publishes confirmed messages until it is stopped; one whose confirm never came may be there or not.

    A channel over which RabbitMQ 3.10 is given a message while a quorum queue has no leader never confirms
    anything again (py-amqp sees the same): after a timeout the publisher is replaced.
    """

    def __init__(self, url: str, queue: str) -> None:
        self.confirmed: set[int] = set()
        self._url, self._queue = url, queue
        self._publisher = self._make()
        self._stopping = False
        self._bodies = iter(range(10**9))
        self._greenlets = [gevent.spawn(self._run) for _ in range(10)]

    def stop(self) -> None:
        self._stopping = True
        gevent.joinall(self._greenlets, timeout=60, raise_error=True)
        self._close(self._publisher)

    def _make(self) -> Publisher:
        options = {"close_timeout": 0.2}
        return Publisher(Connection(self._url, heartbeat=2, transport_options=options), timeout=1.5)

    def _close(self, publisher: Publisher) -> None:
        try:
            publisher.close(0.1)
        except PublishError:
            pass

    def _run(self) -> None:
        while not self._stopping:
            body, publisher = next(self._bodies), self._publisher
            try:
                publisher.publish(body, self._queue, delivery_mode=2)
            except (PublishError, StoppedError):
                if self._publisher is publisher:
                    self._publisher = self._make()
                    self._close(publisher)
                continue
            self.confirmed.add(body)
            gevent.sleep(0.02)


def all_handled(cluster: Cluster, load: Load, handled: Counter[Any], queue: str) -> None:
    """Wait until every confirmed message is handled."""
    try:
        wait_until(lambda: load.confirmed <= handled.keys(), 40.0)
    except AssertionError:
        missing_ones = sorted(load.confirmed - handled.keys())
        info = [node.queue_counts(node.url("/"), queue) for node in cluster.running()]
        raise AssertionError(
            f"confirmed and not handled: {missing_ones}; the queue: {info}"
        ) from None


def one_more(handled: Counter[Any], within: float) -> float:
    """Wait until something that came later is handled; return the seconds."""
    began, before = monotonic(), len(handled)
    wait_until(lambda: len(handled) > before + 5, within, "consumers are back")
    return monotonic() - began


def test_killing_the_node_that_consumers_are_on_loses_nothing(cluster, queue_name):
    """Under confirmed load on a quorum queue; duplicates are counted. The target: back within 10 s."""
    handled: Counter[Any] = Counter()
    runtime = Runtime(cluster.url())
    for _ in range(3):
        runtime.spawn(Ledger(cluster.url(), queue_name, handled))
    back = []
    with runtime:
        load = Load(cluster.url(), queue_name)
        wait_until(lambda: len(handled) > 50)
        for _ in range(KILLS):
            node = wait_until(lambda: on_node(cluster, runtime))
            node.kill()
            back.append(one_more(handled, 40.0))
            node.start(within=120.0)
            cluster.wait_whole()
            cluster.wait_queue_whole(queue_name)
        load.stop()
        wait_until(
            lambda: load.confirmed <= handled.keys(), 60.0, "every confirmed message is handled"
        )
    print(
        f"\n{KILLS} kills: {len(load.confirmed)} confirmed, 0 lost, {duplicates(handled)} doubled, "
        f"back after {min(back):.1f} to {max(back):.1f} s"
    )
    assert max(back) < 30.0


def test_a_node_that_is_cut_off_is_left_for_another(cluster, make_proxy, queue_name):
    """Nothing is refused and nothing answers: heartbeats tell."""
    handled: Counter[Any] = Counter()
    proxies = [make_proxy(node.url()) for node in cluster.nodes]
    url = cluster.url(*(int(parse_url(proxy.url)["port"]) for proxy in proxies))
    runtime = Runtime(url)
    runtime.spawn(Ledger(url, queue_name, handled))
    with runtime:
        load = Load(cluster.url(), queue_name)
        wait_until(lambda: len(handled) > 50)
        used = next(proxy for proxy in proxies if proxy.open_count)
        used.stall()
        used.refuse()
        back = one_more(handled, 40.0)
        load.stop()
        all_handled(cluster, load, handled, queue_name)
    print(f"\ncut off: back after {back:.1f} s, {duplicates(handled)} doubled")
    assert back < 30.0


def test_the_leader_of_the_queue_moves_while_consumers_go_on(cluster, queue_name):
    """The node that leads it is restarted in order, whichever node the consumers are on."""
    handled: Counter[Any] = Counter()
    runtime = Runtime(cluster.url())
    runtime.spawn(Ledger(cluster.url(), queue_name, handled))
    with runtime:
        load = Load(cluster.url(), queue_name)
        wait_until(lambda: len(handled) > 50)
        leader = cluster.leader_of(queue_name)
        leader.stop()
        back = one_more(handled, 40.0)
        assert cluster.leader_of(queue_name) is not leader
        leader.start(within=120.0)
        cluster.wait_whole()
        load.stop()
        all_handled(cluster, load, handled, queue_name)
    print(f"\nthe leader moved: back after {back:.1f} s, {duplicates(handled)} doubled")
    assert back < 30.0


def test_a_node_that_is_parted_from_the_others_is_left_for_the_majority(cluster, queue_name):
    """It pauses, and its clients lose their connections; nothing that the others confirmed is lost."""
    handled: Counter[Any] = Counter()
    runtime = Runtime(cluster.url())
    runtime.spawn(Ledger(cluster.url(), queue_name, handled))
    with runtime:
        load = Load(cluster.url(), queue_name)
        wait_until(lambda: len(handled) > 50)
        node = on_node(cluster, runtime)
        cluster.part(node)
        try:
            back = one_more(handled, 40.0)
            wait_until(lambda: on_node(cluster, runtime) not in (None, node), 60.0)
        finally:
            cluster.join(node)
        cluster.wait_queue_whole(queue_name)
        load.stop()
        all_handled(cluster, load, handled, queue_name)
    print(f"\nparted: back after {back:.1f} s, {duplicates(handled)} doubled")


def test_a_single_active_consumer_keeps_the_order_over_processes_and_nodes(
    cluster, queue_name, tmp_path
):
    """The process that has it is killed, then the node that it is on; what comes again comes in order."""
    declare(cluster.nodes[0].url("/"), queue_name, **SINGLE)
    arguments = json.dumps({name.replace("_", "-"): value for name, value in SINGLE.items()})
    env = {"CONCURRENCY": 0, "WORK": "0.01,0.02", "QUEUE_ARGUMENTS": arguments}
    command = [sys.executable, "-m", "greenconsume", "run", "tests.webapp:runtime"]
    processes = Gunicorn(
        tmp_path,
        command=[*command, "--processes", "3"],
        BROKER=cluster.url(),
        QUEUE=queue_name,
        **env,
    )

    def finished() -> list[str]:
        return list(dict.fromkeys(e.body for e in processes.journal if e.kind == "finished"))

    with closing(processes):
        processes.wait_consuming(3)
        publish(cluster.nodes[0].url("/"), queue_name, 400)
        wait_until(lambda: len(finished()) >= 50)
        processes.signal(signal.SIGKILL, processes.journal[-1].pid)
        wait_until(lambda: len(finished()) >= 150)
        # All connect to the first node of their URL, which also has the queue's leader.
        cluster.nodes[0].kill()
        wait_until(lambda: len(finished()) == 400, 60.0)
        assert finished() == [str(number) for number in range(400)]
    assert len({entry.pid for entry in processes.journal if entry.kind == "finished"}) >= 2


def test_consistent_hashing_keeps_each_key_in_one_queue_and_in_order(cluster, queue_name):
    """The exchange of the plugin spreads keys over queues, each with a consumer of its own."""
    seen: list[tuple[int, str, int]] = []
    exchange = Exchange(queue_name, type="x-consistent-hash", durable=True)
    url = cluster.url()

    class Shard(ConsumerMixin):
        def __init__(self, number: int) -> None:
            self.connection, self.number = Connection(url), number

        def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
            queue = Queue(f"{queue_name}.{self.number}", exchange, "10", queue_arguments=QUORUM)
            return [Consumer([queue], callbacks=[self.on_message], prefetch_count=10)]

        def on_message(self, body: Any, message: Any) -> None:
            seen.append((self.number, body["key"], body["n"]))
            message.ack()

    runtime = Runtime(url)
    for number in range(3):
        runtime.spawn(Shard(number))
    with runtime:
        with Publisher(Connection(url), exchange=exchange) as publisher:
            for n in range(10):
                for key in range(100):
                    publisher.publish_nowait({"key": f"k{key}", "n": n}, routing_key=f"k{key}")
            publisher.flush(30.0)
        wait_until(lambda: len(seen) == 1000)
    shards = {key: {shard for shard, other, _ in seen if other == key} for _, key, _ in seen}
    assert {len(each) for each in shards.values()} == {1}
    for key in shards:
        assert [n for _, other, n in seen if other == key] == list(range(10))
    spread = Counter(next(iter(each)) for each in shards.values())
    print(f"\n100 keys over 3 queues: {sorted(spread.values())}")
    assert len(spread) == 3
