"""Owns the green AMQP 0-9-1 client: links, sessions, channels, and the kombu transport over them.

A link is one connection to a broker: its reader and writer greenlets alone touch the socket. A session is
the share of one kombu `Connection` in a link; a channel belongs to a session, and consists of its calls, its
deliveries and its publisher. What these keep in mind (`replies`, `consumers`, `ledger`, `confirms`), the
inbox, the frames, properties and the send queue do no I/O, so that each is tested by itself, or by a model.

It must never run a user's code in the reader, and knows nothing of consumers, runtimes or failure policies.
Read `link`, `session`, `channel_core` and `deliveries` first; `channel` is kombu's interface to them::

    transport                       kombu's transports: a session over a link of its own, or a shared one
    link                            one connection: its socket, its life, who shares it
    link_reader                     its reader: bytes to frames, frames to channels
    link_writer                     its writer: what is queued, joined once a turn of the hub
    link_socket                     dropping its socket, or leaving it to a parent process
    link_users                      what it calls on its channels and sessions
    heartbeats, tls, secret         what keeps it alive, verified and let in
    blame                           which session made the broker close it
    channel_ids, declared           its free channel ids; the queues declared over it
    publish_gate, send_queue        when it takes what is published; in which order that leaves
    session                         the share of one kombu connection: channels and an inbox
    inbox, waits                    what waits to be handed out; when its waits end
    turns                           one greenlet that drains several sessions
    untold                          who is still to be told of a lost link
    channel                         kombu's and py-amqp's interface of a channel
    channel_core                    what a channel consists of, as its link sees it:
    calls, replies                  its calls, and what answers them
    deliveries, consumers, ledger   what it consumes, for whom, and how that is settled
    channel_publisher, confirms     what it publishes, and what answers that
    stream_probe                    whether a queue that others declared is a stream
    message                         a received message
    frames, properties, fields      bytes to values, and back
"""
