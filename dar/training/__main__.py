"""``python -m dar.training`` trains a model from the command line."""

import sys

from dar.training.parallel.launch import start_all_processes

if __name__ == "__main__":
    start_all_processes()  # it may replace this process by torchrun
    from dar.training.script.main import main

    sys.exit(main())
