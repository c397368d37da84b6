"""Owns the green Redis and Valkey client, and its kombu Transport.

No message is ever only in the process: a script moves it from its queue to the unacknowledged ones, where
it stays until it is settled. It keeps kombu's own layout, so that plain kombu and Celery share queues with
it. Nothing here may poll a server that can wake it, nor block on one. Made by kombu once `transports`
registered it. Read `keyspace` (the layout), `scripts` (every change of it), `ledger` (what is held) and
`feed` (the taking) first; `link` is the socket, `channel` and `transport` what kombu sees::

    transport            kombu's transports: a session over a link of its own, or a shared one
    link                 one connection: its socket, its reader, its writer
    calls                commands whose replies are waited for
    protocol, outgoing   its bytes, in and out
    pings, handshake     whether it lives; its first words
    address              where a server is, and how one logs in
    keyspace             the layout of a database
    scripts              every change of more than one key
    session              the share of one kombu connection
    channel              consumers, and what they were delivered
    topology             the part of a channel that declares and publishes
    subscription, qos    one consumer of a queue; what was handed out and is not settled
    feed, take           when messages are taken, for whom; one run of the script that takes them
    errand               `basic_get`
    fanout               listening to fanout exchanges
    ledger               what this process holds, and has yet to tell the server
    keeper               refreshes leases, restores what others left
    restore              how a message comes back
    message              a message, from its bytes and back
    plain_client         redis-py's own client, for users
"""
