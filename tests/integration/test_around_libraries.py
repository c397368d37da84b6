"""Tests what people put around handlers, with the real libraries: nothing stays with a sleeping greenlet."""

from __future__ import annotations

import io
import json
from contextlib import contextmanager

import gevent
import pytest
import sentry_sdk
import structlog
from kombu import Queue
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session
from sqlalchemy.pool import QueuePool

from greenconsume import ConsumerMixin, ConsumerOptions, Reject, Runtime, current_handler
from tests.messages import publish
from tests.waiting import wait_until

COUNT = 200


@pytest.fixture
def run(amqp_url, queue_name):
    """Handle COUNT messages, twenty at once, within `around`; return the consumer's tally."""

    def start(work, around):
        class Orders(ConsumerMixin):
            options = ConsumerOptions(concurrency=20, around=around, on_error=Reject())

            def __init__(self, connection):
                self.connection = connection

            def get_consumers(self, Consumer, channel):
                return [Consumer([Queue(queue_name)], callbacks=[work])]

        runtime = Runtime(amqp_url)
        runtime.spawn(Orders)
        with runtime:
            publish(amqp_url, queue_name, COUNT)
            tally = runtime.children[0].tally
            wait_until(lambda: tally.ok + tally.failed == COUNT)
        return tally

    return start


def test_a_session_of_sqlalchemy_is_one_a_message_and_given_back(run, tmp_path):
    """Committed where the handler returns, rolled back where it raises; five connections do for twenty."""
    engine = create_engine(
        f"sqlite:///{tmp_path}/shop.db", poolclass=QueuePool, pool_size=5, max_overflow=0
    )
    with engine.begin() as connection:
        connection.execute(text("create table orders (id integer)"))
    sessions = {}

    @contextmanager
    def transaction(message):
        with Session(engine) as session, session.begin():
            sessions[message.delivery_tag] = session
            yield

    def work(body, message):
        session = sessions[message.delivery_tag]
        gevent.sleep(0.001)
        session.execute(text("insert into orders values (:id)"), {"id": message.delivery_tag})
        if message.delivery_tag % 10 == 0:
            raise ValueError("no such order")
        message.ack()

    try:
        tally = run(work, [transaction])
        with engine.begin() as connection:
            kept = connection.execute(text("select count(*) from orders")).scalar()
        assert (tally.ok, tally.failed) == (COUNT - COUNT // 10, COUNT // 10)
        assert kept == tally.ok
        assert engine.pool.checkedout() == 0
        assert len({id(each) for each in sessions.values()}) == COUNT
    finally:
        engine.dispose()


def test_connections_of_django_are_closed_after_each_message(run, tmp_path):
    """Django keeps a connection for each greenlet, and greenlets here are kept: it must not stay with one."""
    import django
    from django.conf import settings
    from django.db import close_old_connections, connection, connections

    if not settings.configured:
        database = {"ENGINE": "django.db.backends.sqlite3", "NAME": str(tmp_path / "django.db")}
        settings.configure(DATABASES={"default": {**database, "CONN_MAX_AGE": 0}})
        django.setup()

    @contextmanager
    def django_connections(_message):
        close_old_connections()
        try:
            yield
        finally:
            close_old_connections()

    open_after = []

    @contextmanager
    def look(_message):
        yield
        open_after.append(connections["default"].connection)

    def work(body, message):
        with connection.cursor() as cursor:
            cursor.execute("select 1")
        gevent.sleep(0.001)
        message.ack()

    tally = run(work, [look, django_connections])
    assert tally.ok == COUNT
    assert open_after == [None] * COUNT


def test_each_event_of_sentry_carries_its_consumer_and_message(run):
    events = []

    class Kept(sentry_sdk.transport.Transport):
        def capture_envelope(self, envelope):
            events.extend(filter(None, (item.get_event() for item in envelope.items)))

    sentry_sdk.init(dsn="http://key@localhost/1", transport=Kept, default_integrations=False)

    @contextmanager
    def scope(message):
        with sentry_sdk.isolation_scope() as isolated:
            isolated.set_tag("consumer", current_handler().consumer)
            isolated.set_tag("message", message.delivery_tag)
            try:
                yield
            except Exception as exc:
                sentry_sdk.capture_exception(exc)
                raise

    def work(body, message):
        gevent.sleep(0.001)  # others have their turn within their scopes
        raise ValueError(str(message.delivery_tag))

    try:
        tally = run(work, [scope])
        sentry_sdk.flush()
    finally:
        sentry_sdk.get_client().close()
        sentry_sdk.get_global_scope().set_client(None)
    assert tally.failed == len(events) == COUNT
    for event in events:
        said = event["exception"]["values"][-1]["value"]
        assert event["tags"] == {"consumer": "Orders-1", "message": int(said)}


def test_each_line_of_structlog_carries_its_message(run):
    output = io.StringIO()
    logger = structlog.wrap_logger(
        structlog.PrintLogger(output),
        processors=[structlog.contextvars.merge_contextvars, structlog.processors.JSONRenderer()],
    )

    def bound(message):
        return structlog.contextvars.bound_contextvars(
            consumer=current_handler().consumer, message=message.delivery_tag
        )

    def work(body, message):
        gevent.sleep(0.001)
        logger.info("shipped", tag=message.delivery_tag)
        message.ack()

    tally = run(work, [bound])
    lines = [json.loads(line) for line in output.getvalue().splitlines()]
    assert tally.ok == len(lines) == COUNT
    assert all(line["message"] == line["tag"] and line["consumer"] == "Orders-1" for line in lines)
    assert structlog.contextvars.get_contextvars() == {}
