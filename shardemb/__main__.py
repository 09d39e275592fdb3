"""`python -m shardemb`: the command, also for `torchrun -m shardemb train`."""

import sys

from shardemb.cli import main

if __name__ == "__main__":
    sys.exit(main())
