"""``python -m dar.training.demo``: the torch part of the demo, see `dar.training.demo.base`."""

import contextlib
import sys

from dar.training.demo.base import main

if __name__ == "__main__":
    # Some libraries log to the standard output, DeepSpeed among them; there only reports may stand.
    with contextlib.redirect_stdout(sys.stderr):
        main()
