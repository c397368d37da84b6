"""One consumer handles fifty messages at once: python examples/05_concurrency.py."""

if __name__ == "__main__":
    from greenconsume import patch_all

    patch_all()

import os
from time import monotonic, sleep

from kombu import Connection, Queue

from greenconsume import ConsumerMixin, ConsumerOptions, spawn


class Pages(ConsumerMixin):
    # With auto_settle a message whose callback returns is acknowledged.
    options = ConsumerOptions(concurrency=50, auto_settle=True)
    fetched = 0

    def get_consumers(self, Consumer, channel):
        return [Consumer([Queue("pages", auto_delete=True)], callbacks=[self.on_page])]

    def on_page(self, body, message):
        sleep(0.1)  # an HTTP request, say
        self.fetched += 1
        self.should_stop = self.fetched == 100


if __name__ == "__main__":
    pages = Pages()
    with Connection(os.environ.get("GREENCONSUME_BROKER", "memory://")) as pages.connection:
        (greenlet := spawn(pages)).ready.wait()
        began = monotonic()
        for page in range(100):
            pages.connection.Producer().publish(page, routing_key="pages")
        greenlet.join()
        print(f"100 pages of 0.1 s each, fetched in {monotonic() - began:.1f} s")
