"""The way out for failed messages: whose it is, how long it is kept."""

from __future__ import annotations

import gc
import weakref

from kombu import Connection

from greenconsume.failures.copy_publisher import ensure_copy_publisher
from greenconsume.links.pool import LinkPool


def test_a_pool_that_retries_were_published_over_is_not_kept():
    pool = LinkPool()
    publisher = ensure_copy_publisher(pool, Connection("amqp://"))
    assert ensure_copy_publisher(pool, Connection("amqp://")) is publisher
    pool, kept = None, weakref.ref(pool)
    del publisher
    gc.collect()
    assert kept() is None
