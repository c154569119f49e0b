"""The copy of an onnxruntime-genai folder that is logged, and the chat template that a user gives it."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from phibatch.errors import ModelError
from phibatch.model.folder import TEMPLATE, TOKENIZER_CONFIG, list_files, read_json


def read_template(file: Path) -> str:
    """A chat template's text. Raises ModelError where the file can not be read as UTF-8."""
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise ModelError(f"the chat template {file} can not be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ModelError(f"the chat template {file} can not be read: it is not UTF-8") from error


@contextmanager
def stage_folder(path: Path, chat_template: str | None = None) -> Iterator[Path]:
    """The folder as it is logged: without what is left out, with files in place of links, and with the template.

    A folder that is so already is taken as it is. Links are the hub client's: MLflow does not follow them.

    Args:
        path: the folder.
        chat_template: in place of the folder's own.
    """
    files = list_files(path)
    is_plain = not any(file.is_symlink() for file in path.rglob("*"))
    if chat_template is None and is_plain and sum(file.is_file() for file in path.rglob("*")) == len(files):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="phibatch-") as temporary:
        folder = Path(temporary, path.resolve().name)
        written = {} if chat_template is None else _replace_template(path, chat_template)
        for file in files:
            name = str(file.relative_to(path))
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if name not in written:
                _link_or_copy(file, folder / name)
        for name, text in written.items():
            (folder / name).write_text(text, encoding="utf-8")
        yield folder


def check_bos(folder: Path) -> None:
    """See that a template which names the BOS token gets one: onnxruntime-genai renders an unknown name as nothing.

    Raises:
        ModelError: the template names `bos_token` and tokenizer_config.json does not.
    """
    config = read_json(folder / TOKENIZER_CONFIG)
    template = config.get("chat_template") or (folder / TEMPLATE).read_text(encoding="utf-8")
    if "bos_token" in template and not config.get("bos_token"):
        raise ModelError("the chat template names bos_token, and tokenizer_config.json gives none")


def _replace_template(path: Path, chat_template: str) -> dict[str, str]:
    """The files that give a folder its template, by name: onnxruntime-genai takes the configuration's first."""
    config = {key: value for key, value in read_json(path / TOKENIZER_CONFIG).items() if key != "chat_template"}
    return {TEMPLATE: chat_template, TOKENIZER_CONFIG: json.dumps(config, indent=2, ensure_ascii=False)}


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system
        shutil.copy2(source, target)
