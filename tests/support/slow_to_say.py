"""stockpot, whose main process takes two seconds to say an error, as on a busy machine."""

from __future__ import annotations

import os
import time

import stockpot.cli.app
import stockpot.cli.output

if __name__ == "__main__":
    if os.environ["RANK"] == "0":
        complain = stockpot.cli.output.complain

        def slowly(message: str, head: str = "error") -> None:
            time.sleep(2.0)
            complain(message, head)

        stockpot.cli.app.complain = stockpot.cli.output.complain = slowly
    stockpot.cli.app.main()
