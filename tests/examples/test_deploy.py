"""The files in examples/deploy, checked as far as a machine without an engine can."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import kubernetes_validate
import pytest
import yaml

from greenconsume.admin import run_folder
from greenconsume.admin.gate import OPEN
from greenconsume.cli import check
from greenconsume.cli.main import cli, run
from greenconsume.handling.options import OPTIONS

DEPLOY = Path(__file__).parents[2] / "examples" / "deploy"
UNITS = sorted(DEPLOY.glob("*.service"))
MANIFESTS = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))
#: Seconds that a drain may take by default.
DRAIN = OPTIONS["drain_timeout"].default + OPTIONS["cancel_timeout"].default


def manifest(kind: str) -> Any:
    return next(each for each in MANIFESTS if each["kind"] == kind)


def parses(command: list[str]) -> None:
    """Check a command line of `greenconsume` against the one that there is."""
    program, name, *args = command
    assert Path(program).name == "greenconsume"
    with click.Context(cli) as context:
        found = cli.get_command(context, name)
        assert found is not None
        found.make_context(name, list(args), parent=context)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_finds_nothing_wrong_with_a_unit(unit: Path, tmp_path: Path) -> None:
    text = unit.read_text().replace("/srv/shop/.venv/bin/greenconsume", sys.executable)
    copy = tmp_path / unit.name
    copy.write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", copy], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_a_unit_starts_a_command_that_there_is_and_leaves_it_time_to_drain(unit: Path) -> None:
    said = dict(line.split("=", 1) for line in unit.read_text().splitlines() if "=" in line)
    parses(shlex.split(said["ExecStart"].replace("${TARGET}", "shop:runtime")))
    assert said["Type"] == "notify"
    assert int(said["TimeoutStopSec"]) > DRAIN
    assert said["KillMode"] == "mixed"


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_a_unit_hides_no_failure_and_starts_no_mistake_again(unit: Path) -> None:
    """1 says that something failed; 2 that the call is wrong, as it will be the next time."""
    said = dict(line.split("=", 1) for line in unit.read_text().splitlines() if "=" in line)
    command = [
        sys.executable,
        "-m",
        *shlex.split(said["ExecStart"].replace("${TARGET}", "shop:runtime")),
    ]
    command[2] = "greenconsume"
    wrong = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "No module named 'shop'" in wrong.stderr
    assert said["RestartPreventExitStatus"] == str(wrong.returncode)
    assert "SuccessExitStatus" not in said


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_processes_of_a_unit_are_found_in_its_own_run_folder(unit: Path) -> None:
    """That in /tmp is private to the unit; one that two instances shared would go with the first."""
    said = dict(line.split("=", 1) for line in unit.read_text().splitlines() if "=" in line)
    assert said["Environment"] == f"{run_folder.VARIABLE}=%t/{said['RuntimeDirectory']}"
    assert said["RuntimeDirectoryMode"] == "0700"
    assert said["RuntimeDirectory"].endswith("%i") == unit.name.endswith("@.service")


def test_the_image_runs_commands_that_there_are() -> None:
    parses(entry_and_command())
    probe = listed("HEALTHCHECK")
    assert probe[:2] == ["greenconsume", "check"]
    assert check._parse(probe[2:])[0] == "/livez"


def entry_and_command() -> list[str]:
    return [*listed("ENTRYPOINT"), *listed("CMD")]


def listed(instruction: str) -> list[str]:
    """Return the list of an instruction of the Dockerfile."""
    for line in (DEPLOY / "Dockerfile").read_text().splitlines():
        if line.startswith(instruction):
            return list(yaml.safe_load(line[line.index("[") :]))
    raise AssertionError(f"there is no {instruction}")


def test_the_compose_file_is_one_and_leaves_time_to_drain() -> None:
    file = DEPLOY / "compose.yaml"
    check = ["check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(file)]
    done = subprocess.run(
        [sys.executable, "-m", *check], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    services = yaml.safe_load(file.read_text())["services"]
    assert int(services["consumers"]["stop_grace_period"].rstrip("s")) > DRAIN
    assert (
        "healthcheck" in services["web"]
    )  # that of the image asks for what `greenconsume run` runs
    flags = {param.envvar for param in run.params}
    assert "GREENCONSUME_BROKER" in services["consumers"]["environment"].keys() & flags


def test_the_deployment_is_one() -> None:
    kubernetes_validate.validate(manifest("Deployment"), "1.30", strict=True)


def test_the_deployment_probes_and_drains_what_there_is() -> None:
    spec = manifest("Deployment")["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert spec["terminationGracePeriodSeconds"] > DRAIN
    parses(["greenconsume", "run", "shop:runtime", *container["args"]])
    probes = [container[name] for name in ("startupProbe", "livenessProbe", "readinessProbe")]
    assert {probe["httpGet"]["path"] for probe in probes} <= OPEN
    assert {probe["httpGet"]["port"] for probe in probes} == {container["ports"][0]["name"]}
    flags = {param.envvar for param in run.params}
    assert {each["name"] for each in container["env"]} <= flags


def test_keda_scales_that_deployment_by_a_queue() -> None:
    scaled, trusted = manifest("ScaledObject"), manifest("TriggerAuthentication")
    assert scaled["spec"]["scaleTargetRef"]["name"] == manifest("Deployment")["metadata"]["name"]
    (trigger,) = scaled["spec"]["triggers"]
    assert trigger["authenticationRef"]["name"] == trusted["metadata"]["name"]
    assert {"queueName", "mode", "value", "protocol"} <= trigger["metadata"].keys()
    assert "replicas" not in manifest("Deployment")["spec"]  # else the two would fight over it
