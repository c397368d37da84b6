"""Tests how the command line reads its arguments, and what it makes of MODULE:TARGET."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from greenconsume import ConsumerOptions, Runtime
from greenconsume.cli.main import main

SHOP = """
from kombu import Connection, Queue
from greenconsume import ConsumerMixin, ConsumerOptions, Runtime

class Orders(ConsumerMixin):
    def __init__(self, connection):
        self.connection = connection

    def get_consumers(self, Consumer, channel):
        return [Consumer([Queue("orders")], callbacks=[print])]

class Brief(Orders):
    def on_consume_ready(self, connection, channel, consumers, **kwargs):
        print("ready on", connection.hostname)
        self.should_stop = True

class Plain:
    pass

class Bare(ConsumerMixin):
    def __init__(self, connection):
        self.connection = connection

bare = Bare(None)

class NeedsMore(Orders):
    def __init__(self, connection, shop):
        super().__init__(connection)

timeouts = ConsumerOptions(drain_timeout=7.0, cancel_timeout=8.0)
runtime = Runtime("memory://theirs//", links=3, options=timeouts)
runtime.spawn(Orders, replicas=2)
unconnected = Brief(None)
connected = Brief(Connection("memory://theirs//"))

def make_runtime():
    return runtime

def make_class():
    return Brief

def make_consumer(connection):
    return Brief(connection)

def make_nothing():
    return None

def make_defaulted(connection=None):
    assert connection is None
    return Brief(connection)

def fail():
    raise KeyError("amqp://user:secret@host//")

class shelf:
    runtime = runtime

number = 5
"""

GIVEN_UP = """
from greenconsume import RestartPolicy

class Failing(Orders):
    def get_consumers(self, Consumer, channel):
        raise ValueError("no stock")

failing = Runtime(restart=RestartPolicy("temporary"))
failing.spawn(Failing, replicas=2)
"""

Told = tuple[int, str, str]
Command = Callable[..., Told]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that the command runs in, with a module `shop`; the process is as before afterwards."""
    (tmp_path / "shop.py").write_text(SHOP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    modules = {*sys.modules}
    yield tmp_path
    for name in {*sys.modules} - modules:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def command(folder: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """Call the command line; returns its exit code and what it wrote to stdout and stderr."""

    def call(*args: str) -> Told:
        with pytest.raises(SystemExit) as caught:
            main(args)
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return call


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Runtime]:
    """The runtimes that the command line has run: none of them starts."""
    runtimes: list[Runtime] = []

    def run(self: Runtime) -> bool:
        runtimes.append(self)
        return True

    monkeypatch.setattr(Runtime, "run", run)
    return runtimes


def timeouts_of(runtime: Runtime) -> tuple[float, float]:
    options = runtime.options
    return options.value_of("drain_timeout"), options.value_of("cancel_timeout")


def concurrency_of(runtime: Runtime) -> Any:
    return runtime.options.value_of("concurrency")


def the_error(told: Told, code: int = 2) -> str:
    """Return the one line of an error."""
    assert (told[0], told[1]) == (code, "")
    (line,) = told[2].splitlines()
    assert line.startswith("greenconsume: ")
    return line


def test_a_consumer_that_ends_by_itself_ends_the_command_clean(command: Command) -> None:
    code, out, _ = command("run", "shop:Brief", "--replicas", "2")
    assert (code, out) == (0, "ready on localhost\n" * 2)


@pytest.mark.parametrize("args", [["--help"], ["run", "--help"], ["run", "-h"]])
def test_the_help_shows_examples(command: Command, args: list[str]) -> None:
    code, out, _ = command(*args)
    assert code == 0
    assert "  greenconsume run shop:Orders --broker amqp://" in out


def test_the_help_of_run_tells_variables_defaults_and_exit_codes(command: Command) -> None:
    _, out, _ = command("run", "--help")
    told = " ".join(out.split())
    assert "[env var: GREENCONSUME_BROKER; default: memory://]" in told
    assert "Exit codes: 0" in told
    assert "[tool.greenconsume]" in told


def test_the_version_is_told(command: Command) -> None:
    code, out, _ = command("--version")
    assert (code, out) == (0, "greenconsume, version 0.1.0\n")


def test_an_option_left_alone_has_its_default(command: Command, ran: list[Runtime]) -> None:
    assert command("run", "shop:Orders")[0] == 0
    (runtime,) = ran
    assert runtime.connection.hostname == "localhost"
    assert (runtime.links, *timeouts_of(runtime)) == (1, 30.0, 5.0)
    assert [child.name for child in runtime.children] == ["Orders-1"]


@pytest.mark.parametrize("target", ["Orders", "runtime"])
def test_how_handlers_run_is_said_for_all_consumers(
    command: Command, ran: list[Runtime], target: str
) -> None:
    flags = ("--concurrency", "20", "--max-handlers", "50", "--block-warning", "0.5")
    command("run", f"shop:{target}", *flags)
    (runtime,) = ran
    assert (concurrency_of(runtime), runtime.max_handlers, runtime.block_warning) == (20, 50, 0.5)


def test_every_option_of_a_consumer_that_words_can_say_has_a_flag(
    command: Command, ran: list[Runtime], folder: Path
) -> None:
    (folder / "pyproject.toml").write_text("[tool.greenconsume]\nauto-settle = true\n")
    numbers = ("--batch-size", "5", "--batch-timeout", "0.5", "--handler-timeout", "7")
    command("run", "shop:Orders", *numbers, "--settle-deadline", "60", "--concurrency", "2")
    command("run", "shop:Orders", "--no-auto-settle")
    assert [runtime.options for runtime in ran] == [
        ConsumerOptions(
            concurrency=2,
            batch_size=5,
            batch_timeout=0.5,
            handler_timeout=7.0,
            auto_settle=True,
            settle_deadline=60.0,
        ),
        ConsumerOptions(auto_settle=False),
    ]


def test_handlers_are_inline_and_not_watched_unless_it_is_said(
    command: Command, ran: list[Runtime]
) -> None:
    command("run", "shop:Orders")
    (runtime,) = ran
    assert (concurrency_of(runtime), runtime.max_handlers, runtime.block_warning) == (
        None,
        None,
        None,
    )


def test_a_flag_goes_before_a_variable_before_the_file(
    command: Command, ran: list[Runtime], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "pyproject.toml").write_text(
        "[tool.greenconsume]\nlinks = 2\ndrain-timeout = 2\ncancel-timeout = 2.5\nreplicas = 2"
    )
    monkeypatch.setenv("GREENCONSUME_LINKS", "3")
    monkeypatch.setenv("GREENCONSUME_DRAIN_TIMEOUT", "3")
    command("run", "shop:Orders", "--links", "4")
    (runtime,) = ran
    assert (runtime.links, *timeouts_of(runtime)) == (4, 3.0, 2.5)
    assert len(runtime.children) == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("BROKER", "memory://other//"),
        ("REPLICAS", "3"),
        ("LINKS", "3"),
        ("CONCURRENCY", "3"),
        ("BATCH_SIZE", "3"),
        ("BATCH_TIMEOUT", "3"),
        ("HANDLER_TIMEOUT", "3"),
        ("AUTO_SETTLE", "yes"),
        ("SETTLE_DEADLINE", "3"),
        ("MAX_HANDLERS", "3"),
        ("BLOCK_WARNING", "0.5"),
        ("DRAIN_TIMEOUT", "3"),
        ("CANCEL_TIMEOUT", "3"),
        ("LOG_LEVEL", "error"),
        ("LOG_FORMAT", "json"),
    ],
)
def test_every_option_has_a_variable(
    command: Command, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    told = command("run", "--help")[1].replace("\n", " ")
    assert f"GREENCONSUME_{name};" in " ".join(told.split())
    monkeypatch.setenv(f"GREENCONSUME_{name}", value)
    assert command("run", "shop:Brief")[0] == 0


def test_the_log_level_and_format_are_set_up(command: Command) -> None:
    _, _, err = command("run", "shop:Brief", "--log-format", "JSON", "--log-level", "Debug")
    assert '"event": "ConsumerChanged"' in err.splitlines()[0]
    assert command("run", "shop:Brief", "--log-level", "error")[2] == ""


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("links = 0", "links: 0 is not in the range x>=1"),
        ("links = 2.5", "links: '2.5' is not a valid integer"),
        ("links = true", "links must be a number, not True"),
        ('links = "2"', "links must be a number, not '2'"),
        ("broker = 5", "broker must be a string, not 5"),
        ("broker = ['amqp://']", "broker must be a string, not ['amqp://']"),
        ("drain-timeout = -1", "drain-timeout: '-1' is no number of seconds"),
        ("auto-settle = 'yes'", "auto-settle must be true or false, not 'yes'"),
        ("concurrency = true", "concurrency must be a number, not True"),
        ("handler-timeout = 0", "handler-timeout: 0.0 is not in the range x>0"),
        ("concurrency = 0", "concurrency: 0 is not in the range x>=1"),
        ("block-warning = 0", "block-warning: 0.0 is not in the range x>0"),
        ("log-level = 'loud'", "log-level: 'loud' is not one of"),
        ("drain_timeout = 5", "there is no 'drain_timeout', only broker, replicas, links, conc"),
    ],
)
def test_a_bad_setting_in_the_file_is_an_error_that_names_the_file(
    command: Command, folder: Path, table: str, message: str
) -> None:
    (folder / "pyproject.toml").write_text(f"[tool.greenconsume]\n{table}\n")
    line = the_error(command("run", "shop:Orders"))
    assert f"[tool.greenconsume] in pyproject.toml: {message}" in line


@pytest.mark.parametrize("content", [b"[tool", b"\xff = 1"])
def test_a_file_that_is_no_toml_is_an_error(command: Command, folder: Path, content: bytes) -> None:
    (folder / "pyproject.toml").write_bytes(content)
    assert "pyproject.toml cannot be read" in the_error(command("run", "shop:Orders"))


def test_a_setting_that_is_no_table_is_an_error(command: Command, folder: Path) -> None:
    (folder / "pyproject.toml").write_text("[tool]\ngreenconsume = 5")
    assert "must be a table, not 5" in the_error(command("run", "shop:Orders"))


def test_a_file_without_settings_changes_nothing(
    command: Command, ran: list[Runtime], folder: Path
) -> None:
    (folder / "pyproject.toml").write_text("[tool.other]\nlinks = 2")
    assert command("run", "shop:Orders")[0] == 0
    assert ran[0].links == 1


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["walk"],
        ["run"],
        ["run", "shop:Orders", "more"],
        ["run", "shop:Orders", "--brokr", "amqp://"],
        ["run", "shop:Orders", "--replicas", "0"],
        ["run", "shop:Orders", "--links", "many"],
        ["run", "shop:Orders", "--drain-timeout", "-1"],
        ["run", "shop:Orders", "--drain-timeout", "nan"],
        ["run", "shop:Orders", "--cancel-timeout", "inf"],
        ["run", "shop:Orders", "--log-level", "loud"],
        ["run", "shop:Orders", "--log-format", "xml"],
    ],
)
def test_a_mistyped_call_is_a_usage_error_that_names_the_help(
    command: Command, args: list[str]
) -> None:
    assert "--help)" in the_error(command(*args))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("shop", "'shop' is no MODULE:TARGET, such as shop:Orders"),
        (":Orders", "is no MODULE:TARGET"),
        ("shop:", "is no MODULE:TARGET"),
        ("shop.py:Orders", "'shop.py' is a file: name its module as an import does"),
        ("./shop:Orders", "'./shop' is a file"),
        ("nowhere:Orders", "No module named 'nowhere', neither in "),
        ("nowhere.at.all:Orders", "No module named 'nowhere', neither in "),
        ("shop.back:Orders", "'shop' is not a package, neither in "),
        ("shop:Oders", "shop has no Oders: did you mean Orders?"),
        ("shop:Orders.xyzzy", "shop has no Orders.xyzzy"),
        ("shop:Plain", "Plain has no get_consumers"),
        ("shop:Bare", "Bare has no get_consumers"),
        ("shop:bare", "Bare has no get_consumers"),
        ("shop:NeedsMore", "NeedsMore cannot be called with the connection alone"),
        ("shop:number", "5 is no consumer"),
        ("shop:make_nothing", "None is no consumer"),
    ],
)
def test_a_target_that_cannot_be_run_is_one_clear_line(
    command: Command, target: str, message: str
) -> None:
    assert message in the_error(command("run", target))


@pytest.mark.parametrize(
    ("broker", "message"),
    [
        ("carrier-pigeon://", "no transport is called 'carrier-pigeon'"),
        ("", "broker must be a URL such as amqp:// or memory://"),
        ("amqp://user:sec#ret@host//", "the broker URL cannot be parsed"),
    ],
)
@pytest.mark.parametrize("target", ["Orders", "runtime"])
def test_a_broker_that_cannot_be_used_is_one_clear_line(
    command: Command, target: str, broker: str, message: str
) -> None:
    line = the_error(command("run", f"shop:{target}", "--broker", broker))
    assert message in line
    assert "sec" not in line


@pytest.mark.parametrize("target", ["runtime", "make_runtime", "shelf.runtime"])
def test_a_runtime_keeps_what_it_was_made_with(
    command: Command, ran: list[Runtime], target: str
) -> None:
    assert command("run", f"shop:{target}")[0] == 0
    (runtime,) = ran
    assert runtime.connection.hostname == "theirs"
    assert (runtime.links, *timeouts_of(runtime)) == (3, 7.0, 8.0)
    assert len(runtime.children) == 2


def test_a_runtime_does_what_the_command_line_says(command: Command, ran: list[Runtime]) -> None:
    command("run", "shop:runtime", "--links", "2", "--drain-timeout", "1", "--cancel-timeout", "0")
    (runtime,) = ran
    assert (runtime.links, *timeouts_of(runtime)) == (2, 1.0, 0.0)


def test_a_runtime_is_given_another_broker_with_all_that_was_spawned_for_it(
    command: Command, folder: Path
) -> None:
    (folder / "shop.py").write_text(SHOP + "\nruntime = Runtime(); runtime.spawn(Brief, 2)")
    code, out, _ = command("run", "shop:runtime", "--broker", "memory://ours//")
    assert (code, out) == (0, "ready on ours\n" * 2)


def test_the_same_broker_leaves_a_connection_what_its_url_does_not_say(
    command: Command, ran: list[Runtime], folder: Path
) -> None:
    with (folder / "shop.py").open("a") as shop:
        shop.write("\nruntime = Runtime(Connection('memory://ours//', heartbeat=77))")
    command("run", "shop:runtime", "--broker", "memory://ours//")
    assert ran[0].connection.heartbeat == 77
    command("run", "shop:runtime", "--broker", "memory://others//")
    assert (ran[1].connection.hostname, ran[1].connection.heartbeat) == ("others", 0)


@pytest.mark.parametrize("flag", [("--pid-file", "pid"), ("--hang-timeout", "3")])
def test_a_flag_of_the_arbiter_is_refused_where_there_is_none(
    command: Command, flag: tuple[str, str]
) -> None:
    line = the_error(command("run", "shop:Orders", *flag))
    assert f"{flag[0]} does nothing without --processes (1 is enough)" in line


def test_a_runtime_refuses_replicas(command: Command) -> None:
    line = the_error(command("run", "shop:runtime", "--replicas", "1"))
    assert "--replicas is not for a Runtime: say it there" in line


@pytest.mark.parametrize(
    ("target", "options", "hostname"),
    [
        ("unconnected", [], "localhost"),
        ("unconnected", ["--broker", "memory://ours//"], "ours"),
        ("connected", [], "theirs"),
        ("connected", ["--broker", "memory://ours//"], "ours"),
    ],
)
def test_a_consumer_is_given_the_broker_unless_it_has_one(
    command: Command, target: str, options: list[str], hostname: str
) -> None:
    assert command("run", f"shop:{target}", *options)[:2] == (0, f"ready on {hostname}\n")


def test_a_consumer_refuses_replicas(command: Command) -> None:
    line = the_error(command("run", "shop:unconnected", "--replicas", "2"))
    assert "an instance of Brief cannot have 2 replicas" in line


@pytest.mark.parametrize("target", ["make_class", "make_consumer"])
def test_a_function_makes_consumers(command: Command, target: str) -> None:
    code, out, _ = command("run", f"shop:{target}", "--replicas", "3")
    assert (code, out) == (0, "ready on localhost\n" * 3)


def test_a_function_that_needs_no_arguments_is_called_without_any(command: Command) -> None:
    assert command("run", "shop:make_defaulted")[:2] == (0, "ready on localhost\n")


def test_an_error_of_the_users_own_code_shows_that_code_alone(command: Command) -> None:
    code, out, err = command("run", "shop:fail")
    assert (code, out) == (1, "")
    first, where, *_, last = err.splitlines()
    assert first == "Traceback (most recent call last):"
    line = SHOP[: SHOP.index("raise KeyError")].count("\n") + 1
    assert where.endswith(f'shop.py", line {line}, in fail')
    assert last == "KeyError: 'amqp://user:**@host//'"


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("import nowhere", "ModuleNotFoundError: No module named 'nowhere'"),
        (
            "import broken.part",
            "ModuleNotFoundError: No module named 'broken.part'; 'broken' is not",
        ),
        ("from shop import Nobody", "ImportError: cannot import name 'Nobody' from 'shop'"),
        ("def", "SyntaxError: invalid syntax"),
    ],
)
def test_an_import_that_fails_in_the_users_module_shows_where(
    command: Command, folder: Path, source: str, shown: str
) -> None:
    (folder / "broken.py").write_text(source)
    code, out, err = command("run", "broken:Orders")
    assert (code, out) == (1, "")
    assert 'broken.py", line 1' in err
    assert shown in err.splitlines()[-1]
    assert "greenconsume" not in err


def test_a_refused_consumer_in_the_users_module_is_one_line(command: Command, folder: Path) -> None:
    (folder / "wrong.py").write_text("import shop; shop.runtime.spawn(shop.Plain)")
    assert "Plain has no get_consumers" in the_error(command("run", "wrong:runtime"))


def test_an_interrupt_before_the_start_is_one_line(command: Command, folder: Path) -> None:
    (folder / "slow.py").write_text("raise KeyboardInterrupt")
    code, _, err = command("run", "slow:Orders")
    assert code == 1
    assert err.strip() == "greenconsume: interrupted before anything was started"


def test_the_current_folder_comes_first(
    command: Command, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "shop.py").write_text("")
    sys.path.insert(0, str(elsewhere))
    assert command("run", "shop:Brief")[0] == 0


def test_a_consumer_that_was_given_up_is_an_error(command: Command, folder: Path) -> None:
    with (folder / "shop.py").open("a") as shop:
        shop.write(GIVEN_UP)
    code, _, err = command("run", "shop:failing", "--log-level", "error")
    assert code == 1
    assert err.count("Traceback") == 2  # in the log, one for each
    last = err.splitlines()[-1]
    assert last == "greenconsume: Failing-1 was given up: ValueError('no stock'), and 1 more"
