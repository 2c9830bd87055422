"""`python -m tools`: the command `ldm` without installing it."""

import sys

from tools.cli import main

sys.exit(main())
