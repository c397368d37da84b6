"""Many kombu consumers as greenlets under one gevent hub.

What runs in a process::

    hub                           one gevent hub, one OS thread
    └─ Runtime                    start, stop, drain, join
       ├─ supervisor greenlet     restarts failed consumers, runs the drain
       ├─ ConsumerGreenlet × N    one per mixin instance: connect, consume, drain, close
       └─ LinkPool                a few broker links, shared by all consumers, a channel each
          └─ Link                 one connection, to RabbitMQ or Redis: a reader and a writer greenlet

Where it is written. A package imports only what stands below it, and says what to read in it first::

    processes    what `greenconsume run --processes` becomes: gunicorn's arbiter without sockets
    gunicorn     consumers in gunicorn's gevent workers, beside HTTP
    cli          the command line: `greenconsume run MODULE:TARGET`, `greenconsume dead-letters`
    runtime      Runtime, spawn: many consumers, what restarts them and what stops them
    metrics      greenconsume[metrics]: a runtime's metrics for prometheus_client
    otel         greenconsume[otel]: spans and metrics around handlers and publications
    admin        how a process is seen and steered: health, metrics, a live page, commands
    mixins       ConsumerMixin, ConsumerProducerMixin: kombu's interface, which users subclass
    consuming    the engine of a consumer: connect, receive, drain, close, by kombu's methods alone
    handling     the callbacks of a consumer: how many run at once, their timeouts, their drain
    failures     what becomes of a message whose callback failed: Requeue, Reject, Retry, dead letters
    publishing   Publisher: confirmed publishing from many greenlets
    links        how many consumers share a few connections
    transports   which kombu transports are green, polled or refused; memory
    redis        the green Redis and Valkey client: takes, leases, restores, in kombu's layout
    virtual      what redis and memory share: prefetch, settling once, closing every channel
    amqp         the green AMQP client: a link, its sessions, its channels
    lifecycle    one consumer's name, state, readiness and stop signal
    around       what is entered around a message: handlers, batches and publications
    tally        the numbers of one consumer, and what its handlers took in the last minute
    logs         structured logging, the first observer of the events
    log_lines    what the log says of each event
    events       what happens, as frozen values
    states       the states of a consumer, and the outcome of a drain
    hooks        the one seam that observers of the events hang on
    hub          what keeps gevent's hub waiting while only a thread or a signal could wake it
    stopping     StopSignal and Deadline: what ends every wait
    patching     patch_all, require_patched: gevent's patching and its check
    checks       what counts as a number where arguments are checked
    errors       every exception, under GreenconsumeError

Read `events`, `stopping`, `mixins` and `runtime` first; they hold the ideas. Importing this package
imports neither gevent nor kombu and patches nothing: the public names are imported when first used.
"""

from __future__ import annotations

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "BlockedError",
    "Child",
    "ConsumerGreenlet",
    "ConsumerMixin",
    "ConsumerOptions",
    "ConsumerProducerMixin",
    "CurrentHandler",
    "DeadLetter",
    "DeadLetters",
    "HandlerTimeout",
    "KillSwitch",
    "LinkPool",
    "NackedError",
    "Publication",
    "PublishError",
    "PublishTimeoutError",
    "Publisher",
    "RefusedError",
    "Reject",
    "Requeue",
    "RestartPolicy",
    "Retry",
    "ReturnedError",
    "Runtime",
    "Shutdown",
    "UnconfirmedError",
    "current_handler",
    "patch_all",
    "require_patched",
    "spawn",
]

# As `typing` has it, whose import would take a probe (`greenconsume check`) half its time.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from greenconsume.errors import (
        BlockedError,
        HandlerTimeout,
        NackedError,
        PublishError,
        PublishTimeoutError,
        RefusedError,
        ReturnedError,
        Shutdown,
        UnconfirmedError,
    )
    from greenconsume.failures.dead_letters import DeadLetter, DeadLetters
    from greenconsume.failures.policies import Reject, Requeue
    from greenconsume.failures.retry import Retry
    from greenconsume.handling.batches import Batch
    from greenconsume.handling.kill_switch import KillSwitch
    from greenconsume.handling.options import ConsumerOptions
    from greenconsume.handling.wrapping import CurrentHandler, current_handler
    from greenconsume.links.pool import LinkPool
    from greenconsume.mixins import ConsumerMixin, ConsumerProducerMixin
    from greenconsume.patching import patch_all, require_patched
    from greenconsume.publishing.publication import Publication
    from greenconsume.publishing.publisher import Publisher
    from greenconsume.runtime.child import Child
    from greenconsume.runtime.greenlet import ConsumerGreenlet, spawn
    from greenconsume.runtime.restart_policy import RestartPolicy
    from greenconsume.runtime.runtime import Runtime
else:
    _HOMES = {
        "Batch": "handling.batches",
        "BlockedError": "errors",
        "Child": "runtime.child",
        "ConsumerGreenlet": "runtime.greenlet",
        "ConsumerMixin": "mixins",
        "ConsumerOptions": "handling.options",
        "ConsumerProducerMixin": "mixins",
        "CurrentHandler": "handling.wrapping",
        "DeadLetter": "failures.dead_letters",
        "DeadLetters": "failures.dead_letters",
        "HandlerTimeout": "errors",
        "KillSwitch": "handling.kill_switch",
        "LinkPool": "links.pool",
        "NackedError": "errors",
        "Publication": "publishing.publication",
        "PublishError": "errors",
        "PublishTimeoutError": "errors",
        "Publisher": "publishing.publisher",
        "RefusedError": "errors",
        "Reject": "failures.policies",
        "Requeue": "failures.policies",
        "RestartPolicy": "runtime.restart_policy",
        "Retry": "failures.retry",
        "ReturnedError": "errors",
        "Runtime": "runtime.runtime",
        "Shutdown": "errors",
        "UnconfirmedError": "errors",
        "current_handler": "handling.wrapping",
        "patch_all": "patching",
        "require_patched": "patching",
        "spawn": "runtime.greenlet",
    }

    # Hidden from type checkers, to whom a module with __getattr__ has every name.
    def __getattr__(name):
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        return value

    def __dir__():
        return sorted({*globals(), *__all__})
