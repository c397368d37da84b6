"""Owns which kombu transports a consumer may use: the green ones, the polled ones and the refused ones.

Green transports park a greenlet until there is a message and take a `stop`; they have `wakes = True`.
Every other kombu transport is polled, which the hooks are told once for each, apart from those that wait
in C and would stop the whole hub with every wait. Importing this changes nothing in kombu: `register`
does, called by `links` before it connects.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from kombu.transport import TRANSPORT_ALIASES, _transport_cache, get_transport_cls

from greenconsume.errors import UnsupportedTransportError
from greenconsume.events import PollingTransport, emit

if TYPE_CHECKING:
    import kombu

#: A transport as kombu names it: an alias, a path, or the class itself.
TransportName = str | type[Any]

#: Seconds after which a polled transport without an interval of its own looks whether it is to stop.
SAFETY_INTERVAL = 1.0

_GREEN = {
    "amqp": "greenconsume.amqp.transport:Transport",
    "amqps": "greenconsume.amqp.transport:SSLTransport",
    "pyamqp": "greenconsume.amqp.transport:Transport",
    "memory": "greenconsume.transports.memory:Transport",
    "redis": "greenconsume.redis.transport:Transport",
    "rediss": "greenconsume.redis.transport:SSLTransport",
    "sentinel": "greenconsume.redis.transport:SentinelTransport",
    "valkey": "greenconsume.redis.transport:Transport",
    "valkeys": "greenconsume.redis.transport:SSLTransport",
}

_ELSEWHERE = (
    "run its consumers with kombu.mixins in a process without gevent, or use a broker that has a "
    "green transport (amqp://, redis://, memory://)"
)
# By module: what of it waits in C, and the remedy.
_BLOCKING = {
    "kombu.transport.librabbitmq": (
        "librabbitmq",
        "write pyamqp:// in its broker URL, which speaks to the same broker",
    ),
    "kombu.transport.confluentkafka": ("librdkafka", _ELSEWHERE),
    "kombu.transport.gcpubsub": ("gRPC", _ELSEWHERE),
}

# What to install for transports whose name is not that of an extra of kombu.
_EXTRAS = {
    "kombu.transport.SQS": "kombu[sqs]",
    "kombu.transport.SLMQ": "kombu[slmq]",
    "kombu.transport.etcd": "python-etcd",
}

_announced: set[str] = set()


def register() -> None:
    """Have kombu resolve the names of brokers that have a green transport to that.

    For the whole process; connections that are connected already keep what they have. A name that was
    given to a transport of somebody else's stays theirs. Calling it again does no harm.

    Switches: no. From anywhere.
    """
    for name, path in _GREEN.items():
        if TRANSPORT_ALIASES.get(name, "kombu.").startswith("kombu."):
            TRANSPORT_ALIASES[name] = path
            _transport_cache.pop(name, None)


def require_green(connection: kombu.Connection) -> None:
    """Check that consuming from `connection`, or from any of its alternates, cannot stop the hub.

    Registers the green transports first. Emits `PollingTransport`, once in a process for each transport
    that has to be polled.

    Raises:
        UnsupportedTransportError: A transport is unknown, lacks a library, or waits in C; the message
            says which, and what to do.

    Switches: no. Imports the transports on first use.
    """
    register()
    names = (connection.transport_cls, *_schemes(connection.alt))
    classes = [_usable(name) for name in names]
    _require_libraries(connection)
    for name, cls in zip(names, classes, strict=True):
        if not getattr(cls, "wakes", False):
            _announce(name, cls, connection.transport_options or {})


def require_known(url: str) -> None:
    """Check the transports of a broker URL, or of several with `;` between, before kombu is given it.

    kombu's `Connection` raises `KeyError`, `ValueError` or `ImportError` for most that it cannot use.

    Raises:
        UnsupportedTransportError: As `require_green` does.

    Switches: no. Imports the transports on first use.
    """
    register()
    for name in _schemes(url.split(";")):
        if name not in TRANSPORT_ALIASES:
            # Never resolved: kombu would import whatever module a dotted name names.
            raise UnsupportedTransportError(_unknown(name))
        _usable(name)


def _schemes(urls: Iterable[str] | None) -> Iterator[str]:
    for url in urls or ():
        scheme, found, _ = url.partition("://")
        if found:
            yield scheme.partition("+")[0]  # sqla+postgresql:// is sqla


def _usable(name: TransportName) -> Any:
    """Return the class that a name, a path or a class stands for; refuse what waits in C."""
    path = TRANSPORT_ALIASES.get(name, name) if isinstance(name, str) else ""
    _refuse_blocking(name, str(path).partition(":")[0])
    cls = _resolved(name)
    for base in getattr(cls, "__mro__", ()):
        _refuse_blocking(name, base.__module__)
    return cls


def _refuse_blocking(name: TransportName, module: str) -> None:
    if module in _BLOCKING:
        library, remedy = _BLOCKING[module]
        raise UnsupportedTransportError(
            f"the transport {_display(name)!r} waits in C ({library}), where one wait stops every "
            f"consumer of the process: {remedy}"
        )


def _resolved(name: TransportName) -> Any:
    try:
        return get_transport_cls(name)
    except KeyError as exc:
        raise UnsupportedTransportError(_unknown(_display(name))) from exc
    except ImportError as exc:
        raise UnsupportedTransportError(_not_installed(name, exc)) from exc
    except (AttributeError, ValueError) as exc:
        raise UnsupportedTransportError(
            f"the transport {_display(name)!r} is no class that can be imported ({_line(exc)}): "
            "write it as package.module:Class"
        ) from exc


def _require_libraries(connection: kombu.Connection) -> None:
    # Several of kombu's transports miss their library when they are made; qpid's says RuntimeError.
    try:
        _ = connection.transport
    except (ImportError, RuntimeError) as exc:
        raise UnsupportedTransportError(_not_installed(connection.transport_cls, exc)) from exc


def _unknown(name: str) -> str:
    usable = sorted(
        alias
        for alias, path in TRANSPORT_ALIASES.items()
        if str(path).partition(":")[0] not in _BLOCKING
    )
    close = get_close_matches(name.lower(), usable, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(usable)}."
    return (
        f"no transport is called {name!r}: {hint} A broker URL begins with its transport's name, "
        "as amqp://host does"
    )


def _not_installed(name: TransportName, exc: Exception) -> str:
    path = str(TRANSPORT_ALIASES.get(name, "")) if isinstance(name, str) else ""
    module = path.partition(":")[0].removesuffix(".Transport")
    if module.startswith("kombu."):
        wanted = _EXTRAS.get(module, f"kombu[{module.rpartition('.')[2]}]")
        remedy = f"pip install '{wanted}'"
    elif module == "greenconsume.redis.transport":
        remedy = "pip install 'greenconsume[redis]'"
    else:
        remedy = "install what it needs, or correct its name"
    return f"the transport {_display(name)!r} lacks a library ({_line(exc)}): {remedy}"


def _announce(name: TransportName, cls: Any, options: dict[str, Any]) -> None:
    shown = _display(name)
    if shown in _announced:
        return
    _announced.add(shown)
    intervals = (options.get("polling_interval"), getattr(cls, "polling_interval", None))
    interval = next((value for value in intervals if value is not None), SAFETY_INTERVAL)
    emit(PollingTransport(shown, float(interval)))


def _display(name: TransportName) -> str:
    return name if isinstance(name, str) else f"{name.__module__}:{name.__qualname__}"


def _line(exc: BaseException) -> str:
    return " ".join(str(exc).split())
