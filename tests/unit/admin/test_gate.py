"""Tests who may ask the admin what: no web page, no stranger, and nobody without the token who steers."""

from __future__ import annotations

import pytest

from greenconsume.admin.address import Address, AddressError, check, parse
from greenconsume.admin.gate import Gate
from tests.unit.admin.fakes import LOOPBACK, TOKEN

UNIX = Address(path="/run/shop.sock")
ANYWHERE = Address("0.0.0.0", 9191)
HOME = {"HTTP_HOST": "127.0.0.1:9191"}
SHOWN = {"HTTP_AUTHORIZATION": f"Bearer {TOKEN}"}


def refused(gate, method, path, **environ):
    found = gate.refusal(method, path, environ)
    return None if found is None else int(found.status[:3])


def test_on_loopback_anybody_looks_and_nobody_steers_without_a_token():
    gate = Gate(LOOPBACK)
    assert refused(gate, "GET", "/status.json", **HOME) is None
    assert refused(gate, "POST", "/pause", **HOME) == 401
    assert refused(gate, "POST", "/pause", **HOME, **SHOWN) == 401
    assert refused(gate, "DELETE", "/pause", **HOME) == 401


def test_on_loopback_the_token_lets_steer():
    gate = Gate(LOOPBACK, TOKEN)
    assert refused(gate, "POST", "/pause", **HOME, **SHOWN) is None
    assert refused(gate, "POST", "/pause", **HOME, HTTP_AUTHORIZATION=f"Bearer {TOKEN}x") == 401
    assert refused(gate, "POST", "/pause", **HOME, HTTP_AUTHORIZATION=f"Bearer {TOKEN[:-1]}") == 401
    assert refused(gate, "POST", "/pause", **HOME, HTTP_AUTHORIZATION=TOKEN) == 401
    assert refused(gate, "POST", "/pause", **HOME, HTTP_AUTHORIZATION="Bearer ¤¤¤") == 401


def test_a_unix_socket_has_said_by_its_mode_who_may():
    assert refused(Gate(UNIX), "POST", "/pause", HTTP_HOST="whatever") is None


def test_elsewhere_all_but_probes_and_the_empty_page_need_the_token():
    gate = Gate(ANYWHERE, TOKEN)
    for path in ("/status.json", "/metrics", "/greenlets"):
        assert refused(gate, "GET", path, HTTP_HOST="10.1.2.3:9191") == 401
        assert refused(gate, "GET", path, HTTP_HOST="10.1.2.3:9191", **SHOWN) is None
    for path in ("/", "/livez", "/readyz"):
        assert refused(gate, "GET", path, HTTP_HOST="10.1.2.3:9191") is None
    assert refused(gate, "POST", "/", HTTP_HOST="10.1.2.3:9191") == 401


@pytest.mark.parametrize(
    "host",
    [
        "evil.example:9191",
        "evil.example",
        "127.0.0.1.evil.example:9191",
        "127.0.0.1:9192",
        "127.0.0.1",
        "localhost.evil.example:9191",
        "[::ffff:8.8.8.8]:9191",
        "",
        "127.0.0.1:9191@evil.example",
        "127.0.0.1:9191, evil.example",
    ],
)
def test_a_name_that_was_bound_to_this_address_is_refused(host):
    assert refused(Gate(LOOPBACK), "GET", "/status.json", HTTP_HOST=host) == 421


@pytest.mark.parametrize(
    "host", ["127.0.0.1:9191", "localhost:9191", "[::1]:9191", "LOCALHOST:9191"]
)
def test_this_machine_is_known_by_its_names(host):
    assert refused(Gate(LOOPBACK), "GET", "/status.json", HTTP_HOST=host) is None


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://127.0.0.1:80", "http://localhost:9191", ""]
)
def test_a_page_of_another_origin_is_refused_whatever_it_asks(origin):
    gate = Gate(LOOPBACK, TOKEN)
    for method in ("GET", "POST"):
        found = refused(gate, method, "/pause", **HOME, **SHOWN, HTTP_ORIGIN=origin)
        assert found == 403


def test_a_page_of_another_site_is_refused_where_the_browser_says_so():
    gate = Gate(LOOPBACK)
    for site in ("cross-site", "same-site"):
        assert refused(gate, "GET", "/", **HOME, HTTP_SEC_FETCH_SITE=site) == 403
    assert refused(gate, "GET", "/", **HOME, HTTP_SEC_FETCH_SITE="same-origin") is None


def test_the_own_page_is_let_through():
    gate = Gate(LOOPBACK, TOKEN)
    own = {**HOME, **SHOWN, "HTTP_ORIGIN": "http://127.0.0.1:9191"}
    assert refused(gate, "POST", "/pause", **own) is None


def test_names_are_told_only_to_who_may_see_them():
    assert Gate(LOOPBACK).may_see(HOME)
    assert Gate(UNIX).may_see({})
    assert not Gate(ANYWHERE, TOKEN).may_see({})
    assert Gate(ANYWHERE, TOKEN).may_see(SHOWN)


def test_an_address_that_others_reach_needs_a_token():
    for text in ("0.0.0.0:9191", "10.0.0.1:9191", "[::]:9191", "shop.example:9191"):
        with pytest.raises(AddressError, match="set an admin token"):
            check(parse(text), None)
        check(parse(text), TOKEN)
    for text in ("127.0.0.1:0", "localhost:9191", "[::1]:9191", "unix:/run/shop.sock"):
        check(parse(text), None)


def test_a_short_token_is_refused():
    with pytest.raises(AddressError, match="16 characters"):
        check(LOOPBACK, "secret")


@pytest.mark.parametrize(
    "text", ["", 9191, "9191", "localhost", ":9191", "a:b", "unix:run.sock", "h:70000"]
)
def test_what_is_no_address_is_refused(text):
    with pytest.raises(AddressError, match="write"):
        parse(text)


@pytest.mark.parametrize("text", ["127.0.0.1:9191", "[::1]:9191", "unix:/run/shop.sock"])
def test_an_address_is_shown_as_it_is_written(text):
    assert str(parse(text)) == text
