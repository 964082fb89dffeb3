"""``python -m worker.attempt`` is the trainer process."""

from worker.attempt.main import leave, main

if __name__ == "__main__":
    leave(main())
