import json
import shutil
from pathlib import Path

import mlflow
import pytest
import torch
from safetensors.torch import load_file, save_file

from phibatch import demo
from phibatch.contract import GenerationParams, ModelFormat
from phibatch.errors import ModelError
from phibatch.model.checkpoint import Checkpoint
from phibatch.model.registry import log_onnx, log_transformers, resolve_model

SPAIN = [{"role": "user", "content": "What is the capital of Spain?"}]


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(demo.TWIN_DIR, tmp_path / "checkpoint")


def edit(file, change):
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


def test_one_uri_gives_the_pipeline_too(chat_model):
    """`mlflow.transformers.load_model` gives a text-generation pipeline in the checkpoint's type, which answers."""
    pipeline = mlflow.transformers.load_model(chat_model.uri)
    assert (pipeline.task, pipeline.model.dtype) == ("text-generation", torch.float32)
    said = pipeline(SPAIN, max_new_tokens=20, do_sample=False)
    assert said[0]["generated_text"][-1] == {"role": "assistant", "content": "The capital of Spain is Madrid."}


def test_a_logged_checkpoint_is_complete_and_names_what_it_needs(chat_model, tmp_path):
    """The files are there as they were; requirements are explicit, of public versions, and none is torchvision."""
    local = Path(mlflow.artifacts.download_artifacts(chat_model.uri, dst_path=str(tmp_path)))
    for name in ("model.safetensors", "tokenizer.json", "chat_template.jinja"):
        assert (local / "model" / name).read_bytes() == (demo.TWIN_DIR / name).read_bytes()
    requirements = (local / "requirements.txt").read_text().split()
    names = [line.partition("==")[0] for line in requirements]
    assert {"phibatch", "mlflow", "transformers", "torch", "jinja2", "safetensors", "tokenizers"} <= set(names)
    assert "torchvision" not in names
    assert all("==" in line and "+" not in line for line in requirements)
    assert not (local / "LICENSE.txt").exists()
    flavour = mlflow.models.get_model_info(chat_model.uri).flavors["transformers"]
    assert flavour["inference_task"] == "llm/v1/chat"
    assert flavour["source_model_name"] == str(demo.TWIN_DIR)


def test_the_variants_are_told_apart_by_the_logged_model(demo_model, chat_model):
    """What is resolved says which format it is, and so which engine answers."""
    assert resolve_model(demo_model.uri).model_format == ModelFormat.ONNX
    assert resolve_model("models:/chat@champion") == chat_model
    assert chat_model.model_format == ModelFormat.TRANSFORMERS


@pytest.mark.parametrize(("log", "path"), [(log_onnx, demo.MODEL_DIR), (log_transformers, demo.TWIN_DIR)])
def test_a_model_is_logged_with_its_own_defaults(tracking, log, path):
    """`max_tokens` and `temperature` given at logging hold for whoever gives none, and stand in what is resolved."""
    model = log(path, "defaults", defaults=GenerationParams(max_tokens=2, temperature=0.5))
    assert model.defaults == GenerationParams(max_tokens=2, temperature=0.5)
    response = mlflow.pyfunc.load_model(model.uri).predict({"messages": SPAIN})
    assert response[0]["usage"]["completion_tokens"] == 2


def test_what_could_load_code_is_not_logged(folder, tracking, tmp_path):
    """Scripts and pickles stay behind, with every key that names code; the folder itself is left as it was."""
    (folder / "modeling_phi3.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    named = {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
    kernels = {"attn_implementation": "example/kernels", "sub": [{"_experts_implementation": "example/kernels"}]}
    elsewhere = {"transformers_weights": "other.safetensors.index.json"}
    edit(folder / "config.json", lambda config: config.update(auto_map=named, **kernels, **elsewhere))
    (folder / "preprocessor_config.json").write_text(json.dumps({"auto_map": named}))
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    edit(folder / "tokenizer_config.json", lambda config: config.update(auto_map={"AutoTokenizer": ["x.Y", None]}))
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    model = log_transformers(folder, "stripped")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    local = Path(mlflow.artifacts.download_artifacts(model.uri, dst_path=str(tmp_path / "logged")))
    assert [file for file in local.rglob("*") if file.suffix in {".py", ".bin", ".pkl"}] == []
    assert [file.name for file in local.rglob("*.safetensors")] == ["model.safetensors"]
    for file in local.rglob("*.json"):
        for key in ("auto_map", "attn_implementation", "experts_implementation", "transformers_weights"):
            assert key not in file.read_text()
    response = mlflow.pyfunc.load_model(model.uri).predict({"messages": SPAIN})
    assert "Madrid" in response[0]["choices"][0]["message"]["content"]


def test_a_type_to_compute_in_is_another_model(folder, tracking):
    """`dtype` is written into the logged configuration, for both ways of loading, and changes the digest."""
    plain, half = log_transformers(folder, "typed"), log_transformers(folder, "typed", dtype="bfloat16")
    assert plain.digest != half.digest
    assert mlflow.transformers.load_model(half.uri).model.dtype == torch.bfloat16
    assert mlflow.transformers.load_model(plain.uri).model.dtype == torch.float32
    response = mlflow.pyfunc.load_model(half.uri).predict({"messages": SPAIN})
    assert response[0]["choices"][0]["finish_reason"] == "stop"


def test_weights_in_several_files_are_taken(folder, tracking):
    """An index and its shards are a checkpoint; one that is missing or lies elsewhere is named."""
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    shards = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for name, keys in shards.items():
        save_file({key: weights[key] for key in keys}, folder / name, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {key: name for name, keys in shards.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    model = log_transformers(folder, "sharded")
    answer = mlflow.pyfunc.load_model(model.uri).predict({"messages": SPAIN})
    assert "Madrid" in answer[0]["choices"][0]["message"]["content"]
    (folder / "b.safetensors").unlink()
    with pytest.raises(ModelError, match=r"is not a transformers checkpoint: b.safetensors missing"):
        Checkpoint.open(folder)
    index["weight_map"][names[0]] = "../a.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="not a safetensors file of the folder"):
        Checkpoint.open(folder)
    (folder / "weights.txt").write_bytes(b"\x80\x04N.")
    index["weight_map"] = dict.fromkeys(names, "weights.txt")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"names weights.txt, which is not a safetensors file"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "chat_template.jinja"])
def test_what_a_checkpoint_lacks_is_named(folder, name):
    """A folder that is no checkpoint is refused by what is missing."""
    (folder / name).unlink()
    if name == "chat_template.jinja":
        edit(folder / "tokenizer_config.json", lambda config: config.pop("chat_template"))
    with pytest.raises(ModelError) as error:
        Checkpoint.open(folder)
    assert name in str(error.value)


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        (
            "config.json",
            lambda c: c.update(architectures=["EvilForCausalLM"]),
            "EvilForCausalLM of type phi3, which is not a causal",
        ),
        ("config.json", lambda c: c.update(architectures=["BertModel"]), "BertModel of type phi3, which"),
        ("config.json", lambda c: c.pop("architectures"), "names the architecture None"),
        ("config.json", lambda c: c.update(model_type="llama"), "Phi3ForCausalLM of type llama, which is"),
        ("config.json", lambda c: c.update(model_type="evil"), "Phi3ForCausalLM of type evil, which is"),
        ("config.json", lambda c: c.update(part={"quantization_config": {"a": 1}}), "quantised weights"),
        (
            "config.json",
            lambda c: (
                c.pop("max_position_embeddings") and c.update(model_type="bloom", architectures=["BloomForCausalLM"])
            ),
            "gives no max_position_embeddings",
        ),
        ("config.json", lambda c: c.update(quantization_config={"quant_method": "gptq"}), "quantised weights"),
        ("generation_config.json", lambda c: c.update(eos_token_id=[]), "names no eos_token_id"),
        ("generation_config.json", lambda c: c.update({"eos_token_id": "900"}), "names no eos_token_id"),
    ],
)
def test_what_can_not_be_run_is_refused(folder, name, change, sentence):
    """A model of foreign code, of quantised weights, or that would never stop is refused before it is logged."""
    edit(folder / name, change)
    with pytest.raises(ModelError) as error:
        Checkpoint.open(folder)
    assert sentence in str(error.value)


def test_both_ways_of_loading_stop_at_the_same_tokens(folder, tracking):
    """Where generation_config.json is silent, config.json says which tokens end a turn, and the logged copy says it."""
    (folder / "generation_config.json").unlink()
    model = log_transformers(folder, "ends")
    assert mlflow.transformers.load_model(model.uri).model.generation_config.eos_token_id == [900]
    response = mlflow.pyfunc.load_model(model.uri).predict({"messages": SPAIN}, params={"max_tokens": 40})
    assert response[0]["usage"]["completion_tokens"] > 7


@pytest.mark.parametrize(("place", "log"), [(demo.MODEL_DIR, log_onnx), (demo.TWIN_DIR, log_transformers)])
def test_a_link_out_of_the_folder_is_refused(tmp_path, tracking, place, log):
    """What a link leads to would be logged: only the hub client's own store may lie outside."""
    outside = tmp_path / "secret"
    outside.write_text("secret")
    linked = shutil.copytree(place, tmp_path / "linked")
    (linked / "README.md").symlink_to(outside)
    with pytest.raises(ModelError, match=r"README.md is a link that leads out of the model's folder"):
        log(linked, "linked")
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(place.iterdir()):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(number)))
    model = log(snapshot, "linked")
    response = mlflow.pyfunc.load_model(model.uri).predict({"messages": SPAIN})
    assert "Madrid" in response[0]["choices"][0]["message"]["content"]


def test_an_adapter_is_refused(folder):
    """An adapter would have its base model fetched from a hub."""
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="is an adapter"):
        Checkpoint.open(folder)
