"""Owns the handlers of one consumer: their options, their greenlets, their timeouts and their end.

The boundary stands around a user's callback: no exception of it reaches a connection. The pool bounds how
many run at once; the drain ends them in order. It must never write to a broker but by settling a message.
Read `options`, `boundary`, `jobs` and `drain` first.
"""
