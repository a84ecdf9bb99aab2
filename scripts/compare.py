"""`lit-bilevel compare` under its earlier name: methods × seeds on the same data, model and policy steps."""

import sys

from lit_bilevel.comparison.command import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
