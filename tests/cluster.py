"""Owns a RabbitMQ cluster of three nodes on loopback, that tests kill, stop and cut off.

The nodes are `tests.brokers.RabbitMQ`s with one port mapper and one cookie. They start one after the other:
the first alone, and the others join it. Nothing but the tests' own folder and ports is used.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from tests.brokers import Member, RabbitMQ
from tests.servers import HOST, end, find_program, free_port, launch
from tests.waiting import wait_until

NODE_COUNT = 3
PLUGINS = ["rabbitmq_consistent_hash_exchange"]


class Cluster:
    """Three nodes; every method switches.

    Attributes:
        nodes: The nodes, in the order of their start.
    """

    def __init__(self, folder: Path) -> None:
        epmd_port = free_port()
        names = [f"n{number}@localhost" for number in range(1, NODE_COUNT + 1)]
        self._folder = folder
        self._epmd_port = epmd_port
        self._epmd: subprocess.Popen[bytes] | None = None
        self.nodes: list[RabbitMQ] = []
        for name in names:
            own = folder / name.partition("@")[0]
            own.mkdir()
            self.nodes.append(RabbitMQ(own, plugins=PLUGINS, member=Member(name, names, epmd_port)))

    def start(self) -> None:
        """Start all nodes, and wait until they are one cluster."""
        env = {"ERL_EPMD_ADDRESS": HOST, "ERL_EPMD_PORT": str(self._epmd_port)}
        log = self._folder / "epmd.out"
        self._epmd = launch(find_program("epmd", "/usr/bin"), log=log, env=env)
        for node in self.nodes:
            node.start(within=120.0)
        self.wait_whole()

    def url(self, *ports: int) -> str:
        """Return the address of all nodes, or of proxies before them, to fail over between."""
        ports = ports or tuple(node.port for node in self.nodes)
        return ";".join(f"amqp://guest:guest@{HOST}:{port}//" for port in ports)

    def node_on(self, port: int) -> RabbitMQ:
        """Return the node that listens on a port."""
        return next(node for node in self.nodes if node.port == port)

    def running(self) -> list[RabbitMQ]:
        """Return the nodes that run."""
        return [node for node in self.nodes if node.running]

    def wait_whole(self, within: float = 120.0) -> None:
        """Wait until every node sees all of them."""
        for node in self.nodes:
            wait_until(
                lambda node=node: (
                    node.eval("catch length(rabbit_nodes:all_running())") == str(NODE_COUNT)
                ),
                within,
                "the cluster is whole",
            )

    def wait_queue_whole(self, queue: str, within: float = 60.0) -> None:
        """Wait until every node has caught up with a quorum queue."""
        found = f'{{ok, Q}} = rabbit_amqqueue:lookup({{resource, <<"/">>, queue, <<"{queue}">>}}), '
        count = "length(proplists:get_value(online, rabbit_quorum_queue:info(Q, [online])))"
        ask = f"catch begin {found}{count} end"  # there may be no leader yet
        node = self.running()[0]
        wait_until(lambda: node.eval(ask) == str(NODE_COUNT), within, "all replicas are online")

    def leader_of(self, queue: str) -> RabbitMQ:
        """Return the node that leads a quorum queue."""
        found = f'{{ok, Q}} = rabbit_amqqueue:lookup({{resource, <<"/">>, queue, <<"{queue}">>}}), '
        told = self.running()[0].eval(found + "rabbit_quorum_queue:info(Q, [leader])")
        number = re.search(r"n(\d)@localhost", told)
        assert number is not None, told
        return self.nodes[int(number[1]) - 1]

    def part(self, node: RabbitMQ) -> None:
        """Cut a node off from the others: they refuse each other's cookie. It pauses, as a minority."""
        others = [self.name_of(other) for other in self.nodes if other is not node]
        # All in one call: while it still sees one of them, the other one pauses, too (a partial partition).
        node.eval(
            ", ".join(
                [f"erlang:set_cookie('{name}', nobodys)" for name in others]
                + [f"erlang:disconnect_node('{name}')" for name in others]
            )
        )

    def join(self, node: RabbitMQ) -> None:
        """End what `part` did, and wait until the cluster is whole."""
        for other in self.nodes:
            if other is not node:
                name = self.name_of(other)
                node.eval(
                    f"erlang:set_cookie('{name}', erlang:get_cookie()), net_kernel:connect_node('{name}')"
                )
        self.wait_whole()

    def name_of(self, node: RabbitMQ) -> str:
        """Return the Erlang name of a node."""
        return f"n{self.nodes.index(node) + 1}@localhost"

    def close(self) -> None:
        """End all nodes, and the port mapper."""
        for node in self.nodes:
            if node.running:
                node.kill()
        if self._epmd is not None:
            end(self._epmd)
