"""Logging models to MLflow, and finding them there."""

import difflib
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature, get_model_info
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import Array, Object, Property
from mlflow.utils.validation import (
    _validate_model_alias_name,
    _validate_model_alias_name_reserved,
    _validate_model_name,
)

import phibatch
from phibatch.contract import EngineName, GenerationParams
from phibatch.errors import ModelError
from phibatch.model.folder import ModelFolder
from phibatch.model.pyfunc import ARTIFACT

ENTRY = Path(__file__).with_name("entry.py")
REQUIREMENTS = ("mlflow", "onnxruntime-genai", "onnxruntime", "tokenizers", "pandas", "numpy")


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A logged model that will not change.

    Attributes:
        uri: `models:/name/version`, never an alias.
        digest: SHA-256 of the model's files.
    """

    uri: str
    digest: str


def use_default_tracking() -> None:
    """Track into sqlite in the working directory, by absolute path, unless the environment says where."""
    if not mlflow.is_tracking_uri_set() and "DATABRICKS_RUNTIME_VERSION" not in os.environ:
        mlflow.set_tracking_uri(f"sqlite:///{Path.cwd() / 'mlflow.db'}")


def signature() -> ModelSignature:
    """What `predict` takes: every column optional, generation parameters for all rows, and the engine's options."""
    message = Object([Property("role", DataType.string), Property("content", DataType.string)])
    usage = [Property(f"{kind}_tokens", DataType.long) for kind in ("prompt", "completion", "total", "cached")]
    choice = Object(
        [
            Property("index", DataType.long),
            Property("finish_reason", DataType.string),
            Property("message", message),
        ]
    )
    error = [Property(name, DataType.string, required=False) for name in ("code", "message")]
    defaults = GenerationParams()
    return ModelSignature(
        inputs=Schema(
            [
                ColSpec(DataType.string, "prompt", required=False),
                ColSpec(Array(message), "messages", required=False),
                ColSpec(DataType.string, "request", required=False),
            ]
        ),
        outputs=Schema(
            [
                ColSpec(DataType.string, "id"),
                ColSpec(DataType.string, "object"),
                ColSpec(DataType.long, "created"),
                ColSpec(DataType.string, "model"),
                ColSpec(Array(choice), "choices"),
                ColSpec(Object(usage), "usage"),
                ColSpec(Object(error), "error"),
                ColSpec(DataType.double, "generation_seconds"),
            ]
        ),
        params=ParamSchema(
            [
                ParamSpec("engine", DataType.string, EngineName.GENAI.value),
                ParamSpec("batch_size", DataType.long, 8),
                ParamSpec("max_tokens", DataType.long, defaults.max_tokens),
                ParamSpec("temperature", DataType.double, defaults.temperature),
                ParamSpec("top_p", DataType.double, defaults.top_p),
                ParamSpec("top_k", DataType.long, defaults.top_k),
                ParamSpec("repetition_penalty", DataType.double, defaults.repetition_penalty),
                ParamSpec("seed", DataType.long, 0),
                ParamSpec("stop", DataType.string, [], shape=(-1,)),
            ]
        ),
    )


def log_onnx(model_dir: Path, name: str, alias: str | None = None) -> ResolvedModel:
    """Log an onnxruntime-genai folder as a pyfunc model, register it, and give it an alias.

    Nothing is pickled: the logged code is `entry.py`, and the rest is this package by version.

    Raises:
        ModelError: the folder is not such a model, or names native code; or MLflow takes no such name or alias.
    """
    try:
        _validate_model_name(name)
        if alias:
            _validate_model_alias_name(alias)
            _validate_model_alias_name_reserved(alias)
    except MlflowException as error:
        raise ModelError(str(error).splitlines()[0]) from error
    digest = ModelFolder.open(model_dir).digest()
    requirements = [f"phibatch=={phibatch.__version__}", *(f"{each}=={version(each)}" for each in REQUIREMENTS)]
    with _without_links(model_dir) as folder, warnings.catch_warnings():
        # An example would load the model and generate with it, to infer a signature that is given.
        warnings.filterwarnings("ignore", message=".*An input example was not provided")
        info = mlflow.pyfunc.log_model(
            name=name,
            python_model=str(ENTRY),
            artifacts={ARTIFACT: str(folder)},
            signature=signature(),
            pip_requirements=requirements,
            model_config={"name": name, "digest": digest},
            metadata={"phibatch_digest": digest},
            registered_model_name=name,
        )
    if alias:
        mlflow.MlflowClient().set_registered_model_alias(name, alias, info.registered_model_version)
    return ResolvedModel(f"models:/{name}/{info.registered_model_version}", digest)


@contextmanager
def _without_links(folder: Path) -> Iterator[Path]:
    """The folder with its files in place: the hub client's cache holds links, which MLflow does not follow."""
    if not any(file.is_symlink() for file in folder.rglob("*")):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="phibatch-") as temporary:
        yield Path(shutil.copytree(folder, Path(temporary, folder.name), copy_function=_link_or_copy))


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(Path(source).resolve(), target)
    except OSError:  # another file system
        shutil.copy2(source, target)


def resolve_model(uri: str) -> ResolvedModel:
    """The version behind a URI (`models:/name@alias`, `models:/name/7`, `models:/m-...`, `runs:/...`), and its digest.

    Raises:
        ModelError: there is no such model, or it was not logged by phibatch.
    """
    try:
        fixed = _resolve_alias(uri)
        metadata = get_model_info(fixed).metadata or {}
    except (MlflowException, OSError) as error:
        raise ModelError(f"model {uri} is not known at {mlflow.get_tracking_uri()}: {_reason(uri, error)}") from error
    digest = metadata.get("phibatch_digest")
    if digest is None:
        raise ModelError(f"model {uri} was not logged by `phibatch log`, so its answers can not be accounted for")
    return ResolvedModel(fixed, str(digest))


def _resolve_alias(uri: str) -> str:
    name, at, alias = uri.removeprefix("models:/").partition("@")
    if not uri.startswith("models:/") or not at:
        version_or_stage = name.partition("/")[2]
        if uri.startswith("models:/") and version_or_stage and not version_or_stage.isdigit():
            raise ModelError(f"model {uri} may become another one while the job runs: name a version or an alias")
        return uri
    found = mlflow.MlflowClient().get_model_version_by_alias(name, alias)
    return f"models:/{name}/{found.version}"


def _reason(uri: str, error: Exception) -> str:
    """The nearest registered name where there is one, else MLflow's own first line."""
    name = uri.removeprefix("models:/").replace("@", "/").partition("/")[0]
    try:
        known = [model.name for model in mlflow.MlflowClient().search_registered_models()]
    except MlflowException:
        known = []
    near = difflib.get_close_matches(name, known, n=1)
    if near and near[0] != name:
        return f"did you mean {near[0]}?"
    return str(error).splitlines()[0]
