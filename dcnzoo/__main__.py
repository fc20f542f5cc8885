"""`python -m dcnzoo` is the `dcnzoo` command."""

import sys

from .commands import main

sys.exit(main())
