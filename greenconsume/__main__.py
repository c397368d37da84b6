"""The entry point of the `greenconsume` script and of `python -m greenconsume`: patches first of all."""

from __future__ import annotations

import sys


def main() -> None:
    """Patch the process, then run the command line; a probe's question needs neither.

    Raises:
        SystemExit: Always, with the exit code.
    """
    if sys.argv[1:2] == ["check"]:
        from greenconsume.cli.check import main as check

        raise SystemExit(check(sys.argv[2:]))

    from greenconsume.patching import patch_all

    patch_all()
    # Not above: it imports kombu and the standard library's networking.
    from greenconsume.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
