"""Work for every core: greenconsume run examples.13_processes:Primes --processes 2 --broker amqp://."""

import os

from kombu import Queue

from greenconsume import ConsumerMixin


class Primes(ConsumerMixin):
    """Computes, and so needs a process for each core: greenlets alone overlap only what waits."""

    def __init__(self, connection):
        self.connection = connection

    def get_consumers(self, Consumer, channel):
        queue = Queue("numbers")
        return [Consumer([queue], callbacks=[self.on_number], prefetch_count=1)]

    def on_number(self, number, message):
        prime = all(number % divisor for divisor in range(2, int(number**0.5) + 1))
        print(f"{os.getpid()}: {number} is {'' if prime else 'not '}prime", flush=True)
        message.ack()
