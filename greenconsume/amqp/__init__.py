"""Owns the green AMQP 0-9-1 client: links, sessions, channels, and the kombu transport over them.

A link is one connection to a broker: its reader and writer greenlets alone touch the socket. A session is
the share of one kombu `Connection` in a link; a channel belongs to a session. The frames, properties, the
ledger of settles and the send queue do no I/O, so that each can be tested by itself.

It must never run a user's code in the reader, and knows nothing of consumers, runtimes or failure policies.
Read `link`, `session` and `channel` first.
"""
