"""Owns how the metrics of a runtime reach prometheus_client: the extra `greenconsume[metrics]`.

The admin's `/metrics` needs none of this. `Collector` is for a program that has an endpoint of its own,
`Mirror` for gunicorn's workers, whose values prometheus_client merges from files. Names and numbers are those
of `admin.metrics`. Called by users.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gevent
from prometheus_client import values
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector as _Collector

from greenconsume.admin.metrics import BUCKETS, PLACES, Family, Labels, families
from greenconsume.admin.status import Process

#: The upper bounds as prometheus_client writes them.
_BOUNDS = (*map(str, BUCKETS), "+Inf")

#: The name of a sample, and the values of its labels.
_Key = tuple[str, tuple[str, ...]]


class Collector(_Collector):
    """Hands a runtime's metrics to a registry whenever that is collected.

    Example:
        REGISTRY.register(Collector(runtime.control))

    Counters end in `_total`, durations are in seconds; docs/operations.md has the names.

    Args:
        process: What is shown, a runtime's `control`.
    """

    def __init__(self, process: Process) -> None:
        self._process = process

    def describe(self) -> list[Metric]:
        """Return nothing: a registry need not collect them to know their names. Never switches."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Return the metrics as they are now. Never switches."""
        self._process.watch()
        for family in families(self._process.status()):
            yield _metric_of(family)


class Mirror:
    """Writes a runtime's metrics into prometheus_client's multiprocess folder, every few seconds.

    For processes that are seen together, as gunicorn's workers: `PROMETHEUS_MULTIPROC_DIR` names the folder,
    and `prometheus_client.multiprocess.MultiProcessCollector` merges what each has written. The files of a
    worker that has ended keep its counters. A gauge of what is gone in a worker that lives is 0.

    Args:
        process: What is shown, a runtime's `control`.
        every: Seconds between two writes.
    """

    def __init__(self, process: Process, every: float = 5.0) -> None:
        self._process = process
        self._values: dict[_Key, Any] = {}
        self._gauges: set[_Key] = set()
        self._timer: Any = gevent.get_hub().loop.timer(0.0, every, ref=False)
        process.watch()

    def start(self) -> None:
        """Write now and then, from now on. Never switches."""
        self._timer.start(self.write)

    def close(self) -> None:
        """Write for the last time. Idempotent. Never switches."""
        self._timer.stop()
        self.write()

    def write(self) -> None:
        """Write what is so now. Never switches."""
        self._process.watch()
        gauges: set[_Key] = set()
        for family in families(self._process.status()):
            for suffix, labels, value in _samples_of(family):
                key = (family.name + suffix, labels.values)
                self._value(key, family, labels).set(value)
                if family.kind == "gauge":
                    gauges.add(key)
        # A file forgets nothing: without this a consumer, a link or a state that is gone is shown for ever.
        for key in self._gauges - gauges:
            self._values[key].set(0.0)
        self._gauges = gauges

    def _value(self, key: _Key, family: Family, labels: Labels) -> Any:
        found = self._values.get(key)
        if found is None:
            # As its own metrics do; a gauge of a process that has ended is not shown.
            found = self._values[key] = values.ValueClass(
                family.kind,
                family.name,
                key[0],
                labels.names,
                labels.values,
                family.help,
                multiprocess_mode="liveall" if family.kind == "gauge" else "",
            )
        return found


def _metric_of(family: Family) -> Metric:
    first: list[tuple[Labels, object]] = [*family.rows[:1], *family.timings[:1]]
    names = first[0][0].names if first else ()
    if family.kind == "histogram":
        histogram = HistogramMetricFamily(family.name, family.help, labels=names)
        for labels, timings in family.timings:
            buckets = list(zip(_BOUNDS, timings.cumulative(PLACES), strict=True))
            histogram.add_metric(labels.values, buckets, timings.total)
        return histogram
    kind = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
    metric = kind(family.name, family.help, labels=names)
    for labels, value in family.rows:
        metric.add_metric(labels.values, value)
    return metric


def _samples_of(family: Family) -> Iterator[tuple[str, Labels, float]]:
    """Yield the samples as the files have them: buckets are not cumulative there."""
    suffix = "_total" if family.kind == "counter" else ""
    for labels, value in family.rows:
        yield suffix, labels, float(value)
    for labels, timings in family.timings:
        before = 0
        for bound, count in zip(_BOUNDS, timings.cumulative(PLACES), strict=True):
            # Not `more`: nobody reads their text here.
            yield "_bucket", Labels((*labels.pairs, ("le", bound)), ""), float(count - before)
            before = count
        yield "_sum", labels, timings.total
