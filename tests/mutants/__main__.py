"""Try the mutants and print which test caught which: `python -m tests.mutants [NAME ...]`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # as pytest has it

from mutants.command import main

if __name__ == "__main__":
    sys.exit(main())
