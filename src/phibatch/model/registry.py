"""Logging models to MLflow, and finding them there."""

import difflib
import os
import re
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature, get_model_info
from mlflow.models.model import ModelInfo
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import AnyType, Array, Object, Property
from mlflow.utils.validation import (
    _validate_model_alias_name,
    _validate_model_alias_name_reserved,
    _validate_model_name,
)
from packaging.version import Version

import phibatch
from phibatch.contract import (
    NUMBERS,
    PARAMETERS,
    Bounds,
    EngineName,
    GenerationParams,
    ModelFormat,
    build_params,
)
from phibatch.errors import EngineError, ModelError
from phibatch.model import flavor
from phibatch.model.chat import first_line
from phibatch.model.checkpoint import Checkpoint
from phibatch.model.engine.base import check_engine
from phibatch.model.folder import ModelFolder, digest_folder
from phibatch.model.pyfunc import ARTIFACT
from phibatch.model.staging import check_bos, read_template, stage_folder
from phibatch.model.whole import check_folder

ENTRY = Path(__file__).with_name("entry.py")
REQUIREMENTS = {
    ModelFormat.ONNX: ("onnxruntime-genai", "onnxruntime", "onnx", "psutil"),
    ModelFormat.TRANSFORMERS: ("transformers", "torch", "jinja2", "safetensors"),
}
"""What a model of each format needs at the version it was logged with, beside what all need."""


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A logged model that will not change.

    Attributes:
        uri: `models:/name/version`, never an alias.
        digest: SHA-256 of the model's files.
        model_format: what the files are.
        defaults: the generation parameters it was logged with.
        options: the names of all parameters that its `predict` takes.
        takes_system: whether its chat template has a place for a system message.
        outputs: the names of all fields that its answers have.
    """

    uri: str
    digest: str
    model_format: ModelFormat
    defaults: GenerationParams
    options: frozenset[str]
    takes_system: bool
    outputs: frozenset[str]

    def check_engine(self, name: EngineName) -> None:
        """Raise ModelError where an engine can not run this model."""
        check_engine(self.model_format, name)


def use_default_tracking() -> None:
    """Track into sqlite in the working directory, by absolute path, unless the environment says where."""
    if not mlflow.is_tracking_uri_set() and "DATABRICKS_RUNTIME_VERSION" not in os.environ:
        mlflow.set_tracking_uri(f"sqlite:///{Path.cwd() / 'mlflow.db'}")


def signature(defaults: GenerationParams) -> ModelSignature:
    """What `predict` takes: every column optional; generation parameters, by row or for all; the engine's options."""
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
    # Of any type: a long can not be absent in a frame, a double column refuses whole numbers, and `stop` is a text or a
    # list. The values are checked row by row in any case.
    own = [ColSpec(AnyType(), name, required=False) for name in PARAMETERS]
    return ModelSignature(
        inputs=Schema(
            [
                ColSpec(DataType.string, "prompt", required=False),
                ColSpec(Array(message), "messages", required=False),
                *own,
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
                ColSpec(DataType.string, "engine"),
                ColSpec(DataType.string, "engine_version"),
            ]
        ),
        params=ParamSchema(
            [
                ParamSpec("engine", DataType.string, EngineName.AUTO.value),
                ParamSpec("batch_size", DataType.long, 16),
                ParamSpec("memory", DataType.long, 0),
                ParamSpec("row_timeout", DataType.double, 0.0),
                ParamSpec("worker_timeout", DataType.double, 0.0),
                ParamSpec("count_only", DataType.boolean, False),
                *(_param(name, bounds, getattr(defaults, name)) for name, bounds in NUMBERS.items()),
                ParamSpec("stop", DataType.string, list(defaults.stop), shape=(-1,)),
                ParamSpec("response_format", DataType.string, defaults.response_format or ""),
            ]
        ),
    )


def _param(name: str, bounds: Bounds, default: float | None) -> ParamSpec:
    # No parameter may be null, and the stream of seed 0 is that of no seed.
    return ParamSpec(name, DataType.long if bounds.whole else DataType.double, default or 0)


def log_onnx(
    model_dir: Path,
    name: str,
    alias: str | None = None,
    defaults: GenerationParams | None = None,
    chat_template: Path | None = None,
) -> ResolvedModel:
    """Log an onnxruntime-genai folder as a pyfunc model, register it, and give it an alias.

    Nothing is pickled: the logged code is `entry.py`, and the rest is this package by version.

    Args:
        model_dir: the folder.
        name: the registered model's name.
        alias: of the new version.
        defaults: the generation parameters of callers who give none; None for `GenerationParams`' own.
        chat_template: a file that replaces the folder's chat template in what is logged.

    Raises:
        ModelError: the folder is not such a model, is not whole, or names native code; the template renders no user
            turn; or MLflow takes no such name or alias.
    """
    # It loads what reads graphs, which a job's driver does without.
    from phibatch.model.engine.attention import check_windows

    check_names(name, alias)
    template = None if chat_template is None else read_template(chat_template)
    check_folder(model_dir)
    check_windows(ModelFolder.open(model_dir, needs_template=template is None))
    with stage_folder(model_dir, template) as folder, warnings.catch_warnings():
        digest = ModelFolder.open(folder).digest()
        takes_system = _check_template(folder, ModelFormat.ONNX, chat_template or model_dir)
        # An example would load the model and generate with it, to infer a signature that is given.
        warnings.filterwarnings("ignore", message=".*An input example was not provided")
        info = mlflow.pyfunc.log_model(
            name=_logged_name(name),
            python_model=str(ENTRY),
            artifacts={ARTIFACT: str(folder)},
            signature=signature(defaults or GenerationParams()),
            pip_requirements=_requirements(ModelFormat.ONNX),
            model_config={"name": name, "digest": digest},
            metadata={"phibatch_digest": digest, "phibatch_takes_system": takes_system},
            registered_model_name=name,
        )
    return _set_alias(info, name, alias)


def log_transformers(
    model_dir: Path,
    name: str,
    alias: str | None = None,
    defaults: GenerationParams | None = None,
    dtype: str | None = None,
    chat_template: Path | None = None,
) -> ResolvedModel:
    """Log a transformers checkpoint with MLflow's transformers flavour, register it, and give it an alias.

    The weights are copied, not loaded. What is logged can load no code: neither pickles nor scripts are in it, nor what
    would name them.

    Args:
        model_dir: the checkpoint: `config.json`, `tokenizer.json`, safetensors, a chat template.
        name: the registered model's name.
        alias: of the new version.
        defaults: the generation parameters of callers who give none; None for `GenerationParams`' own.
        dtype: the type to compute in, as torch names it; None for the one that the checkpoint names.
        chat_template: a file that replaces the checkpoint's chat template in what is logged.

    Raises:
        ModelError: the folder is not such a model, or is not whole; transformers is not installed; the template renders
            no user turn; or MLflow takes no such name or alias.
    """
    check_names(name, alias)
    template = None if chat_template is None else read_template(chat_template)
    checkpoint = Checkpoint.open(model_dir, needs_template=template is None)
    with checkpoint.stage(dtype, template) as folder:
        digest = digest_folder(folder)
        takes_system = _check_template(folder, ModelFormat.TRANSFORMERS, chat_template or model_dir)
        info = Model.log(
            artifact_path=None,
            name=_logged_name(name),
            flavor=flavor,
            registered_model_name=name,
            metadata={"phibatch_digest": digest, "phibatch_takes_system": takes_system},
            checkpoint=folder,
            source=str(model_dir.resolve()),
            signature=signature(defaults or GenerationParams()),
            pip_requirements=_requirements(ModelFormat.TRANSFORMERS),
            model_config={"name": name, "digest": digest},
        )
    return _set_alias(info, name, alias)


def check_names(name: str, alias: str | None) -> None:
    """Raise ModelError where MLflow takes no such name or alias: before a version is made, or a model downloaded."""
    try:
        _validate_model_name(name)
        if alias:
            _validate_model_alias_name(alias)
            _validate_model_alias_name_reserved(alias)
    except MlflowException as error:
        raise ModelError(str(error).splitlines()[0]) from error


def _logged_name(name: str) -> str:
    """What a run calls the model; MLflow refuses dots there, and Unity Catalog's names are `catalog.schema.model`."""
    return re.sub("[.%\"']", "_", name)


def _requirements(model_format: ModelFormat) -> list[str]:
    packages = ("mlflow", *REQUIREMENTS[model_format], "tokenizers", "pandas", "numpy")
    # Without the local part: `torch==2.13.0+cpu` is in no registry.
    pinned = (f"{each}=={Version(version(each)).public}" for each in packages)
    return [f"phibatch=={phibatch.__version__}", *pinned]


def _set_alias(info: ModelInfo, name: str, alias: str | None) -> ResolvedModel:
    if alias:
        mlflow.MlflowClient().set_registered_model_alias(name, alias, str(info.registered_model_version))
    return resolve_model(f"models:/{name}/{info.registered_model_version}")


def _check_template(folder: Path, model_format: ModelFormat, source: Path) -> bool:
    """See that a staged folder's chat template renders a user turn.

    Returns:
        Whether the template has a place for a system message.
    """
    # Each loads the libraries of its engine.
    if model_format == ModelFormat.ONNX:
        from phibatch.model.engine.genai import open_tokenizer
    else:
        from phibatch.model.engine.transformers import open_tokenizer
    try:
        if model_format == ModelFormat.ONNX:
            check_bos(folder)
        tokenizer = open_tokenizer(folder)
        tokenizer.check_template()
    except (EngineError, ModelError, OSError, RuntimeError, ValueError) as error:
        raise ModelError(f"{source} can not be used: {first_line(error)}") from error
    return tokenizer.takes_system


def resolve_model(uri: str) -> ResolvedModel:
    """The version behind a URI (`models:/name@alias`, `models:/name/7`, `models:/m-...`, `runs:/...`), and its digest.

    Raises:
        ModelError: there is no such model, or it was not logged by phibatch.
    """
    try:
        fixed = _resolve_alias(uri)
        info = get_model_info(fixed)
    except (MlflowException, OSError) as error:
        raise ModelError(f"model {uri} is not known at {mlflow.get_tracking_uri()}: {_reason(uri, error)}") from error
    digest = (info.metadata or {}).get("phibatch_digest")
    if digest is None:
        raise ModelError(f"model {uri} was not logged by `phibatch log`, so its answers can not be accounted for")
    loader = info.flavors[mlflow.pyfunc.FLAVOR_NAME]["loader_module"]
    model_format = ModelFormat.TRANSFORMERS if loader == flavor.__name__ else ModelFormat.ONNX
    logged = {spec.name: spec.default for spec in info.signature.params.params}
    # A signature's seed is never null, and the job gives each row its own.
    defaults = build_params({name: logged[name] for name in PARAMETERS if name in logged and name != "seed"})
    # An earlier version did not say.
    takes_system = bool((info.metadata or {}).get("phibatch_takes_system", True))
    outputs = frozenset(info.signature.outputs.input_names())
    return ResolvedModel(fixed, str(digest), model_format, defaults, frozenset(logged), takes_system, outputs)


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
    if ":" not in uri:
        return "a registered model is named models:/NAME@ALIAS or models:/NAME/VERSION"
    near = difflib.get_close_matches(name, known, n=1)
    if near and near[0] != name:
        return f"did you mean {near[0]}?"
    return str(error).splitlines()[0]
