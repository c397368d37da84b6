"""Owns how a running process is seen and steered: its state as values, health, metrics, page and commands.

It must never wait for a broker or for a consumer, show anything of a message but its delivery tag, or keep a
number of its own: what it shows is what `Process.status` says (law 13). Who runs consumers starts the
`Server`, and gives it a `Process`. Read `status`, then `app`::

    status       what a process tells of itself, as values; what may be asked of it
    server       the socket, and how many connections it holds
    app          the WSGI app: which path answers what
    gate         who may ask what
    address      where it listens
    run_folder   where the processes of a user are found
    commands     the commands that an operator gives
    health       live, ready, stalled
    metrics      the numbers, and Prometheus' text of them
    page         the live page
    greenlets    the tree of greenlets, as text
    lag          how late the hub is
    snapshots    the bound on what looking costs
"""
