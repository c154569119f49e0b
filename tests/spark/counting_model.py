"""A logged model that notes every row it is asked for."""

import os
from pathlib import Path

import pandas as pd
from mlflow.models import set_model

from phibatch.model.pyfunc import ChatModel


class CountingModel(ChatModel):
    def predict(self, context, model_input: pd.DataFrame, params=None):
        calls = Path(context.model_config["calls"])
        with (calls / str(os.getpid())).open("a") as notes:
            notes.writelines(f"{request}\n" for request in model_input["request"])
        return super().predict(context, model_input, params)


set_model(CountingModel())
