"""Batch inference with Phi-3 on Apache Spark, on CPU executors, with every row and every token accounted for."""

import os

__version__ = "0.2.0"

QUIET = {
    # onnxruntime's wheels report usage unless told not to: importing them starts threads and writes a device id under
    # the user's cache folder, and a model loaded before a fork then hangs the child.
    "ORT_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
"""What keeps the libraries from reporting to anyone. It must be set before each is first imported."""

os.environ.update(QUIET)
