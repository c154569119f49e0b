"""A logged model that notes every row it is asked for, and dies, hangs, breaks or is late at rows marked for it."""

import os
import time
from pathlib import Path

import pandas as pd
from mlflow.models import set_model

from phibatch.contract import ErrorCode
from phibatch.errors import EngineError
from phibatch.model.engine.watchdog import watch
from phibatch.model.pyfunc import ChatModel


class CountingModel(ChatModel):
    def predict(self, context, model_input: pd.DataFrame, params=None):
        calls = Path(context.model_config["calls"])
        with (calls / str(os.getpid())).open("a") as notes:
            notes.writelines(f"{request}\n" for request in model_input["request"])
        if model_input["request"].str.contains("-crash-").any():
            os.abort()
        if model_input["request"].str.contains("-hang-").any():
            with watch(params["worker_timeout"]):
                time.sleep(600)
        if model_input["request"].str.contains("-break-").any():
            raise EngineError("the weights are broken")
        answers = super().predict(context, model_input, params)
        for request, answer in zip(model_input["request"], answers, strict=True):
            if "-late-" in request and not calls.with_name("mended").exists():
                answer.update(choices=[], error={"code": ErrorCode.TIMEOUT, "message": "late"})
        return answers


set_model(CountingModel())
