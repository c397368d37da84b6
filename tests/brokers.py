"""Owns the RabbitMQ that integration and fault tests run against.

`RabbitMQ` is a private node: own ports on loopback, own folder, own Erlang port mapper, so that
nothing on the machine is shared, read or left over. It is the installed server, or where
GREENCONSUME_TEST_RABBITMQ says 4.0, the one that `tests.newer_servers` has fetched.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import ssl
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from kombu.utils.url import parse_url

from tests.erlang import ErlangShell
from tests.servers import HOST, end, find_newer_program, find_program, free_port, launch
from tests.waiting import wait_until

# Debian's rabbitmq-server on PATH changes user and home first; the script beside it does not.
DEBIAN_FOLDER = "/usr/lib/rabbitmq/bin"

RELEASE_VARIABLE = "GREENCONSUME_TEST_RABBITMQ"
INSTALLED, NEWER = "installed", "4.0"

PROTOCOL_HEADER = b"AMQP\x00\x00\x09\x01"

CONFIG = """\
listeners.tcp.1 = {host}:{port}
listeners.ssl.1 = {host}:{tls_port}
ssl_options.cacertfile = {folder}/ca.pem
ssl_options.certfile = {folder}/server.pem
ssl_options.keyfile = {folder}/server.key
ssl_options.verify = verify_none
log.console = false
log.file.level = error
disk_free_limit.absolute = 1MB
vm_memory_high_watermark.relative = 0.8
"""

# A quorum queue tells how many messages it has now and then: every 5 s, if nothing else is said.
ADVANCED = "[{rabbit, [{quorum_tick_interval, 100}]}]."

CONNECTIONS = """
[Pid || Pid <- rabbit_networking:connections(),
        (catch rabbit_networking:connection_info(Pid, [vhost])) =:= [{{vhost, <<"{vhost}">>}}]]
"""


class QueueCounts(NamedTuple):
    """The numbers of a queue: its messages, and who consumes from it."""

    ready: int
    unacked: int
    consumers: int


class Member(NamedTuple):
    """A node's place in a cluster.

    Attributes:
        name: The node's name, as `n1@localhost`.
        nodes: The names of all nodes; the first one starts alone, and the others join it.
        epmd_port: Where the port mapper of all listens.
    """

    name: str
    nodes: list[str]
    epmd_port: int

    def write_files(self, folder: Path) -> None:
        """Say so in the node's files."""
        peers = "".join(
            f"cluster_formation.classic_config.nodes.{number} = {name}\n"
            for number, name in enumerate(self.nodes, 1)
        )
        with (folder / "rabbitmq.conf").open("a") as config:
            config.write("cluster_formation.peer_discovery_backend = classic_config\n" + peers)
            config.write("cluster_partition_handling = pause_minority\n")
        cookie = folder / ".erlang.cookie"
        cookie.write_text("ACOOKIEOFTESTS")
        cookie.chmod(0o400)


class RabbitMQ:
    """A private RabbitMQ node that can be stopped, killed, paused and asked.

    Killed or stopped, it keeps what is durable, and comes back on the same ports. Where a method
    takes the address of a virtual host, it is an URL such as the fixture ``amqp_url`` gives.
    Every method but the properties and addresses switches.

    Args:
        folder: An empty folder for all that it writes.
        release: `INSTALLED` or `NEWER`.
        plugins: What of its own it runs besides.
        advanced: The Erlang terms of its advanced configuration.
        member: Which node of a cluster it is; None: of none.

    Attributes:
        version: ``(3, 10, 8)``, say; from the first start on.
    """

    def __init__(
        self,
        folder: Path,
        release: str = INSTALLED,
        plugins: Sequence[str] = (),
        advanced: str = ADVANCED,
        member: Member | None = None,
    ) -> None:
        self.folder = folder
        self.version: tuple[int, ...] = ()
        self.port, self.tls_port = free_port(), free_port()
        self.ca_path = folder / "ca.pem"
        self._find = _FINDERS[release]
        self._program = self._find("rabbitmq-server")
        epmd_port = free_port() if member is None else member.epmd_port
        self._env = _environment(folder, free_port(), epmd_port)
        self._has_epmd = member is not None  # the cluster's
        # RabbitMQ's scripts take the first Erlang on the path.
        self._env["PATH"] = f"{Path(self._find('erl')).parent}{os.pathsep}{self._env['PATH']}"
        self._epmd: subprocess.Popen[bytes] | None = None
        self._node: subprocess.Popen[bytes] | None = None
        self._shell: ErlangShell | None = None
        self._paused = False
        self._vhosts = count(1)
        _write_files(folder, CONFIG.format(host=HOST, **vars(self)))
        (folder / "enabled_plugins").write_text(f"[{','.join(plugins)}].\n")
        (folder / "advanced.config").write_text(f"{advanced}\n")
        if member is not None:
            self._env["RABBITMQ_NODENAME"] = member.name
            member.write_files(folder)

    @property
    def pid(self) -> int:
        """The process id of the node's virtual machine."""
        assert self._node is not None, "the broker was not started"
        return self._node.pid

    @property
    def running(self) -> bool:
        """True while the node's process lives, paused or not."""
        return self._node is not None and self._node.poll() is None

    def url(self, vhost: str = "/") -> str:
        """The plain address of a virtual host."""
        return f"amqp://guest:guest@{HOST}:{self.port}/{vhost}"

    def tls_url(self, vhost: str = "/") -> str:
        """The TLS address of a virtual host; `ca_path` is the authority to trust."""
        return f"amqps://guest:guest@localhost:{self.tls_port}/{vhost}"

    def start(self, within: float = 60.0) -> None:
        """Start the node and wait until clients are served."""
        assert not self.running, "the broker runs already"
        log = self.folder / "node.out"
        if self._epmd is None and not self._has_epmd:
            self._epmd = launch(self._find("epmd"), log=self.folder / "epmd.out", env=self._env)
        self._node = launch(self._program, log=log, env=self._env, stdin=True)
        assert self._node.stdin is not None
        self._shell = ErlangShell(self._node.stdin, log)
        self._paused = False
        self.wait_ready(within)
        told = self.eval("rabbit_misc:version()")
        self.version = tuple(map(int, re.findall(r"\d+", told)[:3]))

    def wait_ready(self, within: float = 60.0) -> None:
        """Wait until an AMQP handshake is answered, and the TLS port accepts."""
        wait_until(lambda: self._node_died() or self.ready(), within, "RabbitMQ is ready")
        if self._node_died():
            log = (self.folder / "node.out").read_text(errors="replace")
            raise AssertionError(f"RabbitMQ did not start:\n{log[-4000:]}")

    def ready(self) -> bool:
        """Return whether the node answers a client's first bytes now."""
        try:
            with socket.create_connection((HOST, self.tls_port), 1.0):
                pass
            with socket.create_connection((HOST, self.port), 1.0) as client:
                client.sendall(PROTOCOL_HEADER)
                return client.recv(1) == b"\x01"
        except OSError:
            return False

    def stop(self) -> None:
        """Shut the node down in order: clients are told, then disconnected."""
        self.resume()
        self._end_node(signal.SIGTERM)

    def kill(self) -> None:
        """Kill the node where it stands: kill -9. The queues that were declared by now are kept."""
        if self.running and not self._paused:
            # Mnesia answers a declare before it has handed the queue to the kernel.
            self.eval("mnesia:sync_log()")
        self._end_node(signal.SIGKILL)

    def restart(self) -> None:
        """Stop the node in order, start it again and wait until it serves clients."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """Freeze the node: its sockets stay, connects succeed, nothing is ever answered."""
        os.kill(self.pid, signal.SIGSTOP)
        self._paused = True

    def resume(self) -> None:
        """Let a frozen node go on; without effect on any other."""
        if self.running and self._paused:
            os.kill(self.pid, signal.SIGCONT)
        self._paused = False

    def recover(self) -> None:
        """Bring the node back from whatever a test did to it: resumed, running, ready, unblocked."""
        self.resume()
        if not self.running:
            self.start()
        self.wait_ready()
        self.unblock()

    def close(self) -> None:
        """End the node and its port mapper, for good."""
        if self.running:
            self.stop()
        if self._epmd is not None:
            end(self._epmd)
            self._epmd = None

    def eval(self, expression: str, within: float = 10.0) -> str:
        """Have the node evaluate an Erlang expression: `ErlangShell.eval`. About 2 ms."""
        assert self._shell is not None, "the broker was not started"
        return self._shell.eval(expression, within)

    def rabbitmqctl(self, *args: str) -> str:
        """Run rabbitmqctl and return what it printed. About 1 s: `eval` is the quick way."""
        done = subprocess.run(
            [self._find("rabbitmqctl"), "-n", self._env["RABBITMQ_NODENAME"], *args],
            env=self._env,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout

    def add_vhost(self) -> str:
        """Make a virtual host that guest may use, and return its name. About 15 ms."""
        name = f"gc{next(self._vhosts)}"
        self.eval(
            f'ok = rabbit_vhost:add(<<"{name}">>, <<"test">>),'
            "rabbit_auth_backend_internal:set_permissions("
            f'<<"guest">>, <<"{name}">>, <<".*">>, <<".*">>, <<".*">>, <<"test">>)'
        )
        return name

    def delete_vhost(self, name: str) -> None:
        """Delete a virtual host with all that is in it; its connections are closed."""
        self.eval(f'rabbit_vhost:delete(<<"{name}">>, <<"test">>)', within=60.0)

    def queue_counts(self, url: str, queue: str) -> QueueCounts:
        """Return what a queue holds and how many consume from it, as the queue itself knows it."""
        answer = self.eval(
            f'{{ok, Q}} = rabbit_amqqueue:lookup({{resource, <<"{vhost_of(url)}">>, queue, <<"{queue}">>}}),'
            "[V || {_, V} <- rabbit_amqqueue:info("
            "Q, [messages_ready, messages_unacknowledged, consumers])]"
        )
        return QueueCounts(*map(int, re.findall(r"\d+", answer)))

    def connection_count(self, url: str) -> int:
        """Return how many clients are connected to a virtual host."""
        return int(self.eval(f"length({_connections(url)})"))

    def close_connections(self, url: str, reason: str = "closed by a test") -> None:
        """Have the server close all connections of a virtual host: Connection.Close, code 320."""
        self.eval(
            f'[rabbit_networking:close_connection(P, "{reason}") || P <- {_connections(url)}]'
        )

    def block(self) -> None:
        """Raise the memory alarm: connections that publish are blocked, and told so."""
        self.eval("rabbit_alarm:set_alarm({{resource_limit, memory, node()}, []})")

    def unblock(self) -> None:
        """Clear the memory alarm."""
        self.eval("rabbit_alarm:clear_alarm({resource_limit, memory, node()})")

    def _node_died(self) -> bool:
        return self._node is not None and self._node.poll() is not None

    def _end_node(self, sig: int) -> None:
        assert self._node is not None, "the broker was not started"
        end(self._node, sig)
        self._paused = False


def chosen_release() -> str:
    """Return which RabbitMQ this run is to use, by the environment.

    Raises:
        ValueError: There is none by that name.
    """
    release = os.environ.get(RELEASE_VARIABLE) or INSTALLED
    if release not in _FINDERS:
        raise ValueError(f"{RELEASE_VARIABLE} is one of {', '.join(_FINDERS)}, not {release!r}")
    return release


@contextmanager
def fresh_vhost(broker: RabbitMQ) -> Iterator[str]:
    """Lend a virtual host; afterwards the broker is recovered, and the virtual host deleted."""
    if not broker.running:
        broker.recover()
    name = broker.add_vhost()
    yield name
    broker.recover()
    broker.delete_vhost(name)


def vhost_of(url: str) -> str:
    """Return the virtual host that an AMQP URL names."""
    return str(parse_url(url)["virtual_host"])


def client_tls(broker: RabbitMQ) -> dict[str, Any]:
    """Return kombu's ``ssl`` argument to trust the broker's certificate, and no other."""
    return {
        "ca_certs": str(broker.ca_path),
        "cert_reqs": ssl.CERT_REQUIRED,
        "server_hostname": "localhost",
    }


def _find_installed(name: str) -> str:
    return find_program(name, DEBIAN_FOLDER)


_FINDERS = {INSTALLED: _find_installed, NEWER: find_newer_program}


def _connections(url: str) -> str:
    return " ".join(CONNECTIONS.format(vhost=vhost_of(url)).split())


def _environment(folder: Path, dist_port: int, epmd_port: int) -> dict[str, str]:
    own = {
        "HOME": folder,
        "ERL_EPMD_ADDRESS": HOST,
        "ERL_EPMD_PORT": epmd_port,
        "RABBITMQ_NODENAME": f"gc{os.getpid()}@localhost",
        "RABBITMQ_DIST_PORT": dist_port,
        "RABBITMQ_MNESIA_BASE": folder / "mnesia",
        "RABBITMQ_MNESIA_DIR": folder / "mnesia" / "node",
        "RABBITMQ_LOG_BASE": folder / "log",
        "RABBITMQ_ENABLED_PLUGINS_FILE": folder / "enabled_plugins",
        "RABBITMQ_CONFIG_FILE": folder / "rabbitmq.conf",
        "RABBITMQ_CONFIG_FILES": folder / "conf.d" / "*.conf",
        "RABBITMQ_ADVANCED_CONFIG_FILE": folder / "advanced.config",
        "RABBITMQ_CONF_ENV_FILE": folder / "rabbitmq-env.conf",
        # A shell on standard input, for ErlangShell. At its end, the node ends.
        "RABBITMQ_ALLOW_INPUT": "1",
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}"
        " -start_epmd false",
    }
    others = {k: v for k, v in os.environ.items() if not k.startswith(("RABBITMQ_", "ERL_"))}
    return others | {name: str(value) for name, value in own.items()}


def _write_files(folder: Path, config: str) -> None:
    # Imported here: it takes as long as all of pytest, and most runs of one test file need no TLS.
    import trustme

    (folder / "conf.d").mkdir()
    (folder / "rabbitmq.conf").write_text(config)
    (folder / "rabbitmq-env.conf").touch()
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    server = authority.issue_cert("localhost", HOST)
    server.private_key_pem.write_to_path(folder / "server.key")
    server.cert_chain_pems[0].write_to_path(folder / "server.pem")
