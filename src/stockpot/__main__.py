"""``python -m stockpot``."""

from stockpot.cli import main

main()
