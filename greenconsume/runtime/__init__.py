"""Owns many consumers together: what starts, supervises, restarts, stops and joins them.

It must never wait inside `stop`, nor run a user's code in the hub. Read `runtime`, then `supervisor`::

    runtime          Runtime: what users call
    run              one start of a runtime, up to its end
    starting         the wait of a start, and why it fails
    supervisor       restarts what ended, drains what runs
    child            one consumer through all its restarts
    control          how a runtime is seen and steered while it runs
    observing        the state of consumers and links as values
    groups           what was spawned, by name
    restart_policy   how often and how soon one is started again
    greenlet         spawn: one consumer in a greenlet
    adapter          how a plain kombu mixin becomes ours
    targets          what may be spawned
    arguments        what else may be said, checked where it enters
    signals          SIGTERM and SIGINT go down the ladder of the drain
    hub_watch        the warning that something blocks every greenlet
    bound            a stop that has to end sooner than the timeouts say
    quota            the stop after so many messages
    freezing         the exemption from garbage collection
    forker           the ban on consuming in a process that forks others for it
"""
