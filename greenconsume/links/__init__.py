"""Owns how connections come to be and are shared: a few links to each broker, dialled once for all.

A lost link is dialled again once for all who used it, with backoff and jitter. It must never hold up a stop.
Read `pool`, then `dialer`::

    pool          LinkPool: which connection gets which link
    dialer        one link of a pool, dialled for all who wait for it
    backoff       when to dial again
    quarantine    consumers that are kept apart
    session       what the sessions of AMQP and Redis have in common
    holding       how many messages a connection holds
    numbers       which link is which, where they are shown
    brokers       the addresses of brokers, checked
    unpooled      connecting over a transport that has no links to share
    polled_stop   the stop of a consumer that can only be asked
"""
