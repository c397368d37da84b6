"""Many kombu consumers as greenlets under one gevent hub.

What runs in a process::

    hub                           one gevent hub, one OS thread
    └─ Runtime                    start, stop, drain, join
       ├─ supervisor greenlet     restarts failed consumers, runs the drain
       ├─ ConsumerGreenlet × N    one per mixin instance: connect, consume, drain, close
       └─ LinkPool                a few broker links, shared by all consumers, a channel each
          └─ Link                 one AMQP connection: a reader and a writer greenlet

Where it is written; a module imports only what stands below it::

    cli            the command line: `greenconsume run MODULE:TARGET`, exit codes, signals
    loading        what MODULE:TARGET names, as a runtime with the options that apply
    publisher      Publisher: confirmed publishing from many greenlets
    outbox         what a publisher has outstanding, and how it is written again
    lane           the channel that an outbox writes to
    publications   one message of a publisher, until it is confirmed or has failed
    dead_letters_cli  the command `greenconsume dead-letters list|show|replay|purge QUEUE`
    dead_letters   what is in a dead-letter queue, and its way back
    runtime        Runtime: all consumers of a process together
    signals        what SIGTERM and SIGINT do to it
    blocking       the warning that something keeps every greenlet waiting
    targets        what may be spawned, and the broker it is spawned for
    supervisor     RestartPolicy; which failure restarts what, and the drain ladder
    greenlets      spawn, ConsumerGreenlet: one consumer's life
    adapting       how a plain kombu mixin becomes one of ours
    mixins         ConsumerMixin, ConsumerProducerMixin: kombu's interface
    draining       how one consumer's handlers are brought to their end, rung by rung
    overdue        the warning that a message stays unsettled until the broker loses patience
    batches        messages that a callback is given together
    handlers       the boundary around the callbacks, and their timeouts
    shielding      calls on polled channels: one at a time, and not interrupted
    settings       what a consumer, its runtime or the defaults say of handlers, checked
    switches       KillSwitch: a consumer whose messages fail stops consuming
    retries        Retry: again after a delay, and in the end into a dead-letter queue
    retry_queues   the queues that retries need in the broker
    republishing   the way out for failed messages: confirmed, over a link that consumes nothing
    copies         what a failed message is published as: everything kept, and our headers
    pools          the greenlets that callbacks run in: how many at once, in which order
    policies       Requeue, Reject: what becomes of a message whose handler failed
    deliveries     a message's life: settled once, on the channel it came from
    links          many consumers over a few links
    transports     green transports for kombu: amqp, memory; a fallback for the others
    lifecycle      one consumer's name, state, readiness and stop signal
    logs           structured logging, the first hook
    events         what happens, as frozen values, and the one seam that observers hang on
    stopping       StopSignal and Deadline: what ends every wait
    patching       patch_all, require_patched: gevent's patching and its check
    errors         every exception, under GreenconsumeError

Read `events`, `stopping`, `mixins` and `runtime` first; they hold the ideas. Importing this package
imports neither gevent nor kombu and patches nothing: the public names are imported when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "ConsumerGreenlet",
    "ConsumerMixin",
    "ConsumerProducerMixin",
    "HandlerTimeout",
    "KillSwitch",
    "Publisher",
    "Reject",
    "Requeue",
    "RestartPolicy",
    "Retry",
    "Runtime",
    "Shutdown",
    "patch_all",
    "require_patched",
    "spawn",
]

if TYPE_CHECKING:
    from greenconsume.batches import Batch
    from greenconsume.errors import HandlerTimeout, Shutdown
    from greenconsume.greenlets import ConsumerGreenlet, spawn
    from greenconsume.mixins import ConsumerMixin, ConsumerProducerMixin
    from greenconsume.patching import patch_all, require_patched
    from greenconsume.policies import Reject, Requeue
    from greenconsume.publisher import Publisher
    from greenconsume.retries import Retry
    from greenconsume.runtime import Runtime
    from greenconsume.supervisor import RestartPolicy
    from greenconsume.switches import KillSwitch
else:
    _HOMES = {
        "Batch": "batches",
        "ConsumerGreenlet": "greenlets",
        "ConsumerMixin": "mixins",
        "ConsumerProducerMixin": "mixins",
        "HandlerTimeout": "errors",
        "KillSwitch": "switches",
        "Publisher": "publisher",
        "Reject": "policies",
        "Requeue": "policies",
        "RestartPolicy": "supervisor",
        "Retry": "retries",
        "Runtime": "runtime",
        "Shutdown": "errors",
        "patch_all": "patching",
        "require_patched": "patching",
        "spawn": "greenlets",
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
