"""`python -m uvit ...` is `uvit ...`; it is also what torchrun starts."""

import sys

from uvit.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
