"""Measures what one consumer's mistake costs its neighbours, for each way to have a connection closed.

    python tests/patched.py tests.benchmarks.neighbours [--tree FOLDER] [--newer] [MISTAKE ...]

Ten consumers share a link with an eleventh, which makes its mistake each time that it sets up its
consumers, while 100 messages of 50 ms each are handled, for 5 s, or 15 s where some are left. A row says how
many lines the log had, how often the neighbours lost their link, how many messages were left and how many
times one was done again, and the state of the one who did it. `--newer` asks RabbitMQ 4.0; `--tree` measures
the greenconsume of another checkout.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from time import monotonic
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MESSAGES, NEIGHBOURS = 100, 10
#: Seconds that the messages may take, and that a row takes at the least.
LIMIT, AFTER = 15.0, 5.0


def main() -> None:
    arguments = sys.argv[1:]
    if arguments[:1] == ["--worker"]:
        print(json.dumps(work(*arguments[1:])), flush=True)
        return
    newer = "--newer" in arguments
    tree = Path(arguments[arguments.index("--tree") + 1]) if "--tree" in arguments else ROOT
    wanted = [each for each in arguments if each in vars(_mistakes())]
    measure(tree, newer, wanted)


def measure(tree: Path, newer: bool, wanted: list[str]) -> None:
    from tests.brokers import INSTALLED, NEWER, RabbitMQ, fresh_vhost

    names = wanted or [each.__name__ for each in _mistakes().MISTAKES]
    print("| mistake | lines in the log | links lost | left | done twice | the culprit |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        broker = RabbitMQ(Path(folder), NEWER if newer else INSTALLED)
        broker.start()
        try:
            for name in names:
                with fresh_vhost(broker) as vhost:
                    report(tree, broker.url(vhost), name)
        finally:
            broker.stop()


def report(tree: Path, url: str, name: str) -> None:
    from tests.messages import declare, publish

    declare(url, "busy")
    declare(url, "other")
    publish(url, "busy", MESSAGES)
    env = {**os.environ, "PYTHONPATH": str(tree)}
    env.pop("PYTHONSAFEPATH", None)
    command = [sys.executable, __file__, "--worker", url, name]
    ran = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if ran.returncode:
        print(f"| {name} | failed: {ran.stderr[-300:]!r} |", flush=True)
        return
    told = json.loads(ran.stdout.splitlines()[-1])
    columns = ("lines", "lost", "left", "twice", "state")
    print(f"| {name} | {' | '.join(str(told[each]) for each in columns)} |", flush=True)


def work(url: str, name: str) -> dict[str, Any]:
    """Run in a process of its own, with the greenconsume of its path."""
    import greenconsume

    greenconsume.patch_all()
    import gevent
    from kombu import Connection, Queue

    from greenconsume import ConsumerMixin, RestartPolicy, Runtime, events

    mistake = getattr(_mistakes(), name)
    handled: Counter[Any] = Counter()
    lines: list[str] = []
    lost: list[object] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.extend(_formatted(record).splitlines())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)

    class Neighbour(ConsumerMixin):
        def __init__(self, connection: Any) -> None:
            self.connection = connection

        def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
            queue = Queue("busy", durable=True)
            return [Consumer([queue], callbacks=[self.on_task], prefetch_count=5)]

        def on_task(self, body: Any, message: Any) -> None:
            gevent.sleep(0.05)
            handled[body] += 1
            message.ack()

    class Culprit(Neighbour):
        def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
            mistake(channel, "other")
            return [Consumer([Queue("other", durable=True)], callbacks=[self.on_task])]

    def observe(event: Any, /) -> None:
        if type(event).__name__ == "LinkDown" and event.consumers > 1:
            lost.append(event)

    events.subscribe(observe)
    policy = RestartPolicy(max_restarts=1000, backoff=0.2)
    with Runtime(Connection(url), restart=policy) as runtime:
        began = monotonic()
        runtime.spawn(Neighbour, replicas=NEIGHBOURS)
        (child,) = runtime.spawn(Culprit)
        while len(handled) < MESSAGES and monotonic() - began < LIMIT:
            gevent.sleep(0.05)
        gevent.sleep(max(0.0, began + AFTER - monotonic()))
        return {
            "lines": len(lines),
            "lost": len(lost),
            "left": MESSAGES - len(handled),
            "twice": sum(handled.values()) - len(handled),
            "state": f"{child.state.value}, {child.restart_count} restarts",
        }


def _formatted(record: logging.LogRecord) -> str:
    return logging.Formatter("%(message)s").format(record)


def _mistakes() -> Any:
    # By its path: what a worker finds as `tests` may be another checkout's.
    spec = importlib.util.spec_from_file_location("mistakes", ROOT / "tests/fault/mistakes.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
