"""``python -m dar.training`` trains a model from the command line."""

import gc
import sys

from dar.output import written_output
from dar.training.script.usage import refused

if __name__ == "__main__":
    code = refused(sys.argv[1:])
    if code is None:
        # only now, as they load torch
        from dar.training.parallel.launch import start_all_processes

        start_all_processes()  # it may replace this process by torchrun
        # Imported objects all stay, and searching them for garbage takes an eighth of the start.
        gc.disable()
        from dar.training.script.main import main

        gc.freeze()
        gc.enable()
        with written_output("dar train"):
            code = main()
    sys.exit(code)
