"""Owns the command line: its commands, its options, its words and its exit codes.

It composes a runtime from what the user names, and must hold nothing that a program of one's own would miss.
Read `main` first::

    main           the command line itself, and `greenconsume run`
    flags          the options of `run`
    loading        from MODULE:TARGET to a runtime
    handover       from here to gunicorn's arbiter
    control        status, top, pause, scale, dump and so on
    asking         one request to a running process
    check          a probe's question, in 50 ms
    table, top     a status as text; the page in a terminal
    dead_letters   list, show, replay, purge
"""
