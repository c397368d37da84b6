"""`patch_all` and `require_patched` in a process that is patched; `tests/unpatched` has the others."""

from __future__ import annotations

import select
import sys
import time
from types import ModuleType

import pytest
from gevent import monkey

from greenconsume.patching import patch_all, require_patched

pytestmark = pytest.mark.skipif(
    not monkey.is_module_patched("threading"),
    reason="this run is not patched: use `python tests/patched.py pytest`",
)


def module_with_originals(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Make a module as it is when it was imported before gevent patched."""
    module = ModuleType(name)
    vars(module).update(
        sleep=monkey.get_original("time", "sleep"),
        _selectf=monkey.get_original("select", "select"),
        epoll=monkey.get_original("select", "epoll"),
        monotonic=time.monotonic,
    )
    monkeypatch.setitem(sys.modules, name, module)
    return module


def test_a_patched_process_passes_the_check() -> None:
    require_patched()
    assert monkey.is_module_patched("socket")


def test_patching_again_changes_nothing() -> None:
    before = time.sleep, select.select
    patch_all()
    assert (time.sleep, select.select) == before


@pytest.mark.parametrize("name", ["kombu.early", "amqp.early", "redis.early", "greenconsume.early"])
def test_names_that_a_library_bound_early_are_replaced(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    early = module_with_originals(name, monkeypatch)
    patch_all()
    assert early.sleep is time.sleep
    assert early._selectf is select.select


def test_a_function_that_gevent_removes_is_removed_from_kombu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    early = module_with_originals("kombu.early", monkeypatch)
    patch_all()
    assert early.epoll is None


def test_names_that_gevent_does_not_replace_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    early = module_with_originals("kombu.early", monkeypatch)
    patch_all()
    assert early.monotonic is time.monotonic


def test_the_modules_of_others_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    other = module_with_originals("kombunara.early", monkeypatch)
    patch_all()
    assert other.sleep is monkey.get_original("time", "sleep")


def test_the_check_costs_nothing_once_it_has_passed() -> None:
    require_patched()
    started = time.process_time()
    for _ in range(10_000):
        require_patched()
    assert time.process_time() - started < 1.0  # a whole check each time takes far more than that
