"""kombu's own unit tests of its mixins, on ours; fetched with the installed version's source."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import kombu
import pytest

TREE = Path(__file__).resolve().parents[2]
TESTS = "t/unit/test_mixins.py"
WANTED = ["t/__init__.py", "t/mocks.py", "t/unit/__init__.py", TESTS]
# How many there were in kombu 5.4, and are since.
AT_LEAST = 21
# Holds what kombu mended after 5.4: that heartbeats are checked only where there is a timeout.
MENDED_SINCE = "not test_consume_drain_no_heartbeat_check"


def unavailable(reason: str) -> None:
    """Skip at a desk, fail where CI says so."""
    if os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def kombus_tests(tmp_path_factory):
    """A folder with kombu's tests of its mixins, of the version that is installed."""
    folder = tmp_path_factory.mktemp("kombu")
    return unpacked(fetched(folder), folder / "tests", WANTED)


def fetched(folder: Path) -> Path:
    """Return the archive with the source of the kombu that is installed; skip or fail without it."""
    requirement = f"kombu=={kombu.__version__}"
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "kombu"]
    done = subprocess.run(
        [*pip, "--disable-pip-version-check", "--dest", folder, requirement],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    archives = list(folder.glob("*.tar.gz"))
    if not archives:
        unavailable(f"the source of {requirement} cannot be fetched: {done.stderr[-500:]}")
    return archives[0]


def unpacked(archive: Path, folder: Path, wanted: list[str]) -> Path:
    with tarfile.open(archive) as tar:
        for name in wanted:
            try:
                source = tar.extractfile(f"{archive.name.removesuffix('.tar.gz')}/{name}")
            except KeyError:
                pytest.skip(f"{archive.name} has its tests elsewhere: there is no {name}")
            assert source is not None
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(source.read())
    return folder


def run_tests(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run them in a patched process of their own: kombu's way to write tests is not pytest's default."""
    (folder / "pytest.ini").write_text("[pytest]\npython_classes = test_*\n")
    command = [sys.executable, TREE / "tests" / "patched.py", "pytest", "-p", "no:cacheprovider"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTEST_ADDOPTS": "",
    }
    return subprocess.run(
        [*command, "-c", "pytest.ini", "-k", MENDED_SINCE, TESTS],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.slow
def test_kombus_own_tests_of_its_mixins_pass_on_ours(kombus_tests):
    path = kombus_tests / TESTS
    text = path.read_text()
    assert "kombu.mixins" in text
    path.write_text(text.replace("kombu.mixins", "greenconsume.mixins"))
    done = run_tests(kombus_tests)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = {what: int(count) for count, what in re.findall(r"(\d+) (\w+)", done.stdout)}
    assert counts["passed"] >= AT_LEAST - ("no_heartbeat_check" in text)
    assert "skipped" not in counts
