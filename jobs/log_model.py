"""`phibatch log`, for spark-submit and Databricks: `onnx` or `transformers`, then the same options."""

import sys

from phibatch.cli import main

if __name__ == "__main__":
    main(["log", *sys.argv[1:]])
