"""Redis behind Sentinel: consumers that go with their master, and keep what the servers kept."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any

import gevent
import pytest
import redis
from kombu import Connection, Producer

from greenconsume import Runtime
from greenconsume.redis import keeper
from tests.fault.consumers import Collector
from tests.integration.redis.payloads import put
from tests.servers import HOST, MissingServerError, end, find_program, free_port, launch, missing
from tests.waiting import AT_ONCE, wait_until

MASTER = "main"


class Guarded:
    """A master, its replica, and a Sentinel that makes the replica the master.

    Args:
        folder: A folder for what they print and keep.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._clients: list[Any] = []
        self.master_port = self._serve()
        self.replica_port = self._serve("--replicaof", HOST, str(self.master_port))
        wait_until(lambda: self.at(self.master_port).info("replication")["connected_slaves"] == 1)
        self.sentinel_port = self._guard()
        self.sentinel = self.at(self.sentinel_port)
        wait_until(self._knows_the_replica)

    def at(self, port: int) -> Any:
        """A client of one of them."""
        client = redis.Redis(HOST, port, protocol=2)
        self._clients.append(client)
        return client

    @property
    def url(self) -> str:
        """As kombu spells it: all the sentinels, the first of which is away."""
        return f"sentinel://{HOST}:{free_port()}/0;sentinel://{HOST}:{self.sentinel_port}/0"

    def kill(self, port: int) -> None:
        end(self._processes.pop(port), signal.SIGKILL)

    def is_master(self, port: int) -> bool:
        return bool(self.at(port).info("replication")["role"] == "master")

    def close(self) -> None:
        for client in self._clients:
            client.close()
        for port in list(self._processes):
            self.kill(port)

    def _serve(self, *options: str) -> int:
        port = free_port()
        folder = self._folder / str(port)
        folder.mkdir()
        self._launch(port, "--port", str(port), "--bind", HOST, "--dir", str(folder), *options)
        return port

    def _guard(self) -> int:
        port, path = free_port(), self._folder / "sentinel.conf"
        path.write_text(
            f"port {port}\nbind {HOST}\ndir {self._folder}\n"
            f"sentinel monitor {MASTER} {HOST} {self.master_port} 1\n"
            f"sentinel down-after-milliseconds {MASTER} 500\n"
            f"sentinel failover-timeout {MASTER} 5000\n"
        )
        self._launch(port, str(path), "--sentinel")
        return port

    def _launch(self, port: int, *arguments: str) -> None:
        program = find_program("redis-server")
        self._processes[port] = launch(
            program, *arguments, log=self._folder / f"{port}.out", cwd=self._folder
        )
        wait_until(lambda: self._answers(port), message=f"the server at {port} is ready")

    def _answers(self, port: int) -> bool:
        with suppress(redis.exceptions.ConnectionError), redis.Redis(HOST, port) as client:
            return bool(client.ping())
        return False

    def _knows_the_replica(self) -> bool:
        found = self.sentinel.sentinel_slaves(MASTER)
        return len(found) == 1 and found[0]["flags"] == "slave" and bool(found[0]["runid"])


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Guarded]:
    try:
        find_program("redis-server")
    except MissingServerError as exc:
        missing(exc)
    servers = Guarded(tmp_path)
    yield servers
    servers.close()


def connection_to(servers: Guarded) -> Connection:
    options = {"master_name": MASTER, "visibility_timeout": 3.0}
    return Connection(servers.url, transport_options=options)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "told to"])
def test_consumers_go_with_their_master_and_nothing_is_lost_that_the_servers_kept(
    guarded, queue_name, how, monkeypatch
):
    monkeypatch.setattr(keeper, "BEAT_INTERVAL", 0.5)
    old, new = guarded.master_port, guarded.replica_port
    with Runtime(connection_to(guarded)) as runtime:
        runtime.spawn(
            lambda c: Collector(c, queue_name, work=lambda _body: gevent.sleep(0.01)),
            replicas=3,
        )
        wait_until(lambda: all(child.started for child in runtime.children))
        consumers = [child.consumer for child in runtime.children]
        master = guarded.at(old)
        put(master, queue_name, *range(300))
        assert master.wait(1, 5000) == 1  # the replica has them all
        wait_until(lambda: sum(len(each.handled) for each in consumers) >= 30)
        if how == "killed":
            guarded.kill(old)
        else:
            guarded.sentinel.execute_command("SENTINEL", "FAILOVER", MASTER)
        wait_until(lambda: guarded.is_master(new), 30)
        with connection_to(guarded) as connection:  # a publisher finds the new one as well
            producer = Producer(connection)
            for n in range(300, 310):
                producer.publish(n, routing_key=queue_name, retry=True)
        wait_until(lambda: set().union(*(each.handled for each in consumers)) == set(range(310)))
        # An ack that the old master took and the new one never heard of: such a message comes again.
        server = guarded.at(new)
        wait_until(lambda: server.hlen("unacked") + server.llen(queue_name) == 0)
        assert all(child.restart_count == 0 for child in runtime.children)


def test_a_sentinel_that_knows_no_such_master_is_asked_again_until_it_does(
    guarded, queue_name, monkeypatch
):
    """An attempt fails at once, though redis-py would try the absent one for seconds."""
    slept: list[float] = []
    monkeypatch.setattr("redis.retry.sleep", slept.append)
    connection = Connection(guarded.url, transport_options={"master_name": "another"})
    began = monotonic()
    with pytest.raises(connection.connection_errors, match="another"):
        connection.connect()
    assert slept == []
    assert monotonic() - began < AT_ONCE
    guarded.sentinel.execute_command(
        *("SENTINEL", "MONITOR", "another", HOST, guarded.master_port, 1)
    )
    with connection:
        connection.connect()
        assert connection.connected
