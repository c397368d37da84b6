"""Owns what becomes of a message whose handler failed: policies, retries, dead letters.

A failed message is put back, rejected, or published anew to a retry or dead-letter queue and acknowledged
only once the broker has confirmed the copy. It must never lose a message to save time. Read `policies` and
`retry` first::

    policies          Requeue, Reject, and a policy for each error
    retry             Retry
    recoverer         what the policies of one consumer need: the origin of a message, its copies
    message_copy      what a copy keeps, and which headers it gains
    copy_publisher    publishes copies, over a link that consumes nothing
    retry_queues      the queues that retries need in the broker
    queue_names       their names, and those of dead-letter queues
    requeues          giving back a message: now, or after a delay
    delivery_limits   how often a queue gives a message back before it drops it
    renewals          writing a message anew before that
    streams           which queues are streams
    dead_letters      DeadLetters: a look into a dead-letter queue
"""
