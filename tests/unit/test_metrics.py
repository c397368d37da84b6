"""Tests how a runtime's metrics reach prometheus_client, and the dashboard that shows them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from greenconsume.admin.address import Address
from greenconsume.admin.metrics import exposition, families, labels_of_consumer
from greenconsume.admin.status import LagStatus
from greenconsume.metrics import Collector, Mirror
from greenconsume.tally import PublishTally, Tally, Timings
from tests.unit.admin.fakes import Asking, FakeProcess, consumer, link

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana-dashboard.json"


@pytest.fixture
def process():
    timings = Timings(now=0.0)
    for seconds in (0.003, 0.2, 400.0):
        timings.note(0.0, seconds)
    published = PublishTally("amqp://host//")
    published.note(0.0, None)
    published.timings = timings
    known = {
        "received": 3,
        "outcomes": {"ok": 2, "failed": 1},
        "errors": {"ValueError": 1},
        "timings": timings,
    }
    fake = FakeProcess(consumer(**known), consumer("Orders-2"))
    fake.change(links=(link(),), lag=LagStatus(timings=timings), published=(published,))
    return fake


def samples(text):
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def test_a_registry_is_given_what_the_admin_shows(process):
    registry = CollectorRegistry()
    registry.register(Collector(process))
    theirs = samples(generate_latest(registry).decode())
    assert theirs == samples(exposition(process.status()).decode())
    assert process.watched


def test_the_admin_also_shows_what_the_program_counts_itself(process):
    counter = Counter("shop_orders_paid", "Orders that were paid")
    counter.inc(7)
    text = Asking(process, Address(path="/x")).get("/metrics").text
    assert samples(text)["shop_orders_paid_total", ()] == 7
    assert text.count("# TYPE greenconsume_received_messages_total") == 1


def test_a_mirror_without_a_folder_is_no_error(process, monkeypatch):
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    Mirror(process).write()


def test_the_buckets_of_a_mirror_push_no_labels_out_that_are_kept(process):
    labels_of_consumer.cache_clear()
    families(process.status())
    kept = labels_of_consumer.cache_info().currsize
    Mirror(process).write()
    assert labels_of_consumer.cache_info().currsize == kept


def test_labels_of_10_000_consumers_are_made_once():
    many = [consumer(f"Orders-{number}", outcomes=Tally().outcomes) for number in range(10_000)]
    labels_of_consumer.cache_clear()
    for _ in range(2):
        families(FakeProcess(*many).status())
    assert labels_of_consumer.cache_info().misses == len(many)
    labels_of_consumer.cache_clear()


SCRIPT = """
from greenconsume import patch_all; patch_all()
import os, sys
from greenconsume.metrics import Mirror
sys.path.insert(0, {root!r})
from tests.unit.admin.fakes import FakeProcess, consumer
from greenconsume.tally import Timings
timings = Timings(now=0.0)
for seconds in (0.003, 0.2, 400.0):
    timings.note(0.0, seconds)
fake = FakeProcess(consumer(received=5, in_progress=2, timings=timings))
mirror = Mirror(fake)
mirror.write()
mirror.write()
fake.change(consumers=(consumer(received=6, in_progress=1, timings=timings),))
mirror.close()
"""


def test_the_values_of_several_processes_are_merged(tmp_path, monkeypatch):
    """As gunicorn's workers are: each writes its own files, and counters outlive their process."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    root = str(Path(__file__).parents[2])
    for _ in range(2):
        subprocess.run([sys.executable, "-c", SCRIPT.format(root=root)], check=True)
    from prometheus_client.multiprocess import MultiProcessCollector

    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(tmp_path))
    found = samples(generate_latest(registry).decode())
    labels = (("consumer", "Orders-1"), ("queue", "orders"))
    assert found["greenconsume_received_messages_total", labels] == 12
    name = "greenconsume_received_processed_messages_duration_seconds"
    assert found[f"{name}_count", labels] == 6
    for bound, count in (("0.25", 4), ("+Inf", 6)):
        assert found[f"{name}_bucket", tuple(sorted((*labels, ("le", bound))))] == count


GONE = """
from greenconsume import patch_all; patch_all()
import sys
from greenconsume.metrics import Mirror
sys.path.insert(0, {root!r})
from tests.unit.admin.fakes import FakeProcess, consumer, link
fake = FakeProcess(consumer(received=5), consumer("Orders-2", received=5))
fake.change(links=(link(), link()))
mirror = Mirror(fake)
mirror.write()
fake.change(consumers=(consumer(received=6),), links=(link(),), state="draining")
mirror.write()
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
registry = CollectorRegistry()
MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""


def test_a_mirror_shows_nothing_that_is_gone(tmp_path, monkeypatch):
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    script = GONE.format(root=str(Path(__file__).parents[2]))
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    sums: dict[str, float] = {}
    for (name, _), value in samples(done.stdout).items():
        sums[name] = sums.get(name, 0) + value
    assert sums["greenconsume_process"] == 1
    assert sums["greenconsume_consumer_consuming"] == 1
    assert sums["greenconsume_link_up"] == 1
    assert sums["greenconsume_received_messages_total"] == 11


def test_the_dashboard_asks_for_metrics_and_labels_that_there_are(process):
    known: dict[str, set[str]] = {}
    for name, labels in samples(exposition(process.status()).decode()):
        known.setdefault(name, set()).update(name for name, _ in labels)
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [
        target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())
    ]
    assert len(queries) > 10
    for query in queries:
        names = re.findall(r"greenconsume_\w+", query)
        assert names, query
        for name in names:
            assert name in known, query
        labels = set().union(*(known[name] for name in names))
        grouped = re.findall(r"by \(([^)]*)\)", query)
        selected = re.findall(r"(\w+)=~?\"", query)
        wanted = {each.strip() for group in grouped for each in group.split(",")} | set(selected)
        assert wanted <= labels, query


def test_every_metric_is_on_the_dashboard(process):
    shown = DASHBOARD.read_text()
    for family in text_string_to_metric_families(exposition(process.status()).decode()):
        assert family.name in shown, family.name
