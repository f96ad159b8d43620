"""Now ``python scripts/dataset.py world``; this name passes its arguments on."""

import sys

from dataset import main

if __name__ == "__main__":
    sys.exit(main(["world", *sys.argv[1:]]))
