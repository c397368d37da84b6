"""Owns the admin's WSGI app: which path answers what, and what a request may be.

It must never wait for a consumer, nor answer what `gate` refuses. Called by `server`, in a greenlet for each
request; mount it in an application of your own only behind its own authentication.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from hashlib import blake2b
from time import monotonic
from typing import Any
from urllib.parse import parse_qs

from greenconsume.admin import commands, greenlets, health, metrics, page
from greenconsume.admin.gate import Gate
from greenconsume.admin.snapshots import Snapshots
from greenconsume.admin.status import Process, ProcessStatus, to_json
from greenconsume.errors import ControlError, UnknownConsumerError
from greenconsume.events import AdminRefused, emit

#: Bytes that the body of a command may have.
MAX_BODY = 4096
#: Seconds between two events that tell of refused requests.
TELL_EVERY = 10.0

_TEXT, _JSON = "text/plain; charset=utf-8", "application/json"
_HEADERS = (
    ("Cache-Control", "no-cache"),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Content-Security-Policy", page.POLICY),
)

StartResponse = Callable[[str, list[tuple[str, str]]], object]


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a request."""

    body: bytes
    kind: str = _TEXT
    status: str = "200 OK"
    tag: str = field(default="")

    @classmethod
    def tagged(cls, body: bytes, kind: str) -> Answer:
        """Return an answer that is sent once to whoever has it."""
        return cls(body, kind, tag=f'"{blake2b(body, digest_size=12).hexdigest()}"')

    @classmethod
    def text(cls, words: str, status: str = "200 OK") -> Answer:
        """Return a line of text."""
        return cls(f"{words}\n".encode(), status=status)


class App:
    """The WSGI app of one process.

    Args:
        process: What is seen and steered.
        gate: Who may.
        stall_after: Seconds after which a handler counts as stalled; None: never.
    """

    def __init__(self, process: Process, gate: Gate, stall_after: float | None = None) -> None:
        self._process = process
        self._gate = gate
        self._snapshots = Snapshots()
        self._refused, self._tell_from = 0, 0.0
        self._stalls = health.StallWatch(stall_after)
        self._looks: dict[str, Callable[[Mapping[str, Any]], Answer]] = {
            "/": lambda _: Answer.tagged(page.HTML, "text/html; charset=utf-8"),
            "/livez": lambda environ: self._probe(environ, health.live),
            "/readyz": lambda environ: self._probe(environ, health.ready),
            "/stalledz": lambda environ: self._probe(environ, self._stalls.stalled),
            "/status.json": self._status,
            "/metrics": self._metrics,
            "/greenlets": self._greenlets,
        }

    def __call__(self, environ: Mapping[str, Any], start: StartResponse) -> Iterable[bytes]:
        """Answer one request. Never waits but for the body of a command."""
        method, path = environ["REQUEST_METHOD"], environ.get("PATH_INFO", "")
        answer = self._answer(method, path, environ)
        headers = [("Content-Type", answer.kind), *_HEADERS]
        if answer.tag:
            headers.append(("ETag", answer.tag))
            if environ.get("HTTP_IF_NONE_MATCH") == answer.tag:
                start("304 Not Modified", headers)
                return []
        headers.append(("Content-Length", str(len(answer.body))))
        start(answer.status, headers)
        return [] if method == "HEAD" else [answer.body]

    def _answer(self, method: str, path: str, environ: Mapping[str, Any]) -> Answer:
        refusal = self._gate.refusal(method, path, environ)
        if refusal is not None:
            self._tell(method, path, refusal.reason)
            return Answer.text(refusal.reason, refusal.status)
        if method == "POST":
            return self._command(path, environ)
        if method not in ("GET", "HEAD"):
            return Answer.text("only GET, HEAD and POST", "405 Method Not Allowed")
        look = self._looks.get(path)
        if look is None:
            return Answer.text("there is nothing here", "404 Not Found")
        try:
            return look(environ)
        except commands.BadRequestError as exc:
            return Answer.text(str(exc), exc.status)
        except UnknownConsumerError as exc:
            return Answer.text(self._did_you_mean(exc), "404 Not Found")

    def _tell(self, method: str, path: str, reason: str) -> None:
        """Tell of refusals, now and then: whoever attacks must not fill the log."""
        self._refused += 1
        if monotonic() >= self._tell_from:
            emit(AdminRefused(method[:10], path[:80], reason, self._refused))
            self._refused, self._tell_from = 0, monotonic() + TELL_EVERY

    # -- looking --------------------------------------------------------------------------------

    def _now(self) -> ProcessStatus:
        found: ProcessStatus = self._snapshots.get("status", self._look)
        return found

    def _look(self) -> ProcessStatus:
        self._process.watch()
        return self._process.status()

    def _probe(
        self, environ: Mapping[str, Any], question: Callable[[ProcessStatus], health.Answer]
    ) -> Answer:
        answer = question(self._now())
        words = "ok" if answer.yes else "not ok"
        if not answer.yes and self._gate.may_see(environ):
            words = "\n".join(answer.reasons[:100])
        return Answer.text(words, "200 OK" if answer.yes else "503 Service Unavailable")

    def _status(self, environ: Mapping[str, Any]) -> Answer:
        wanted = _query(environ).get("consumer")
        if wanted:
            handlers = self._process.handlers_of(wanted[0])
            shown = [{"message": each.message, "seconds": each.seconds} for each in handlers]
            return Answer(json.dumps({"consumer": wanted[0], "running": shown}).encode(), _JSON)
        found: Answer = self._snapshots.get("status.json", self._made_status)
        return found

    def _made_status(self) -> Answer:
        status = self._now()
        answers = {
            "live": health.live(status).reasons,
            "ready": health.ready(status).reasons,
            "stalled": self._stalls.stalled(status).reasons,
        }
        return Answer.tagged(to_json(status, health=answers), _JSON)

    def _metrics(self, _environ: Mapping[str, Any]) -> Answer:
        def made() -> Answer:
            text = metrics.exposition(self._now()) + _others_metrics()
            return Answer(text, metrics.CONTENT_TYPE)

        found: Answer = self._snapshots.get("metrics", made)
        return found

    def _greenlets(self, _environ: Mapping[str, Any]) -> Answer:
        found: Answer = self._snapshots.get("greenlets", lambda: Answer.text(greenlets.tree()))
        return found

    # -- steering -------------------------------------------------------------------------------

    def _command(self, path: str, environ: Mapping[str, Any]) -> Answer:
        command = commands.COMMANDS.get(path.removeprefix("/"))
        if command is None:
            return Answer.text("there is no such command", "404 Not Found")
        try:
            done = command(self._process, _body(environ))
        except commands.BadRequestError as exc:
            return Answer.text(str(exc), exc.status)
        except UnknownConsumerError as exc:
            return Answer.text(self._did_you_mean(exc), "404 Not Found")
        except ControlError as exc:
            return Answer.text(str(exc), "409 Conflict")
        finally:
            self._snapshots.clear()
        return Answer(json.dumps({"done": done}).encode(), _JSON, "202 Accepted")

    def _did_you_mean(self, error: UnknownConsumerError) -> str:
        consumers = self._process.status().consumers
        names = {each.name for each in consumers} | {each.group for each in consumers}
        near = get_close_matches(error.name, names, n=1)
        return f"{error}: did you mean {near[0]}?" if near else str(error)


def _others_metrics() -> bytes:
    """Return what the process has in prometheus_client's own registry, if it has imported that."""
    client: Any = sys.modules.get("prometheus_client")
    if client is None:
        return b""

    class Others:
        def collect(self) -> Iterable[Any]:
            found = client.REGISTRY.collect()
            return (each for each in found if not each.name.startswith("greenconsume_"))

    text: bytes = client.generate_latest(Others())
    return text


def _query(environ: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return what a request asks for, by name.

    Raises:
        BadRequestError: It is too much.
    """
    try:
        return parse_qs(environ.get("QUERY_STRING", ""), max_num_fields=5)
    except ValueError as exc:
        raise commands.BadRequestError("nothing here takes so many fields") from exc


def _body(environ: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON object that a request brings; none is an empty one. Switches: while it comes.

    Raises:
        BadRequestError: It is none, or too long.
    """
    if "HTTP_TRANSFER_ENCODING" in environ:
        raise commands.BadRequestError("say the body's length", "411 Length Required")
    length = int(environ.get("CONTENT_LENGTH") or 0)
    if length > MAX_BODY:
        raise commands.BadRequestError(
            f"a body has {MAX_BODY} bytes or less", "413 Content Too Large"
        )
    if not length:
        return {}
    # What a form sends without asking first: a page of another origin could.
    if environ.get("CONTENT_TYPE", "").partition(";")[0].strip().lower() != _JSON:
        raise commands.BadRequestError(f"send {_JSON}", "415 Unsupported Media Type")
    try:
        body = json.loads(environ["wsgi.input"].read(length))
    except (ValueError, OSError, RecursionError) as exc:
        raise commands.BadRequestError("the body is no JSON") from exc
    if not isinstance(body, dict):
        raise commands.BadRequestError("the body must be a JSON object")
    return body
