"""What runs on the executors: chat template, engine, and the MLflow model around them. Knows nothing of Spark."""
