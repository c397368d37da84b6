"""Owns many consumers together: what starts, supervises, restarts, stops and joins them.

It must never wait inside `stop`, nor run a user's code in the hub. Read `runtime`, then `supervisor`.
"""
