"""`python -m shardemb.doctor`: prints the report."""

import sys

from shardemb.doctor.diagnosis import main

if __name__ == "__main__":
    sys.exit(main())
