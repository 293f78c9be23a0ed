"""`python -m fastrlhf` is the `fastrlhf` command."""

from __future__ import annotations

import sys

from fastrlhf.cli import main

if __name__ == "__main__":
    sys.exit(main())
