"""`greenconsume dead-letters`: what it shows, sends back and removes, and what it leaves where it was."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import amqp
import pytest
from kombu import Queue

import greenconsume
from greenconsume import ConsumerMixin, Reject, Retry
from greenconsume.cli.main import main
from greenconsume.errors import GreenconsumeError
from greenconsume.failures import message_copy
from greenconsume.failures.dead_letters import DeadLetters
from greenconsume.handling.options import ConsumerOptions
from tests.integration.consumers import SOON, Recorder, consuming, green_connection
from tests.messages import channel, declare, delete_queue, publish, queue_depth
from tests.options import say
from tests.waiting import wait_until


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys) -> Iterator[Callable[..., Result]]:
    """Run `greenconsume dead-letters …` in this process."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level

    def command(*args: str) -> Result:
        with pytest.raises(SystemExit) as ended:
            main(["dead-letters", *args])
        out, err = capsys.readouterr()
        return Result(ended.value.code or 0, out, err)

    yield command
    root.handlers[:] = before
    root.setLevel(level)


class Failing(Recorder):
    """Fails on every message with the error that its body names."""

    def __init__(self, url: str, queue: Any, on_error: Any) -> None:
        super().__init__(url, queue, self.fail)
        say(self, on_error=on_error)

    def fail(self, body: Any, _message: Any) -> None:
        raise {"key": KeyError, "value": ValueError}[body](f"{body}:\n\x1b[31mred")


@pytest.fixture
def dead(amqp_url: str, queue_name: str) -> str:
    """A dead-letter queue with two KeyErrors and a ValueError between them."""
    name = f"{queue_name}.dead"
    with consuming(Failing(amqp_url, queue_name, Retry(0))):
        for number, body in enumerate(["key", "value", "key"]):
            publish_one(amqp_url, queue_name, f'"{body}"', number)
        wait_until(lambda: queue_depth(amqp_url, name) == 3, SOON)
    return name


def publish_one(url: str, queue: str, body: str, number: int, exchange: str = "") -> None:
    with channel(url) as chan:
        chan.confirm_select()
        message = amqp.Message(
            body,
            content_type="application/json",
            content_encoding="utf-8",
            message_id=f"m{number}",
            application_headers={"number": number},
        )
        chan.basic_publish_confirm(message, exchange, queue)


def message_ids(url: str, queue: str) -> list[str]:
    """Return the ids of a queue's messages, in their order; they stay in it."""
    with channel(url) as chan:
        count = chan.queue_declare(queue, passive=True).message_count
        return [chan.basic_get(queue).properties["message_id"] for _ in range(count)]


# -- looking --------------------------------------------------------------------------------------


def test_the_list_says_when_why_and_where_and_shows_no_body(run, amqp_url, dead, queue_name):
    code, out, err = run("list", dead, "--broker", amqp_url)
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert lines[0].split() == ["#", "time", "error", "message", "retries", "from"]
    assert [line.split()[0] for line in lines[1:4]] == ["1", "2", "3"]
    assert [line.split()[2] for line in lines[1:4]] == ["KeyError", "ValueError", "KeyError"]
    assert lines[2].split()[-2:] == ["0", queue_name]
    assert lines[4:] == [f"3 of 3 messages in {dead}"]
    assert '"key"' not in out
    assert "\x1b" not in out  # nor what a terminal would act on


def test_looking_leaves_the_queue_as_it_was(run, amqp_url, dead):
    run("list", dead, "--broker", amqp_url)
    run("show", dead, "--broker", amqp_url, "--limit", "2")
    run("replay", dead, "--broker", amqp_url, "--dry-run")
    run("purge", dead, "--broker", amqp_url, "--dry-run")
    assert message_ids(amqp_url, dead) == ["m0", "m1", "m2"]


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        (["--limit", "2"], "12"),
        (["--filter", "KeyError"], "13"),
        (["--filter", "KeyError", "--limit", "1"], "1"),
        (["--filter", "number=1"], "2"),
        (["--filter", "message_id=m2"], "3"),
        (["--filter", "error-type=KeyError", "--filter", "number=0"], "1"),
        (["--filter", "OSError"], ""),
        (["--filter", "no-such=1"], ""),
    ],
)
def test_a_list_can_be_limited_and_filtered(run, amqp_url, dead, options, numbers):
    out = run("list", dead, "--broker", amqp_url, *options).out
    assert "".join(line.split()[0] for line in out.splitlines()[1:-1]) == numbers
    assert out.splitlines()[-1] == f"{len(numbers)} of 3 messages in {dead}"


def test_one_message_is_shown_in_full(run, amqp_url, dead, queue_name):
    code, out, _ = run("show", dead, "--broker", amqp_url, "--number", "2")
    assert code == 0
    assert out.startswith("message 2\n")
    assert f"  queue        {queue_name}\n" in out
    assert "  message_id: 'm1'\n" in out
    assert "  number: 1\n" in out
    assert "ValueError: value:" in out
    assert "in fail" in out  # the stack
    assert out.endswith('body (7 bytes):\n"value"\n')
    assert "\x1b" not in out


def test_a_number_that_there_is_not(run, amqp_url, dead):
    code, out, err = run("show", dead, "--broker", amqp_url, "--number", "9")
    assert (code, out, err) == (1, "", f"greenconsume: there is no such message in {dead}\n")


# -- sending back ---------------------------------------------------------------------------------


def test_what_is_replayed_is_as_it_was_before_it_failed(run, amqp_url, dead, queue_name):
    code, out, err = run("replay", dead, "--broker", amqp_url)
    assert (code, out, err) == (0, "3 of 3 messages replayed\n", "")
    assert queue_depth(amqp_url, dead) == 0
    assert message_ids(amqp_url, queue_name) == ["m0", "m1", "m2"]
    with channel(amqp_url) as chan:
        message = chan.basic_get(queue_name)
    assert message.body == '"key"'
    assert message.headers == {
        "number": 0,
        message_copy.EXCHANGE: "",
        message_copy.ROUTING_KEY: queue_name,
    }


def test_what_does_not_match_stays_in_its_order(run, amqp_url, dead, queue_name):
    out = run("replay", dead, "--broker", amqp_url, "--filter", "ValueError").out
    assert out == "1 of 3 messages replayed\n"
    assert message_ids(amqp_url, dead) == ["m0", "m2"]
    assert message_ids(amqp_url, queue_name) == ["m1"]


def test_a_limit_replays_the_oldest(run, amqp_url, dead):
    run("replay", dead, "--broker", amqp_url, "--limit", "2")
    assert message_ids(amqp_url, dead) == ["m2"]


def test_a_replayed_message_has_its_retries_before_it(run, amqp_url, dead, queue_name):
    run("replay", dead, "--broker", amqp_url, "--limit", "1")
    consumer = Failing(amqp_url, queue_name, Retry(delays=[0.05]))
    with consuming(consumer):
        wait_until(lambda: queue_depth(amqp_url, dead) == 3, SOON)
    with channel(amqp_url) as chan:
        counts = [chan.basic_get(dead).headers[message_copy.RETRIES] for _ in range(3)]
    assert counts == [0, 0, 1]


def test_an_expiration_comes_back_with_a_replay(run, amqp_url, queue_name):
    with consuming(Failing(amqp_url, queue_name, Retry(0))), channel(amqp_url) as chan:
        chan.basic_publish(
            amqp.Message('"key"', content_type="application/json", expiration="60000"),
            "",
            queue_name,
        )
        wait_until(lambda: queue_depth(amqp_url, f"{queue_name}.dead") == 1, SOON)
    run("replay", f"{queue_name}.dead", "--broker", amqp_url)
    with channel(amqp_url) as chan:
        assert chan.basic_get(queue_name).properties["expiration"] == "60000"


def test_where_the_queue_is_gone_the_messages_stay(run, amqp_url, dead, queue_name):
    delete_queue(amqp_url, queue_name)
    code, out, err = run("replay", dead, "--broker", amqp_url)
    assert (code, out) == (1, "0 of 3 messages replayed\n")
    assert f"message 1 stays: there is no queue {queue_name!r}" in err
    assert err.endswith("greenconsume: 3 messages could not be replayed\n")
    assert message_ids(amqp_url, dead) == ["m0", "m1", "m2"]


def test_a_message_of_nowhere_stays(run, amqp_url, queue_name):
    publish(amqp_url, queue_name, 1)
    code, _, err = run("replay", queue_name, "--broker", amqp_url)
    assert code == 1
    assert "message 1 stays: message 1 does not say where it came from" in err
    assert queue_depth(amqp_url, queue_name) == 1


def test_what_the_broker_dead_lettered_is_replayed_too(run, amqp_url, queue_name):
    """By a queue's own dead-letter exchange, after `Reject`."""
    dead = f"{queue_name}-dlx"
    declare(amqp_url, dead)
    arguments = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": dead}
    queue = Queue(queue_name, queue_arguments=arguments)
    with consuming(Failing(amqp_url, queue, Reject())):
        publish_one(amqp_url, queue_name, '"key"', 0)
        wait_until(lambda: queue_depth(amqp_url, dead) == 1, SOON)
    out = run("list", dead, "--broker", amqp_url, "--filter", "rejected").out
    assert queue_name in out
    assert "rejected" in out
    assert run("replay", dead, "--broker", amqp_url).code == 0
    with channel(amqp_url) as chan:
        message = chan.basic_get(queue_name)
    assert not [name for name in message.headers if name.startswith("x-")]


def test_a_replay_that_fails_again_at_once_comes_to_an_end(run, amqp_url, dead, queue_name):
    with consuming(Failing(amqp_url, queue_name, Retry(0))):
        assert run("replay", dead, "--broker", amqp_url).out == "3 of 3 messages replayed\n"
        wait_until(lambda: queue_depth(amqp_url, dead) == 3, SOON)


# -- removing -------------------------------------------------------------------------------------


def test_what_is_purged_is_gone_and_the_rest_is_not(run, amqp_url, dead):
    result = run("purge", dead, "--broker", amqp_url, "--filter", "KeyError", "--yes")
    assert result == (0, "2 of 3 messages removed\n", "")
    assert message_ids(amqp_url, dead) == ["m1"]


def test_a_purge_asks_first(run, amqp_url, dead, monkeypatch):
    monkeypatch.setattr("click.confirm", lambda *_args, **_kwargs: False)
    code, _, err = run("purge", dead, "--broker", amqp_url)
    assert (code, err) == (1, "greenconsume: nothing was removed\n")
    assert queue_depth(amqp_url, dead) == 3


# -- what goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["list", "show", "replay"])
def test_a_queue_that_is_not_there_is_told_in_one_line(run, amqp_url, command):
    code, out, err = run(command, "nothing", "--broker", amqp_url)
    assert (code, out, err) == (1, "", "greenconsume: there is no queue 'nothing'\n")


def test_a_broker_that_is_away_is_told_in_one_line(run, proxy):
    proxy.refuse()
    code, out, err = run("list", "orders", "--broker", proxy.url)
    assert (code, out) == (1, "")
    assert len(err.splitlines()) == 1
    assert "refused" in err


def test_a_wrong_password_is_told_in_one_line_that_does_not_show_it(run, amqp_url):
    url = amqp_url.replace("guest:guest", "guest:secret")
    code, _, err = run("list", "orders", "--broker", url)
    assert code == 1
    assert len(err.splitlines()) == 1
    assert "ACCESS_REFUSED" in err
    assert "secret" not in err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["list", "orders"], "--broker"),
        (["list", "--broker", "amqp://"], "QUEUE"),
        (["list", "orders", "--broker", "amqp://", "--limit", "0"], "--limit"),
        (["list", "orders", "--broker", "nothing://"], "no transport is called"),
        (["list", "orders", "--broker", "amqp://host:port//"], "cannot be parsed"),
        (["bury", "orders"], "No such command"),
    ],
)
def test_a_mistake_in_the_call_is_exit_code_two(run, arguments, complaint, monkeypatch):
    monkeypatch.delenv("GREENCONSUME_BROKER", raising=False)
    code, _, err = run(*arguments)
    assert code == 2
    assert complaint in err


def test_the_broker_may_come_from_the_environment(run, amqp_url, dead, monkeypatch):
    monkeypatch.setenv("GREENCONSUME_BROKER", amqp_url)
    assert run("list", dead).code == 0


def test_the_broker_may_come_from_pyproject(run, amqp_url, dead, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pyproject.toml").write_text(f'[tool.greenconsume]\nbroker = "{amqp_url}"\n')
    assert run("list", dead).code == 0


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 1), (signal.SIGKILL, -9)])
def test_an_interrupted_replay_neither_loses_nor_mixes_up_messages(
    amqp_url, queue_name, tmp_path, signum, code
):
    count, dead = 3000, f"{queue_name}.dead"
    declare(amqp_url, queue_name)
    with channel(amqp_url) as chan:
        chan.queue_declare(dead, durable=True, auto_delete=False)
        chan.confirm_select()
        for number in range(count):
            headers = {message_copy.QUEUE: queue_name}
            chan.basic_publish(
                amqp.Message(str(number), message_id=str(number), application_headers=headers),
                "",
                dead,
            )
    wait_until(lambda: queue_depth(amqp_url, dead) == count, SOON)
    path = str(Path(greenconsume.__file__).parents[1])
    command = [sys.executable, "-m", "greenconsume", "dead-letters", "replay", dead]
    with (tmp_path / "err").open("wb") as err:
        process = subprocess.Popen([*command, "--broker", amqp_url], cwd=path, stderr=err)
        wait_until(lambda: queue_depth(amqp_url, queue_name) > 100, 20)
        process.send_signal(signum)
        assert process.wait(30) == code
    if signum == signal.SIGINT:
        said = (tmp_path / "err").read_text()
        assert said == "greenconsume: interrupted; what was not done yet is in the queue again\n"
    wait_until(lambda: queue_depth(amqp_url, queue_name) + queue_depth(amqp_url, dead) >= count)
    replayed = [int(each) for each in message_ids(amqp_url, queue_name)]
    left = [int(each) for each in message_ids(amqp_url, dead)]
    assert 100 < len(replayed) < count
    assert replayed == list(range(len(replayed)))
    twice = len(replayed) + len(left) - count
    assert 0 <= twice <= (1 if signum == signal.SIGKILL else 0)  # confirmed, and not yet removed
    assert left == list(range(len(replayed) - twice, count))


# -- the library, and other brokers ---------------------------------------------------------------


def test_the_rest_goes_back_when_the_look_ends_with_an_error(amqp_url, dead):
    def remove_one_and_fail() -> None:
        with DeadLetters(amqp_url, dead) as letters:
            letters.remove(next(iter(letters)))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        remove_one_and_fail()
    wait_until(lambda: queue_depth(amqp_url, dead) == 2)
    assert message_ids(amqp_url, dead) == ["m1", "m2"]


def test_dead_letters_in_memory_are_replayed(queue_name):
    dead = f"{queue_name}.dead"

    class Orders(ConsumerMixin):
        connection = green_connection("memory://")
        options = ConsumerOptions(on_error=Retry(0))

        def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
            return [Consumer([Queue(queue_name)], callbacks=[self.fail])]

        def fail(self, body: Any, _message: Any) -> None:
            raise LookupError(body)

    with green_connection("memory://") as connection, consuming(Orders()):
        for number in range(3):
            connection.Producer().publish(number, routing_key=queue_name)
        wait_until(lambda: connection.default_channel._size(dead) == 3)
    with DeadLetters("memory://", dead) as letters:
        assert letters.count == 3
        for letter in letters:
            if letter.error == "1":
                letters.replay(letter)
    with DeadLetters("memory://", queue_name) as replayed:
        assert [letter.headers for letter in replayed] == [
            {message_copy.EXCHANGE: "", message_copy.ROUTING_KEY: queue_name}
        ]
    with DeadLetters("memory://", dead) as letters:
        assert [letter.error for letter in letters] == ["0", "2"]
    with pytest.raises(GreenconsumeError, match="no queue"):
        DeadLetters("memory://", f"{queue_name}.none").__enter__()


@pytest.mark.leaks_ok("kombu's redis transport leaves its sockets to the garbage collector")
def test_dead_letters_on_redis_are_replayed(redis_url, queue_name):
    """Also that retries are counted there, by a transport that is polled."""
    dead = f"{queue_name}.dead"
    consumer = Recorder(green_connection(redis_url), queue_name)
    seen: list[int] = []

    def fail(_body: Any, message: Any) -> None:
        seen.append(message_copy.retries_of(message.headers))
        raise LookupError("no such hat")

    consumer.handle = fail
    say(consumer, on_error=Retry(delays=[0.1]))
    with green_connection(redis_url) as connection, consuming(consumer):
        connection.Producer().publish({"hat": 1}, routing_key=queue_name)
        wait_until(lambda: connection.default_channel._size(dead) == 1, SOON)
    assert seen == [0, 1]
    with DeadLetters(redis_url, dead) as letters:
        (letter,) = letters
        assert (letter.error, letter.retry_count) == ("no such hat", 1)
        letters.replay(letter)
    with green_connection(redis_url) as connection:
        message = connection.default_channel.basic_get(queue_name)
        assert message.decode() == {"hat": 1}
        assert connection.default_channel._size(dead) == 0
