"""Tests what the admin answers, path by path, and what it does not take."""

from __future__ import annotations

import logging

import pytest

from greenconsume.admin import app as apps
from greenconsume.admin.address import Address
from greenconsume.events import AdminAsked, AdminRefused
from tests.unit.admin.fakes import TOKEN, Asking, FakeProcess, consumer, link
from tests.unit.fakes import of_type

AUTH = {"HTTP_AUTHORIZATION": f"Bearer {TOKEN}"}


@pytest.fixture
def process():
    return FakeProcess()


@pytest.fixture
def asking(process):
    return Asking(process, Address(path="/run/shop.sock"))


def test_probes_say_yes_and_no_by_status_and_the_reasons_in_words(process, asking):
    assert asking.get("/livez").code == asking.get("/readyz").code == 200
    process.change(consumers=(consumer(state="connecting"),))
    asking.app._snapshots.clear()
    assert asking.get("/livez").code == 200
    reply = asking.get("/readyz")
    assert reply.code == 503
    assert "Orders-1 is connecting" in reply.text


def test_a_stall_is_told_with_its_consumer(process, asking):
    from greenconsume.admin.status import RunningHandler

    process.change(consumers=(consumer(running=(RunningHandler("17", 90.0),)),))
    reply = asking.get("/stalledz")
    assert reply.code == 503
    assert "Orders-1: the handler of message 17 has run for 90 s" in reply.text


def test_a_query_of_too_many_fields_is_refused_and_no_defect(asking):
    assert asking.get("/status.json", QUERY_STRING="a=1&" * 50).code == 400


def test_strangers_are_told_yes_or_no_and_no_names(process):
    asking = Asking(process, Address("0.0.0.0", 9191), TOKEN)
    process.change(consumers=(consumer(state="connecting"),))
    assert asking.get("/readyz").text == "not ok\n"
    assert "Orders-1" in asking.get("/readyz", **AUTH).text


def test_the_status_is_json_with_its_health(process, asking):
    process.change(links=(link(),))
    found = asking.get("/status.json").json
    assert found["name"] == "shop"
    assert found["consumers"][0]["name"] == "Orders-1"
    assert found["consumers"][0]["queues"] == ["orders"]
    assert found["links"][0]["up"] is True
    assert found["health"] == {"live": [], "ready": [], "stalled": []}
    assert "timings" not in found["consumers"][0]


def test_what_the_handlers_of_one_consumer_do_now_is_told(asking):
    reply = asking.get("/status.json?consumer=Orders-1")
    assert reply.json["running"] == [{"message": "7", "seconds": 1.5}]
    assert asking.get("/status.json?consumer=Nobody").code == 404


def test_who_has_the_status_already_is_not_sent_it_again(asking, monkeypatch):
    monkeypatch.setattr("greenconsume.admin.snapshots.REUSE", 1e9)
    monkeypatch.setattr("greenconsume.admin.snapshots.MAX_AGE", 1e9)
    first = asking.get("/status.json")
    again = asking.get("/status.json", HTTP_IF_NONE_MATCH=first.headers["ETag"])
    assert (again.code, again.body) == (304, b"")


def test_looking_begins_the_keeping_of_times(process, asking):
    assert process.watched == 0
    asking.get("/status.json")
    assert process.watched > 0


def test_a_command_asks_the_process_and_is_told(process, asking, events):
    for command in ("pause", "resume", "stop", "restart"):
        assert asking.post(f"/{command}", {"consumer": "Orders-1"}).code == 202
    assert asking.post("/scale", {"consumer": "Orders", "replicas": 20}).code == 202
    assert asking.post("/drain").code == 202
    assert process.asked == [
        ("pause", "Orders-1"),
        ("resume", "Orders-1"),
        ("stop", "Orders-1"),
        ("restart", "Orders-1"),
        ("scale", "Orders", 20),
        ("drain", "asked by the admin"),
    ]
    assert [each.command for each in of_type(events, AdminAsked)] == [
        "pause",
        "resume",
        "stop",
        "restart",
        "scale",
        "drain",
    ]


def test_a_command_is_seen_in_the_next_status(process, asking, monkeypatch):
    monkeypatch.setattr("greenconsume.admin.snapshots.REUSE", 1e9)
    monkeypatch.setattr("greenconsume.admin.snapshots.MAX_AGE", 1e9)
    asking.get("/status.json")
    process.change(consumers=(consumer(state="paused"),))
    assert asking.get("/status.json").json["consumers"][0]["state"] == "consuming"
    asking.post("/pause", {"consumer": "Orders-1"})
    assert asking.get("/status.json").json["consumers"][0]["state"] == "paused"


def test_the_log_level_is_set_for_this_package(asking):
    logger = logging.getLogger("greenconsume")
    before = logger.level
    try:
        assert asking.post("/log-level", {"level": "debug"}).code == 202
        assert logger.level == logging.DEBUG
        assert asking.post("/log-level", {"level": "loud"}).code == 400
    finally:
        logger.setLevel(before)


def test_an_unknown_consumer_is_not_found_and_a_near_one_is_named(asking):
    reply = asking.post("/pause", {"consumer": "Order-1"})
    assert reply.code == 404
    assert "did you mean Orders-1?" in reply.text


def test_what_cannot_be_done_now_is_a_conflict(asking):
    reply = asking.post("/scale", {"consumer": "Orders", "replicas": 1000})
    assert (reply.code, reply.text) == (409, "too many for this test\n")


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({}, 400),
        ({"consumer": 5}, 400),
        ({"consumer": ""}, 400),
        ({"consumer": "Orders", "replicas": -1}, 400),
        ({"consumer": "Orders", "replicas": True}, 400),
        ({"consumer": "Orders", "replicas": 10**9}, 400),
        ([], 400),
    ],
)
def test_a_command_that_makes_no_sense_is_refused(process, asking, body, code):
    assert asking.post("/scale", body).code == code
    assert process.asked == []


def test_a_body_is_json_and_short(process, asking):
    long = {"consumer": "x" * apps.MAX_BODY}
    assert asking.post("/pause", long).code == 413
    given = {"CONTENT_TYPE": "application/json"}
    assert asking.ask("POST", "/pause", b"{", given).code == 400
    assert asking.ask("POST", "/pause", b"[" * 4000, given).code == 400
    assert asking.post("/pause", {}, HTTP_TRANSFER_ENCODING="chunked").code == 411
    # What a form of another site could send without asking first.
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        body = b'{"consumer": "Orders-1"}'
        assert asking.ask("POST", "/pause", body, {"CONTENT_TYPE": kind}).code == 415
    assert process.asked == []


@pytest.mark.parametrize(
    "path",
    ["/../../etc/passwd", "/status.json/", "//", "/%2e%2e/", "/page.html", "/livez/../drain", ""],
)
def test_there_is_nothing_beside_the_known_paths(process, asking, path):
    assert asking.get(path).code == 404
    assert asking.post(path, {"consumer": "Orders-1"}).code == 404
    assert process.asked == []


def test_other_methods_are_refused(asking):
    for method in ("PUT", "DELETE", "OPTIONS", "TRACE"):
        assert asking.ask(method, "/status.json", b"", {}).code == 405


def test_nothing_is_done_by_a_get(process, asking):
    assert asking.get("/drain").code == 404
    assert process.asked == []


def test_a_head_has_no_body(asking):
    reply = asking.ask("HEAD", "/livez", b"", {})
    assert (reply.code, reply.body) == (200, b"")


def test_every_answer_forbids_browsers_to_use_it_elsewhere(asking):
    for path in ("/", "/status.json", "/nothing"):
        headers = asking.get(path).headers
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["X-Frame-Options"] == "DENY"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy


def test_refusals_are_told_now_and_then_with_their_number(process, events, monkeypatch):
    asking = Asking(process)
    for _ in range(1000):
        assert asking.get("/status.json", HTTP_HOST="evil.example").code == 421
    (told,) = of_type(events, AdminRefused)
    assert told.count == 1
    asking.app._tell_from = 0.0
    asking.get("/status.json", HTTP_HOST="evil.example")
    assert of_type(events, AdminRefused)[1].count == 1000
