"""`python -m ldm_tools`: the command `ldm` without installing it."""

import sys

from ldm_tools.cli import main

sys.exit(main())
