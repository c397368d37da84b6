"""Owns a process that the admin's tests look at and steer, and requests to its app without a socket."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any, NamedTuple

from greenconsume.admin.address import Address
from greenconsume.admin.app import App
from greenconsume.admin.gate import Gate
from greenconsume.admin.status import ConsumerStatus, LinkStatus, ProcessStatus, RunningHandler
from greenconsume.errors import ControlError, UnknownConsumerError

LOOPBACK = Address("127.0.0.1", 9191)
TOKEN = "a-token-of-some-length"


def consumer(name: str = "Orders-1", **known: Any) -> ConsumerStatus:
    """Return the state of a consumer that consumes."""
    given = {"group": name.rpartition("-")[0], "state": "consuming", "queues": ("orders",), **known}
    return ConsumerStatus(name, **given)


def link(**known: Any) -> LinkStatus:
    """Return the state of a link that is up."""
    return LinkStatus(**{"uri": "amqp://guest:**@127.0.0.1//", "up": True, **known})


def process(*consumers: ConsumerStatus, **known: Any) -> ProcessStatus:
    """Return the state of a process that runs."""
    given = {"state": "running", "started": 0.0, "uptime": 1.0, **known}
    return ProcessStatus("shop", 1234, "0", consumers=consumers, **given)


class FakeProcess:
    """Notes what it is asked for; what it tells can be replaced."""

    def __init__(self, *consumers: ConsumerStatus) -> None:
        self.told = process(*(consumers or (consumer(),)))
        self.asked: list[tuple[Any, ...]] = []
        self.watched = 0

    def status(self) -> ProcessStatus:
        return self.told

    def change(self, **known: Any) -> None:
        self.told = replace(self.told, **known)

    def watch(self) -> None:
        self.watched += 1

    def handlers_of(self, consumer: str) -> tuple[RunningHandler, ...]:
        self._known(consumer)
        return (RunningHandler("7", 1.5),)

    def pause(self, consumer: str) -> None:
        self._note("pause", consumer)

    def resume(self, consumer: str) -> None:
        self._note("resume", consumer)

    def stop_consumer(self, consumer: str) -> None:
        self._note("stop", consumer)

    def restart_consumer(self, consumer: str) -> None:
        self._note("restart", consumer)

    def scale(self, group: str, replicas: int) -> None:
        if replicas > 100:
            raise ControlError("too many for this test")
        self.asked.append(("scale", group, replicas))

    def stop(self, reason: str = "stop") -> None:
        self.asked.append(("drain", reason))

    def _note(self, command: str, consumer: str) -> None:
        self._known(consumer)
        self.asked.append((command, consumer))

    def _known(self, consumer: str) -> None:
        if consumer not in {each.name for each in self.told.consumers}:
            raise UnknownConsumerError(consumer)


class Reply(NamedTuple):
    """The answer to a request."""

    code: int
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Asking:
    """Asks an app, as a client at `address` that shows `token` would."""

    def __init__(
        self,
        process: Any,
        address: Address = LOOPBACK,
        token: str | None = None,
        stall_after: float | None = 60.0,
    ) -> None:
        self.app = App(process, Gate(address, token), stall_after)
        self._host = str(address) if not address.is_unix else "localhost"

    def get(self, path: str, **headers: str) -> Reply:
        return self.ask("GET", path, b"", headers)

    def post(self, path: str, body: Any = None, **headers: str) -> Reply:
        sent = b"" if body is None else json.dumps(body).encode()
        return self.ask("POST", path, sent, {"CONTENT_TYPE": "application/json", **headers})

    def ask(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> Reply:
        path, _, query = path.partition("?")
        environ = {
            "REQUEST_METHOD": method,
            "PATH_INFO": path,
            "QUERY_STRING": query,
            "HTTP_HOST": self._host,
            "CONTENT_LENGTH": str(len(body)),
            "wsgi.input": io.BytesIO(body),
            **headers,
        }
        found: list[Any] = []
        sent = b"".join(self.app(environ, lambda *given: found.append(given)))
        status, said = found[0]
        return Reply(int(status[:3]), dict(said), sent)
