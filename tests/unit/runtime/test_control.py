"""Tests how a runtime is seen and steered by the names of its consumers."""

from __future__ import annotations

from time import monotonic

import gevent
import pytest
from gevent.event import Event
from kombu import Connection, Queue
from kombu.utils.limits import TokenBucket

from greenconsume import ConsumerMixin, ConsumerOptions, KillSwitch, Reject, Runtime
from greenconsume.admin.health import StallWatch
from greenconsume.errors import ControlError, UnknownConsumerError
from greenconsume.events import ConsumerChanged, ConsumersScaled, KillSwitchReset, StaleSettle, emit
from tests.unit.fakes import Idle, of_type
from tests.waiting import AT_ONCE, NEVER, wait_until


def names(runtime):
    return [each.name for each in runtime.control.status().consumers]


def state(runtime, name="Idle-1"):
    return next(each for each in runtime.control.status().consumers if each.name == name).state


@pytest.fixture
def running():
    runtimes = []

    def run(target=Idle, replicas=1, **options):
        runtime = Runtime(**options)
        runtime.spawn(target, replicas)
        runtime.start()
        runtimes.append(runtime)
        return runtime

    yield run
    for runtime in runtimes:
        runtime.stop()
        runtime.join()


def test_before_and_after_its_run_a_runtime_is_stopped_and_its_consumers_are_known():
    runtime = Runtime()
    runtime.spawn(Idle, replicas=2)
    assert runtime.control.status().state == "stopped"
    assert names(runtime) == ["Idle-1", "Idle-2"]
    with runtime:
        assert runtime.control.status().state == "running"
    assert runtime.control.status().state == "stopped"
    assert state(runtime) == "stopped"


def test_a_runtime_that_drains_says_so(running):
    runtime = running()
    runtime.stop()
    assert runtime.control.status().state == "draining"
    with pytest.raises(ControlError, match="drains"):
        runtime.control.scale("Idle", 3)


def test_scaling_up_starts_more_and_down_drains_the_last(running, events):
    runtime = running()
    runtime.control.scale("Idle", 4)
    wait_until(lambda: [each.state.value for each in runtime.children] == ["consuming"] * 4)
    assert names(runtime) == ["Idle-1", "Idle-2", "Idle-3", "Idle-4"]
    runtime.control.scale("Idle", 2)
    wait_until(lambda: names(runtime) == ["Idle-1", "Idle-2"])
    runtime.control.scale("Idle", 2)
    assert of_type(events, ConsumersScaled) == [
        ConsumersScaled("Idle", 1, 4),
        ConsumersScaled("Idle", 4, 2),
    ]


def test_scaled_down_to_nothing_a_runtime_goes_on_and_can_be_scaled_up(running):
    runtime = running()
    runtime.control.scale("Idle", 0)
    wait_until(lambda: not names(runtime))
    assert runtime.control.status().state == "running"
    runtime.control.scale("Idle", 1)
    wait_until(lambda: names(runtime) == ["Idle-2"] and state(runtime, "Idle-2") == "consuming")


def test_what_was_scaled_down_while_it_was_being_made_does_not_stay(running):
    let = Event()

    def slow(connection):
        if runtime_started:
            let.wait()
        return Idle(connection)

    runtime_started = False
    runtime = running(slow)
    runtime_started = True
    runtime.control.scale("slow", 2)
    gevent.sleep(0)
    runtime.control.scale("slow", 1)
    let.set()
    wait_until(lambda: names(runtime) == ["slow-1"])


def test_an_instance_has_no_replicas(running):
    runtime = running(Idle())
    with pytest.raises(ControlError, match="instance"):
        runtime.control.scale("Idle", 2)


def test_a_consumer_that_was_stopped_stays_so_and_the_others_go_on(running):
    runtime = running(replicas=2)
    runtime.control.stop_consumer("Idle-1")
    wait_until(lambda: state(runtime) == "stopped")
    assert state(runtime, "Idle-2") == "consuming"
    with pytest.raises(ControlError, match="it is stopped"):
        runtime.control.stop_consumer("Idle-1")


def test_the_last_consumer_that_is_stopped_does_not_end_the_runtime(running):
    runtime = running()
    runtime.control.stop_consumer("Idle-1")
    wait_until(lambda: state(runtime) == "stopped")
    assert not runtime.join(timeout=0.01)
    runtime.control.restart_consumer("Idle-1")
    wait_until(lambda: state(runtime) == "consuming")


def test_a_restart_makes_a_new_instance_and_is_counted(running):
    runtime = running()
    before = runtime.children[0].consumer
    runtime.control.restart_consumer("Idle-1")
    wait_until(lambda: runtime.children[0].consumer is not before and state(runtime) == "consuming")
    assert runtime.control.status().consumers[0].restarts == 1


def test_an_instance_is_restarted_as_the_same(running):
    instance = Idle()
    runtime = running(instance)
    runtime.control.restart_consumer("Idle-1")
    wait_until(lambda: instance.runs == 2 and state(runtime) == "consuming")


def test_one_that_was_given_up_is_started_again_and_its_runtime_forgives_it(running):
    from greenconsume import RestartPolicy

    broken = [True]

    class Mended(Idle):
        def run(self):
            if broken and self.connection is not None and started:
                raise ValueError("no such thing")
            super().run()

    started = False
    runtime = running(Mended, 2, restart=RestartPolicy("temporary"))
    started = True
    runtime.control.restart_consumer("Mended-1")
    wait_until(lambda: runtime.children[0].given_up)
    assert "ValueError: no such thing" in runtime.control.status().consumers[0].error
    broken.clear()
    runtime.control.restart_consumer("Mended-1")
    wait_until(lambda: state(runtime, "Mended-1") == "consuming")
    runtime.stop()
    assert runtime.join()


def test_an_unknown_name_is_an_error(running):
    runtime = running()
    for ask in (
        runtime.control.stop_consumer,
        runtime.control.restart_consumer,
        runtime.control.handlers_of,
        lambda name: runtime.control.scale(name, 1),
    ):
        with pytest.raises(UnknownConsumerError, match="no consumer 'Nobody'"):
            ask("Nobody")


class Work(ConsumerMixin):
    options = ConsumerOptions(concurrency=2, on_error=Reject())
    let = Event()

    def __init__(self, connection):
        self.connection = connection

    def get_consumers(self, Consumer, channel):
        return [Consumer([Queue("work")], callbacks=[self.on_work])]

    def on_work(self, body, message):
        if body == "wait":
            self.let.wait()
        if body == "fail":
            raise ValueError(body)
        message.ack()


@pytest.fixture
def publish():
    def send(*bodies):
        with Connection("memory://") as connection:
            queue = connection.SimpleQueue("work")
            for body in bodies:
                queue.put(body)
            queue.close()

    Work.let.clear()
    yield send
    Work.let.set()


def test_the_status_tells_what_became_of_messages_and_what_handlers_do_now(running, publish):
    runtime = running(Work)
    runtime.control.watch()
    publish("go", "fail", "wait")
    found = wait_until(
        lambda: (c := runtime.control.status().consumers[0]).received == 3 and c.in_progress and c
    )
    assert found.queues == ("work",)
    assert (found.concurrency, found.in_progress, found.idle) == (2, 1, 1)
    assert found.outcomes == {"ok": 1, "failed": 1, "timed_out": 0, "cancelled": 0, "killed": 0}
    assert found.errors == {"ValueError": 1}
    assert found.rate > 0
    assert found.p50 is not None
    (handler,) = found.running
    assert handler.message
    assert handler.seconds >= 0
    assert runtime.control.handlers_of("Work-1")[0].message == handler.message
    Work.let.set()
    wait_until(lambda: runtime.control.status().consumers[0].outcomes["ok"] == 2)


def test_numbers_outlive_a_restart(running, publish):
    runtime = running(Work)
    publish("go", "go")
    wait_until(lambda: runtime.control.status().consumers[0].outcomes["ok"] == 2)
    runtime.control.restart_consumer("Work-1")
    wait_until(lambda: runtime.control.status().consumers[0].restarts == 1)
    wait_until(lambda: state(runtime, "Work-1") == "consuming")
    assert runtime.control.status().consumers[0].received == 2


def test_without_a_look_no_times_are_kept(running, publish):
    runtime = running(Work)
    publish("go")
    wait_until(lambda: runtime.control.status().consumers[0].outcomes["ok"] == 1)
    assert runtime.children[0].tally.timings is None
    assert runtime.control.status().consumers[0].rate is None
    assert runtime.control._lag is None


def test_a_handler_that_began_before_anybody_looked_is_timed_from_the_first_look(running, publish):
    """Else one that hangs would never stall for whoever first looks because of it."""
    runtime = running(Work)
    publish("wait")
    status = runtime.control.status
    wait_until(lambda: status().consumers[0].in_progress == 1)
    assert status().consumers[0].running[0].seconds is None
    runtime.control.watch()
    first = status().consumers[0].running[0].seconds
    assert first is not None
    runtime.control.watch()  # does not begin anew
    wait_until(lambda: status().consumers[0].running[0].seconds > first)
    assert StallWatch(stall_after=0.0).stalled(status()).reasons
    Work.let.set()
    wait_until(lambda: status().consumers[0].outcomes["ok"] == 1)
    assert runtime.children[0].tally.timings.count == 0  # nobody knows for how long it ran


def test_a_consumer_whose_kill_switch_has_tripped_says_so_until_it_consumes_as_ever(
    running, publish, events
):
    runtime = running(Work, options=ConsumerOptions(kill_switch=KillSwitch(0.4, 2, 0.1)))

    def is_off():
        return runtime.control.status().consumers[0].switched_off

    assert not is_off()
    publish("fail", "fail")
    wait_until(is_off)
    publish("go")  # the one that it tries
    wait_until(lambda: of_type(events, KillSwitchReset))
    assert not is_off()


def test_a_paused_consumer_rests_and_consumes_again_as_the_same_instance(running, events):
    runtime = running(replicas=2)
    instance = runtime.children[0].consumer
    runtime.control.pause("Idle-1")
    wait_until(lambda: state(runtime) == "paused")
    assert not runtime.children[0].running
    assert state(runtime, "Idle-2") == "consuming"
    runtime.control.pause("Idle-1")  # nothing more
    runtime.control.resume("Idle-1")
    wait_until(lambda: state(runtime) == "consuming")
    assert runtime.children[0].consumer is instance
    assert instance.runs == 2
    assert runtime.control.status().consumers[0].restarts == 0
    told = [
        each.new.value for each in of_type(events, ConsumerChanged) if each.consumer == "Idle-1"
    ]
    assert (
        told
        == [
            "starting",
            "consuming",
            "draining",
            "stopped",
            "paused",
            "starting",
            "consuming",
        ][-len(told) :]
    )


def test_a_runtime_all_of_whose_consumers_are_paused_goes_on_and_can_be_stopped(running):
    runtime = running()
    runtime.control.pause("Idle-1")
    wait_until(lambda: state(runtime) == "paused")
    assert runtime.control.status().state == "running"
    runtime.stop()
    assert runtime.join(timeout=30)


def test_a_paused_runtime_that_is_started_anew_consumes(running):
    runtime = running()
    runtime.control.pause("Idle-1")
    wait_until(lambda: state(runtime) == "paused")
    runtime.stop()
    runtime.join()
    runtime.start()
    assert state(runtime) == "consuming"


def test_a_resume_that_comes_while_it_drains_holds(running, publish):
    runtime = running(Work)
    publish("wait")
    wait_until(lambda: runtime.control.status().consumers[0].in_progress == 1)
    runtime.control.pause("Work-1")
    wait_until(lambda: state(runtime, "Work-1") == "draining")
    runtime.control.resume("Work-1")
    Work.let.set()
    wait_until(lambda: state(runtime, "Work-1") == "consuming")
    assert runtime.control.status().consumers[0].outcomes["ok"] == 1


def test_a_pause_lets_running_handlers_end_and_gives_the_rest_back(running, publish):
    runtime = running(Work)
    publish("wait", "wait", "go", "go")
    wait_until(lambda: runtime.control.status().consumers[0].in_progress == 2)
    runtime.control.pause("Work-1")
    wait_until(lambda: state(runtime, "Work-1") == "draining")
    Work.let.set()
    wait_until(lambda: state(runtime, "Work-1") == "paused")
    assert runtime.control.status().consumers[0].outcomes["ok"] == 2
    runtime.control.resume("Work-1")
    wait_until(lambda: runtime.control.status().consumers[0].outcomes["ok"] == 4)


def test_what_is_not_paused_cannot_be_resumed_and_what_was_stopped_not_paused(running):
    runtime = running(replicas=2)
    with pytest.raises(ControlError, match="is not paused: it is consuming"):
        runtime.control.resume("Idle-1")
    runtime.control.stop_consumer("Idle-2")
    wait_until(lambda: state(runtime, "Idle-2") == "stopped")
    with pytest.raises(ControlError, match="it is stopped"):
        runtime.control.pause("Idle-2")


def test_a_paused_consumer_can_be_stopped_restarted_and_scaled_away(running):
    runtime = running(replicas=3)
    for name in ("Idle-1", "Idle-2", "Idle-3"):
        runtime.control.pause(name)
        wait_until(lambda name=name: state(runtime, name) == "paused")
    runtime.control.stop_consumer("Idle-1")
    wait_until(lambda: state(runtime, "Idle-1") == "stopped")
    runtime.control.restart_consumer("Idle-2")
    wait_until(lambda: state(runtime, "Idle-2") == "consuming")
    runtime.control.scale("Idle", 1)
    wait_until(lambda: names(runtime) == ["Idle-1", "Idle-2"])


def test_a_consumer_whose_queue_would_be_deleted_is_not_paused(running):
    class Fleeting(Work):
        def get_consumers(self, Consumer, channel):
            return [Consumer([Queue("reply", auto_delete=True)], callbacks=[self.on_work])]

    runtime = running(Fleeting)
    with pytest.raises(ControlError, match="reply is auto_delete or exclusive"):
        runtime.control.pause("Fleeting-1")
    assert state(runtime, "Fleeting-1") == "consuming"


def test_a_settle_that_comes_too_late_is_counted_for_its_consumer(running, publish):
    class Late(Work):
        def on_work(self, body, message):
            emit(StaleSettle(message.delivery_tag, 1))
            message.ack()

    runtime = running(Late, replicas=2)
    publish("go")
    wait_until(lambda: sum(each.tally.ok for each in runtime.children) == 1)
    emit(StaleSettle(7, 2))  # by nobody's handler
    counted = [each.stale_settles for each in runtime.control.status().consumers]
    assert sorted(counted) == [0, 1]
    assert [each.tally.ok for each in runtime.children] == counted


def test_a_resumed_consumer_does_not_wait_for_kombus_restart_limit(running):
    """One start a second is for what fails; each of these was asked for."""

    class Rarely(Work):
        restart_limit = TokenBucket(1 / NEVER)

    runtime = running(Rarely)
    since = monotonic()
    for _ in range(5):
        runtime.control.pause("Rarely-1")
        wait_until(lambda: state(runtime, "Rarely-1") == "paused")
        runtime.control.resume("Rarely-1")
        wait_until(lambda: state(runtime, "Rarely-1") == "consuming")
    assert monotonic() - since < AT_ONCE
