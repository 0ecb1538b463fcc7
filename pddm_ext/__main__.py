"""``python -m pddm_ext``: the command line, for launchers that start a module."""

import sys

from .workbench.cli import main

if __name__ == "__main__":
    sys.exit(main())
