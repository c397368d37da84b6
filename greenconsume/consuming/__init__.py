"""Owns the engine of a consumer: what connects it, receives its messages, drains it and closes.

It calls a consumer by kombu's public methods alone, in kombu's order, and keeps all that it knows of one in
one attribute: everything else on a user's class is the user's (law 12). It must never run a callback itself:
that is `handling`. Read `interface` and `engine` first, then `receiving` and `connecting`::

    interface    what the engine calls on a consumer
    engine       connects, receives, drains, closes
    connecting   its connections
    guarding     what is done to its `kombu.Consumer`s before they consume
    receiving    the loop
    refusals     what to do about what the broker refuses
    streams      where it stands in a stream
    lighter      small objects of kombu's, in fewer bytes
"""
