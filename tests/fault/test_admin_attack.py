"""An admin port under attack: everything is refused, and consumption goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from time import monotonic

import gevent
from kombu import Queue

from greenconsume import ConsumerMixin, ConsumerOptions, Publisher, Runtime
from greenconsume.cli.asking import ask
from tests.servers import free_port

RATE = 300
SECONDS = 4.0


def test_an_attack_is_refused_and_consumption_goes_on_at_its_rate(amqp_url, queue_name):
    """The target is 95 % of the rate; a hub that an attack keeps busy would handle next to nothing."""
    handled: list[float] = []

    class Orders(ConsumerMixin):
        options = ConsumerOptions(concurrency=50)

        def __init__(self, connection):
            self.connection = connection

        def get_consumers(self, Consumer, channel):
            return [Consumer([Queue(queue_name)], callbacks=[self.on_order])]

        def on_order(self, body, message):
            gevent.sleep(0.01)
            handled.append(monotonic())
            message.ack()

    def feed():
        due = monotonic()
        while True:
            publisher.publish_nowait({"order": 7})
            due += 1 / RATE
            gevent.sleep(max(0.0, due - monotonic()))

    def rate():
        since = len(handled)
        began = monotonic()
        gevent.sleep(SECONDS)
        return (len(handled) - since) / (monotonic() - began)

    port = free_port()
    runtime = Runtime(amqp_url, admin=f"127.0.0.1:{port}", admin_token="the-token-that-nobody-has")
    runtime.spawn(Orders)
    with runtime, Publisher(amqp_url, routing_key=queue_name) as publisher:
        feeding = gevent.spawn(feed)
        before = rate()
        attack = [sys.executable, str(Path(__file__).with_name("attacker.py")), str(port)]
        attacker = subprocess.Popen([*attack, str(SECONDS + 3)], stdout=subprocess.PIPE, text=True)
        gevent.sleep(2)
        during = rate()
        assert ask(f"127.0.0.1:{port}", "/livez").code == 200
        said = json.loads(attacker.communicate()[0])
        feeding.kill()
        assert runtime.control.status().state == "running"  # nobody drained it
    assert said["wrong"] == {}
    assert {"401", "403", "404", "421"} <= said["got"].keys()
    assert during >= 0.5 * before
