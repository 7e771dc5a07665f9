"""`python -m ltmp` runs `ltmp`, and so does `torchrun -m ltmp`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
