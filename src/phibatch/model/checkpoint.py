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
from phibatch.model.folder import (
    LEFT_OUT,
    TEMPLATE,
    TOKENIZER,
    TOKENIZER_CONFIG,
    check_links,
    has_chat_template,
    is_inside,
    read_json,
)
from phibatch.model.whole import check_pointers, check_safetensors

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TEXTS = (
    *(TOKENIZER, TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", TEMPLATE),
    *("README.md", "LICENSE*", "NOTICE*"),
)
FILES = (CONFIG, GENERATION_CONFIG, INDEX, "*.safetensors", *TEXTS)
"""Patterns of all that a checkpoint is made of. No code, and no pickle."""

FOREIGN_KEYS = {
    *("auto_map", "transformers_weights"),
    *("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"),
}
"""Keys by which a configuration has transformers load code, from files or a hub, or weights from other files."""


def check_extra() -> None:
    """Raise ModelError where transformers or torch is not installed."""
    missing = [name for name in ("transformers", "torch") if find_spec(name) is None]
    if missing:
        raise ModelError(
            f"a transformers model needs {' and '.join(missing)} to be installed: install phibatch[transformers]"
        )


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checked folder of a causal language model.

    Attributes:
        path: the folder.
        config: its `config.json`, without `FOREIGN_KEYS`.
        eos_token_ids: the tokens that end a turn.
        weights: the names of its safetensors files.
    """

    path: Path
    config: dict[str, Any]
    eos_token_ids: tuple[int, ...]
    weights: tuple[str, ...]

    @classmethod
    def open(cls, path: Path, *, needs_template: bool = True) -> Self:
        """Check a folder; one that is to be given a chat template needs none.

        Raises:
            ModelError: transformers is not installed, or the folder is not such a model, or is not whole, or its
                architecture is none of transformers' own. The sentence names what is missing.
        """
        absent = [name for name in (CONFIG, TOKENIZER) if not (path / name).is_file()]
        if absent:
            raise ModelError(f"{path} is not a transformers checkpoint: {' and '.join(absent)} missing")
        if (path / "adapter_config.json").is_file():
            raise ModelError(f"{path} is an adapter: merge it into its base model, and log that")
        check_links(path)
        found = {file for pattern in FILES for file in path.glob(pattern) if file.is_file()}
        check_pointers(file for file in found if not any(file.match(pattern) for pattern in LEFT_OUT))
        check_extra()
        read_json(path / TOKENIZER)
        config = _without_foreign(read_json(path / CONFIG))
        _check_architecture(path / CONFIG, config)
        if needs_template and not has_chat_template(path):
            raise ModelError(
                f"{path} has no chat template: neither chat_template.jinja nor tokenizer_config.json gives one"
            )
        weights = _read_weights(path)
        for name in weights:
            check_safetensors(path / name)
        return cls(path, config, _read_eos(path, config), weights)

    @contextmanager
    def stage(self, dtype: str | None = None, chat_template: str | None = None) -> Iterator[Path]:
        """A temporary copy with nothing in it that could load code; what is copied whole are links.

        Args:
            dtype: how the weights are to be computed with, `float32` for instance; None is as the checkpoint says.
            chat_template: in place of the checkpoint's own.
        """
        written = {CONFIG: self.config}
        for name in (GENERATION_CONFIG, TOKENIZER_CONFIG):
            if (self.path / name).is_file():
                written[name] = _without_foreign(read_json(self.path / name))
        # Both ways of loading must stop at the same tokens.
        written[GENERATION_CONFIG] = {**written.get(GENERATION_CONFIG, {}), "eos_token_id": list(self.eos_token_ids)}
        if dtype:
            written[CONFIG] = {key: value for key, value in self.config.items() if key != "torch_dtype"}
            written[CONFIG]["dtype"] = dtype
        copied = {file.name for pattern in TEXTS for file in self.path.glob(pattern) if file.is_file()}
        copied |= {*self.weights, *(() if WEIGHTS in self.weights else (INDEX,))}
        with tempfile.TemporaryDirectory(prefix="phibatch-") as temporary:
            folder = Path(temporary, "checkpoint")
            folder.mkdir()
            if chat_template is not None:
                written.get(TOKENIZER_CONFIG, {}).pop("chat_template", None)
                (folder / TEMPLATE).write_text(chat_template, encoding="utf-8")
                copied.discard(TEMPLATE)
            for name in sorted(copied - set(written)):
                (folder / name).symlink_to((self.path / name).resolve())
            for name, content in written.items():
                (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
            yield folder


def context_length(config: Any) -> int | None:
    """Prompt and completion together, in tokens, by a transformers `PreTrainedConfig`; None where it has no bound."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


def _check_architecture(file: Path, config: dict[str, Any]) -> None:
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    architectures, model_type = config.get("architectures"), str(config.get("model_type"))
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    if name is None or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type) != name:
        raise ModelError(
            f"{file} names the architecture {name} of type {model_type}, which is not a causal language model of"
            f" transformers {transformers.__version__} itself; code from a model's folder is never run"
        )
    if _has_key(config, "quantization_config"):
        raise ModelError(f"{file} describes quantised weights, which need kernels that transformers fetches as code")
    values = {key: value for key, value in config.items() if key != "model_type"}
    if context_length(transformers.AutoConfig.for_model(model_type, **values)) is None:
        raise ModelError(f"{file} gives no max_position_embeddings, so the length of its context is not known")


def _read_eos(path: Path, config: dict[str, Any]) -> tuple[int, ...]:
    file = path / GENERATION_CONFIG
    generation = read_json(file) if file.is_file() else {}
    value = generation.get("eos_token_id", config.get("eos_token_id"))
    ids = value if isinstance(value, list) else [value]
    if not ids or not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise ModelError(f"{path} names no eos_token_id, so its answers would not end")
    return tuple(ids)


def _read_weights(path: Path) -> tuple[str, ...]:
    if (path / WEIGHTS).is_file():
        return (WEIGHTS,)
    if not (path / INDEX).is_file():
        raise ModelError(f"{path} is not a transformers checkpoint: {WEIGHTS} missing; pickled weights are not taken")
    weight_map = read_json(path / INDEX).get("weight_map")
    names = sorted(set(weight_map.values())) if isinstance(weight_map, dict) else []
    for name in names:
        if not is_inside(name) or "/" in name or not name.endswith(".safetensors"):
            raise ModelError(f"{path / INDEX} names {name}, which is not a safetensors file of the folder")
        if not (path / name).is_file():
            raise ModelError(f"{path} is not a transformers checkpoint: {name} missing")
    if not names:
        raise ModelError(f"{path / INDEX} names no weights")
    return tuple(names)


def _has_key(value: Any, key: str) -> bool:
    if isinstance(value, dict):
        return bool(value.get(key)) or any(_has_key(item, key) for item in value.values())
    return isinstance(value, list) and any(_has_key(item, key) for item in value)


def _without_foreign(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_foreign(item) for key, item in value.items() if key not in FOREIGN_KEYS}
    if isinstance(value, list):
        return [_without_foreign(item) for item in value]
    return value
