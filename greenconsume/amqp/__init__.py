"""Owns the green AMQP 0-9-1 client: links, sessions, channels, and the kombu transport over them.

A link is one connection to a broker: its reader and writer greenlets alone touch the socket. A session is
the share of one kombu `Connection` in a link; a channel belongs to a session, and consists of its calls, its
deliveries and its publisher. What these keep in mind (`replies`, `consumers`, `ledger`, `confirms`), the
inbox, the frames, properties and the send queue do no I/O, so that each is tested by itself, or by a model.

It must never run a user's code in the reader, and knows nothing of consumers, runtimes or failure policies.
Read `link`, `session`, `channel_core` and `deliveries` first; `channel` is kombu's interface to them.
"""
