"""Owns confirmed publishing: `Publisher`, what it has outstanding, and how that is written again.

It must never publish on a link that consumes, as the broker blocks publishers by blocking their connection.
Read `publisher`, then `outbox`.
"""
