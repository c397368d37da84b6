"""Tests what the package promises as a package: its names, its files, its bounds, its shape."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.resources
import inspect
import os
import pkgutil
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType

import pytest

import greenconsume

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PACKAGE = Path(greenconsume.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
#: What docs/reference.md has of single modules.
PUBLIC_ELSEWHERE = {
    "around": ("PlainPublication", "around_producers"),
    "events": ("emit", "subscribe"),
    "gunicorn": ("consumers",),
    "metrics": ("Collector", "Mirror"),
    "otel": ("Tracing",),
    "runtime.control": ("Control",),
    "runtime.greenlet": ("Readiness",),
}
PUBLIC = {
    "Batch",
    "BlockedError",
    "Child",
    "ConsumerGreenlet",
    "ConsumerMixin",
    "ConsumerOptions",
    "ConsumerProducerMixin",
    "DeadLetter",
    "CurrentHandler",
    "DeadLetters",
    "HandlerTimeout",
    "KillSwitch",
    "LinkPool",
    "NackedError",
    "Publication",
    "PublishError",
    "PublishTimeoutError",
    "Publisher",
    "RefusedError",
    "Reject",
    "Requeue",
    "RestartPolicy",
    "Retry",
    "ReturnedError",
    "Runtime",
    "Shutdown",
    "UnconfirmedError",
    "current_handler",
    "patch_all",
    "require_patched",
    "spawn",
}


@pytest.fixture
def distribution() -> importlib.metadata.Distribution:
    if "GREENCONSUME_TEST_INSTALLED" not in os.environ:
        pytest.skip(
            "the package need not be installed at a desk; tox runs these tests on the wheel"
        )
    return importlib.metadata.distribution("greenconsume")


def test_the_tests_run_on_the_wheel(distribution: importlib.metadata.Distribution) -> None:
    assert Path(greenconsume.__file__) == distribution.locate_file("greenconsume/__init__.py")
    assert ROOT not in (PACKAGE.parent, PACKAGE)


def test_the_wheel_has_the_version_of_the_module(
    distribution: importlib.metadata.Distribution,
) -> None:
    assert distribution.version == greenconsume.__version__


def test_the_script_patches_first(distribution: importlib.metadata.Distribution) -> None:
    (script,) = distribution.entry_points.select(group="console_scripts")
    assert (script.name, script.value) == ("greenconsume", "greenconsume.__main__:main")


def test_the_wheel_holds_the_licence(distribution: importlib.metadata.Distribution) -> None:
    assert any(file.name == "LICENSE" for file in distribution.files or ())


def test_the_package_says_that_it_is_typed() -> None:
    assert importlib.resources.files("greenconsume").joinpath("py.typed").is_file()


def test_the_public_names_are_these() -> None:
    assert set(greenconsume.__all__) == PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_a_public_name_is_found_where_it_is_used(name: str) -> None:
    value = getattr(greenconsume, name)
    assert value.__module__.startswith("greenconsume.")
    assert value.__doc__


def test_a_star_import_brings_the_public_names_alone() -> None:
    names: dict[str, object] = {}
    exec("from greenconsume import *", names)
    assert names.keys() - {"__builtins__"} == PUBLIC


def test_the_public_names_are_listed_by_dir() -> None:
    assert {*PUBLIC, "__version__"} <= set(dir(greenconsume))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Consumer'"):
        _ = greenconsume.Consumer


def test_the_tree_in_the_docstring_names_every_module() -> None:
    names = {module.name for module in pkgutil.iter_modules([str(PACKAGE)])} - {"__main__"}
    tree = re.findall(r"^    (\w+)  +\w", greenconsume.__doc__ or "", re.MULTILINE)
    assert names <= set(tree)


@pytest.mark.parametrize(
    "package",
    [path.parent for path in MODULES if path.name == "__init__.py"][1:],
    ids=lambda p: p.name,
)
def test_the_docstring_of_a_package_names_each_of_its_modules(package: Path) -> None:
    doc = ast.get_docstring(ast.parse((package / "__init__.py").read_text())) or ""
    rows = re.findall(r"^    ((?:\w+, )*\w+)  +\S", doc, re.MULTILINE)
    named = {name for row in rows for name in row.split(", ")}
    assert named == {path.stem for path in package.glob("*.py")} - {"__init__"}


def test_the_lowest_dependencies_that_are_tested_are_those_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = dict(
        re.fullmatch(r"([\w-]+)>=([\d.]+)(?:;.*)?", bound).groups()
        for bound in project["dependencies"]
    )
    lines = (ROOT / "tests" / "lowest.txt").read_text().splitlines()
    tested = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert {name: tested[name].removesuffix(".0") for name in declared} == {
        name: version.removesuffix(".0") for name, version in declared.items()
    }


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_fits_in_the_head(path: Path) -> None:
    source = path.read_text()
    assert source.count("\n") <= 400
    assert ast.get_docstring(ast.parse(source))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_function_is_longer_than_forty_lines(path: Path) -> None:
    long = {name: lines for name, lines in function_lengths(path) if lines > 40}
    assert not long


def function_lengths(path: Path) -> Iterator[tuple[str, int]]:
    """Yield each function's name and its number of lines, without its docstring."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = (ast.get_docstring(node, clean=False) or "").count("\n")
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1 - docstring


QUESTION = re.compile(r"(What|Whether|How|Who|Where|When|If|It|Its|There|That|None|No|Nothing)\b")


def named(path: Path) -> str:
    return str(path.relative_to(PACKAGE if PACKAGE in path.parents else ROOT))


@pytest.mark.parametrize("path", [*MODULES, *TESTS], ids=named)
def test_a_docstring_begins_with_what_it_does(path: Path) -> None:
    """A verb, or for a class or property a noun: never a question that the reader has to finish."""
    source = path.read_text()
    # Most files have none, and need not be parsed.
    tree = ast.parse(source if re.search(r'"""' + QUESTION.pattern, source) else "")
    questions = [
        f"{node.name}: {doc.splitlines()[0]}"
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        # The name of a test says what is true, and its docstring more of it.
        and not node.name.startswith("test_")
        and (doc := ast.get_docstring(node))
        and QUESTION.match(doc)
    ]
    assert questions == []


def public_functions() -> Iterator[tuple[str, FunctionType]]:
    """Yield the functions that users may call, and the methods of the classes that they may use."""
    names = [(name, getattr(greenconsume, name)) for name in greenconsume.__all__]
    for module, of_it in PUBLIC_ELSEWHERE.items():
        found = importlib.import_module(f"greenconsume.{module}")
        names += [(f"{module}.{name}", getattr(found, name)) for name in of_it]
    for name, value in names:
        if isinstance(value, type):
            of_class = {each: getattr(raw, "__func__", raw) for each, raw in vars(value).items()}
            for each, function in of_class.items():
                if isinstance(function, FunctionType) and not each.startswith("_"):
                    yield f"{name}.{each}", function
        else:
            yield name, value


@pytest.mark.parametrize(("name", "function"), list(public_functions()), ids=str)
def test_a_public_function_says_whether_it_switches_what_it_raises_and_its_units(
    name: str, function: FunctionType
) -> None:
    """As docs/reference.md promises of every public name."""
    doc = inspect.getdoc(function) or ""
    if re.fullmatch(r"Consumer(Producer)?Mixin\.(on_\w+|get_consumers|extra_context)", name):
        doc += inspect.getdoc(greenconsume.ConsumerMixin) or ""  # it says so of all hooks
    doc = " ".join(doc.split())
    assert re.search(r"Switches: |[Nn]ever switches|each may switch", doc), "does it switch?"
    code = ast.parse(textwrap.dedent(inspect.getsource(function)))
    calls = [each.exc for each in ast.walk(code) if isinstance(each, ast.Raise) and each.exc]
    raised = {
        each.func.id for each in calls if isinstance(each, ast.Call) and hasattr(each.func, "id")
    }
    assert raised <= set(re.findall(r"\w+", doc)) | {"NotImplementedError"}, f"it raises {raised}"
    times = {"timeout", "within", "seconds", "delay", "interval", "safety_interval"}
    if times & set(inspect.signature(function).parameters):
        assert re.search(r"[Ss]econds|monotonic", doc), "what is the unit?"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_modules_that_a_module_says_it_is_called_by_exist(path: Path) -> None:
    """A reader goes on from there, and a module that was renamed is found nowhere."""
    doc = " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split())
    names = {each.stem for each in MODULES} | {each.parent.name for each in MODULES} | PUBLIC
    for callers in re.findall(r"Called by ((?:`[\w.]+`(?:, and by |, and |, | and )?)+)", doc):
        for name in re.findall(r"`([\w.]+)`", callers):
            assert name.rpartition(".")[2] in names | {"consumers"}, f"{name} is no module"


def test_what_needs_no_extra_works_without_all_of_them():
    """Who installs no extra has no redis: nothing but `redis://` may ask for it."""
    code = "\n".join(
        [
            "import sys",
            "for name in ('redis', 'gunicorn', 'prometheus_client', 'opentelemetry', 'rich'):",
            "    sys.modules[name] = None",
            "import greenconsume",
            "greenconsume.patch_all()",
            "import greenconsume.cli",
            "runtime = greenconsume.Runtime('memory://')",
            "assert runtime.control.status().links == ()",
        ]
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
