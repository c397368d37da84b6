"""A failed message is tried again, and set aside at last: python examples/06_retry_with_dead_letter.py."""

if __name__ == "__main__":
    from greenconsume import patch_all

    patch_all()

import os

from kombu import Connection, Queue

from greenconsume import ConsumerMixin, ConsumerOptions, Retry, spawn


class Payments(ConsumerMixin):
    options = ConsumerOptions(on_error=Retry(delays=[0.1, 0.5]))  # then it goes to payments.dead

    def get_consumers(self, Consumer, channel):
        return [Consumer([Queue("payments")], callbacks=[self.on_payment])]

    def on_payment(self, body, message):
        attempt = message.headers.get("greenconsume-retries", 0) + 1
        print(f"attempt {attempt} to charge {body}")
        self.should_stop = attempt == 3
        raise RuntimeError("the bank does not answer")


if __name__ == "__main__":
    payments = Payments()
    with Connection(os.environ.get("GREENCONSUME_BROKER", "memory://")) as payments.connection:
        (greenlet := spawn(payments)).ready.wait()
        payments.connection.Producer().publish("order 7", routing_key="payments")
        greenlet.join()
        dead = payments.connection.SimpleQueue("payments.dead").get(timeout=5)
        print(f"set aside: {dead.payload}, {dead.headers['greenconsume-error']}")
