"""Tests what a process is told that gevent has not patched, or not far or early enough.

These tests run in a process that is not patched, and each starts its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

REFUSE = """
from greenconsume import require_patched
from greenconsume.errors import NotPatchedError
try:
    require_patched()
except NotPatchedError as exc:
    print(exc)
else:
    print("accepted")
"""


def run(*code: str) -> str:
    """Run `code` in a fresh interpreter and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "\n".join(code)],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def imported_after(code: str) -> set[str]:
    """Return the top-level packages that are imported once `code` has run."""
    found = run(code, "import json, sys", "print(json.dumps([*sys.modules]))")
    return {name.partition(".")[0] for name in json.loads(found)}


def test_importing_the_package_imports_neither_gevent_nor_kombu() -> None:
    assert imported_after("import greenconsume").isdisjoint({"gevent", "kombu", "amqp", "click"})


def test_importing_what_patches_imports_no_kombu_and_patches_nothing() -> None:
    code = "import greenconsume.__main__, greenconsume.patching"
    assert imported_after(code).isdisjoint({"kombu", "amqp", "click"})
    check = "from gevent import monkey; print([*monkey.saved])"
    assert run(code, check) == "[]"


def test_the_check_imports_no_kombu() -> None:
    patched = "from gevent import monkey; monkey.patch_all()"
    code = f"{patched}; from greenconsume import require_patched; require_patched()"
    assert imported_after(code).isdisjoint({"kombu", "amqp"})


@pytest.mark.parametrize(
    "entry",
    [
        "from greenconsume import require_patched; require_patched()",
        "from greenconsume import spawn; spawn(object())",
        "from greenconsume import Runtime; Runtime('memory://').start()",
    ],
)
def test_an_unpatched_process_is_refused_and_told_how_to_patch(entry: str) -> None:
    told = run(
        "from greenconsume.errors import NotPatchedError",
        "try:",
        f"    {entry}",
        "except NotPatchedError as exc:",
        "    print(exc)",
    )
    assert "gevent has not patched this process" in told
    assert "greenconsume.patch_all()" in told
    assert "greenconsume run" in told


WORKER = """
import threading
import kombu
from greenconsume import ConsumerMixin, Publisher

class Worker(ConsumerMixin):
    def __init__(self, connection):
        self.connection = connection

    def get_consumers(self, Consumer, channel):
        return [Consumer([kombu.Queue("q")], callbacks=[self.on_message])]

    def on_message(self, body, message):
        message.ack()
        print("handled", body)
        self.should_stop = True

def in_thread(function):
    errors = []
    def run():
        try:
            function()
        except BaseException as exc:
            errors.append(exc)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]

worker = Worker(kombu.Connection("amqp://127.0.0.1:1"))
"""


@pytest.mark.parametrize(
    "entry",
    [
        "worker.run()",
        "next(iter(worker.consume()))",
        "in_thread(worker.run)",
        "Worker(kombu.Connection('redis://127.0.0.1:1')).run()",
        "from greenconsume.transports import registry; registry.register();"
        "kombu.Connection('redis://127.0.0.1:1').connect()",
        "in_thread(lambda: list(worker.consume(limit=1)))",
        "Publisher('amqp://127.0.0.1:1').publish('a')",
        "in_thread(lambda: Publisher('amqp://127.0.0.1:1').publish('a'))",
        "Worker(kombu.Connection('filesystem://')).run()",
        "from greenconsume.transports import registry; registry.register();"
        "kombu.Connection('amqp://127.0.0.1:1').connect()",
        "from greenconsume.transports import registry; registry.register();"
        "kombu.Connection('amqp://127.0.0.1:1').default_channel",
    ],
)
def test_whatever_would_wait_in_an_unpatched_process_is_refused_at_once(entry: str) -> None:
    """HAZARDS row 31: it used to hang, silently."""
    told = run(
        WORKER,
        "from greenconsume.errors import NotPatchedError",
        "try:",
        f"    {entry}",
        "except NotPatchedError as exc:",
        "    print(exc)",
    )
    assert "gevent has not patched this process" in told
    assert "greenconsume.patch_all()" in told


def test_memory_works_in_an_unpatched_process() -> None:
    """Nothing there waits for a network: a first try in a shell needs no patching."""
    told = run(
        WORKER,
        "connection = kombu.Connection('memory://')",
        "Publisher(connection).publish('a', 'q')",
        "Worker(connection).run()",
    )
    assert told == "handled a"


@pytest.mark.parametrize("scheme", ["amqp", "amqps", "pyamqp", "memory"])
def test_a_connection_that_is_made_after_patch_all_is_green(scheme: str) -> None:
    """HAZARDS row 40: one that a module opens when it is imported, too."""
    told = run(
        "from greenconsume import patch_all",
        "patch_all()",
        "import kombu",
        f"print(type(kombu.Connection('{scheme}://').transport).__module__)",
    )
    assert told.startswith("greenconsume.")


def test_a_connection_that_is_made_while_the_users_module_is_imported_is_green(
    tmp_path: Path,
) -> None:
    """HAZARDS row 40: py-amqp's has but one user at a time, and 50 handlers that publish on it fail."""
    (tmp_path / "shop.py").write_text(
        "import kombu\n"
        "connection = kombu.Connection('amqp://')\n"
        "raise SystemExit(type(connection.transport).__module__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "greenconsume", "run", "shop:Orders"],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
    )
    assert done.stderr.strip() == "greenconsume.amqp.transport"


def test_a_patched_process_is_accepted() -> None:
    assert run("from gevent import monkey; monkey.patch_all()", REFUSE) == "accepted"


def test_unpatched_threads_are_refused() -> None:
    """HAZARDS row 9: with `patch_all(thread=False)` a native lock held across a send stops the hub."""
    told = run("from gevent import monkey; monkey.patch_all(thread=False)", REFUSE)
    assert told.startswith("threads are not patched")
    assert "leave out thread=False" in told


def test_unpatched_threads_can_be_patched_late() -> None:
    """HAZARDS row 9: the remedy that the message names is one."""
    late = "from greenconsume import patch_all; patch_all()"
    assert (
        run("from gevent import monkey; monkey.patch_all(thread=False)", late, REFUSE) == "accepted"
    )


@pytest.mark.parametrize("module", ["socket", "ssl", "time", "subprocess", "queue"])
def test_a_module_left_out_is_named(module: str) -> None:
    told = run(f"from gevent import monkey; monkey.patch_all({module}=False)", REFUSE)
    assert told.startswith(f"gevent has not patched {module},")
    assert "leave out the arguments" in told


def test_select_left_out_leaves_out_selectors() -> None:
    told = run("from gevent import monkey; monkey.patch_all(select=False)", REFUSE)
    assert told.startswith("gevent has not patched select, selectors,")


def test_blocking_name_resolution_is_refused() -> None:
    told = run("from gevent import monkey; monkey.patch_all(dns=False)", REFUSE)
    assert "leave out dns=False" in told


@pytest.mark.parametrize(
    "name",
    [
        "kombu.mixins.sleep",
        "kombu.utils.eventio._selectf",
        "kombu.transport.virtual.base.sleep",
        "kombu.utils.functional.sleep",
        "kombu.clocks.Lock",
    ],
)
def test_kombu_imported_before_patching_is_refused(name: str) -> None:
    """HAZARDS row 10: late patching leaves a blocking `sleep` and `select` in kombu."""
    early = f"import {name.rpartition('.')[0]}"
    told = run(early, "from gevent import monkey; monkey.patch_all()", REFUSE)
    assert told.startswith("imported before gevent patched")
    assert name in told
    assert "patch before the first import of kombu, or call greenconsume.patch_all()" in told


def test_an_environment_that_kombu_found_before_patching_is_refused() -> None:
    """HAZARDS row 10: kombu remembers that there was no gevent, and polls with the real `epoll`."""
    early = "from kombu.utils.compat import detect_environment; detect_environment()"
    told = run(early, "from gevent import monkey; monkey.patch_all()", REFUSE)
    assert "kombu.utils.compat._environment" in told


def test_names_bound_early_let_others_run_once_replaced() -> None:
    """HAZARDS row 10: `greenconsume.patch_all` mends what an early import of kombu has left."""
    assert (
        run(
            "import kombu.mixins, kombu.utils.eventio",
            "from kombu.utils.compat import detect_environment",
            "detect_environment()",
            "import greenconsume, gevent",
            "greenconsume.patch_all()",
            "greenconsume.require_patched()",
            "ran = []",
            "gevent.spawn(ran.append, 'during sleep')",
            "kombu.mixins.sleep(0.001)",
            "gevent.spawn(ran.append, 'during poll')",
            "kombu.utils.eventio.poll().poll(0.001)",
            "print(ran, detect_environment())",
        )
        == "['during sleep', 'during poll'] gevent"
    )


def test_kombu_imported_after_patching_is_accepted() -> None:
    code = "from gevent import monkey; monkey.patch_all(); import kombu.mixins, kombu.utils.eventio"
    assert run(code, REFUSE) == "accepted"


def test_an_interpreter_without_its_lock_is_refused() -> None:
    code = "import sys; sys._is_gil_enabled = lambda: False"
    told = run(code, "from gevent import monkey; monkey.patch_all()", REFUSE)
    assert "without its global interpreter lock" in told
    assert "PYTHON_GIL=1" in told


def test_every_failure_is_told_at_once() -> None:
    told = run(
        "import kombu.mixins, sys",
        "sys._is_gil_enabled = lambda: False",
        "from gevent import monkey",
        "monkey.patch_all(thread=False, ssl=False)",
        REFUSE,
    ).splitlines()
    assert len(told) == 5
    assert told[0].startswith("4 things")
    for line, cause in zip(
        told[1:], ("threads", "has not patched ssl", "kombu.mixins.sleep", "lock"), strict=True
    ):
        assert cause in line


def test_a_process_that_was_refused_is_accepted_once_mended() -> None:
    told = run(REFUSE, "import greenconsume; greenconsume.patch_all()", REFUSE).splitlines()
    assert told[0].startswith("gevent has not patched this process")
    assert told[-1] == "accepted"


def test_the_entry_point_patches_before_anything_else_is_imported() -> None:
    told = run(
        "import runpy, sys",
        "class Watch:",
        "    def find_spec(self, name, path=None, target=None):",
        "        if name in ('greenconsume.cli.main', 'click', 'kombu'):",
        "            from gevent import monkey",
        "            print(name, monkey.is_module_patched('threading'), file=sys.__stdout__)",
        "sys.meta_path.insert(0, Watch())",
        "sys.argv = ['greenconsume', '--help']",
        "try:",
        "    runpy.run_module('greenconsume', run_name='__main__', alter_sys=True)",
        "except SystemExit as exc:",
        "    assert not exc.code, exc.code",
    )
    assert "greenconsume.cli.main True" in told
    assert "False" not in told
