"""A consumer in a greenlet of its own, which stops itself: python examples/01_hello.py."""

if __name__ == "__main__":
    from greenconsume import patch_all

    patch_all()  # before any other import: what blocks would block every greenlet

import os

from kombu import Connection, Queue

from greenconsume import ConsumerMixin, spawn


class Greeter(ConsumerMixin):
    """As for kombu: it has a connection, and says what it consumes."""

    def __init__(self, connection):
        self.connection = connection

    def get_consumers(self, Consumer, channel):
        queue = Queue("greetings", auto_delete=True)
        return [Consumer([queue], callbacks=[self.on_greeting])]

    def on_greeting(self, body, message):
        print(f"Hello, {body}!")
        message.ack()
        self.should_stop = True


if __name__ == "__main__":
    with Connection(os.environ.get("GREENCONSUME_BROKER", "memory://")) as connection:
        greeter = spawn(Greeter(connection))
        greeter.ready.wait()
        connection.Producer().publish("world", routing_key="greetings")
        greeter.join()
