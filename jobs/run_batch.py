"""`phibatch run`, for spark-submit and Databricks: the same options."""

import sys

from phibatch.cli import main

if __name__ == "__main__":
    main(["run", *sys.argv[1:]])
