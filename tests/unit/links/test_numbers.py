"""Tests that a link is known by one number while it is there."""

from __future__ import annotations

import gc
from types import SimpleNamespace

from greenconsume.links.dialer import Dialer
from greenconsume.links.numbers import LinkNumbers
from greenconsume.runtime.observing import links_of


def test_a_link_keeps_its_number_whatever_comes_and_goes():
    numbers = LinkNumbers()
    first, second, third, fourth = (Dialer() for _ in range(4))
    assert numbers.of([first, second]) == [1, 2]
    assert numbers.of([second, first, third]) == [2, 1, 3]
    assert numbers.of([third, second]) == [3, 2]
    assert numbers.of([fourth, third, second]) == [1, 3, 2]  # the smallest that is free


def test_numbers_keep_no_link_alive():
    numbers = LinkNumbers()
    assert numbers.of([Dialer()]) == [1]
    gc.collect()
    assert numbers.of([Dialer(), Dialer()]) == [1, 2]


def test_the_links_of_a_process_are_shown_by_their_numbers():
    """By their places, the second link had the first's counters for a scraper, once that was gone."""
    first, second = Dialer(), Dialer()
    first.uri, second.uri = "amqp://first//", "amqp://second//"
    pool = SimpleNamespace(dialers=[first, second])
    before = {link.uri: link.number for link in links_of([pool])}
    assert len(set(before.values())) == 2
    pool.dialers = [second]
    (left,) = links_of([pool])
    assert left.number == before[left.uri]
    pool.dialers = [Dialer(), second]
    assert [link.number for link in links_of([pool]) if link.uri == left.uri] == [left.number]
