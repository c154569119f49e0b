"""MLflow's transformers flavour with our own pyfunc: one URI for `mlflow.transformers.load_model` and for `predict`.

MLflow's own pyfunc for `llm/v1/chat` fails under `spark_udf`, lets the first row's parameters rule all, and counts
wrong in batches. This module is what `Model.log(flavor=...)` saves with, and what MLflow loads the pyfunc by.
"""

from pathlib import Path
from typing import Any

from mlflow.models import Model, ModelSignature
from mlflow.models.model import MLMODEL_FILE_NAME
from mlflow.pyfunc import FLAVOR_NAME

from phibatch.contract import ModelFormat
from phibatch.model.pyfunc import Predictor

TASK = "llm/v1/chat"
CHECKPOINT = "model"
"""The folder of the checkpoint in the logged model: the flavour's own name for it."""


def save_model(
    path: str,
    mlflow_model: Model,
    checkpoint: Path,
    source: str,
    signature: ModelSignature,
    pip_requirements: list[str],
    model_config: dict[str, Any],
) -> None:
    """Write a staged checkpoint as a model of the transformers flavour, with this module as the pyfunc's loader.

    `source` is where the checkpoint came from, for the record.
    """
    import mlflow.transformers
    from transformers import TextGenerationPipeline
    from transformers.pipelines import PIPELINE_REGISTRY

    # MLflow reads the class's name here; transformers has the dotted name of the class by now, and takes either.
    PIPELINE_REGISTRY.supported_tasks["text-generation"]["impl"] = TextGenerationPipeline
    mlflow.transformers.save_model(
        str(checkpoint),
        path,
        task=TASK,
        mlflow_model=mlflow_model,
        pip_requirements=pip_requirements,
        model_config=model_config,
    )
    # These two are made from the name of a temporary folder; the checkpoint's own licence is among its files.
    Path(path, "LICENSE.txt").unlink(missing_ok=True)
    mlflow_model.flavors[mlflow.transformers.FLAVOR_NAME]["source_model_name"] = source
    mlflow_model.flavors[FLAVOR_NAME]["loader_module"] = __name__
    mlflow_model.signature = signature
    mlflow_model.save(str(Path(path, MLMODEL_FILE_NAME)))


def _load_pyfunc(path: str, model_config: dict[str, Any]) -> Predictor:
    # The name is MLflow's: what `loader_module` must have.
    return Predictor(
        Path(path, CHECKPOINT), str(model_config["name"]), str(model_config["digest"]), ModelFormat.TRANSFORMERS
    )
