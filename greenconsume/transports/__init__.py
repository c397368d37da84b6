"""Owns which kombu transports may be used, which are green, polled or refused; and `memory://`.

Importing it changes nothing in kombu; `registry.register` does. It must never connect. Read `registry`::

    registry           what a URL may name, and the remedy for what it may not
    memory             the green memory:// transport
    memory_queues      its queues, and which consumer is woken for a message
    memory_unsettled   what its channels have delivered and not seen settled
"""
