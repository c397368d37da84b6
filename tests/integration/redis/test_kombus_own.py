"""kombu's own integration tests of its Redis transport, on ours; fetched with its source."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.unit.test_kombu_mixins import TREE, fetched, unpacked

TESTS = "t/integration/test_redis.py"
WANTED = ["t/__init__.py", "t/integration/__init__.py", "t/integration/common.py", TESTS]
# What a user of a connection sees. The others look into kombu's channel: its poller, pools and scripts.
CHOSEN = (
    "failed_credentials",
    "BasicFunctionality",
    "BaseExchangeTypes",
    "RedisPriority",
    "RedisMessage",
    "PublishBatch",
)
# Of the classes that look into kombu's channel, those tests that look at the server alone, and soon end.
ALSO = (
    "queue_expires_for_all_priorities",
    "never_swept",
    "swept_after_its_queue_without_expires_is_deleted",
    "deleting_an_expiring_queue",
)
# They take kombu's word that it subscribed for a message, and look into its pools.
LEFT_OUT = ("test_fanout",)
AT_LEAST = 44

SETTINGS = """\
[pytest]
python_classes = test_*
markers =
    env(name): the server that is needed
    flaky(reruns, reruns_delay): said for a plugin that is not used
"""
REGISTERS = "from greenconsume.transports import registry\n\nregistry.register()\n"


@pytest.fixture
def kombus_tests(tmp_path: Path) -> Path:
    """A folder with kombu's tests of its Redis transport, which take ours."""
    folder = unpacked(fetched(tmp_path), tmp_path / "tests", WANTED)
    (folder / "pytest.ini").write_text(SETTINGS)
    (folder / "conftest.py").write_text(REGISTERS)
    return folder


@pytest.mark.slow
def test_kombus_own_integration_tests_pass_on_ours(kombus_tests, redis_server):
    where = urlsplit(redis_server.url())
    command = [sys.executable, TREE / "tests" / "patched.py", "pytest", "-p", "no:cacheprovider"]
    wanted = f"({' or '.join(CHOSEN + ALSO)}) and not ({' or '.join(LEFT_OUT)})"
    done = subprocess.run(
        [*command, "-c", "pytest.ini", "-k", wanted, TESTS],
        cwd=kombus_tests,
        env={
            **os.environ,
            "REDIS_HOST": str(where.hostname),
            "REDIS_6379_TCP": str(where.port),
            "PYTHONPATH": str(kombus_tests),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "PYTEST_ADDOPTS": "",
        },
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = {what: int(count) for count, what in re.findall(r"(\d+) (\w+)", done.stdout)}
    assert counts["passed"] >= AT_LEAST
    assert "skipped" not in counts
