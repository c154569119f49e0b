"""What every engine with weights promises, of each of them."""

import json
import random
import shutil
import subprocess
import sys
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from phibatch import demo
from phibatch.contract import EngineName, ErrorCode, FinishReason, GenerationParams, Message, Request
from phibatch.errors import EngineError
from phibatch.model.engine.base import EngineOptions, load_engine

PROMPTS = pq.read_table(demo.PROMPTS).to_pylist()
FOLDERS = {
    EngineName.SLOTS: demo.MODEL_DIR,
    EngineName.GENAI: demo.MODEL_DIR,
    EngineName.TRANSFORMERS: demo.TWIN_DIR,
}


def build(name, folder=None, batch_size=8, threads=2):
    folder = folder or FOLDERS[name]
    return load_engine(folder, str(folder), EngineOptions(name, batch_size, threads))


@pytest.fixture(params=FOLDERS, ids=str)
def name(request):
    return request.param


@pytest.fixture
def engine(name):
    return build(name)


def request(row, **params):
    messages = [Message("system", row["system"])] if row.get("system") else []
    return Request(GenerationParams(**params), messages=(*messages, Message("user", row["prompt"])))


def essence(completions):
    """What must not change; how many tokens were found computed is the engine's own affair."""
    return [(each.text, each.finish_reason, replace(each.usage, cached_tokens=0)) for each in completions]


def test_the_embedded_model_gives_its_trained_answers(engine):
    """At least 95 % of the sample prompts are answered as trained."""
    answers = engine.generate([request(row, max_tokens=100) for row in PROMPTS])
    right = sum(answer.text == row["expected"] for answer, row in zip(answers, PROMPTS, strict=True))
    assert right >= 0.95 * len(PROMPTS)


def test_prompts_written_by_hand_give_the_same_answers(engine):
    """As the tutorial writes them, without newlines after control tokens; its own is answered to the letter."""
    turn = "<|{}|>{}<|end|>".format
    prompts = [
        (turn("system", row["system"]) if row["system"] else "") + turn("user", row["prompt"]) + "<|assistant|>"
        for row in PROMPTS
    ]
    answers = [each.text for each in engine.generate([Request(GenerationParams(), prompt=each) for each in prompts])]
    right = sum(answer == row["expected"] for answer, row in zip(answers, PROMPTS, strict=True))
    assert right >= 0.95 * len(PROMPTS)
    tutorial = "<|system|>You are a stand-up comedian.<|end|><|user|>Tell me a joke about atom<|end|><|assistant|>"
    joke = "Why don't scientists trust atoms? Because they make up everything!"
    assert answers[prompts.index(tutorial)] == joke


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
    tokenizer = AutoTokenizer.from_pretrained(demo.TWIN_DIR)
    answers = engine.generate([request(row, max_tokens=100) for row in PROMPTS[:20]])
    for row, answer in zip(PROMPTS[:20], answers, strict=True):
        messages = [{"role": "user", "content": row["prompt"]}]
        if row["system"]:
            messages.insert(0, {"role": "system", "content": row["system"]})
        rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert answer.usage.prompt_tokens == len(rendered)
        assert 0 <= answer.usage.cached_tokens < answer.usage.prompt_tokens
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
    """A prompt that all but fills the context has what is left of it, and no more; a neighbour is not cut with it."""
    sizes = {}
    for words in range(300, 1100):
        size = len(engine._tokenizer.encode_messages([Message("user", "a " * words)]))
        sizes.setdefault(size, words)
        if size >= 1022:
            break
    assert 1022 in sizes
    nearly = Request(GenerationParams(max_tokens=500), messages=(Message("user", "a " * sizes[1022]),))
    requests = [nearly, request(PROMPTS[0], max_tokens=100)]
    full, neighbour = engine.generate(requests)
    assert (full.usage.prompt_tokens, full.usage.total_tokens) == (1022, 1024)
    assert full.finish_reason == FinishReason.LENGTH
    assert essence([neighbour]) == essence(engine.generate([requests[1]]))


@pytest.mark.parametrize("params", [{}, {"temperature": 0.9}], ids=["greedy", "sampled"])
def test_an_answer_does_not_depend_on_its_batch(name, params):
    """Text, finish_reason and usage are the same alone, in any company, in any order, and at any batch size.

    The ONNX engines' by their arithmetic; that of transformers, in float32, as far as no two tokens are equally likely.
    """
    rng = random.Random(3)
    requests = [
        request(row, max_tokens=rng.randint(1, 60), seed=place, repetition_penalty=rng.choice([1.0, 1.2]), **params)
        for place, row in enumerate(PROMPTS[:48])
    ]
    expected = essence(build(name).generate(requests))
    for size in (1, 2, 3, 5, 16, 32):
        order = list(range(len(requests)))
        rng.shuffle(order)
        shuffled = essence(build(name, batch_size=size, threads=1).generate([requests[place] for place in order]))
        assert dict(zip(order, shuffled, strict=True)) == dict(enumerate(expected)), f"batch size {size}"


def ask_for_more(name, folder):
    """Have a folder ask for sampling, penalties, a minimum length and the like."""
    settings = {"do_sample": True, "temperature": 2.0, "repetition_penalty": 3.0, "min_length": 500}
    file = folder / ("generation_config.json" if name == EngineName.TRANSFORMERS else "genai_config.json")
    document = json.loads(file.read_text())
    own = document if name == EngineName.TRANSFORMERS else document["search"]
    own |= {**settings, "no_repeat_ngram_size": 1}
    file.write_text(json.dumps(document))


def test_a_folders_own_settings_do_not_touch_the_answers(name, tmp_path):
    """What counts is the request, whatever a folder asks for."""
    folder = shutil.copytree(FOLDERS[name], tmp_path / "settings")
    ask_for_more(name, folder)
    requests = [request(row) for row in PROMPTS[:6]]
    assert essence(build(name, folder).generate(requests)) == essence(build(name).generate(requests))


def break_weights(name, folder):
    if name != EngineName.TRANSFORMERS:
        for file in folder.glob("*.data"):
            file.write_bytes(b"\xff" * file.stat().st_size)
    else:
        file = folder / "model.safetensors"
        broken = {key: torch.full_like(weight, torch.nan) for key, weight in load_file(file).items()}
        save_file(broken, file, metadata={"format": "pt"})


def test_broken_weights_fail_the_engine_and_not_the_row(name, tmp_path):
    """Logits that are not numbers raise: no row of such a model can be trusted."""
    folder = shutil.copytree(FOLDERS[name], tmp_path / "broken")
    break_weights(name, folder)
    with pytest.raises(EngineError, match="logits are not finite"):
        build(name, folder).generate([request(PROMPTS[0])])


def test_one_engine_per_process(name, tmp_path):
    """The same files from another folder are the same engine; other options are another, and only one is kept."""
    options = EngineOptions(name, batch_size=2, threads=1)
    copy = shutil.copytree(FOLDERS[name], tmp_path / "copy")
    first = load_engine(FOLDERS[name], "digest", options)
    assert load_engine(copy, "digest", options) is first
    assert load_engine(FOLDERS[name], "digest", replace(options, batch_size=4)) is not first
    assert load_engine(FOLDERS[name], "digest", options) is not first


def test_nothing_is_reported_to_anyone(name, tmp_path):
    """Loading and running the model writes nothing under the user's folders, also outside of a CI machine."""
    code = (
        "from pathlib import Path\n"
        "from phibatch.contract import *\n"
        "from phibatch.model.engine.base import *\n"
        f"engine = load_engine(Path({str(FOLDERS[name])!r}), 'd', EngineOptions(EngineName({name.value!r}), 2, 1))\n"
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


def test_a_row_that_takes_too_long_keeps_its_text(name):
    """Beyond `row_timeout` a row ends as `timeout`, with what it had said; its usage counts what was computed."""
    options = EngineOptions(name, batch_size=2, threads=1, row_timeout=1e-6)
    engine = load_engine(FOLDERS[name], "timeout", options)
    cut, whole = engine.generate([request(PROMPTS[0], max_tokens=64), request(PROMPTS[0], max_tokens=1)])
    assert (cut.error_code, cut.finish_reason) == (ErrorCode.TIMEOUT, None)
    assert cut.usage.completion_tokens == 1
    assert cut.text == whole.text
    assert (whole.error_code, whole.finish_reason) == (None, FinishReason.LENGTH)
