"""The publishing side of a measurement, in a process of its own: never the one that is measured.

    python feeder.py '{"url": ..., "queue": ..., "queues": 1, "messages": 1000, "rate": 500}'

Without a rate it fills the queues and returns; with one it publishes stamped messages at that rate.
"""

import json
import sys
from time import monotonic, sleep, time

import amqp
from kombu.utils.url import parse_url


def main() -> None:
    options = json.loads(sys.argv[1])
    parts = parse_url(options["url"])
    with amqp.Connection(
        host=f"{parts['hostname']}:{parts['port']}",
        userid=parts["userid"],
        password=parts["password"],
        virtual_host=parts["virtual_host"],
    ) as connection:
        channel = connection.channel()
        queues = [f"{options['queue']}.{number}" for number in range(options.get("queues", 1))]
        for queue in queues:
            channel.queue_declare(queue, durable=False, auto_delete=False)
        if options.get("rate"):
            stamp(channel, queues[0], options["messages"], options["rate"])
        else:
            fill(channel, queues, options["messages"])


def fill(channel: amqp.Channel, queues: list[str], messages: int) -> None:
    message = text({"data": "x" * 88})
    for number in range(messages):
        channel.basic_publish(message, routing_key=queues[number % len(queues)])
    # The broker serves a channel in order: once it answers, all of them are in their queues.
    channel.queue_declare(queues[0], passive=True)


def stamp(channel: amqp.Channel, queue: str, messages: int, rate: int) -> None:
    began = monotonic()
    for number in range(messages):
        sleep(max(0.0, began + number / rate - monotonic()))
        channel.basic_publish(text({"at": time(), "data": "x" * 60}), routing_key=queue)


def text(body: object) -> amqp.Message:
    return amqp.Message(
        json.dumps(body),
        content_type="application/json",
        content_encoding="utf-8",
        delivery_mode=1,
    )


if __name__ == "__main__":
    main()
