"""Tests the admin's live page in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest
from gevent.event import Event
from kombu import Connection, Queue

from greenconsume import ConsumerMixin, ConsumerOptions, Runtime
from tests.browser import Browser, Page
from tests.servers import MissingServerError, free_port, missing, need_patched
from tests.waiting import wait_until

TOKEN = "a-token-of-some-length"


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    need_patched()
    try:
        found = Browser(tmp_path_factory.mktemp("chromium"))
    except MissingServerError as exc:
        missing(exc)
    with closing(found):
        yield found


@pytest.fixture
def port() -> int:
    return free_port()


class Orders(ConsumerMixin):
    options = ConsumerOptions(concurrency=2, drain_timeout=0.1, cancel_timeout=0.1)

    def __init__(self, connection):
        self.connection = connection

    def get_consumers(self, Consumer, channel):
        return [Consumer([Queue("orders")], callbacks=[self.on_order])]

    def on_order(self, body, message):
        if body == "wait":
            Event().wait()
        message.ack()


@pytest.fixture
def run(port):
    """Start runtimes on one port; at most one at a time."""
    runtimes = []

    def start(replicas=2, **options):
        admin = {"admin": f"127.0.0.1:{port}", "admin_token": TOKEN}
        runtime = Runtime(**admin, stall_after=0.3, **options)
        runtime.spawn(Orders, replicas)
        runtime.start()
        runtimes.append(runtime)
        return runtime

    yield start
    for runtime in runtimes:
        runtime.stop()
        runtime.join()


@pytest.fixture
def open_page(browser, port):
    pages = []

    def look(**size) -> Page:
        pages.append(browser.open(f"http://127.0.0.1:{port}/", **size))
        return pages[-1]

    yield look
    for page in pages:
        page.command("Page.close")


def rows(page):
    """The cells of each consumer's row, by its name."""
    script = """[...document.querySelectorAll("#consumers tr:not(.detail)")].filter((r) => !r.hidden)
      .map((r) => [...r.children].map((c) => c.textContent))"""
    return {cells[0]: cells[1:] for cells in page.run(script) or ()}


def text(page, selector):
    return page.run(f"document.querySelector({selector!r})?.textContent ?? ''")


def click(page, words):
    found = page.run(
        f"""(() => {{ const b = [...document.querySelectorAll("button")]
          .find((b) => b.textContent === {words!r} && b.offsetParent); b?.click(); return !!b; }})()"""
    )
    assert found, words


def test_it_shows_consumers_and_one_that_is_added(run, open_page):
    runtime = run()
    page = open_page()
    wait_until(lambda: rows(page).keys() == {"Orders-1", "Orders-2"})
    wait_until(lambda: rows(page)["Orders-1"][0:2] == ["consuming", "orders"])
    assert text(page, "#ready") == "ready"
    runtime.control.scale("Orders", 3)
    wait_until(lambda: "Orders-3" in rows(page))
    runtime.control.scale("Orders", 1)
    wait_until(lambda: rows(page).keys() == {"Orders-1"})


def test_it_asks_for_the_token_and_pauses_and_resumes_one(run, open_page):
    runtime = run()
    page = open_page()
    wait_until(lambda: "Orders-1" in rows(page))
    click(page, "Orders-1")
    click(page, "Pause")
    wait_until(lambda: page.run("document.querySelector('#ask').open"))
    assert runtime.children[0].state.value == "consuming"
    page.run("document.querySelector('#token').focus()")
    page.type(TOKEN)
    page.press("Enter")
    wait_until(lambda: rows(page)["Orders-1"][0] == "paused")
    assert rows(page)["Orders-2"][0] == "consuming"
    click(page, "Resume")  # the token is kept
    wait_until(lambda: rows(page)["Orders-1"][0] == "consuming")
    assert "Orders-1" in text(page, "#told")  # for a screen reader


def test_it_shows_a_stall_and_what_the_handlers_do(run, open_page):
    run(replicas=1)
    page = open_page()
    wait_until(lambda: "Orders-1" in rows(page))
    with Connection("memory://") as connection:
        connection.SimpleQueue("orders").put("wait")
    wait_until(lambda: text(page, "#stalled") == "stalled")
    assert "Orders-1: the handler of message" in text(page, "#reasons")
    click(page, "Orders-1")
    wait_until(lambda: "message" in text(page, ".detail li"))
    assert rows(page)["Orders-1"][4] == "1 of 2"


def test_it_survives_a_restart_of_the_process(run, open_page):
    runtime = run()
    page = open_page()
    wait_until(lambda: "Orders-2" in rows(page))
    runtime.stop()
    runtime.join()
    wait_until(lambda: page.run("!document.querySelector('#away').hidden"))
    assert "has not answered" in text(page, "#away")
    run(replicas=1)
    wait_until(lambda: page.run("document.querySelector('#away').hidden"))
    wait_until(lambda: rows(page).keys() == {"Orders-1"})


def test_it_is_used_by_keyboard_alone(run, open_page):
    run(replicas=3)
    page = open_page()
    wait_until(lambda: len(rows(page)) == 3)
    page.press("/", "/")
    assert page.run("document.activeElement.id") == "filter"
    page.type("orders-2")
    wait_until(lambda: rows(page).keys() == {"Orders-2"})
    page.press("Escape")
    wait_until(lambda: len(rows(page)) == 3)
    reached = set()
    for _ in range(40):
        page.press("Tab")
        reached.add(page.run("document.activeElement.textContent"))
    assert {"consumer", "state", "Orders-1", "Orders-2", "Orders-3"} <= reached


def test_what_it_shows_has_names_for_a_screen_reader(run, open_page):
    run()
    page = open_page()
    wait_until(lambda: len(rows(page)) == 2)
    nodes = page.command("Accessibility.getFullAXTree")["nodes"]
    named = {
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in nodes
        if "role" in node
    }
    assert ("table", "Consumers") in named
    assert ("table", "Links") in named
    assert ("button", "Orders-1") in named
    assert ("columnheader", "waiting") in named
    assert ("rowheader", "Orders-1") in named
    unnamed = [node for node in named if node[0] in ("button", "textbox", "searchbox", "link")]
    assert all(name for _, name in unnamed)


def test_a_thousand_consumers_are_shown_and_sorted(run, open_page):
    """The target is a tenth of a second; a second is what there is until the next."""
    run(replicas=1000)
    page = open_page()
    wait_until(lambda: len(rows(page)) == 1000, within=60)
    click(page, "consumer")
    wait_until(lambda: next(iter(rows(page))) == "Orders-1000")
    took = page.run(
        "(() => { const t = performance.now(); table(last); return performance.now() - t; })()"
    )
    assert took < 10_000


def test_it_asks_for_nothing_from_elsewhere(run, open_page, port):
    run()
    page = open_page()
    wait_until(lambda: len(rows(page)) == 2)
    asked = page.run("performance.getEntriesByType('resource').map((r) => r.name)")
    assert asked
    assert all(each.startswith(f"http://127.0.0.1:{port}/") for each in asked)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_its_words_stand_out_in_light_and_in_dark(run, open_page, scheme):
    """By the measure of the WCAG: 4.5 to 1."""
    run()
    page = open_page()
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.command("Emulation.setEmulatedMedia", features=features)
    wait_until(lambda: len(rows(page)) == 2)
    contrast = """(() => {
      const light = (c) => { const [r, g, b] = c.match(/[\\d.]+/g).map((v) => { v /= 255;
        return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
        return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
      const ground = light(getComputedStyle(document.body).backgroundColor);
      return ["h1", ".quiet", "#ready", "tbody th button", "td.good", "footer", "dt"].map((s) => {
        const ink = light(getComputedStyle(document.querySelector(s)).color);
        return [s, (Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05)]; });
    })()"""
    for selector, ratio in page.run(contrast):
        assert ratio >= 4.5, selector
