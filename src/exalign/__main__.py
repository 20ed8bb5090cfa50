"""The entry of the command line, which hears Ctrl-C while the rest is imported."""

import sys


def main() -> None:
    """`exalign.cli.main`."""
    try:
        from exalign.cli import main as run
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
