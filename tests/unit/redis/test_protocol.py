"""The bytes of Redis's protocol: whatever is read of them, and however they are cut."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.exceptions import AuthenticationError, ReadOnlyError, ResponseError

from greenconsume.redis.protocol import Parser, ProtocolError, Push, encode, encode_for_each

REPLIES = (
    b"+OK\r\n:42\r\n$5\r\nhe\r\no\r\n*3\r\n$1\r\na\r\n*0\r\n_\r\n"
    b">2\r\n$10\r\ninvalidate\r\n*1\r\n$1\r\nq\r\n%1\r\n$1\r\nk\r\n:1\r\n"
    b"$-1\r\n*-1\r\n#t\r\n,1.5\r\n=7\r\ntxt:abc\r\n$0\r\n\r\n"
)
READ = [
    *(b"OK", 42, b"he\r\no", [b"a", [], None], [b"invalidate", [b"q"]], {b"k": 1}),
    *(None, None, True, 1.5, b"abc", b""),
]


def read(*chunks: bytes) -> list[Any]:
    parser = Parser()
    return [reply for chunk in chunks for reply in parser.feed(chunk)]


def test_replies_of_every_kind_are_read():
    assert read(REPLIES) == READ
    assert [type(each) for each in read(REPLIES)].count(Push) == 1


@given(st.lists(st.integers(0, len(REPLIES)), max_size=12))
def test_replies_are_the_same_however_their_bytes_are_cut(cuts):
    edges = [0, *sorted(cuts), len(REPLIES)]
    assert read(*(REPLIES[a:b] for a, b in pairwise(edges))) == READ


def test_replies_that_come_byte_by_byte_are_read():
    assert read(*(REPLIES[n : n + 1] for n in range(len(REPLIES)))) == READ


def test_a_large_reply_is_not_read_again_with_each_part_of_it():
    parser = Parser()
    assert list(parser.feed(b"*2\r\n$1\r\na\r\n$1000000\r\n")) == []
    for _ in range(100):
        assert list(parser.feed(b"x" * 10000)) == []
    assert list(parser.feed(b"\r\n")) == [[b"a", b"x" * 1000000]]


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("ERR unknown command", ResponseError),
        ("WRONGPASS invalid username-password pair", AuthenticationError),
        ("NOAUTH Authentication required.", AuthenticationError),
        ("READONLY You can't write against a read only replica.", ReadOnlyError),
    ],
)
def test_an_error_is_a_reply_of_its_kind(line, kind):
    [error] = read(f"-{line}\r\n".encode())
    assert type(error) is kind
    assert str(error) == line


@pytest.mark.parametrize("line", [b"?\r\n", b"\r\n", b"HTTP/1.1 400\r\n"])
def test_what_is_no_reply_is_refused(line):
    with pytest.raises(ProtocolError):
        read(line)


def test_a_command_is_an_array_of_bytes():
    assert encode(("SET", b"\xff", 1, 2.5)) == (
        b"*4\r\n$3\r\nSET\r\n$1\r\n\xff\r\n$1\r\n1\r\n$3\r\n2.5\r\n"
    )


@given(st.lists(st.binary(), min_size=1))
def test_a_command_is_read_as_it_was_written(arguments):
    assert read(encode(arguments)) == [arguments]


def test_commands_that_end_alike_are_written_as_each_would_be_by_itself():
    begins, ends = (("HDEL", b"hash"), ("ZREM", "index")), ["a.1", "ü"]
    assert list(encode_for_each(begins, ends)) == [encode((*begin, *ends)) for begin in begins]
