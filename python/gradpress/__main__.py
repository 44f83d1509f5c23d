"""`python -m gradpress`: the environment's report, or any command that follows."""

import sys

from gradpress.cli import main

if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:] or ["env"]))
