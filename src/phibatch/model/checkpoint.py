"""A transformers checkpoint: what it must hold, and the copy of it that is logged, which can load no code."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from phibatch.errors import ModelError
from phibatch.model.folder import TOKENIZER, has_chat_template, is_inside, link_or_copy, read_json

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.md", "LICENSE*", "NOTICE*")
"""The files of a checkpoint that are logged: weights as safetensors, and text. No code, and no pickle."""

CODE_KEYS = {"auto_map", "attn_implementation", "_attn_implementation", "experts_implementation"}
"""Keys by which a configuration has transformers load code from files or from a hub."""


def missing_extra() -> str | None:
    """What to say where transformers or torch is not installed; None where both are."""
    missing = [name for name in ("transformers", "torch") if find_spec(name) is None]
    if not missing:
        return None
    return f"a transformers model needs {' and '.join(missing)} to be installed: install phibatch[transformers]"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checked folder of a causal language model.

    Attributes:
        path: the folder.
        config: its `config.json`.
    """

    path: Path
    config: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> Self:
        """Check a folder.

        Raises:
            ModelError: transformers is not installed, or the folder is not such a model, or its architecture is none
                of transformers' own. The sentence names what is missing.
        """
        if missing := missing_extra():
            raise ModelError(missing)
        absent = [name for name in (CONFIG, TOKENIZER) if not (path / name).is_file()]
        if absent:
            raise ModelError(f"{path} is not a transformers checkpoint: {' and '.join(absent)} missing")
        if (path / ADAPTER).is_file():
            raise ModelError(f"{path} is an adapter: merge it into its base model, and log that")
        config = read_json(path / CONFIG)
        _check_architecture(path / CONFIG, config)
        _check_weights(path)
        generation = path / GENERATION_CONFIG
        if (read_json(generation) if generation.is_file() else config).get("eos_token_id") is None:
            raise ModelError(f"{path} names no eos_token_id, so its answers would not end")
        if not has_chat_template(path):
            raise ModelError(
                f"{path} has no chat template: neither chat_template.jinja nor tokenizer_config.json gives one"
            )
        return cls(path, config)

    @contextmanager
    def stage(self, dtype: str | None = None) -> Iterator[Path]:
        """A temporary copy, by hard links where it can, with nothing in it that could load code.

        Args:
            dtype: how the weights are to be computed with, `float32` for instance; None is as the checkpoint says.
        """
        with tempfile.TemporaryDirectory(prefix="phibatch-") as temporary:
            folder = Path(temporary, "checkpoint")
            folder.mkdir()
            for file in sorted({file for pattern in FILES for file in self.path.glob(pattern) if file.is_file()}):
                link_or_copy(file, folder / file.name)
            for file in (folder / CONFIG, folder / "tokenizer_config.json"):
                if file.is_file():
                    content = _without_code(read_json(file))
                    if dtype and file.name == CONFIG:
                        content = {key: value for key, value in content.items() if key != "torch_dtype"}
                        content["dtype"] = dtype
                    # A new file: the old one may be the user's own, under a second name.
                    file.unlink()
                    file.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
            yield folder


def _check_architecture(file: Path, config: dict[str, Any]) -> None:
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise ModelError(
            f"{file} names the architecture {name}, which is not a causal language model of transformers"
            f" {transformers.__version__} itself; code from a model's folder is never run"
        )
    if config.get("quantization_config"):
        raise ModelError(f"{file} describes quantised weights, which need kernels that transformers fetches as code")


def _check_weights(path: Path) -> None:
    if (path / WEIGHTS).is_file():
        return
    if not (path / INDEX).is_file():
        raise ModelError(f"{path} is not a transformers checkpoint: {WEIGHTS} missing; pickled weights are not taken")
    weight_map = read_json(path / INDEX).get("weight_map")
    files = sorted(set(weight_map.values())) if isinstance(weight_map, dict) else []
    for name in files:
        if not is_inside(name) or "/" in name:
            raise ModelError(f"{path / INDEX} names {name}, which is outside the folder")
        if not (path / name).is_file():
            raise ModelError(f"{path} is not a transformers checkpoint: {name} missing")
    if not files:
        raise ModelError(f"{path / INDEX} names no weights")


def _without_code(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_code(item) for key, item in value.items() if key not in CODE_KEYS}
    if isinstance(value, list):
        return [_without_code(item) for item in value]
    return value
