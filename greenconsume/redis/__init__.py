"""Owns the green Redis and Valkey client, and its kombu Transport.

No message is ever only in the process: a script moves it from its queue to the unacknowledged ones, where
it stays until it is settled. It keeps kombu's own layout, so that plain kombu and Celery share queues with
it. Nothing here may poll a server that can wake it, nor block on one. Made by kombu once `transports`
registered it. Read `keyspace` (the layout), `scripts` (every change of it), `ledger` (what is held) and
`feed` (the taking) first; `link` is the socket, `channel` and `transport` what kombu sees.
"""
