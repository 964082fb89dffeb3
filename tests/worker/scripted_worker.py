"""A real worker whose trainers are scripted."""

import sys
from pathlib import Path

from worker.__main__ import main

if __name__ == "__main__":
    sys.exit(main([sys.executable, str(Path(__file__).with_name("scripted_trainer.py"))]))
