"""Owns how MODULE:TARGET becomes a runtime: what is imported, what is called, which options apply to it.

It must never connect, nor start anything. Called by `cli`; a mistake in the call is a `click.UsageError`.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from dataclasses import replace
from difflib import get_close_matches
from types import TracebackType
from typing import Any

import click
import kombu

from greenconsume.handling.options import ConsumerOptions
from greenconsume.links.brokers import connection_to
from greenconsume.runtime.runtime import Runtime

#: Whose frames precede those of the user's code in a traceback.
_OURS = {"click", "gevent", "greenconsume", "importlib"}


def runtime_of(
    spec: str, options: dict[str, Any], given: dict[str, Any], handled: ConsumerOptions
) -> Runtime:
    """Return the runtime that a MODULE:TARGET names, or a new one that runs the consumers it names.

    Args:
        spec: What names a Runtime, a consumer class or instance, or a function that returns one of these:
            called here if it takes no arguments, else by the runtime, with the connection.
        options: `replicas`, and `broker` and whatever else `Runtime` is called with. Without `broker` the
            target must have one of its own.
        given: Those of the options that the user gave. Only these apply to what has its own.
        handled: How messages are handled, as far as the user says so.

    Raises:
        click.UsageError: There is no such module or name, or an option is not for this target.
        GreenconsumeError: The target is no consumer, or the broker's transport cannot be used.
        Exception: Whatever the user's module or function raised.
    """
    target = _load(spec)
    if _is_factory(target):
        target = target()
    try:
        if isinstance(target, Runtime):
            _apply(target, handled, **given)
            return target
        return _made_of(spec, target, given, handled, **options)
    except ValueError as exc:
        raise click.UsageError(str(exc)) from exc


def users_part(error: BaseException) -> TracebackType | None:
    """Return the traceback from the first frame of the user's code on; `None` if none is the user's."""
    found = error.__traceback__
    while found is not None and _package(found) in _OURS:
        found = found.tb_next
    return found


def _package(traceback: TracebackType) -> str:
    return str(traceback.tb_frame.f_globals.get("__name__", "")).partition(".")[0]


def _load(spec: str) -> Any:
    module, _, path = spec.partition(":")
    if not (module and path):
        raise click.UsageError(f"{spec!r} is no MODULE:TARGET, such as shop:Orders")
    if "/" in module or module.endswith(".py"):
        raise click.UsageError(
            f"{module!r} is a file: name its module as an import does, as in shop.consumers:Orders"
        )
    sys.path.insert(0, os.getcwd())
    found = _import(module)
    for name in path.split("."):
        if not hasattr(found, name):
            near = get_close_matches(name, dir(found), n=1)
            hint = f": did you mean {near[0]}?" if near else ""
            raise click.UsageError(f"{module} has no {path}{hint}")
        found = getattr(found, name)
    return found


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as exc:
        if users_part(exc) is not None:  # the module was found, and misses another
            raise
        raise click.UsageError(f"{exc}, neither in {os.getcwd()} nor installed") from exc


def _is_factory(target: Any) -> bool:
    """Return whether `target` is to be called for what it makes: no class or consumer, without arguments."""
    if isinstance(target, (type, Runtime)) or hasattr(target, "get_consumers"):
        return False
    try:
        inspect.signature(target).bind()
    except (TypeError, ValueError):  # it needs arguments, cannot be called, or does not tell
        return False
    return True


def _made_of(
    spec: str,
    target: object,
    given: dict[str, Any],
    handled: ConsumerOptions,
    replicas: int,
    **options: Any,
) -> Runtime:
    own = None if isinstance(target, type) else getattr(target, "connection", None)
    has_kombus = isinstance(own, kombu.Connection)
    broker = options.get("broker", own if has_kombus else "memory://")
    runtime = Runtime(options=handled, **{**options, "broker": broker})
    if has_kombus and "broker" in given:
        _redirect(own, runtime.connection)
    runtime.spawn(target, replicas)
    if own is None and "broker" not in options:  # only now: it may be no consumer at all
        raise click.UsageError(
            f'{spec} does not say from which broker it consumes: add broker="amqp://…", or name a Runtime '
            'that has one (broker="memory://" is this process alone)'
        )
    return runtime


def _apply(
    runtime: Runtime, handled: ConsumerOptions, broker: str | None = None, **given: Any
) -> None:
    """Have a runtime that the user made do what the command line says."""
    if "replicas" in given:
        raise click.UsageError(
            "--replicas is not for a Runtime: say it there, as in runtime.spawn(Orders, replicas=20)"
        )
    Runtime(**given)  # to say now what is wrong with one
    for name, value in given.items():
        setattr(runtime, name, value)
    runtime.options = replace(runtime.options, **handled.said())
    if broker is not None:
        _redirect(runtime.connection, connection_to(broker))


def _redirect(connection: kombu.Connection, broker: kombu.Connection) -> None:
    """Make a connection one to another broker, in place: whatever holds it follows."""
    addresses = [(each.as_uri(), each.password, each.alt) for each in (connection, broker)]
    if addresses[0] == addresses[1]:
        return  # it may know more than its URL says, such as a certificate
    connection.release()
    vars(connection).clear()
    vars(connection).update(vars(broker), _transport=None)
