"""The examples that are served by gunicorn do what they say, on the embedded broker and on RabbitMQ."""

from __future__ import annotations

import http.client
import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.gunicorns import GUNICORN, Gunicorn
from tests.messages import publish
from tests.servers import HOST, free_port
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
CONF = ROOT / "examples" / "deploy" / "gunicorn.conf.py"


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Gunicorn]]:
    """Run a command in the repository; what still runs at the end is killed."""
    started: list[Gunicorn] = []

    def make(command: list[str], **env: object) -> Gunicorn:
        started.append(Gunicorn(tmp_path, command=command, cwd=ROOT, **env))
        return started[-1]

    yield make
    for each in started:
        each.close()


def ask(port: int, method: str, path: str, body: object = None) -> tuple[int, str]:
    connection = http.client.HTTPConnection(HOST, port, timeout=30)
    sent = None if body is None else json.dumps(body)
    try:
        connection.request(method, path, sent, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read().decode()
    except OSError as exc:
        return 0, str(exc)
    finally:
        connection.close()


@pytest.mark.parametrize("broker", ["memory", pytest.param("amqp", marks=pytest.mark.rabbitmq)])
@pytest.mark.parametrize("name", ["11_gunicorn_flask", "12_gunicorn_django"])
def test_a_web_application_publishes_and_consumes_in_one_worker(request, serve, name, broker):
    url = "memory://" if broker == "memory" else request.getfixturevalue("amqp_url")
    port = free_port()
    command = [str(GUNICORN), "-c", str(CONF), f"examples.{name}:app"]
    env = {"BIND": f"{HOST}:{port}", "WORKERS": 1, "CONSUMERS": f"examples.{name}:runtime"}
    server = serve(command, GREENCONSUME_BROKER=url, **env)
    wait_until(lambda: ask(port, "GET", "/shipped")[0] == 200)
    for order in range(3):
        assert ask(port, "POST", "/orders", {"order": order})[0] == 202
    wait_until(lambda: len(json.loads(ask(port, "GET", "/shipped")[1])) == 3)
    server.signal(signal.SIGTERM)
    server.wait_end()
    assert "Traceback" not in server.log


def test_work_is_spread_over_processes(amqp_url, serve):
    target = "examples.13_processes:Primes"
    command = [sys.executable, "-m", "greenconsume", "run", target, "--processes", "2"]
    server = serve([*command, "--broker", amqp_url])
    wait_until(lambda: server.log.count("in this worker") == 2)
    publish(amqp_url, "numbers", [2_147_483_647 + 2 * n for n in range(100)])
    wait_until(lambda: server.log.count("prime\n") == 100)
    pids = {line.split(":")[0] for line in server.log.splitlines() if line.endswith("prime")}
    assert len(pids) == 2
    assert "2147483647 is prime" in server.log
    server.signal(signal.SIGTERM)
    server.wait_end()
    assert server.process.returncode == 0
