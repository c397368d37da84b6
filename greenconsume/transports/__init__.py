"""Owns which kombu transports may be used, which are green, polled or refused; and `memory://`.

Importing it changes nothing in kombu; `registry.register` does. Read `registry`.
"""
