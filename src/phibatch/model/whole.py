"""Whether a model's files are there with all their bytes: what a clone without Git LFS, or a cut download, leaves."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from phibatch.errors import ModelError
from phibatch.model.folder import TOKENIZER, TOKENIZER_CONFIG, is_inside, list_files, read_json

if TYPE_CHECKING:
    import onnx

POINTER = b"version https://git-lfs.github.com/spec/"
POINTER_BYTES = 1024
"""A pointer file is shorter: Git LFS's own limit."""

AGAIN = "download it again, with `phibatch log ... --hf-repo` for instance"


def check_folder(path: Path) -> None:
    """Raise ModelError where a file of an onnxruntime-genai folder is a pointer or cut short."""
    files = list_files(path)
    check_pointers(files)
    for file in files:
        if file in (path / TOKENIZER, path / TOKENIZER_CONFIG):
            read_json(file)
        if file.suffix == ".onnx":
            _check_graph(file, set(files))


def check_pointers(files: Iterable[Path]) -> None:
    """Raise ModelError where a file is what Git LFS leaves in its place."""
    pointers = [file for file in files if file.stat().st_size < POINTER_BYTES and _starts(file, POINTER)]
    if pointers:
        names = ", ".join(sorted(file.name for file in pointers))
        raise ModelError(
            f"{pointers[0].parent} holds Git LFS pointers in place of data ({names}): run `git lfs pull` there, or"
            " have `phibatch log ... --hf-repo` download the files"
        )


def check_safetensors(file: Path) -> None:
    """Raise ModelError where a safetensors file has fewer bytes than its header says."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = 8 + int.from_bytes(stream.read(8), "little")
        if size < max(start, 8):
            raise ModelError(f"{file} is cut short, or is not a safetensors file: {AGAIN}")
        try:
            header = json.loads(stream.read(start - 8))
            ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
            needed = start + max(ends, default=0)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise ModelError(f"{file} is not a safetensors file: {AGAIN}") from error
    _check_size(file, needed)


def _check_graph(file: Path, files: set[Path]) -> None:
    import onnx
    from google.protobuf.message import DecodeError
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    try:
        model = onnx.load(str(file), load_external_data=False)
    except DecodeError as error:
        raise ModelError(f"{file} is cut short, or is not an ONNX graph: {AGAIN}") from error
    if not model.graph.node or not model.opset_import:
        raise ModelError(f"{file} is cut short: {AGAIN}")
    needed: dict[str, int] = {}
    for tensor in _tensors(model.graph):
        if uses_external_data(tensor):
            info = ExternalDataInfo(tensor)
            needed[info.location] = max(needed.get(info.location, 0), (info.offset or 0) + (info.length or 0))
    for name, end in needed.items():
        data = file.parent / name
        if not is_inside(name):
            raise ModelError(f"{file} keeps its weights in {name}, which is outside the folder")
        if data not in files and data.is_file():
            raise ModelError(f"{file} keeps its weights in {name}, and files of that ending are not logged: rename it")
        if data not in files:
            raise ModelError(f"{file} keeps its weights in {name}, which is missing: {AGAIN}")
        _check_size(data, end)


def _tensors(graph: "onnx.GraphProto") -> "Iterator[onnx.TensorProto]":
    """The tensors of a graph and of the graphs within it."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield attribute.t
            yield from attribute.tensors
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner)


def _check_size(file: Path, needed: int) -> None:
    size = file.stat().st_size
    if size < needed:
        raise ModelError(f"{file} is cut short, {size:,} of {needed:,} bytes are there: {AGAIN}")


def _starts(file: Path, beginning: bytes) -> bool:
    with file.open("rb") as stream:
        return stream.read(len(beginning)) == beginning
