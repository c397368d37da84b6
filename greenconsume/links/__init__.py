"""Owns how connections come to be and are shared: a few links to each broker, dialled once for all.

A lost link is dialled again once for all who used it, with backoff and jitter. It must never hold up a stop.
Read `pool`, then `dialer`.
"""
