"""One start of many consumers, in a process of its own: by greenconsume, or by no more than AMQP needs.

    python starting.py '{"who": "greenconsume", "url": …, "consumers": 10000, "links": 5}'

Prints one JSON object with the figures. `greenconsume` comes from the path, so that trees can be compared.
"""

# ruff: noqa: E402  # nothing may be imported before the patching

from __future__ import annotations

from gevent import monkey

monkey.patch_all()

import gc
import json
import socket
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import cache
from pathlib import Path
from struct import Struct, unpack_from
from time import monotonic, process_time
from typing import Any

import gevent
import psutil
from gevent.event import Event
from kombu import Connection, Queue
from kombu.utils.url import parse_url

Options = dict[str, Any]

#: Frames of a traceback that say which of our lines an allocation is for.
DEPTH = 12
ROOT = Path(__file__).resolve().parent

_header, _method = Struct(">BHI"), Struct(">HH")
_consume_ok, _queues_a_batch = (60, 21), 100


def green(options: Options, ready: Callable[[], object]) -> None:
    """Start a `Runtime` with a consumer for each queue; `ready` is called when one consumes."""
    from greenconsume import ConsumerMixin, Runtime

    class Bench(ConsumerMixin):
        def __init__(self, connection: Connection) -> None:
            self.connection = connection
            self.queue = Queue(f"bench.{next(numbers)}", durable=False)

        def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
            return [Consumer([self.queue], callbacks=[self.on_task], prefetch_count=10)]

        def on_task(self, body: Any, message: Any) -> None:
            message.ack()

        def on_consume_ready(self, *_args: Any, **_kwargs: Any) -> None:
            ready()

    numbers = iter(range(options["consumers"]))
    runtime = Runtime(options["url"], links=options["links"])
    runtime.spawn(Bench, replicas=options["consumers"])
    gevent.spawn(runtime.start)


def bare(options: Options, ready: Callable[[], object]) -> None:
    """Write what each consumer has to say, without waiting for an answer; count the last answers."""
    count, links = options["consumers"], options["links"]
    for link in range(links):
        gevent.spawn(_bare_link, options["url"], range(link, count, links), ready)


def _bare_link(url: str, numbers: range, ready: Callable[[], object]) -> None:
    parts = parse_url(url)
    sock = socket.create_connection((parts["hostname"], parts["port"]))
    with closing(sock):
        frames = _methods(sock)
        sock.sendall(b"AMQP\x00\x00\x09\x01")
        next(frames)  # Start
        login = f"\0{parts['userid']}\0{parts['password']}".encode()
        sock.sendall(
            _call(0, 10, 11, _long(0), _short("PLAIN"), _long_string(login), _short("en_US"))
        )
        tune = next(frames)[1]
        sock.sendall(
            _call(0, 10, 31, tune[4:])  # as the broker would have it
            + _call(0, 10, 40, _short(parts["virtual_host"]), _short(""), b"\0")
        )
        next(frames)  # OpenOk
        gevent.spawn(_bare_setup, sock, numbers)
        for method, _payload in frames:
            if method == _consume_ok:
                ready()


def _bare_setup(sock: socket.socket, numbers: range) -> None:
    for begin in range(0, len(numbers), _queues_a_batch):
        batch = enumerate(numbers[begin : begin + _queues_a_batch], begin + 1)
        sock.sendall(b"".join(_setup(channel, f"bench.{number}") for channel, number in batch))


def _setup(channel: int, queue: str) -> bytes:
    return b"".join(
        (
            _call(channel, 20, 10, _short("")),
            _call(channel, 60, 10, _long(0), (10).to_bytes(2, "big"), b"\0"),
            _call(channel, 50, 10, b"\0\0", _short(queue), b"\0", _long(0)),
            _call(channel, 60, 20, b"\0\0", _short(queue), _short(queue), b"\0", _long(0)),
        )
    )


def _call(channel: int, class_id: int, method_id: int, *args: bytes) -> bytes:
    payload = _method.pack(class_id, method_id) + b"".join(args)
    return _header.pack(1, channel, len(payload)) + payload + b"\xce"


def _long(number: int) -> bytes:
    return number.to_bytes(4, "big")


def _short(text: str) -> bytes:
    return bytes((len(text),)) + text.encode()


def _long_string(text: bytes) -> bytes:
    return _long(len(text)) + text


def _methods(sock: socket.socket) -> Iterator[tuple[tuple[int, int], bytes]]:
    """Yield the methods that come; heartbeats are left out."""
    buffer = b""
    while data := sock.recv(1 << 17):
        buffer, at = buffer + data, 0
        while len(buffer) - at >= _header.size:
            kind, _channel, size = _header.unpack_from(buffer, at)
            end = at + _header.size + size
            if len(buffer) <= end:
                break
            if kind == 1:
                method = unpack_from(">HH", buffer, at + _header.size)
                yield method, buffer[at + _header.size : end]  # type: ignore[misc]  # two numbers
            at = end + 1
        buffer = buffer[at:]


STARTS = {"greenconsume": green, "bare": bare}


def start(options: Options) -> dict[str, float]:
    """Return how long all took to consume, the CPU seconds of that, and the memory of each."""
    process, ready = psutil.Process(), Event()
    missing = iter(range(options["consumers"] - 1, -1, -1))

    def one_ready() -> None:
        if not next(missing):
            ready.set()

    gc.collect()
    memory, began, cpu = process.memory_info().rss, monotonic(), process_time()
    STARTS[options["who"]](options, one_ready)
    ready.wait()
    figures = {"start_s": monotonic() - began, "cpu_s": process_time() - cpu}
    gevent.sleep(0.5)
    figures["kb_each"] = (process.memory_info().rss - memory) / options["consumers"] / 1024
    return figures


def places(options: Options) -> dict[str, float]:
    """Return the bytes of each consumer by the line that asked for them, and our line that led there.

    Not among them: the page in which a greenlet keeps its Python frames (4 KB), and what `malloc` rounds up.
    """
    warm = {**options, "consumers": 20, "links": 1}
    start(warm)
    gc.collect()
    tracemalloc.start(DEPTH)
    figures = start(options)
    gc.collect()
    figures["all_traced"] = tracemalloc.get_traced_memory()[0] / options["consumers"]
    snapshot = tracemalloc.take_snapshot()
    tracemalloc.stop()  # else what follows is traced, too, and takes minutes
    found: Counter[str] = Counter()
    for each in snapshot.traces:
        lines = [f"{_shown(line.filename)}:{line.lineno}" for line in each.traceback]
        ours = (line for line in reversed(lines) if line.startswith("greenconsume/"))
        found[" < ".join(dict.fromkeys((lines[-1], next(ours, ""))))] += each.size
    return {place: size / options["consumers"] for place, size in found.most_common(60)} | figures


@cache
def _shown(path: str) -> str:
    path = path.rpartition("site-packages/")[2].rpartition("/lib/python3")[2]
    return (
        "greenconsume/" + path.rpartition("/greenconsume/")[2] if "/greenconsume/" in path else path
    )


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    print(json.dumps((places if given.get("places") else start)(given)))
