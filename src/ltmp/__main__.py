"""`python -m ltmp` is `ltmp`; so that `torchrun -m ltmp` is, too."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
