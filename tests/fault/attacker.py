"""Owns an attack on an admin port, as a program of its own: `attacker.py PORT SECONDS`; prints what it got.

It holds a thousand idle connections, sends bodies that never end, and asks again and again as a web page
that rebinds a name, as a page of another site, by paths that lead out, and with guessed tokens.
"""

from __future__ import annotations

import json
import socket
import sys
from collections import Counter
from time import monotonic, sleep

PORT, SECONDS = int(sys.argv[1]), float(sys.argv[2])
HOST = f"127.0.0.1:{PORT}"
DRAIN = "POST /drain HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 2\r\n"
#: Each with what answers it.
ATTACKS = {
    f"{DRAIN}Host: evil.example:{PORT}\r\n\r\n{{}}": "421",
    f"GET /status.json HTTP/1.1\r\nHost: evil.example:{PORT}\r\n\r\n": "421",
    f"{DRAIN}Host: {HOST}\r\nOrigin: https://evil.example\r\n\r\n{{}}": "403",
    f"{DRAIN}Host: {HOST}\r\nSec-Fetch-Site: cross-site\r\n\r\n{{}}": "403",
    f"GET /../../../etc/passwd HTTP/1.1\r\nHost: {HOST}\r\n\r\n": "404",
    f"{DRAIN}Host: {HOST}\r\nAuthorization: Bearer guessed-guessed-guess\r\n\r\n{{}}": "401",
    f"{DRAIN}Host: {HOST}\r\n\r\n{{}}": "401",
}


def connect() -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", PORT), timeout=10)
    sock.settimeout(10)
    return sock


def ask(request: str) -> str:
    try:
        with connect() as sock:
            sock.sendall(request.encode())
            return sock.recv(64).decode("latin-1").split(" ")[1]
    except (OSError, IndexError):
        return "dropped"  # for one that came later


def main() -> None:
    idle = [connect() for _ in range(1000)]
    slow = [connect() for _ in range(20)]
    for sock in slow:
        sock.sendall(
            f"POST /pause HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: 4000\r\n\r\n".encode()
        )
    got: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    until = monotonic() + SECONDS
    while monotonic() < until:
        for request, wanted in ATTACKS.items():
            code = ask(request)
            got[code] += 1
            if code not in (wanted, "dropped"):
                wrong[code] += 1
        for sock in slow:
            try:
                sock.send(b" ")
            except OSError:
                pass
        sleep(0.02)
    for sock in (*idle, *slow):
        sock.close()
    print(json.dumps({"got": got, "wrong": wrong}))


main()
