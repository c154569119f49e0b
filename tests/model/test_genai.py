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
from phibatch.contract import EngineName, ErrorCode, FinishReason, GenerationParams, Message, Request
from phibatch.errors import EngineError
from phibatch.model.engine.base import EngineOptions, load_engine
from phibatch.model.engine.genai import MAX_BATCH_TOKENS, GenaiEngine, plan_batches

PROMPTS = pq.read_table(demo.PROMPTS).to_pylist()


@pytest.fixture(scope="module")
def engine():
    return GenaiEngine(demo.MODEL_DIR, EngineOptions(EngineName.GENAI, batch_size=8, threads=2))


def request(row, **params):
    messages = [Message("system", row["system"])] if row.get("system") else []
    return Request(GenerationParams(**params), messages=(*messages, Message("user", row["prompt"])))


def essence(completions):
    return [(each.text, each.finish_reason, each.usage) for each in completions]


def test_the_embedded_model_gives_its_trained_answers(engine):
    """At least 95 % of the sample prompts are answered as trained."""
    answers = engine.generate([request(row, max_tokens=100) for row in PROMPTS])
    right = sum(answer.text == row["expected"] for answer, row in zip(answers, PROMPTS, strict=True))
    assert right >= 0.95 * len(PROMPTS)


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


def test_the_limit_is_the_rows_own_and_says_length(engine):
    """Each row of a batch stops at its own `max_tokens`: a shorter one is a prefix of the longer, and says `length`."""
    longest = engine.generate([request(PROMPTS[0], max_tokens=200)])[0]
    total = longest.usage.completion_tokens
    assert longest.finish_reason == FinishReason.STOP
    limits = list(range(1, total + 2))
    cut = engine.generate([request(PROMPTS[0], max_tokens=limit) for limit in limits])
    for limit, answer in zip(limits, cut, strict=True):
        assert answer.usage.completion_tokens == min(limit, total)
        # At just its own length the answer is cut before its end-of-turn token was seen.
        assert answer.finish_reason == (FinishReason.STOP if limit > total else FinishReason.LENGTH)
        assert longest.text.startswith(answer.text)


def test_usage_is_the_tokenizers_count(engine):
    """Prompt tokens are the rendered chat's, and completion tokens are the answer's, by transformers' tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo.TWIN_DIR)
    answers = engine.generate([request(row, max_tokens=100) for row in PROMPTS[:20]])
    for row, answer in zip(PROMPTS[:20], answers, strict=True):
        messages = [{"role": "user", "content": row["prompt"]}]
        if row["system"]:
            messages.insert(0, {"role": "system", "content": row["system"]})
        rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert answer.usage.prompt_tokens == len(rendered)
        assert answer.usage.cached_tokens == 0
        again = len(tokenizer.encode(answer.text, add_special_tokens=False))
        # The model may spell a word in more tokens than the tokenizer would, never in fewer.
        assert answer.usage.completion_tokens >= again


def test_a_stop_string_cuts_before_itself(engine):
    """The text ends before the first stop string, also one that lies across tokens; the reason is `stop`."""
    whole = engine.generate([request(PROMPTS[0], max_tokens=100)])[0].text
    middle = whole[3 : len(whole) // 2]
    answers = engine.generate(
        [request(PROMPTS[0], max_tokens=100, stop=stop) for stop in [(middle,), ("§", whole[-2:]), ("§",)]]
    )
    assert [each.text for each in answers] == [whole[:3], whole[: whole.find(whole[-2:])], whole]
    assert {each.finish_reason for each in answers} == {FinishReason.STOP}
    assert answers[0].usage.completion_tokens < answers[2].usage.completion_tokens


def test_a_prompt_beyond_the_context_fails_alone(engine):
    """An over-long row is `context_length_exceeded`; its neighbours are answered as without it."""
    long = Request(GenerationParams(), messages=(Message("user", "word " * 3000),))
    alone = essence(engine.generate([request(PROMPTS[0]), request(PROMPTS[1])]))
    first, failed, second = engine.generate([request(PROMPTS[0]), long, request(PROMPTS[1])])
    assert essence([first, second]) == alone
    assert (failed.error_code, failed.text, failed.usage.total_tokens) == (ErrorCode.CONTEXT_LENGTH_EXCEEDED, None, 0)
    assert "context of 1024" in failed.error_message


def test_the_context_cuts_a_row_that_nearly_fills_it(engine):
    """A prompt that fits leaves room for the rest of the context, and no more; a neighbour is not cut with it."""
    tokenizer = engine._tokenizer
    words = "a " * 100
    ids = len(tokenizer.encode_messages([Message("user", words)]))
    per_word = (len(tokenizer.encode_messages([Message("user", words * 2)])) - ids) / 100
    nearly = Request(
        GenerationParams(max_tokens=500), messages=(Message("user", "a " * int((1000 - ids) / per_word + 100)),)
    )
    requests = [nearly, request(PROMPTS[0], max_tokens=100)]
    full, neighbour = engine.generate(requests)
    assert full.usage.prompt_tokens < 1024
    assert full.usage.total_tokens <= 1024
    if full.finish_reason == FinishReason.LENGTH:
        assert full.usage.total_tokens == 1024
    assert essence([neighbour]) == essence(engine.generate([requests[1]]))


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
