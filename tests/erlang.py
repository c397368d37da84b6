"""Owns asking a running Erlang node to evaluate an expression, in milliseconds.

`rabbitmqctl eval` boots a virtual machine for each question, which takes a second or two. A node
that was started with its shell on standard input answers in about two milliseconds.
"""

from __future__ import annotations

import base64
import itertools
import re
from pathlib import Path
from typing import IO

from tests.waiting import wait_until

# Scanned and parsed inside, so that a syntax error is an answer, too. In a fun, so that the shell
# keeps no bindings. Encoded both ways, so that neither prompts nor quotes can get in between.
ASK = """
(fun() ->
  {Word, Term} =
    try
      {ok, Tokens, _} = erl_scan:string(binary_to_list(base64:decode("%(expression)s"))),
      {ok, Parsed} = erl_parse:parse_exprs(Tokens),
      {value, Value, _} = erl_eval:exprs(Parsed, []),
      {ok, Value}
    catch Class:Reason -> {Class, Reason}
    end,
  Text = unicode:characters_to_binary(io_lib:format("~0tp", [Term])),
  io:format("~n<%(number)d ~s ~s>~n", [Word, base64:encode(Text)])
end)().
"""


class ErlangError(Exception):
    """An expression raised, or did not parse."""


class ErlangShell:
    """One node's shell: expressions go into its standard input, answers come out of its log.

    May be asked from many greenlets at once; the node answers them one after the other.
    """

    def __init__(self, stdin: IO[bytes], log: Path) -> None:
        self._stdin = stdin
        self._log = log
        self._numbers = itertools.count(1)
        # A node that is started again writes on in the same file, and counts from 1 again.
        self._start = log.stat().st_size

    def eval(self, expression: str, within: float = 10.0) -> str:
        """Evaluate one expression and return its value as Erlang would print it, on one line.

        Args:
            expression: Erlang, with or without its full stop.
            within: Seconds to wait for the answer. The node goes on evaluating after it.

        Raises:
            ErlangError: It raised, or is no Erlang.
            AssertionError: No answer in time.
            OSError: The node is gone.

        Switches: yes.
        """
        number = next(self._numbers)
        code = base64.b64encode((expression.rstrip(". \n") + ".").encode()).decode()
        line = " ".join((ASK % {"expression": code, "number": number}).split())
        self._stdin.write(line.encode() + b"\n")
        answer = re.compile(rb"<%d (\w+) ([\w+/=]*)>" % number)
        found = wait_until(
            lambda: answer.search(self._printed()), within, f"answer to {expression}"
        )
        word, text = found[1], base64.b64decode(found[2]).decode()
        if word != b"ok":
            raise ErlangError(f"{word.decode()}: {text} in {expression}")
        return text

    def _printed(self) -> bytes:
        with self._log.open("rb") as log:
            log.seek(self._start)
            return log.read()
