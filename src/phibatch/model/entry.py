"""The file that MLflow logs as the model's code; the code itself is the installed package, by version."""

from mlflow.models import set_model

from phibatch.model.pyfunc import ChatModel

set_model(ChatModel())
