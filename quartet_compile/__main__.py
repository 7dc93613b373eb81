"""``python -m quartet_compile``: the command `quartet`."""

import sys

from quartet_compile.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
