"""The way out for failed messages: whose it is, how long it is kept."""

from __future__ import annotations

import gc
import weakref

from kombu import Connection

from greenconsume.failures.copy_publisher import copy_publisher_of
from greenconsume.links.pool import LinkPool


def test_a_pool_that_retries_were_published_over_is_not_kept():
    pool = LinkPool()
    publisher = copy_publisher_of(pool, Connection("amqp://"))
    assert copy_publisher_of(pool, Connection("amqp://")) is publisher
    pool, kept = None, weakref.ref(pool)
    del publisher
    gc.collect()
    assert kept() is None
