import json
import shutil
from pathlib import Path

import mlflow
import pytest

from phibatch import demo
from phibatch.errors import ModelError
from phibatch.model.folder import ModelFolder
from phibatch.model.registry import log_onnx, log_transformers, resolve_model


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(demo.MODEL_DIR, tmp_path / "model")


def edit(file, change):
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


def test_a_logged_model_is_complete_and_holds_no_pickle(demo_model, tmp_path):
    """The artifacts are the five-line entry file, the metadata, and the folder, once."""
    local = Path(mlflow.artifacts.download_artifacts(demo_model.uri, dst_path=str(tmp_path)))
    files = sorted(str(file.relative_to(local)) for file in local.rglob("*") if file.is_file())
    assert [name for name in files if name.endswith((".pkl", ".pickle"))] == []
    copied = [name for name in files if name.endswith((".onnx", ".data"))]
    assert copied == sorted(
        f"artifacts/model/{file.name}" for file in demo.MODEL_DIR.iterdir() if file.suffix in {".onnx", ".data"}
    )
    assert "entry.py" in files
    requirements = (local / "requirements.txt").read_text()
    assert "phibatch==" in requirements
    assert "torch" not in requirements


def test_an_alias_is_resolved_to_its_version(demo_model):
    """What a run records is the version, with the digest of the files; an alias that moves is another model."""
    before = resolve_model("models:/demo@champion")
    assert before == demo_model
    assert before.digest == ModelFolder.open(demo.MODEL_DIR).digest()
    moved = log_onnx(demo.MODEL_DIR, "demo", "challenger")
    assert resolve_model("models:/demo@challenger") == moved
    assert moved.uri != before.uri
    assert resolve_model(before.uri) == before


@pytest.mark.parametrize(("log", "folder"), [(log_onnx, demo.MODEL_DIR), (log_transformers, demo.TWIN_DIR)])
def test_unity_catalogs_names_are_taken(log, folder, tracking):
    """A registered name may have dots, and other characters that the name of a logged model may not."""
    name = f"main.phibatch.it's-{log.__name__}-3.5"
    assert log(folder, name, "champion").uri == f"models:/{name}/1"
    assert resolve_model(f"models:/{name}@champion").uri == f"models:/{name}/1"


@pytest.mark.parametrize(
    ("uri", "sentence"),
    [
        ("models:/dem@champion", "did you mean demo?"),
        ("models:/demo@nobody", "alias nobody not found"),
        ("models:/demo/999", "not found"),
        ("runs:/0123456789abcdef0123456789abcdef/model", "not found"),
        ("/nope", "a registered model is named models:/NAME@ALIAS or models:/NAME/VERSION"),
        ("demo@champion", "a registered model is named models:/NAME@ALIAS or models:/NAME/VERSION"),
    ],
)
def test_an_unknown_model_is_one_sentence(demo_model, uri, sentence):
    """A model that is not there is named, with the nearest registered one."""
    with pytest.raises(ModelError) as error:
        resolve_model(uri)
    assert str(error.value).startswith(f"model {uri} is not known at sqlite:")
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_model_of_another_kind_is_refused(tracking, tmp_path):
    """A model that phibatch did not log has no digest, so its rows could not be known again."""
    code = tmp_path / "other.py"
    code.write_text(
        "from mlflow.models import set_model\nfrom mlflow.pyfunc import PythonModel\nset_model(PythonModel())\n"
    )
    info = mlflow.pyfunc.log_model(name="other", python_model=str(code), pip_requirements=[])
    with pytest.raises(ModelError, match="was not logged by `phibatch log`"):
        resolve_model(info.model_uri)


@pytest.mark.parametrize("name", ["genai_config.json", "tokenizer.json", "model.onnx", "chat_template.jinja"])
def test_what_a_folder_lacks_is_named(folder, name):
    """A folder that is not an onnxruntime-genai model is refused by what is missing."""
    (folder / name).unlink()
    if name == "chat_template.jinja":
        edit(folder / "tokenizer_config.json", lambda config: config.pop("chat_template", None))
    with pytest.raises(ModelError) as error:
        log_onnx(folder, "refused")
    assert name in str(error.value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda c: c["model"]["decoder"]["session_options"].update(custom_ops_library="evil.so"),
            "may load code or write files: custom_ops_library",
        ),
        (
            lambda c: c["model"]["decoder"]["session_options"].update(provider_options=[{"qnn": {}}]),
            "names native code (provider_options)",
        ),
        (lambda c: c["model"].update(extra={"path": "x/libevil.SO"}), "names native code (path)"),
        (lambda c: c["model"]["decoder"].update(filename="../model.onnx"), "which is outside the folder"),
        (lambda c: c["model"]["decoder"].update(filename="/etc/model.onnx"), "which is outside the folder"),
        (lambda c: c["model"]["decoder"].update(filename="other.onnx"), "other.onnx missing"),
        (
            lambda c: c["model"].pop("context_length"),
            "must give context_length, eos_token_id, pad_token_id and head_size",
        ),
        (
            lambda c: c["model"]["decoder"]["session_options"].update({"session.optimized_model_filepath": "/etc/x"}),
            "may load code or write files: session.optimized_model_filepath",
        ),
        (
            lambda c: c["model"]["decoder"]["session_options"].update(enable_profiling="/etc/x"),
            "may load code or write files: enable_profiling",
        ),
        (lambda c: c["model"].update(encoder={"encoder_filename": "/etc/x"}), "which is outside the folder"),
        (lambda c: c.pop("model"), "describes no model with a decoder"),
    ],
)
def test_a_folder_that_would_load_code_or_leave_itself_is_refused(folder, change, sentence):
    """Native libraries, other execution providers and files outside the folder are refused before any is loaded."""
    edit(folder / "genai_config.json", change)
    with pytest.raises(ModelError) as error:
        ModelFolder.open(folder)
    assert sentence in str(error.value)


def test_a_key_that_stands_twice_is_refused(folder):
    """Of a repeated key Python reads the last and the library all, so nothing may be hidden behind one."""
    file = folder / "genai_config.json"
    hidden = '{"model": {"decoder": {"session_options": {"custom_ops_library": "x.so"}}},'
    file.write_text(hidden + file.read_text().lstrip()[1:])
    with pytest.raises(ModelError, match="a key stands in it twice"):
        ModelFolder.open(folder)


@pytest.mark.parametrize(("name", "alias"), [("a/b", None), ("fine", "v1")])
def test_a_name_that_mlflow_does_not_take_is_refused_before_logging(tracking, name, alias):
    """A bad name or alias leaves no version behind."""
    before = len(mlflow.MlflowClient().search_registered_models())
    with pytest.raises(ModelError):
        log_onnx(demo.MODEL_DIR, name, alias)
    assert len(mlflow.MlflowClient().search_registered_models()) == before


def test_the_digest_is_of_names_and_contents(folder, tmp_path):
    """Equal folders have equal digests, wherever they are; any change of a byte or a name is another."""
    digests = {ModelFolder.open(demo.MODEL_DIR).digest(), ModelFolder.open(folder).digest()}
    assert len(digests) == 1
    edit(folder / "genai_config.json", lambda config: config.update(note=1))
    digests.add(ModelFolder.open(folder).digest())
    (folder / "extra").write_text("")
    digests.add(ModelFolder.open(folder).digest())
    (folder / "extra").rename(folder / "other")
    digests.add(ModelFolder.open(folder).digest())
    assert len(digests) == 4
