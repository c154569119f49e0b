import json
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest

from phibatch import demo
from phibatch.contract import EngineName, GenerationParams, Message, Request
from phibatch.errors import EngineError
from phibatch.model.engine.base import EngineOptions, load_engine
from phibatch.model.engine.batches import MAX_BATCH_TOKENS, plan_batches
from phibatch.model.engine.genai import GenaiEngine

PROMPTS = pq.read_table(demo.PROMPTS).to_pylist()


@pytest.fixture(scope="module")
def engine():
    return GenaiEngine(demo.MODEL_DIR, EngineOptions(EngineName.GENAI, batch_size=8, threads=2))


def request(row, **params):
    messages = [Message("system", row["system"])] if row.get("system") else []
    return Request(GenerationParams(**params), messages=(*messages, Message("user", row["prompt"])))


def essence(completions):
    return [(each.text, each.finish_reason, each.usage) for each in completions]


@pytest.mark.parametrize("params", [{}, {"temperature": 0.9}], ids=["greedy", "sampled"])
def test_an_answer_does_not_depend_on_its_batch(engine, params):
    """Text, finish_reason and usage are the same alone, in any company, in any order, and at any batch size."""
    rng = random.Random(3)
    requests = [
        request(row, max_tokens=rng.randint(1, 60), seed=place, repetition_penalty=rng.choice([1.0, 1.2]), **params)
        for place, row in enumerate(PROMPTS[:48])
    ]
    expected = essence(engine.generate(requests))
    for size in (1, 2, 3, 5, 16, 32):
        other = GenaiEngine(demo.MODEL_DIR, EngineOptions(EngineName.GENAI, batch_size=size, threads=1))
        order = list(range(len(requests)))
        rng.shuffle(order)
        shuffled = essence(other.generate([requests[place] for place in order]))
        assert dict(zip(order, shuffled, strict=True)) == dict(enumerate(expected)), f"batch size {size}"


def test_batches_fit_the_context_and_the_memory():
    """Whatever rows meet, padded length and limit stay within the context and the token budget, and none is lost."""
    rng = random.Random(1)
    context = 4096
    rows = []
    for _ in range(300):
        prompt = [0] * rng.randint(1, 4000)
        rows.append(SimpleNamespace(prompt=prompt, limit=rng.randint(1, context - len(prompt))))
    batches = list(plan_batches(rows, 8, context))
    assert sorted(map(id, rows)) == sorted(id(row) for batch in batches for row in batch)
    for batch in batches:
        length = max(len(row.prompt) for row in batch) + max(row.limit for row in batch)
        assert len(batch) <= 8
        assert length <= context
        assert len(batch) == 1 or length * len(batch) <= MAX_BATCH_TOKENS
    widths = [max(len(row.prompt) for row in batch) for batch in batches]
    assert all(left >= right for left, right in pairwise(widths))


def test_broken_weights_fail_the_engine_and_not_the_row(tmp_path):
    """Logits that are not numbers raise: no row of such a model can be trusted."""
    folder = shutil.copytree(demo.MODEL_DIR, tmp_path / "broken")
    for file in folder.glob("*.data"):
        file.write_bytes(b"\xff" * file.stat().st_size)
    engine = GenaiEngine(folder, EngineOptions(EngineName.GENAI, batch_size=2, threads=1))
    with pytest.raises(EngineError, match="logits are not finite"):
        engine.generate([request(PROMPTS[0])])


def test_one_engine_per_process(tmp_path):
    """The same files from another folder are the same engine; other options are another, and only one is kept."""
    options = EngineOptions(EngineName.GENAI, batch_size=2, threads=1)
    copy = shutil.copytree(demo.MODEL_DIR, tmp_path / "copy")
    first = load_engine(demo.MODEL_DIR, "digest", options)
    assert load_engine(copy, "digest", options) is first
    assert load_engine(demo.MODEL_DIR, "digest", replace(options, batch_size=4)) is not first
    assert load_engine(demo.MODEL_DIR, "digest", options) is not first


def test_the_folders_own_search_settings_do_not_touch_the_answers(engine, tmp_path):
    """A folder may ask for sampling, penalties or a minimum length; what counts is the request."""
    folder = shutil.copytree(demo.MODEL_DIR, tmp_path / "search")
    config = json.loads((folder / "genai_config.json").read_text())
    config["search"] |= {
        "do_sample": True,
        "temperature": 2.0,
        "repetition_penalty": 3.0,
        "min_length": 500,
        "no_repeat_ngram_size": 1,
    }
    (folder / "genai_config.json").write_text(json.dumps(config))
    other = GenaiEngine(folder, EngineOptions(EngineName.GENAI, batch_size=8, threads=2))
    requests = [request(row) for row in PROMPTS[:6]]
    assert essence(other.generate(requests)) == essence(engine.generate(requests))


def test_nothing_is_reported_to_anyone(tmp_path):
    """Loading and running the model writes nothing under the user's folders, also outside of a CI machine."""
    code = (
        "from phibatch import demo\n"
        "from phibatch.contract import *\n"
        "from phibatch.model.engine.base import *\n"
        "engine = load_engine(demo.MODEL_DIR, 'd', EngineOptions(EngineName.GENAI, 2, 1))\n"
        "print(engine.generate([Request(GenerationParams(max_tokens=1), prompt='hi')])[0].error_code)\n"
    )
    environment = {
        "HOME": str(tmp_path),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "PYTHONPATH": ":".join(filter(None, sys.path)),
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None"
    assert list(tmp_path.rglob("*")) == []
