"""Owns the engine of a consumer: what connects it, receives its messages, drains it and closes.

It calls a consumer by kombu's public methods alone, in kombu's order, and keeps all that it knows of one in
one attribute: everything else on a user's class is the user's (law 12). It must never run a callback itself:
that is `handling`. Read `interface` and `engine` first, then `receiving` and `connecting`.
"""
