"""Owns how a running process is seen and steered: its state as values, health, metrics, page and commands.

It must never wait for a broker or for a consumer, show anything of a message but its delivery tag, or keep a
number of its own: what it shows is what `Process.status` says (law 13). Who runs consumers starts the
`Server`, and gives it a `Process`. Read `status`, then `app`.
"""
