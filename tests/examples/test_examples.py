"""Every example does what it says, on the embedded broker and on RabbitMQ."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import greenconsume
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

# What each prints, as a pattern.
OUTPUTS = {
    "01_hello": r"Hello, world!\n",
    "02_a_hundred_consumers": r"3000 orders of 0\.1 s each, shipped in \d+\.\d s\n",
    "03_stop_from_another_greenlet": r"stopped \d+\.\d ms after it was told\n",
    "04_rpc": "".join(rf"{n} squared is {n * n}\n" for n in range(1, 6)),
    "05_concurrency": r"100 pages of 0\.1 s each, fetched in \d+\.\d s\n",
    "06_retry_with_dead_letter": "".join(rf"attempt {n} to charge order 7\n" for n in (1, 2, 3))
    + "set aside: order 7, the bank does not answer\n",
    "07_partitioned_order": "10 customers, each in order: True\n",
    "08_batches": "".join(
        rf"{n} readings, on average {mean}\n"
        for n, mean in [(100, 49.5), (100, 149.5), (50, 224.5)]
    ),
    "09_timeouts": "a report of 0.1 s is done\n"
    "a report of 60 s is not: the handler took longer than 0.5 s\n",
    "10_asyncio": r"\[0, 2, 4, 6, 8\]\n",
    "14_cluster": "booked 1\nbooked 2\nbooked 3\n",
    "15_around_a_message": "paid: 4\nin a transaction still: False\n",
    "16_fed_by_kombu": "shipped a hat\nshipped a coat\nshipped a scarf\n",
}
# Those that are no scripts, but served: test_served_examples.py runs them.
SERVED = {"11_gunicorn_flask", "12_gunicorn_django", "13_processes"}
# What the command line runs of those that are no scripts.
TARGETS = {"02_a_hundred_consumers": "runtime"}


@pytest.fixture(
    params=[
        "memory",
        pytest.param("rabbitmq", marks=pytest.mark.rabbitmq),
        pytest.param("redis", marks=pytest.mark.redis),
    ]
)
def broker(request: pytest.FixtureRequest) -> str:
    """The address of each broker that examples run on."""
    if request.param == "memory":
        return "memory://"
    return str(
        request.getfixturevalue({"rabbitmq": "amqp_url", "redis": "redis_url"}[request.param])
    )


@pytest.fixture
def start(broker: str, tmp_path: Path) -> Iterator[Callable[..., Example]]:
    """Start an example, on one broker after the other; what still runs at the end is killed."""
    started: list[Example] = []

    def example(name: str, *options: str) -> Example:
        started.append(Example(name, broker, tmp_path, options))
        return started[-1]

    yield example
    for each in started:
        each.process.kill()
        each.process.wait()


class Example:
    """An example in a process of its own; what it writes goes to files in `folder`."""

    def __init__(self, name: str, broker: str, folder: Path, options: tuple[str, ...]) -> None:
        self._out, self._err = folder / "out", folder / "err"
        args = [f"examples/{name}.py"]
        if name in TARGETS:
            args = ["-m", "greenconsume", "run", f"examples.{name}:{TARGETS[name]}", *options]
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, *args],
                cwd=ROOT,
                env={**environment(), "GREENCONSUME_BROKER": broker},
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


def environment() -> dict[str, str]:
    """This process's, with the greenconsume that is tested."""
    path = [str(Path(greenconsume.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_example_prints_its_result_and_ends_by_itself(
    start: Callable[..., Example], name: str
) -> None:
    example = start(name)
    assert example.process.wait(60) == 0, example.err
    assert re.fullmatch(OUTPUTS[name], example.out)
    # Only the one whose handler fails on purpose has a traceback in its log.
    assert ("Traceback" in example.err) is name.startswith("06")


def test_a_hundred_consumers_stop_clean_on_ctrl_c(start: Callable[..., Example]) -> None:
    example = start("02_a_hundred_consumers", "--log-level", "debug")
    # The last one publishes before it consumes, which leaves the others time to ship all.
    wait_until(lambda: example.err.count(" is consuming") >= 99)
    example.process.send_signal(signal.SIGINT)
    assert example.process.wait(30) == 0, example.err
    assert "stopping 100 consumers within 30.0 s (SIGINT)" in example.err
    assert "consumers: 100 drained, 0 killed" in example.err
    assert example.out == ""


def test_every_example_is_run_here() -> None:
    assert [example.stem for example in EXAMPLES] == sorted({*OUTPUTS, *SERVED})


def test_the_examples_are_numbered() -> None:
    assert [int(example.name[:2]) for example in EXAMPLES] == [*range(1, len(EXAMPLES) + 1)]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.stem)
def test_an_example_is_under_forty_lines(example: Path) -> None:
    assert len(example.read_text().splitlines()) < 40
