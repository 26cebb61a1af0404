"""`python -m netstack` is the command `netstack`."""

import sys

from netstack.cli import main

if __name__ == "__main__":
    sys.exit(main())
