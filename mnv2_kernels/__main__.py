"""`python -m mnv2_kernels` and `mnv2`: the command line, or the sentence that it needs Rich."""

import sys

from .ops.optional import MissingPackage


def main() -> int:
    """Run the command of sys.argv. Returns the exit status."""
    try:
        from .cli.main import main as run
    except MissingPackage as error:
        print(f"mnv2: {error}", file=sys.stderr)
        return 2
    return run()


if __name__ == "__main__":
    sys.exit(main())
