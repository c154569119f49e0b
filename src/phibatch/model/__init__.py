"""What runs on the executors: chat template, engine, and the MLflow model around them. Knows nothing of Spark."""

import os

# onnxruntime's wheels report usage by default: importing them starts threads and writes a device id under the user's
# cache folder, and a model loaded before a fork then hangs the child. It must be off before the first import.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
