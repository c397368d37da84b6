"""Runs a module, as `python -m` does, in a process that gevent patches first of all.

    python tests/patched.py pytest tests/unit
    python tests/patched.py tests.benchmarks

Other than with `python -m gevent.monkey --module pytest`, the tree comes last on the path: `tests`
and `examples` are found there, `greenconsume` where it is installed, if it is.
"""

# ruff: noqa: E402  # nothing may be imported before the patching

from gevent import monkey

monkey.patch_all()

import runpy
import sys
from pathlib import Path


def main() -> None:
    """Run the module that the first argument names."""
    here = Path(__file__).resolve().parent
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != here]
    sys.path.append(str(here.parent))
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
