"""Owns the handlers of one consumer: their options, their greenlets, their timeouts and their end.

The boundary stands around a user's callback: no exception of it reaches a connection. The pool bounds how
many run at once; the drain ends them in order. It must never write to a broker but by settling a message.
Read `options`, `boundary`, `jobs` and `drain` first::

    options, declaring   ConsumerOptions; what an option is
    settings, shared     what the options come to; what a runtime's consumers share
    handler              what takes each delivery
    boundary             where a callback runs, and what its failure means
    decoding, wrapping   the body, decoded; what is entered around the callback
    jobs                 a handler at work: how it is interrupted, shielded or killed
    pool, slots          the greenlets that handlers run in; how many at once
    batches              messages that a callback is given together
    prefetch             how many messages to ask for ahead
    pace, intake         a rate; taking less while the hub lags behind
    alarm                handler_timeout
    drain                how handlers are brought to their end
    kill_switch          KillSwitch
    unsettled_watch      the warning of a message that stays unsettled
    shield               keeps interrupts out of calls that do I/O themselves
    trial                finds the message that has the broker close the connection
    advice               what is said of a handler's error besides its traceback
"""
