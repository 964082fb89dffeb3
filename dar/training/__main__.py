"""``python -m dar.training`` trains a model from the command line."""

import sys

from dar.training.script.usage import refused

if __name__ == "__main__":
    code = refused(sys.argv[1:])
    if code is None:
        # only now, as they load torch
        from dar.training.parallel.launch import start_all_processes

        start_all_processes()  # it may replace this process by torchrun
        from dar.training.script.main import main

        code = main()
    sys.exit(code)
