"""`python -m ltmp.cli` is `ltmp`."""

import sys

from . import main

sys.exit(main())
