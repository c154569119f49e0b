import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from phibatch import demo
from phibatch.contract import EngineName, GenerationParams, ModelFormat, Request
from phibatch.model.engine.base import EngineOptions, load_engine
from phibatch.model.engine.row import Row

# The suite's own modules.
sys.path.insert(0, str(Path(__file__).parent))

from architectures import ARCHITECTURES
from reference import NEW_TOKENS, Answer, Built, build_prompt


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Built]:
    """A tiny model by the name of its architecture, built once."""
    models: dict[str, Built] = {}

    def build(name: str) -> Built:
        if name not in models:
            models[name] = Built(ARCHITECTURES[name], tmp_path_factory.mktemp("model"))
        return models[name]

    return build


@pytest.fixture(scope="session")
def words() -> list[tuple[str, int]]:
    """Words of one token each, which are so wherever they stand."""
    vocabulary = Tokenizer.from_file(str(demo.TWIN_DIR / "tokenizer.json")).get_vocab()
    return [(token.replace("Ġ", " "), number) for token, number in sorted(vocabulary.items()) if _is_word(token)]


def _is_word(token: str) -> bool:
    return token.startswith("Ġ") and token[1:].isascii() and token[1:].isalpha()


@pytest.fixture
def generate(monkeypatch: pytest.MonkeyPatch, words: list[tuple[str, int]]) -> Callable[..., dict[int, Answer]]:
    """Have an engine answer prompts of given lengths greedily; gives each answer by the length of its prompt.

    The prompt of a length is always the same one.
    """
    steps: dict[tuple[int, ...], list[tuple[int, Any]]] = {}
    step = Row.step

    def watch(row: Row, logits: Any) -> int:
        token = step(row, logits)
        steps.setdefault(tuple(row.prompt), []).append((token, np.array(logits)))
        return token

    monkeypatch.setattr(Row, "step", watch)

    def go(folder: Path, engine: EngineName, lengths: Sequence[int], batch_size: int = 4) -> dict[int, Answer]:
        steps.clear()
        checkpoint = engine is EngineName.TRANSFORMERS
        model_format = ModelFormat.TRANSFORMERS if checkpoint else ModelFormat.ONNX
        options = EngineOptions(engine, batch_size, 2, model_format=model_format)
        prompts = [build_prompt(words, length) for length in lengths]
        params = GenerationParams(max_tokens=NEW_TOKENS)
        found = load_engine(folder, str(folder), options).generate(
            [Request(params, prompt=text) for text, _ in prompts]
        )
        answers = {}
        for (_, ids), completion in zip(prompts, found, strict=True):
            told = steps.get(tuple(ids), [])
            tokens, logits = [token for token, _ in told], np.array([each for _, each in told])
            answers[len(ids)] = Answer(ids, tokens, logits, completion)
        return answers

    return go
