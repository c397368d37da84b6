"""A database transaction around each message: python examples/15_around_a_message.py."""

if __name__ == "__main__":
    from greenconsume import patch_all

    patch_all()

import os
import sqlite3

from kombu import Connection, Queue

from greenconsume import ConsumerMixin, ConsumerOptions, spawn

(database := sqlite3.connect(":memory:")).execute("create table paid (amount integer)")


class Payments(ConsumerMixin):
    # Entered, a sqlite3 connection is a transaction: it commits, or rolls back if the callback raises.
    options = ConsumerOptions(around=[lambda message: database], auto_settle=True)

    def get_consumers(self, Consumer, channel):
        return [Consumer([Queue("payments", auto_delete=True)], callbacks=[self.on_payment])]

    def on_payment(self, body, message):
        database.execute("insert into paid values (?)", (body,))
        self.should_stop = body == 3


if __name__ == "__main__":
    payments = Payments()
    with Connection(os.environ.get("GREENCONSUME_BROKER", "memory://")) as payments.connection:
        (greenlet := spawn(payments)).ready.wait()
        for amount in (1, 3):
            payments.connection.Producer().publish(amount, routing_key="payments")
        greenlet.join()
    print("paid:", *database.execute("select sum(amount) from paid").fetchone())
    print("in a transaction still:", database.in_transaction)
