"""A handler that takes too long is interrupted, and cleans up: python examples/09_timeouts.py."""

if __name__ == "__main__":
    from greenconsume import patch_all

    patch_all()

import os
from time import sleep

from kombu import Connection, Queue

from greenconsume import ConsumerMixin, ConsumerOptions, HandlerTimeout, spawn


class Reports(ConsumerMixin):
    options = ConsumerOptions(handler_timeout=0.5)

    def get_consumers(self, Consumer, channel):
        return [Consumer([Queue("reports", auto_delete=True)], callbacks=[self.on_report])]

    def on_report(self, body, message):
        try:
            sleep(body)
            print(f"a report of {body} s is done")
            message.ack()
        except HandlerTimeout as timeout:  # no Exception: `except Exception` lets it pass
            print(f"a report of {body} s is not: {timeout}")
            message.reject()  # raised again instead, it would meet the consumer's policy
            self.should_stop = True


if __name__ == "__main__":
    reports = Reports()
    with Connection(os.environ.get("GREENCONSUME_BROKER", "memory://")) as reports.connection:
        (greenlet := spawn(reports)).ready.wait()
        for seconds in (0.1, 60):
            reports.connection.Producer().publish(seconds, routing_key="reports")
        greenlet.join()
