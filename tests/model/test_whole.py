import json
import shutil

import pytest
from click.testing import CliRunner

from phibatch import demo
from phibatch.cli import main

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 2720000000\n" % (b"0123456789abcdef" * 4)
GRAPH = "phi3-mini-4k-instruct-cpu-int4-rtn-block-32-acc-level-4.onnx"


@pytest.fixture
def log(published, tmp_path):
    """Change a file of a folder, and log the folder by the command; gives the exit code and what it said."""

    def go(variant, name, content):
        source = published if variant == "onnx" else demo.TWIN_DIR
        folder = shutil.copytree(source, tmp_path / "folder")
        before = (folder / name).read_bytes()
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content(before))
        done = CliRunner().invoke(main, ["log", variant, "--model-dir", str(folder), "--name", "broken"])
        assert done.stderr.count("\n") == 1
        return done.exit_code, done.stderr.replace(str(folder), "DIR")

    return go


@pytest.mark.parametrize(
    ("variant", "name"),
    [
        *(("onnx", name) for name in (GRAPH, f"{GRAPH}.data", "tokenizer.json", "tokenizer.model", "config.json")),
        *(("transformers", name) for name in ("model.safetensors", "tokenizer.json", "config.json")),
    ],
)
def test_a_git_lfs_pointer_is_told_from_data(log, tracking, variant, name):
    """A clone without LFS has pointers for files: the sentence says what they are, and what to do."""
    code, said = log(variant, name, lambda _: POINTER)
    assert code == 2
    assert said == (
        f"phibatch: DIR holds Git LFS pointers in place of data ({name}): run `git lfs pull` there, or have `phibatch"
        " log ... --hf-repo` download the files\n"
    )


AGAIN = "download it again, with `phibatch log ... --hf-repo` for instance\n"


def with_header(header):
    content = json.dumps(header).encode()
    return lambda _: len(content).to_bytes(8, "little") + content


@pytest.mark.parametrize(
    ("variant", "name", "content", "sentence"),
    [
        ("onnx", f"{GRAPH}.data", lambda data: data[:1000], f"{GRAPH}.data is cut short, 1,000 of 1,207,472 bytes"),
        ("onnx", f"{GRAPH}.data", lambda data: data[:-1], f"{GRAPH}.data is cut short, 1,207,471 of 1,207,472 bytes"),
        ("onnx", f"{GRAPH}.data", lambda _: b"", f"{GRAPH}.data is cut short, 0 of 1,207,472 bytes"),
        ("onnx", f"{GRAPH}.data", None, f"{GRAPH} keeps its weights in {GRAPH}.data, which is missing"),
        ("onnx", GRAPH, lambda data: data[: len(data) // 2], f"{GRAPH} is cut short, or is not an ONNX graph"),
        ("onnx", GRAPH, lambda _: b"", f"{GRAPH} is cut short"),
        ("onnx", GRAPH, lambda data: data.replace(b".onnx.data", b"/../../etc"), "which is outside the folder"),
        ("onnx", "tokenizer.json", lambda data: data[:1000], "tokenizer.json is not JSON"),
        ("transformers", "model.safetensors", lambda data: data[:-1], "model.safetensors is cut short, "),
        ("transformers", "model.safetensors", lambda data: data[:100], "is cut short, or is not a safetensors file"),
        ("transformers", "model.safetensors", lambda _: b"", "is cut short, or is not a safetensors file"),
        ("transformers", "model.safetensors", with_header([1]), "model.safetensors is not a safetensors file"),
        ("transformers", "model.safetensors", with_header({"a": {}}), "model.safetensors is not a safetensors file"),
        ("transformers", "tokenizer.json", lambda data: data[:1000], "tokenizer.json is not JSON"),
    ],
)
def test_a_download_cut_short_is_one_sentence(log, tracking, variant, name, content, sentence):
    """What is missing of a file is told when the model is logged, with exit code 2, not by a job that dies."""
    code, said = log(variant, name, content)
    assert code == 2
    assert sentence in said
    assert said.endswith(AGAIN) or "JSON" in said or "outside" in said
