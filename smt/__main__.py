"""``python -m smt`` is ``smt``; ``torchrun --nproc-per-node 2 -m smt train`` runs it on two processes."""

import sys

from smt.cli import main

if __name__ == "__main__":
    sys.exit(main())
