"""Feeds mutated streams of frames to a green link, for a given time: `tox -e fuzz`.

Each round connects a link to the scripted peer, opens a consumer, and sends it bytes that a broker would
send, damaged: bits flipped, parts cut, doubled, swapped, lengths changed. Whatever comes, the link must
either go on or end in a connection error that says why, within seconds; never hang, never raise
anything else. A failure prints the seed that repeats it.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from time import monotonic
from typing import Any

import amqp
import gevent
from kombu import Connection, Queue

from greenconsume.amqp.frames import FrameParser
from greenconsume.transports import registry
from tests import frames
from tests.peer import Peer

ALLOWED = (amqp.AMQPError, OSError)


def stream(chance: random.Random) -> bytes:
    """Return what a broker might send to a consumer."""
    parts = [
        frames.heartbeat(),
        frames.deliver(1, "tag", 1, b"{}", content_type="application/json"),
        frames.deliver(1, "tag", 2, chance.randbytes(chance.randrange(3000))),
        frames.deliver(1, "other", 3, b"x", headers={"a": 1, "b": [1, {"c": None}]}),
        frames.basic_cancel(1, "tag"),
        frames.basic_ack(1, chance.randrange(9), multiple=True),
        frames.channel_close(1, 404, "no queue"),
        frames.blocked(),
        frames.unblocked(),
    ]
    chance.shuffle(parts)
    return b"".join(parts[: chance.randrange(1, len(parts) + 1)])


def damage(data: bytes, chance: random.Random) -> bytes:
    """Return `data` with a few faults in it."""
    broken = bytearray(data)
    for _ in range(chance.randrange(1, 5)):
        at = chance.randrange(len(broken)) if broken else 0
        end = min(len(broken), at + chance.randrange(1, 40))
        fault = chance.randrange(5)
        if fault == 0 and broken:
            broken[at] ^= 1 << chance.randrange(8)
        elif fault == 1:
            del broken[at:end]
        elif fault == 2:
            broken[at:at] = broken[at:end]
        elif fault == 3:
            broken[at:end] = chance.randbytes(end - at)
        else:
            broken[at:at] = chance.randbytes(chance.randrange(20))
    return bytes(broken)


def parse(data: bytes, chance: random.Random) -> None:
    """Feed the parser alone, cut anywhere."""
    parser, at = FrameParser(131072), 0
    while at < len(data):
        end = at + chance.randrange(1, 200)
        for frame in parser.feed(data[at:end]):
            assert len(frame) == 3
        at = end


def converse(data: bytes) -> str:
    """Feed a link that consumes; return how it took it."""
    peer = Peer()
    connection = Connection(peer.url, transport_options={"close_timeout": 0.2, "call_timeout": 1.0})
    try:
        with gevent.Timeout(10):
            consumer = connection.Consumer([Queue("q")], callbacks=[lambda body, message: None])
            consumer.on_decode_error = lambda message, error: None
            consumer.consume()
            session = connection.connection  # kombu's connection would connect again by itself
            peer.send(data)
            return drain(session)
    finally:
        with gevent.Timeout(10):
            connection.release()
            peer.close()


def drain(session: Any) -> str:
    try:
        while True:
            session.drain_events(timeout=0.05)
    except TimeoutError:
        return "went on"
    except ALLOWED as exc:
        error = exc.__cause__ or exc
    assert str(error), "an error that says nothing"
    return type(error).__name__


def main() -> int:
    options = argparse.ArgumentParser(prog="tests.fuzz", description=__doc__)
    options.add_argument("--seconds", type=float, default=60.0)
    options.add_argument("--seed", type=int, help="repeat this one round")
    given = options.parse_args()
    registry.register()
    seen: Counter[str] = Counter()
    end = monotonic() + given.seconds
    seed = random.randrange(1 << 32) if given.seed is None else given.seed
    while not seen or (monotonic() < end and given.seed is None):
        try:
            seen[one_round(random.Random(seed))] += 1
        except BaseException:
            print(f"seed {seed}", file=sys.stderr)
            raise
        seed += 1
    print(f"{seen.total()} rounds: {dict(seen.most_common())}")
    return 0


def one_round(chance: random.Random) -> str:
    data = damage(stream(chance), chance)
    for _ in range(20):
        try:
            parse(damage(stream(chance), chance), chance)
        except ALLOWED:
            pass  # as it should be; anything else ends the fuzzing
    return converse(data)


if __name__ == "__main__":
    sys.exit(main())
