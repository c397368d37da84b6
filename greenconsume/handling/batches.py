"""Owns batches: messages that a callback is given together, once there are enough or the first has waited.

A batch is gathered in the consumer's greenlet and runs as one job of the handler pool. If its time is up
while the pool is full, it goes on taking messages, up to its size, until it has a place. Messages of a batch
that has not started belong to the broker: a drain gives them back, and after a lost link they are forgotten
here, because the broker delivers them again.

A `Batching` takes the place of a consumer's `Handling`; its engine makes the one or the other.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, overload

import gevent
from kombu import Consumer, Message

from greenconsume.errors import InvalidConsumerError
from greenconsume.failures.requeues import is_live, is_settleable
from greenconsume.handling.boundary import Handling
from greenconsume.handling.decoding import decode
from greenconsume.handling.jobs import ALONE, Job
from greenconsume.handling.kill_switch import Switch
from greenconsume.handling.settings import Settings
from greenconsume.lifecycle import Lifecycle
from greenconsume.links.pool import LinkPool


class Batch(Sequence[tuple[Any, Any]]):
    """The argument of a callback with `batch_size`: pairs of body and message, in their order.

    Write `for body, message in batch`: bodies as callbacks get them, each with its `kombu.Message`. A message
    may be settled by itself, `message.ack()`, and the rest of the batch afterwards. What neither does is left
    to `auto_settle`, or to the failure policy.

    Args:
        pairs: The bodies, decoded, each with its `kombu.Message`.
    """

    __slots__ = ("_pairs",)

    def __init__(self, pairs: Iterable[tuple[Any, Any]] = ()) -> None:
        self._pairs = list(pairs)

    @property
    def unsettled(self) -> list[Any]:
        """The messages that nobody has settled yet; none, if the consumer takes them without acks."""
        return [message for _, message in self._pairs if is_settleable(message)]

    @property
    def delivery_tag(self) -> Any:
        """The delivery tag of the first message, which names the batch in the log."""
        return self._pairs[0][1].delivery_tag

    @property
    def delivery_info(self) -> Any:
        """The delivery info of the first message."""
        return self._pairs[0][1].delivery_info

    def ack(self) -> None:
        """Acknowledge what is not settled yet. Switches: over a polled transport alone."""
        for message in self.unsettled:
            message.ack()

    def reject(self) -> None:
        """Reject what is not settled yet: to the dead-letter exchange, or dropped. Switches: as `ack`."""
        for message in self.unsettled:
            message.reject()

    def requeue(self) -> None:
        """Put what is not settled yet back into its queue. Switches: as `ack`."""
        for message in reversed(
            self.unsettled
        ):  # where each goes to the front, they keep their order
            message.requeue()

    @overload
    def __getitem__(self, index: int) -> tuple[Any, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[Any, Any]]: ...
    def __getitem__(self, index: int | slice) -> tuple[Any, Any] | list[tuple[Any, Any]]:
        return self._pairs[index]

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        return iter(self._pairs)

    def __len__(self) -> int:
        return len(self._pairs)

    def __repr__(self) -> str:
        return f"<Batch of {len(self._pairs)} messages>"


class Batching(Handling):
    """One consumer's handlers, where they are given batches.

    Each `kombu.Consumer` gathers a batch of its own. Messages that cannot be decoded are in none: each is a
    job by itself, which calls `on_decode_error`. A kill switch takes a batch for one message.
    """

    __slots__ = ("_open", "_size", "_unstarted")

    def __init__(
        self,
        life: Lifecycle,
        settings: Settings,
        switch: Switch | None = None,
        owned: bool = False,
        links: Callable[[], LinkPool] = LinkPool,
    ) -> None:
        super().__init__(life, settings, switch, owned, links)
        assert settings.batch_size is not None
        self._size = settings.batch_size
        self._open: dict[Any, _Gathering] = {}  # by kombu consumer: what takes its next message
        self._unstarted: dict[_Gathering, None] = {}  # those, and what waits for a place

    # -- gathering ------------------------------------------------------------------------------

    @property
    def gathered(self) -> int:
        """The number of messages that wait in batches that have not started."""
        return sum(job.size for job in self._unstarted)

    def submit(self, consumer: Consumer, message: Message) -> None:
        """Add a message to its batch, and hand a full one over. Switches: while the pool is full."""
        if self._life.consume_stop.is_set():
            self.give_back(message)
            return
        try:
            body = _body_of(consumer, message)
        except Exception:  # as kombu: whatever a serializer raises is a decode error
            message.errors.append(sys.exc_info())  # for its job, which decodes no second time
            super().submit(consumer, message)
            return
        job = self._open.get(consumer) or self._begin(consumer)
        job.add(body, message)
        if job.size >= self._size:
            del self._open[consumer]
            self._hand_over(job)

    def _begin(self, consumer: Consumer) -> _Gathering:
        job = self._open[consumer] = _Gathering(consumer, self._life.name)
        self._unstarted[job] = None
        job.timer = gevent.get_hub().loop.timer(self.settings.batch_timeout)
        job.timer.start(self._time_is_up, job)
        return job

    def _time_is_up(self, job: _Gathering) -> None:
        # In the hub, which cannot wait for a place.
        job.waiter = gevent.spawn(self._hand_over, job)

    def _hand_over(self, job: _Gathering) -> None:
        assert self.pool is not None
        if job.handed_over:  # by whoever was first: its time, its last message, the end
            return
        job.handed_over = True
        if not self.pool.submit(job, self._life.consume_stop, self._is_wanted) and self._forget(
            job
        ):
            self.give_back(job.message)

    def _is_wanted(self, job: Job) -> bool:
        # From here on a batch is started: it takes no more messages, and no drain gives it back.
        if not isinstance(job, _Gathering):
            return super()._is_wanted(job)
        wanted = getattr(job.consumer, "no_ack", False) or is_live(job.pairs[0][1])
        return self._forget(job) and wanted

    def complete(self) -> None:
        """Hand over the batches that are not full: a consumer that was not stopped ends.

        Switches: while the pool is full.
        """
        for job in list(self._unstarted):
            self._hand_over(job)
            if job.waiter is not None:
                job.waiter.join()

    def _forget(self, job: _Gathering) -> bool:
        """Gather no more for a batch; return False if that was said of it before."""
        job.cancel_timer()
        if self._open.get(job.consumer) is job:
            del self._open[job.consumer]
        known = job in self._unstarted
        self._unstarted.pop(job, None)
        return known

    def unstarted(self) -> Iterator[Job]:
        """Yield, and forget, what waits to be started or for more messages, the newest first."""
        for job in reversed(list(self._unstarted)):
            if self._forget(job):
                yield job
        yield from super().unstarted()

    def fitted(self, consumer: Consumer) -> Callable[[Any, Any], None]:
        """Fit the prefetch as for single messages.

        Raises:
            InvalidConsumerError: The consumer has `on_message`, which batches do not fit.
        """
        if consumer.on_message:
            raise InvalidConsumerError(
                f"{self._life.name} has batch_size, but a consumer of it has on_message, which is given one "
                "message: use callbacks, which are given a Batch"
            )
        return super().fitted(consumer)

    # -- one batch ------------------------------------------------------------------------------

    @staticmethod
    def _receive(consumer: Consumer, message: Message | Batch) -> None:
        if not isinstance(message, Batch):
            Handling._receive(consumer, message)
            return
        if not consumer.callbacks:
            raise NotImplementedError("Consumer does not have any callbacks")  # as kombu
        for callback in consumer.callbacks:
            callback(message)

    def _is_unsettled(self, message: Message | Batch) -> bool:
        if isinstance(message, Batch):
            return bool(message.unsettled)
        return super()._is_unsettled(message)

    def _outcome_of(self, message: Message | Batch, exc: BaseException) -> str:
        if not isinstance(message, Batch):
            return super()._outcome_of(message, exc)
        outcome_of = super()._outcome_of
        outcomes = Counter(outcome_of(each, exc) for _, each in message)
        return ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())

    def give_back(self, message: Message | Batch, started: bool = False) -> None:
        """Put a message, or all of a batch that is not settled, back into its queue."""
        for each in reversed(message.unsettled) if isinstance(message, Batch) else (message,):
            super().give_back(each, started)


class _Gathering(Job):
    """A batch that takes messages until it starts, as the job that will run it.

    Attributes:
        pairs: The messages.
        timer: What ends the wait for more.
        waiter: The greenlet that hands the batch over when its time is up.
        handed_over: It has a place in the pool, or waits for one.
    """

    __slots__ = ("handed_over", "pairs", "size", "timer", "waiter")

    def __init__(self, consumer: Consumer, owner: str) -> None:
        batch = Batch()
        super().__init__(batch, consumer, ALONE, owner)
        self.pairs = batch._pairs
        self.size = 0
        self.timer: Any = None
        self.waiter: Any = None
        self.handed_over = False

    def add(self, body: Any, message: Message) -> None:
        """Take one more. Never switches."""
        self.pairs.append((body, message))
        self.size += 1

    def cancel_timer(self) -> None:
        """Stop the timer, if it was not stopped before."""
        timer, self.timer = self.timer, None
        if timer is not None:
            timer.stop()
            timer.close()


def _body_of(consumer: Consumer, message: Message) -> Any:
    if consumer.accept is not None:
        message.accept = consumer.accept
    if message.errors:
        message._reraise_error()
    return decode(message)
