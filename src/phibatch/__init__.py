"""Batch inference with Phi-3 on Apache Spark, on CPU executors, with every row and every token accounted for."""

__version__ = "0.1.0"
