"""Consumers beside HTTP in gunicorn's workers: how they start, what refuses, where they run."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from urllib.parse import urlsplit

import psutil
import pytest

from tests.messages import declare, publish
from tests.servers import HOST, free_port
from tests.waiting import wait_until

SECOND = "from tests.webapp import *\n"


@pytest.mark.parametrize("worker_class", ["gevent", "gevent_pywsgi"])
def test_consumers_run_beside_http(amqp_url, queue_name, start, worker_class):
    server = start(f"worker_class = {worker_class!r}\n")
    publish(amqp_url, queue_name, 20)
    server.wait_serving()
    wait_until(lambda: server.count("finished") == 20)
    server.signal(signal.SIGTERM)
    server.wait_end()
    assert "Traceback" not in server.log


@pytest.mark.parametrize("worker_class", ["sync", "gthread"])
def test_any_other_worker_class_is_refused(start, worker_class):
    server = start(f"worker_class = {worker_class!r}\n", consuming=0)
    assert server.process.wait(30) == 3
    assert 'set worker_class = "gevent" or "gevent_pywsgi" in gunicorn.conf.py' in server.log


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        (
            "post_worker_init = consumers",
            'GeventWorker object at .*: post_worker_init = consumers\\("myapp:runtime"\\)',
        ),
        (
            "post_worker_init = consumers('tests.webapp:')",
            "takes a string such as .*, not 'tests.webapp:'",
        ),
        (
            "post_worker_init = consumers('tests.webapp:runtime', only_in='1')",
            "only_in must be 1 or more, or None, not '1'",
        ),
        (
            "when_ready = consumers('tests.webapp:runtime')",
            "consumers start in workers, and this is Arbiter",
        ),
    ],
)
def test_a_mistake_in_the_configuration_ends_gunicorn_with_the_remedy(start, mistake, said):
    server = start(f"{mistake}\n", consuming=0)
    assert server.process.wait(30) in (1, 3)
    assert re.search(said, server.log)


@pytest.mark.parametrize("target", ["tests.webapp:runtime", "tests.webapp:Worker"])
def test_an_option_that_there_is_not_is_refused_with_the_nearest(start, target):
    conf = f"post_worker_init = consumers({target!r}, concurency=3)\n"
    server = start(conf, consuming=0)
    server.wait_log("there is no option concurency: did you mean concurrency?; HTTP is served on")


def test_a_class_is_given_options_as_an_object_and_by_name(amqp_url, queue_name, start):
    server = start(
        "from greenconsume.gunicorn import consumers\n"
        "def post_worker_init(worker):\n"
        "    from greenconsume import ConsumerOptions\n"
        "    options = ConsumerOptions(drain_timeout=3.0)\n"
        f"    consumers('tests.webapp:Worker', broker={amqp_url!r}, options=options, "
        "cancel_timeout=1.0)(worker)\n"
    )
    server.wait_log("1 consumers of tests.webapp:Worker in this worker, on amqp://guest:**@")
    server.signal(signal.SIGTERM)
    server.wait_log("stopping 1 consumers within 3.0 s")


def test_a_class_for_which_no_broker_is_said_is_refused(start):
    """Messages in memory would be lost without a word, and are for this process alone."""
    server = start("post_worker_init = consumers('tests.webapp:Worker')\n", consuming=0)
    server.wait_log("tests.webapp:Worker does not say from which broker it consumes: add broker=")
    assert "; HTTP is served on" in server.log


@pytest.mark.parametrize(
    ("said", "broker"),
    [
        ("'tests.webapp:Worker', broker='memory://', options=None", "memory"),
        ("'own:worker'", "amqp"),
    ],
)
def test_memory_can_be_asked_for_and_a_consumer_may_have_its_own_connection(
    tmp_path, start, said, broker
):
    (tmp_path / "own.py").write_text(
        "import kombu\nfrom tests.webapp import *\nworker = Worker(kombu.Connection(BROKER))\n"
    )
    conf = f"pythonpath = {str(tmp_path)!r}\npost_worker_init = consumers({said})\n"
    server = start(conf)
    server.wait_log(f"in this worker, on {broker}://")


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("options={'concurrency': 3}", "TypeError: options must be a ConsumerOptions, not {'conc"),
        ("max_messages='3'", "max_messages must be 1 or more, or None, not '3'"),
    ],
)
def test_options_that_are_none_are_one_line(start, said, told):
    conf = f"post_worker_init = consumers('tests.webapp:runtime', {said})\n"
    server = start(conf, consuming=0)
    server.wait_log(told)
    assert "Traceback" not in server.log


#: A worker of which the first is told to end by itself, here.
TELL_ONCE = """import os, signal
def tell_once(folder):
    try:
        os.mkdir(folder + "/told")
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.mark.parametrize("where", ["before the hook", "while the target is imported"])
def test_a_worker_that_is_told_to_end_while_it_loads_ends(tmp_path, start, where):
    """Not only once the arbiter's patience is over; and it consumes nothing in between."""
    tell = f"tell_once({str(tmp_path)!r})\n"
    in_hook, in_target = (tell, "") if where == "before the hook" else ("pass\n", tell)
    (tmp_path / "told_there.py").write_text(
        f"import builtins; {in_target and 'builtins.' + in_target}from tests.webapp import *\n"
    )
    server = start(
        f"import builtins\n{TELL_ONCE}builtins.tell_once = tell_once\n"
        f"pythonpath = {str(tmp_path)!r}\nours = consumers('told_there:runtime')\n"
        "def post_worker_init(worker):\n"
        f"    {in_hook}"
        "    ours(worker)\n"
    )
    told = server.log.partition("Booting worker with pid: ")[2].split()[0]
    wait_until(lambda: int(told) not in server.workers, 60)
    assert {entry.pid for entry in server.journal} == set(server.workers)


def test_http_is_served_while_the_broker_is_away_and_consumers_come_with_it(
    rabbitmq_fault, amqp_url, queue_name, start
):
    declare(amqp_url, queue_name)
    rabbitmq_fault.stop()
    server = start(consuming=0)
    server.wait_serving()
    server.wait_log("cannot connect")
    assert server.get() is not None
    rabbitmq_fault.start()
    server.wait_consuming()
    server.signal(signal.SIGTERM)
    server.wait_end()


def test_a_worker_ends_at_once_while_the_broker_is_away(start):
    url = f"amqp://guest:guest@{HOST}:{free_port()}//"
    server = start("graceful_timeout = 30\n", consuming=0, BROKER=url)
    server.wait_log("cannot connect")
    server.signal(signal.SIGTERM)
    assert server.wait_end() < 25.0


def wrong_password(url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=f"guest:wrong@{parts.hostname}:{parts.port}").geturl()


def test_a_wrong_password_is_one_line_and_http_is_served_on(amqp_url, start):
    server = start(consuming=0, BROKER=wrong_password(amqp_url))
    server.wait_serving()
    server.wait_log("no consumers of tests.webapp:runtime in this worker")
    (line,) = [each for each in server.log.splitlines() if "refused" in each]
    assert line.endswith("; HTTP is served on")
    assert "wrong" not in server.log
    assert "Traceback" not in server.log
    assert server.get() is not None


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("tests.webapp:nothing", "tests.webapp has no nothing"),
        ("tests.absent:runtime", "No module named 'tests.absent'"),
        ("tests.webapp:BROKER", "is no consumer"),
    ],
)
def test_a_target_that_cannot_be_loaded_is_one_line(start, target, said):
    server = start(f"post_worker_init = consumers({target!r})\n", consuming=0)
    server.wait_serving()
    server.wait_log(f"no consumers of {target} in this worker")
    assert said in server.log
    assert "Traceback" not in server.log


def test_a_failure_can_take_the_worker_down_and_never_in_a_loop(amqp_url, start):
    """Nor does it take the arbiter along, as a worker that fails to boot would."""
    conf = "post_worker_init = consumers('tests.webapp:runtime', on_failure='exit')\n"
    server = start(conf, consuming=0, BROKER=wrong_password(amqp_url))
    server.wait_log("; the worker ends")
    server.wait_serving()
    (worker,) = server.workers
    born = psutil.Process(worker).create_time()
    wait_until(lambda: not psutil.pid_exists(worker))
    wait_until(lambda: server.workers)
    assert psutil.Process(server.workers[0]).create_time() - born > 9.0
    assert server.log.count("; the worker ends") <= 2
    assert server.process.poll() is None


def test_a_runtime_that_was_made_before_the_fork_works_in_each_worker(amqp_url, queue_name, start):
    """HAZARDS row 23: preload_app, with a Runtime and a Publisher at the module's top."""
    server = start("preload_app = True\nworkers = 2\n", consuming=2)
    server.wait_serving()
    for _ in range(20):
        assert server.get(f"/publish?{queue_name}")[0] == 200
    wait_until(lambda: server.count("finished") == 20)
    server.signal(signal.SIGTERM)
    server.wait_end()
    assert "Traceback" not in server.log


def test_a_runtime_that_was_started_before_the_fork_is_refused(tmp_path, start):
    """HAZARDS row 23: the remedy is in the line."""
    (tmp_path / "eager.py").write_text(
        "from gevent import monkey; monkey.patch_all()\n" + SECOND + "runtime.start()\n"
    )
    server = start(
        f"preload_app = True\npythonpath = {str(tmp_path)!r}\nwsgi_app = 'eager:app'\n"
        "post_worker_init = consumers('eager:runtime')\n",
        app=None,
    )
    server.wait_log("start, consume and publish in the child alone")
    assert "no consumers of eager:runtime in this worker" in server.log


@pytest.mark.parametrize(
    "eager", ["runtime.start()", "greenconsume.spawn(Worker(kombu.Connection(BROKER)))"]
)
def test_what_was_started_before_the_fork_does_not_consume_in_the_arbiter(
    tmp_path, rabbitmq, amqp_url, queue_name, start, eager
):
    """HAZARDS row 23: it would go on there, over the arbiter's own connection."""
    (tmp_path / "eager.py").write_text(
        "from gevent import monkey; monkey.patch_all(); import greenconsume, kombu\n"
        f"{SECOND}{eager}\n"
        "import time\nwhile not [at for at in open(os.environ['JOURNAL'])]: time.sleep(0.01)\n"
    )
    server = start(
        f"preload_app = True\npythonpath = {str(tmp_path)!r}\nwsgi_app = 'eager:app'\n"
        "post_worker_init = lambda worker: worker.log.info('booted')\n",
        app=None,
    )
    server.wait_log("booted")
    assert "1 runtimes or consumers were started before the fork, and are stopped" in server.log
    assert "post_worker_init = consumers('…')" in server.log
    publish(amqp_url, queue_name, 5)
    assert rabbitmq.queue_counts(amqp_url, queue_name) == (5, 0, 0)
    assert server.count("begun") == 0
    assert "Traceback" not in server.log


def test_a_worker_sends_no_byte_over_what_the_arbiter_has_published_with(
    tmp_path, proxy, amqp_url, queue_name, start
):
    """HAZARDS row 23: neither its requests nor its end; its own runtime has a connection of its own."""
    declare(amqp_url, queue_name)
    (tmp_path / "eager.py").write_text(
        "from gevent import monkey; monkey.patch_all()\n"
        f"{SECOND}publisher.publish('of the arbiter', {queue_name!r})\n"
    )
    server = start(
        f"preload_app = True\npythonpath = {str(tmp_path)!r}\nwsgi_app = 'eager:app'\n"
        "post_worker_init = consumers('eager:runtime')\n",
        app=None,
        BROKER=proxy.url,
    )
    wait_until(lambda: server.count("finished") == 1)
    server.wait_serving()
    recorded = proxy.record()
    status, said = server.get(f"/publish?{queue_name}")
    assert status == 503
    assert said.startswith("ForkedError: this Publisher was used in another process before")
    (worker,) = server.workers
    server.signal(signal.SIGTERM, worker)
    wait_until(lambda: worker not in server.workers)
    assert recorded.keys() == {2}  # the worker's own, which it closed


def test_what_was_imported_before_the_worker_patched_is_mended(amqp_url, queue_name, start):
    """HAZARDS row 10: a gunicorn.conf.py that imports kombu does so in the arbiter."""
    server = start("from kombu import Exchange\nimport kombu.transport.pyamqp\n")
    publish(amqp_url, queue_name, 5)
    wait_until(lambda: server.count("finished") == 5)
    assert "imported before" not in server.log


def test_consumers_can_run_in_one_worker_alone_and_move_when_it_dies(amqp_url, queue_name, start):
    conf = "workers = 3\npost_worker_init = consumers('tests.webapp:runtime', only_in=1)\n"
    server = start(conf)
    wait_until(lambda: server.log.count("run in another worker") == 2)
    (first,) = {entry.pid for entry in server.journal}
    for sig in (signal.SIGKILL, signal.SIGTERM):
        runs = server.count("consuming")
        server.signal(sig, server.journal[-1].pid)
        server.wait_consuming(runs + 1)
    pids = [entry.pid for entry in server.journal]
    assert len(set(pids)) == 3, pids
    assert first == pids[0]


def test_a_reload_hands_a_single_runtime_over_without_an_overlap(amqp_url, queue_name, start):
    conf = "workers = 2\npost_worker_init = consumers('tests.webapp:runtime', only_in=1)\n"
    server = start(conf, WORK="1.5,1.5")
    publish(amqp_url, queue_name, 20)
    wait_until(lambda: server.count("begun") == 10)
    server.signal(signal.SIGHUP)
    server.wait_consuming(2)
    wait_until(lambda: server.count("finished") == 20)
    entries = server.journal
    started = [entry.at for entry in entries if entry.kind == "consuming"][1]
    old = entries[0].pid
    assert max(entry.at for entry in entries if entry.pid == old) <= started


def test_a_hook_of_the_users_own_is_called_too(start):
    conf = (
        "ours = consumers('tests.webapp:runtime')\n"
        "def post_worker_init(worker):\n"
        "    ours(worker)\n"
        "    worker.log.info('and mine: %s', worker.alive)\n"
        "def worker_int(worker):\n"
        "    worker.log.info('worker_int is mine')\n"
    )
    server = start(conf)
    server.wait_log("and mine: True")
    server.signal(signal.SIGINT)
    server.wait_end()
    assert "worker_int is mine" in server.log


def test_garbage_is_frozen_once_all_consume(start):
    server = start("post_worker_init = consumers('tests.webapp:runtime', freeze_gc=True)\n")
    server.wait_log("objects are exempt from garbage collection from now on")


def test_the_arbiter_imports_neither_gevent_nor_kombu():
    """It would fork what they have made; and it stays unpatched."""
    code = (
        "import sys; from greenconsume.gunicorn import consumers; consumers('a:b', only_in=1);"
        "print(sorted({'gevent', 'kombu', 'amqp', 'gunicorn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
