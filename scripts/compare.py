"""Compare methods on the same data, model and policy steps, each at its monitor-best checkpoint.

    python scripts/compare.py --config configs/quickstart.yaml --methods mixing one_step --seeds 0 1 2 --output DIR

`--help` lists methods and options. A second call goes on where the first one stopped.
"""

import sys

from lit_bilevel.comparison.command import main

if __name__ == "__main__":
    sys.exit(main())
