"""Owns what becomes of a message whose handler failed: policies, retries, dead letters.

A failed message is put back, rejected, or published anew to a retry or dead-letter queue and acknowledged
only once the broker has confirmed the copy. It must never lose a message to save time. Read `policies` and
`retry` first.
"""
