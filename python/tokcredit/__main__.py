"""Runs the ``tokcredit`` command as ``python -m tokcredit``."""

from tokcredit.cli import main

main()
