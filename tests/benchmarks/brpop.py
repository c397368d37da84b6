"""The least that a process can do to wait for a Redis queue: BRPOP, over and over; it is ended by a kill.

python brpop.py '{"url": ..., "queue": ...}'
"""

from __future__ import annotations

import json
import sys

import redis


def main() -> None:
    options = json.loads(sys.argv[1])
    server = redis.Redis.from_url(options["url"], socket_timeout=None)
    print("ready", flush=True)
    while True:
        server.brpop(f"{options['queue']}.0", timeout=60)


if __name__ == "__main__":
    main()
