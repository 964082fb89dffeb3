"""A real worker whose trainers are scripted."""

import gc

if __name__ == "__main__":
    gc.disable()  # as a real worker does

import sys
from pathlib import Path

from worker.__main__ import main

if __name__ == "__main__":
    gc.freeze()
    gc.enable()
    sys.exit(main([sys.executable, str(Path(__file__).with_name("scripted_trainer.py"))]))
