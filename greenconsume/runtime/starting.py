"""Owns the wait of a start: until every consumer consumes, or it is known that one cannot.

It is told by calls: by the supervisor of each change, by the links of a refusal. It must never listen to
events, which also tell of what is no business of this start. Called by `run`.
"""

from __future__ import annotations

from collections.abc import Sequence

from greenconsume.errors import BrokerRefusedError, ConsumerRefusedError, RestartLimitError
from greenconsume.runtime.child import Child
from greenconsume.runtime.supervisor import Supervisor
from greenconsume.stopping import Deadline, StopSignal, wait


class Starting:
    """One start, as its caller waits for it.

    Attributes:
        failed: True if `wait` raises, or has raised.
    """

    def __init__(self, supervisor: Supervisor) -> None:
        self.failed = False
        self._supervisor = supervisor
        self._refusal: BrokerRefusedError | ConsumerRefusedError | None = None

    def refuse(self, uri: str, error: BaseException) -> None:
        """Have the start fail: the broker at `uri` refused, and waiting does not mend it.

        Switches: never. From any greenlet.
        """
        if self._refusal is None:
            self._refusal = BrokerRefusedError(f"{uri} refused the connection: {error}", uri)
            self._refusal.__cause__ = error
        self._supervisor.changed.set()

    def refuse_consumer(self, name: str, error: BaseException, remedy: str) -> None:
        """Have the start fail: the broker refuses what a consumer declares, and waiting does not mend it.

        Switches: never. From any greenlet.
        """
        if self._refusal is None:
            self._refusal = ConsumerRefusedError(f"{name} cannot consume: {error}: {remedy}", name)
            self._refusal.__cause__ = error
        self._supervisor.changed.set()

    def wait(self, children: Sequence[Child], stop: StopSignal) -> None:
        """Wait until `children` consume, stand by or have ended, or a stop comes.

        Raises:
            BrokerRefusedError: Their broker refused the connection.
            ConsumerRefusedError: The broker refuses what one declares.
            RestartLimitError: One returned too often.
            Exception: The error of one that was given up.

        Switches: yes.
        """
        changed = self._supervisor.changed
        pending = list(reversed(children))
        while not stop.is_set():
            changed.clear()
            self._raise_failure()
            if self._supervisor.closed:  # whoever joined it took the stop back before this saw it
                return
            while pending and pending[-1].started:
                pending.pop()
            if not pending:
                return
            wait(changed, Deadline(None), stop)

    def _raise_failure(self) -> None:
        if self._supervisor.failed:
            child = self._supervisor.failed[0]
            raise child.error or RestartLimitError(
                f"{child.name} returned too often", (child.name,)
            )
        if self._refusal is not None:
            raise self._refusal
