"""`python -m ltmp.cli` runs `ltmp`."""

import sys

from . import main

sys.exit(main())
