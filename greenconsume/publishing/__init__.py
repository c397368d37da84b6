"""Owns confirmed publishing: `Publisher`, what it has outstanding, and how that is written again.

It must never publish on a link that consumes, as the broker blocks publishers by blocking their connection.
Read `publisher`, then `outbox`::

    publisher         Publisher: what applications call
    publication       one message, until it is confirmed or has failed
    outbox            the messages that have no answer yet
    sender            gets them onto the wire, and again after a loss
    publish_channel   the channel that they go over
"""
