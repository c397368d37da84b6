"""Flask that publishes, with consumers in the same gunicorn worker: see deploy/gunicorn.conf.py."""

import os

from flask import Flask, jsonify, request
from kombu import Queue

from greenconsume import ConsumerMixin, Publisher, PublishError, Runtime

BROKER = os.environ.get("GREENCONSUME_BROKER", "memory://")
app = Flask(__name__)
publisher = Publisher(BROKER, timeout=2.0)  # connects at the first request, once for the process
runtime = Runtime(BROKER)  # gunicorn.conf.py starts it in each worker
orders = Queue("orders")
shipped = []


class Shipping(ConsumerMixin):
    def get_consumers(self, Consumer, channel):
        return [Consumer([orders], callbacks=[self.on_order])]

    def on_order(self, body, message):
        shipped.append(body)
        message.ack()


runtime.spawn(Shipping())


@app.post("/orders")
def order():
    try:
        publisher.publish(request.json, "orders", declare=[orders])  # confirmed, or raises
    except PublishError as error:
        return f"try again later: {error}", 503
    return "", 202


app.get("/shipped")(lambda: jsonify(shipped))
