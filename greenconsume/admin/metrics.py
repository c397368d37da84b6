"""Owns the metrics: their names, labels and kinds, and the text that Prometheus reads.

Names as FastStream has them where it has one, else by Prometheus' conventions. Labels are the consumer, its
queues, a broker: never what a publisher chooses. All numbers come from a `ProcessStatus`; nothing is counted
here. `greenconsume.metrics` hands the same families to prometheus_client; this text needs no library, and is
ten times as fast. Called by `app`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from operator import attrgetter
from typing import Literal

from greenconsume.admin.status import ConsumerStatus, LinkStatus, ProcessStatus
from greenconsume.tally import BOUNDS, Timings

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
#: Bounds of the histograms, in seconds; some of `tally.BOUNDS`.
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 100.0)
#: Where they are among these.
PLACES = [BOUNDS.index(bound) for bound in BUCKETS]
#: How the labels of a bucket end.
_ENDS = [f'{bound}"}} ' for bound in BUCKETS]

#: Consumers whose labels are kept: they are the same at each scrape.
_KEPT = 1 << 14

Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True, slots=True, eq=False)
class Labels:
    """The labels of a row.

    Attributes:
        pairs: Name and value of each.
        text: The same as Prometheus reads it, without the braces.
    """

    pairs: tuple[tuple[str, str], ...]
    text: str

    @property
    def names(self) -> tuple[str, ...]:
        """The names."""
        return tuple(name for name, _ in self.pairs)

    @property
    def values(self) -> tuple[str, ...]:
        """The values, in the order of the names."""
        return tuple(value for _, value in self.pairs)

    def more(self, name: str, value: str) -> Labels:
        """Return these labels and one more."""
        return Labels((*self.pairs, (name, value)), f'{self.text},{name}="{_escaped(value)}"')


def labels_of(*pairs: tuple[str, str]) -> Labels:
    """Return the labels of these names and values. Never switches."""
    return Labels(pairs, ",".join(f'{name}="{_escaped(value)}"' for name, value in pairs))


@lru_cache(_KEPT)
def labels_of_consumer(
    name: str, queues: tuple[str, ...], outcomes: tuple[str, ...]
) -> tuple[Labels, tuple[Labels, ...]]:
    """Return a consumer's labels, and with them those of each of its outcomes. Never switches."""
    labels = labels_of(("consumer", name), ("queue", ",".join(queues)))
    return labels, tuple(labels.more("status", each) for each in outcomes)


#: A consumer, its labels, and those of each of its outcomes.
_Labelled = list[tuple[ConsumerStatus, Labels, tuple[Labels, ...]]]


@dataclass(frozen=True, slots=True)
class Family:
    """One metric: its name without `_total`, and a row for each set of labels.

    Attributes:
        rows: What a counter or gauge says.
        timings: What a histogram says.
    """

    name: str
    kind: Kind
    help: str
    rows: list[tuple[Labels, float]] = field(default_factory=list)
    timings: list[tuple[Labels, Timings]] = field(default_factory=list)


def families(status: ProcessStatus) -> list[Family]:
    """Return all metrics of a process. Never switches."""
    labelled: _Labelled = [
        (each, *labels_of_consumer(each.name, each.queues, tuple(each.outcomes or ())))
        for each in status.consumers
    ]
    return [
        *_plain_families(labelled),
        *_detailed_families(labelled),
        *_link_families(status),
        *_process_families(status),
    ]


def exposition(status: ProcessStatus) -> bytes:
    """Return all metrics as Prometheus' text. Never switches."""
    return "".join(_text(families(status))).encode()


#: Name, kind, what it is, and the attribute of a `ConsumerStatus`.
_OF_CONSUMERS: tuple[tuple[str, Kind, str, str], ...] = (
    ("received_messages", "counter", "Messages that reached the consumer", "received"),
    ("received_messages_in_process", "gauge", "Handlers that run", "in_progress"),
    ("waiting_messages", "gauge", "Deliveries that wait in the consumer's inbox", "waiting"),
    ("unsettled_messages", "gauge", "Deliveries that are not settled", "unsettled"),
    (
        "oldest_unsettled_seconds",
        "gauge",
        "Age of the oldest unsettled delivery",
        "oldest_unsettled",
    ),
    (
        "given_back_messages",
        "counter",
        "Messages that went back before a handler had started",
        "given_back",
    ),
    (
        "stale_settles",
        "counter",
        "Messages that were settled after their channel was gone",
        "stale_settles",
    ),
    ("retried_messages", "counter", "Failed messages that are tried again later", "retries"),
    (
        "dead_lettered_messages",
        "counter",
        "Failed messages that were put where such are kept",
        "dead_letters",
    ),
    ("consumer_restarts", "counter", "How often the consumer was started again", "restarts"),
)


def _plain_families(labelled: _Labelled) -> Iterator[Family]:
    for name, kind, words, attribute in _OF_CONSUMERS:
        value_of = attrgetter(attribute)
        rows = [(labels, value_of(each) or 0) for each, labels, _ in labelled]
        yield Family(f"greenconsume_{name}", kind, words, rows)
    off: list[tuple[Labels, float]] = [
        (labels, int(each.switched_off)) for each, labels, _ in labelled
    ]
    yield Family("greenconsume_consumer_switched_off", "gauge", "Its kill switch has tripped", off)
    up: list[tuple[Labels, float]] = [
        (labels, int(each.state == "consuming")) for each, labels, _ in labelled
    ]
    yield Family("greenconsume_consumer_consuming", "gauge", "The consumer consumes", up)


def _detailed_families(labelled: _Labelled) -> Iterator[Family]:
    yield Family(
        "greenconsume_received_processed_messages",
        "counter",
        "Messages that were handled, by how",
        [
            row
            for each, _, by_outcome in labelled
            for row in zip(by_outcome, (each.outcomes or {}).values(), strict=True)
        ],
    )
    yield Family(
        "greenconsume_received_processed_messages_exceptions",
        "counter",
        "Messages that failed, by the exception's class",
        [
            (labels.more("exception_type", error), number)
            for each, labels, _ in labelled
            for error, number in (each.errors or {}).items()
        ],
    )
    yield Family(
        "greenconsume_received_processed_messages_duration_seconds",
        "histogram",
        "Seconds that handlers took, a batch as one",
        timings=[
            (labels, each.timings) for each, labels, _ in labelled if each.timings is not None
        ],
    )


def _link_families(status: ProcessStatus) -> Iterator[Family]:
    labelled: list[tuple[Labels, LinkStatus]] = [
        (labels_of(("link", str(link.number)), ("broker", link.uri)), link) for link in status.links
    ]
    for name, kind, words, attribute in (
        ("link_up", "gauge", "The link is connected", "up"),
        ("link_blocked", "gauge", "The broker blocks the link's publishers", "blocked"),
        ("link_sessions", "gauge", "Consumers and publishers that use the link", "sessions"),
        ("link_reconnects", "counter", "How often the link was connected again", "reconnects"),
    ):
        rows = [(labels, _number(getattr(link, attribute))) for labels, link in labelled]
        yield Family(
            f"greenconsume_{name}", "counter" if kind == "counter" else "gauge", words, rows
        )


def _process_families(status: ProcessStatus) -> Iterator[Family]:
    published: list[tuple[Labels, float]] = [
        (labels_of(("broker", each.uri), ("status", how)), number)
        for each in status.published
        for how, number in each.outcomes.items()
    ]
    yield Family(
        "greenconsume_published_messages", "counter", "Messages published, by how", published
    )
    confirms: list[tuple[Labels, Timings]] = [
        (labels_of(("broker", each.uri)), each.timings)
        for each in status.published
        if each.timings is not None
    ]
    yield Family(
        "greenconsume_published_messages_duration_seconds",
        "histogram",
        "Seconds until a message was confirmed",
        timings=confirms,
    )
    timings = status.lag.timings
    lag: list[tuple[Labels, Timings]] = [(labels_of(), timings)] if timings is not None else []
    yield Family("greenconsume_hub_lag_seconds", "histogram", "How late the hub was", timings=lag)
    intake = "The part of their prefetch that consumers take"
    yield Family("greenconsume_intake_ratio", "gauge", intake, [(labels_of(), status.intake)])
    yield Family("greenconsume_greenlets", "gauge", "Greenlets", [(labels_of(), status.greenlets)])
    info = labels_of(("version", status.version), ("state", status.state))
    yield Family("greenconsume_process", "gauge", "The process, by its state", [(info, 1)])


# -- as text -----------------------------------------------------------------------------------------


def _text(found: Iterable[Family]) -> Iterator[str]:
    for family in found:
        name = f"{family.name}_total" if family.kind == "counter" else family.name
        yield f"# HELP {name} {family.help}.\n# TYPE {name} {family.kind}\n"
        # A list for each family, not a yield for each row: there are tens of thousands.
        yield "".join(
            [
                f"{name}{{{labels.text}}} {value}\n" if labels.text else f"{name} {value}\n"
                for labels, value in family.rows
            ]
        )
        yield "".join([_histogram(name, *each) for each in family.timings])


def _histogram(name: str, labels: Labels, timings: Timings) -> str:
    comma, braced = (",", f"{{{labels.text}}}") if labels.text else ("", "")
    start = f'{name}_bucket{{{labels.text}{comma}le="'
    *counts, count = timings.cumulative(PLACES)
    buckets = [f"{end}{number}\n" for end, number in zip(_ENDS, counts, strict=True)]
    return (
        f'{start}{start.join(buckets)}{start}+Inf"}} {count}\n'
        f"{name}_count{braced} {count}\n{name}_sum{braced} {timings.total}\n"
    )


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float | None) -> float:
    return 0 if value is None else value + 0  # True is written as 1
