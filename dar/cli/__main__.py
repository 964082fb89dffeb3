"""``python -m dar.cli`` is the ``dar`` command."""

from dar.cli.main import main

main()
