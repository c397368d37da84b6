"""The entry point of the `greenconsume` script and of `python -m greenconsume`: patches first of all."""

from __future__ import annotations

from greenconsume.patching import patch_all


def main() -> None:
    """Patch the process, then run the command line.

    Raises:
        SystemExit: Always, with the exit code.
    """
    patch_all()
    # Not above: it imports kombu and the standard library's networking.
    from greenconsume.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
