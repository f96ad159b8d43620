"""Now ``python scripts/dataset.py write``; this name passes its arguments on."""

import sys

from dataset import main

if __name__ == "__main__":
    sys.exit(main(["write", *sys.argv[1:]]))
