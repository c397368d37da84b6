"""The layout of a database, which is kombu's, and what the options make of it."""

from __future__ import annotations

import pytest
from kombu import Connection
from kombu.transport import redis as kombu_redis

from greenconsume.redis.keyspace import Keyspace


@pytest.fixture
def theirs() -> type[kombu_redis.Channel]:
    """kombu's own channel, which needs no connection to name keys."""
    return kombu_redis.Channel


@pytest.mark.parametrize("priority", range(10))
def test_a_priority_has_the_list_that_kombu_gives_it(theirs, priority):
    channel = theirs.__new__(theirs)
    assert Keyspace().key("orders", priority) == channel._q_for_pri("orders", priority)


def test_lists_are_taken_from_by_step_first_and_then_by_queue():
    space = Keyspace(steps=(0, 5))
    assert space.keys_in_order(["a", "b"]) == [
        *(("a", "a"), ("b", "b")),
        *(("a\x06\x165", "a"), ("b\x06\x165", "b")),
    ]


def test_the_prefix_comes_before_everything():
    space = Keyspace.of({"global_keyprefix": "app:"}, 3)
    named = [space.key("q"), space.unacked, space.index, space.owners, space.delayed]
    named += [space.delayed_index, space.bindings("x"), space.lasting_bindings("x")]
    named += [space.binding_deadlines, space.topic("x", "")]
    assert [name for name in named if not name.startswith("app:")] == []


def test_names_are_kombus_by_default(theirs):
    space = Keyspace.of({}, 3)
    assert (space.unacked, space.index) == (theirs.unacked_key, theirs.unacked_index_key)
    assert space.bindings("x") == theirs.keyprefix_queue % "x"
    assert space.lasting_bindings("x") == theirs.keyprefix_binding_permanent % "x"
    assert space.binding_deadlines == theirs.keyprefix_binding_deadlines
    assert (space.sep, list(space.steps)) == (theirs.sep, theirs.priority_steps)
    assert space.topic("x", "") == "/3.x"
    assert space.topic("x", "a.*") == "/3.x/a.*"


@pytest.mark.parametrize(
    ("option", "topic"), [(False, "x/k"), ("/app.", "/app.x/k"), ("/{db}-", "/3-x/k")]
)
def test_the_prefix_of_topics_can_be_chosen(option, topic):
    assert Keyspace.of({"fanout_prefix": option}, 3).topic("x", "k") == topic


def test_an_entry_names_its_queue_and_nothing_else():
    assert Keyspace.tail_of('a"b') == b',"","a\\"b"]'


@pytest.mark.parametrize(
    "options",
    [{"delivery_limit": 0}, {"delivery_limit": "20"}, {"visibility_timeout": 0}],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Keyspace.of(options, 0)


def test_a_priority_that_is_none_is_the_lowest():
    assert [Keyspace().priority_of({"properties": {"priority": p}}) for p in (None, "x", 99)] == [
        *(0, 0, 9)
    ]
    assert Keyspace().priority_of({}) == 0


def test_kombu_knows_the_names_once_they_are_registered():
    from greenconsume.transports import registry

    registry.register()
    for name in ("redis", "rediss", "valkey", "valkeys", "sentinel"):
        transport = Connection(f"{name}://localhost").transport
        assert type(transport).__module__ == "greenconsume.redis.transport"
