"""Measures what it costs each message that somebody looks, in pairs: so it tells on a busy machine, too.

    python tests/patched.py tests.benchmarks.counting [URL] [MESSAGES] [CONCURRENCY]

One process consumes and acks, over AMQP, Redis or (by default) `memory://`, and has its times kept and not
kept for 500 messages in turn. The CPU of neighbouring turns is compared, so that whatever else the machine
does meanwhile befalls both. Quartiles and medians of all turns.
"""

from __future__ import annotations

import sys
from statistics import median, quantiles
from time import process_time
from typing import Any

from gevent.event import Event
from kombu import Connection, Queue

from greenconsume import ConsumerMixin, ConsumerOptions, Runtime
from greenconsume.tally import Timings

#: Messages of a turn.
TURN = 500
QUEUE = Queue("bench.counting", durable=False, auto_delete=False)


class Turns:
    """Has times kept and not kept in turn, and notes the CPU seconds of each turn."""

    def __init__(self, messages: int) -> None:
        self.over = Event()
        self.tally: Any = None
        self._left, self._kept, self._began = messages, Timings(), 0.0
        self._seconds: dict[bool, list[float]] = {False: [], True: []}
        self._looked = False

    def tick(self) -> None:
        """Count a message."""
        self._left -= 1
        if self._left % TURN:
            return
        if self._began:
            self._seconds[self._looked].append(process_time() - self._began)
        if self._left <= 0:
            self.over.set()
        self._looked = not self._looked
        self.tally.timings = self._kept if self._looked else None
        self._began = process_time()

    def show(self) -> None:
        """Print what was found, in microseconds a message."""
        each = {looked: [1e6 * s / TURN for s in of] for looked, of in self._seconds.items()}
        more = [on - off for off, on in zip(each[False], each[True], strict=False)]
        for name, values in (("not looked at", each[False]), ("looked at", each[True])):
            first, half, third = quantiles(values, n=4)
            print(f"{name}: {half:.2f} us ({first:.2f} to {third:.2f})")
        print(f"more: {median(more):.2f} us, {100 * median(more) / median(each[False]):.1f} %")


def main() -> None:
    url = sys.argv[1] if sys.argv[1:] else "memory://"
    messages = int(sys.argv[2]) if sys.argv[2:] else 100_000
    concurrency = int(sys.argv[3]) if sys.argv[3:] else 0
    turns = Turns(messages)

    class Counted(ConsumerMixin):  # type: ignore[misc]  # kombu is untyped
        options = ConsumerOptions(concurrency=concurrency) if concurrency else ConsumerOptions()

        def __init__(self, connection: Any) -> None:
            self.connection = connection

        def get_consumers(self, Consumer: Any, channel: Any) -> Any:
            return [Consumer([QUEUE], callbacks=[self.on_task], prefetch_count=100)]

        def on_task(self, _body: Any, message: Any) -> None:
            message.ack()
            turns.tick()

    feed(url, messages)
    runtime = Runtime(url)
    runtime.spawn(Counted)
    turns.tally = runtime.children[0].tally
    with runtime:
        turns.over.wait()
    turns.show()


def feed(url: str, messages: int) -> None:
    with Connection(url) as connection:
        QUEUE(connection.default_channel).declare()
        producer = connection.Producer()
        for number in range(messages):
            producer.publish({"number": number, "text": "x" * 80}, routing_key=QUEUE.name)


if __name__ == "__main__":
    main()
