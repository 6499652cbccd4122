"""``python -m kernelmeta``."""

from __future__ import annotations

import sys

from kernelmeta.cli import main

if __name__ == "__main__":
    sys.exit(main())
