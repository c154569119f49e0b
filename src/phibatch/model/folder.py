"""An onnxruntime-genai model folder: what it must hold, what it must not, and its digest."""

import hashlib
import json
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any, Self

from phibatch.errors import ModelError

CONFIG = "genai_config.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
LEFT_OUT = ("*.py", "*.bin", "*.pt", "*.pkl", "consolidated*")
"""Code, pickles and second sets of weights: neither fetched nor logged, and not in the digest."""
NATIVE_SUFFIXES = (".so", ".dll", ".dylib")
SESSION_OPTIONS = {
    *("log_id", "log_severity_level", "log_verbosity_level", "provider_options", "graph_optimization_level"),
    *("intra_op_num_threads", "inter_op_num_threads", "enable_cpu_mem_arena", "enable_mem_pattern"),
}
"""Session options that neither load code nor write files; the library hands any other on to onnxruntime."""


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A checked folder.

    Attributes:
        path: the folder.
        context_length: prompt and completion together, in tokens.
        eos_token_ids: the tokens that end a turn.
        pad_token_id: what fills the end of a shorter row.
        graph: the decoder's `.onnx` file.
        head_size: numbers of one of its attention heads.
    """

    path: Path
    context_length: int
    eos_token_ids: frozenset[int]
    pad_token_id: int
    graph: Path
    head_size: int

    @classmethod
    def open(cls, path: Path, *, needs_template: bool = True) -> Self:
        """Check a folder; one that is to be given a chat template needs none.

        Raises:
            ModelError: it is not an onnxruntime-genai model (the sentence names what is missing), or its configuration
                names native libraries or files outside the folder.
        """
        missing = [name for name in (CONFIG, TOKENIZER, TOKENIZER_CONFIG) if not (path / name).is_file()]
        if missing:
            raise ModelError(f"{path} is not an onnxruntime-genai model folder: {' and '.join(missing)} missing")
        check_links(path)
        document = read_json(path / CONFIG)
        model = document.get("model")
        if not isinstance(model, dict) or not isinstance(model.get("decoder"), dict):
            raise ModelError(f"{path / CONFIG} describes no model with a decoder")
        _check_no_native_code(path / CONFIG, document)
        for key, value in _items(document):
            if key.endswith(("filename", "file", "path")) and not is_inside(value):
                raise ModelError(f"{path / CONFIG} names {value}, which is outside the folder")
        for name in _graphs(model):
            if not (path / name).is_file():
                raise ModelError(f"{path} is not an onnxruntime-genai model folder: {name} missing")
        if needs_template and not has_chat_template(path):
            raise ModelError(
                f"{path} has no chat template: neither chat_template.jinja nor tokenizer_config.json gives one"
            )
        try:
            eos = model["eos_token_id"]
            eos_token_ids = frozenset(int(token) for token in (eos if isinstance(eos, list) else [eos]))
            return cls(
                path,
                int(model["context_length"]),
                eos_token_ids,
                int(model["pad_token_id"]),
                path / model["decoder"].get("filename", "model.onnx"),
                int(model["decoder"]["head_size"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(
                f"{path / CONFIG} must give context_length, eos_token_id, pad_token_id and head_size as numbers"
            ) from error

    def digest(self) -> str:
        return digest_folder(self.path)


def digest_folder(path: Path) -> str:
    """SHA-256 over the names and contents of a model's files, whatever the order in which the folder lists them."""
    total = hashlib.sha256()
    for file in list_files(path):
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        total.update(f"{file.relative_to(path).as_posix()}\0{content}\n".encode())
    return total.hexdigest()


def list_files(path: Path) -> list[Path]:
    """All files of a folder that belong to its model, sorted: none of `LEFT_OUT`."""
    files = (file for file in path.rglob("*") if file.is_file())
    return sorted(file for file in files if not any(fnmatch(file.name, pattern) for pattern in LEFT_OUT))


def check_links(path: Path) -> None:
    """See that no link leads out of a folder, save into the hub client's own store of the files of that repository.

    Raises:
        ModelError: one does: what it leads to would be logged.
    """
    # The hub client's cache: <repository>/snapshots/<commit>/... links into <repository>/blobs.
    stores = [parent.parent / "blobs" for parent in path.resolve().parents if parent.name == "snapshots"]
    for file in path.rglob("*"):
        target = file.resolve()
        if file.is_symlink() and not any(target.is_relative_to(place) for place in (path.resolve(), *stores)):
            raise ModelError(f"{file} is a link that leads out of the model's folder: put the file itself there")


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises ModelError where the file is not one, or has a key twice."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_refuse_repeats)
    except ValueError as error:
        raise ModelError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file} is not a JSON object")
    return content


def _refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Of a repeated key Python keeps the last and the library all: what is checked must be what is read.
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key stands in it twice")
    return dict(pairs)


def is_inside(name: Any) -> bool:
    """Whether a name that a folder's file gives stays within the folder."""
    return isinstance(name, str) and not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts


def _graphs(model: dict[str, Any]) -> list[str]:
    """The ONNX files that the configuration names, wherever in it they stand."""
    names = [str(value) for key, value in _items(model) if key == "filename"]
    return names or ["model.onnx"]


def _check_no_native_code(file: Path, document: dict[str, Any]) -> None:
    for key, value in _items(document):
        if key == "session_options":
            unknown = sorted(set(value) - SESSION_OPTIONS)
            if unknown:
                raise ModelError(f"{file} sets session options that may load code or write files: {', '.join(unknown)}")
        named = key == "provider_options" and value and any(set(option) - {"cpu", "CPU"} for option in value)
        library = "library" in key or (isinstance(value, str) and value.lower().endswith(NATIVE_SUFFIXES))
        if named or library:
            raise ModelError(
                f"{file} names native code ({key}): only models that run on onnxruntime's own CPU kernels are taken"
            )


def _items(value: Any) -> list[tuple[str, Any]]:
    """Every key and value, at any depth."""
    if isinstance(value, dict):
        return [pair for key, item in value.items() for pair in ((key, item), *_items(item))]
    if isinstance(value, list):
        return [pair for item in value for pair in _items(item)]
    return []


def has_chat_template(path: Path) -> bool:
    """Whether a folder says how a conversation is put to its model."""
    if (path / TEMPLATE).is_file():
        return True
    config = path / TOKENIZER_CONFIG
    return config.is_file() and bool(read_json(config).get("chat_template"))
