"""The command itself, in a process of its own: what it says, how it stops, what it exits with."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from urllib.parse import urlsplit

import pytest

import greenconsume
from tests.brokers import RabbitMQ
from tests.messages import publish
from tests.servers import HOST, free_port
from tests.waiting import AT_ONCE, wait_until

SHOP = """
import os, time
from kombu import Queue
from greenconsume import ConsumerMixin, RestartPolicy, Runtime
from greenconsume.links import backoff

class Orders(ConsumerMixin):
    def __init__(self, connection):
        self.connection = connection

    def get_consumers(self, Consumer, channel):
        queue = Queue(os.environ.get("QUEUE", "orders"))
        return [Consumer([queue], callbacks=[self.on_order])]

    def on_consume_ready(self, connection, channel, consumers, **kwargs):
        print("ready", flush=True)

    def on_order(self, body, message):
        print("began", body, flush=True)
        self.work()
        message.ack()
        print("ended", body, flush=True)

    def work(self):
        while not os.path.exists("go"):
            time.sleep(0.01)

class Stubborn(Orders):
    def work(self):
        while True:
            try:
                time.sleep(60)
            except BaseException:
                print("survived", flush=True)

class Failing(Orders):
    def get_consumers(self, Consumer, channel):
        raise ValueError("no stock")

class Plain:
    pass

if "DELAYS" in os.environ:
    backoff.delays = lambda *_: map(float, os.environ["DELAYS"].split())

runtime = Runtime()
runtime.spawn(Orders)
failing = Runtime(restart=RestartPolicy(max_restarts=1, backoff=0.0, max_backoff=0.0))
failing.spawn(Orders)
failing.spawn(Failing)
"""

# A child of the test run takes none of its options from it.
OPTIONS = (
    "BROKER",
    "REPLICAS",
    "LINKS",
    "DRAIN_TIMEOUT",
    "CANCEL_TIMEOUT",
    "LOG_LEVEL",
    "LOG_FORMAT",
    "FREEZE_GC",
    "PROCESSES",
    "MAX_MESSAGES",
    "RELOAD",
)


class Command:
    """`greenconsume` with arguments, running in `folder`; what it writes goes to files there."""

    def __init__(self, folder: Path, *args: str, **env: str) -> None:
        self._out, self._err = folder / "out", folder / "err"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "greenconsume", *args],
                cwd=folder,
                env={**environment(), **env},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    def wait_for(self, text: str, within: float = 20.0) -> None:
        """Wait until it has written `text`."""
        wait_until(lambda: text in self.out + self.err or self.process.poll() is not None, within)
        assert text in self.out + self.err

    def signal(self, signum: int = signal.SIGTERM) -> None:
        self.process.send_signal(signum)

    def ends(self, within: float = 20.0) -> int:
        """Wait until it has ended, and return its exit code."""
        return self.process.wait(within)

    def error(self) -> str:
        """Wait until it has ended, and return its one line of error."""
        self.ends()
        assert self.out == ""
        (line,) = self.err.splitlines()
        assert line.startswith("greenconsume: ")
        return line


def environment() -> dict[str, str]:
    """This process's, with the greenconsume that is tested and without its options."""
    ours = [str(Path(greenconsume.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    options = {f"GREENCONSUME_{name}" for name in OPTIONS}
    others = {name: value for name, value in os.environ.items() if name not in options}
    return {**others, "PYTHONPATH": os.pathsep.join(filter(None, ours))}


Start = Callable[..., Command]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start the command in a folder with a module `shop`; what still runs at the end is killed."""
    (tmp_path / "shop.py").write_text(SHOP)
    commands: list[Command] = []

    def command(*args: str, **env: str) -> Command:
        commands.append(Command(tmp_path, *args, **env))
        return commands[-1]

    yield command
    for each in commands:
        each.process.kill()
        each.process.wait()


def with_password(url: str, password: str) -> str:
    parts = urlsplit(url)
    netloc = f"{parts.username}:{password}@{parts.hostname}:{parts.port or 5672}"
    return parts._replace(netloc=netloc).geturl()


# -- errors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["run"], "Missing argument 'MODULE:TARGET'"),
        (["run", "nowhere:Orders"], "No module named 'nowhere'"),
        (["run", "shop:Oders"], "shop has no Oders: did you mean Orders?"),
        (["run", "shop:Plain"], "Plain has no get_consumers"),
        (["run", "shop:Orders", "--broker", "pigeon://"], "no transport is called 'pigeon'"),
        (["run", "shop:Orders", "--replicas", "none"], "'none' is not a valid integer"),
        (["run", "shop:runtime", "--replicas", "3"], "--replicas is not for a Runtime"),
    ],
)
def test_a_mistake_in_the_call_is_one_line_and_exits_with_2(
    start: Start, args: list[str], message: str
) -> None:
    command = start(*args)
    assert message in command.error()
    assert command.ends() == 2


def test_an_import_that_fails_in_the_users_module_exits_with_1(
    start: Start, tmp_path: Path
) -> None:
    (tmp_path / "shop.py").write_text("import nowhere")
    command = start("run", "shop:Orders")
    assert command.ends() == 1
    assert 'shop.py", line 1, in <module>\n    import nowhere\n' in command.err
    assert command.err.endswith("ModuleNotFoundError: No module named 'nowhere'\n")


def test_a_wrong_password_is_one_line_and_exits_with_1(start: Start, amqp_url: str) -> None:
    command = start("run", "shop:Orders", "--broker", with_password(amqp_url, "s3cret"))
    line = command.error()
    assert command.ends() == 1
    assert f":**@{urlsplit(amqp_url).hostname}" in line
    assert "ACCESS_REFUSED" in line
    assert "check the user name, the password" in line
    assert "s3cret" not in line


def test_a_wrong_virtual_host_is_one_line_and_exits_with_1(start: Start, amqp_url: str) -> None:
    url = urlsplit(amqp_url)._replace(path="/no-such-vhost").geturl()
    command = start("run", "shop:runtime", "--broker", url)
    line = command.error()
    assert command.ends() == 1
    assert "no-such-vhost" in line
    assert "check the user name, the password and the virtual host" in line


def test_a_consumer_that_is_given_up_at_the_start_exits_with_1(start: Start) -> None:
    command = start("run", "shop:failing")
    assert command.ends() == 1
    *_, last = command.err.splitlines()
    assert last == "greenconsume: Failing-1 was given up: ValueError('no stock')"


# -- signals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_exits_with_0(start: Start, amqp_url: str, signum: int) -> None:
    command = start("run", "shop:Orders", "--broker", amqp_url, "--drain-timeout", "60")
    command.wait_for("ready")
    began = monotonic()
    command.signal(signum)
    assert command.ends() == 0
    assert monotonic() - began < AT_ONCE
    assert f"({signal.Signals(signum).name})" in command.err
    assert "consumers: 1 drained, 0 killed" in command.err


def test_a_second_signal_leaves_the_message_to_the_broker_and_exits_with_1(
    start: Start, rabbitmq: RabbitMQ, amqp_url: str, queue_name: str
) -> None:
    """HAZARDS row 12: each signal goes one rung down the ladder; what was prefetched is back, too."""
    publish(amqp_url, queue_name, ["a", "b", "c"])
    command = start("run", "shop:Orders", "--broker", amqp_url, QUEUE=queue_name)
    command.wait_for("began a")
    command.signal(signal.SIGINT)
    command.wait_for("stopping 1 consumers within 30.0 s (SIGINT)")
    assert command.process.poll() is None
    command.signal(signal.SIGTERM)
    assert command.ends() == 1
    assert command.err.splitlines()[-1].startswith("greenconsume: work was abandoned")
    assert "ended" not in command.out
    wait_until(lambda: rabbitmq.queue_counts(amqp_url, queue_name) == (3, 0, 0))


def test_every_further_signal_presses_harder_and_the_last_exits_at_once(
    start: Start, amqp_url: str, queue_name: str
) -> None:
    publish(amqp_url, queue_name, ["a"])
    options = ("--broker", amqp_url, "--cancel-timeout", "60")
    command = start("run", "shop:Stubborn", *options, QUEUE=queue_name)
    command.wait_for("began a")
    command.signal()
    command.wait_for("stopping 1 consumers")
    command.signal()
    command.wait_for("survived")
    command.signal()
    wait_until(lambda: command.out.count("survived") > 1)
    command.signal()
    assert command.ends() == 1
    assert "drain: exit at once" in command.err


def test_a_drain_that_takes_too_long_exits_with_1(
    start: Start, rabbitmq: RabbitMQ, amqp_url: str, queue_name: str
) -> None:
    publish(amqp_url, queue_name, ["a", "b", "c"])
    options = ("--broker", amqp_url, "--drain-timeout", "0.2")
    command = start("run", "shop:Orders", *options, QUEUE=queue_name)
    command.wait_for("began a")
    command.signal()
    assert command.ends() == 1
    assert "stopping 1 consumers within 0.2 s" in command.err
    assert command.err.splitlines()[-1].startswith("greenconsume: work was abandoned")
    wait_until(lambda: rabbitmq.queue_counts(amqp_url, queue_name) == (3, 0, 0))


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_wait_for_an_unreachable_broker_at_once(
    start: Start, signum: int
) -> None:
    """HAZARDS row 3."""
    url = f"amqp://guest:s3cret@{HOST}:{free_port()}//"
    command = start("run", "shop:Orders", "--broker", url, "--replicas", "5", DELAYS="0.1 60")
    command.wait_for("(attempt 2, the next in ")
    began = monotonic()
    command.signal(signum)
    assert command.ends() == 0
    assert monotonic() - began < AT_ONCE
    attempts = [int(number) for number in re.findall(r"attempt (\d+)", command.err)]
    assert attempts == [*range(1, len(attempts) + 1)]  # a line for each, whatever waits for it
    assert "s3cret" not in command.err
    assert "Traceback" not in command.err


def test_a_signal_ends_an_attempt_that_nobody_answers_at_once(
    start: Start, black_hole_url: str
) -> None:
    command = start("run", "shop:Orders", "--broker", black_hole_url, "--log-level", "debug")
    command.wait_for("is connecting")
    command.signal()
    assert command.ends() == 0
    assert (
        "cannot connect" not in command.err
    )  # as it would say once the attempt had ended by itself


# -- options ----------------------------------------------------------------------------------------


def test_replicas_share_the_links(start: Start, rabbitmq: RabbitMQ, amqp_url: str) -> None:
    command = start("run", "shop:Orders", "--replicas", "7", "--links", "2", "--broker", amqp_url)
    wait_until(lambda: command.out.count("ready") == 7)
    assert rabbitmq.connection_count(amqp_url) == 2
    command.signal()
    assert command.ends() == 0


def test_the_broker_of_a_runtime_comes_from_the_file(
    start: Start, amqp_url: str, queue_name: str, tmp_path: Path
) -> None:
    (tmp_path / "go").touch()
    (tmp_path / "pyproject.toml").write_text(f'[tool.greenconsume]\nbroker = "{amqp_url}"\n')
    publish(amqp_url, queue_name, ["a"])
    command = start("run", "shop:runtime", QUEUE=queue_name)
    command.wait_for("ended a")
    command.signal()
    assert command.ends() == 0


def test_a_log_in_json_has_an_object_a_line(start: Start, amqp_url: str) -> None:
    command = start("run", "shop:Orders", "--log-format", "json", GREENCONSUME_BROKER=amqp_url)
    command.wait_for("ready")
    command.signal()
    assert command.ends() == 0
    events = [json.loads(line)["event"] for line in command.err.splitlines()]
    assert events == ["LinkUp", "DrainStarted", "DrainFinished"]


def test_a_refusal_of_one_of_two_brokers_is_logged_and_the_other_is_used(
    start: Start, amqp_url: str
) -> None:
    brokers = f"{with_password(amqp_url, 's3cret')};{amqp_url}"
    command = start("run", "shop:Orders", "--broker", brokers)
    command.wait_for("ready")
    assert "refused the connection" in command.err
    command.signal()
    assert command.ends() == 0
