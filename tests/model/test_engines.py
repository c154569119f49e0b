"""What every engine with weights promises, of each of them."""

import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from phibatch import demo
from phibatch.contract import EngineName, ErrorCode, FinishReason, GenerationParams, Message, Request
from phibatch.model.engine.base import EngineOptions, load_engine

PROMPTS = pq.read_table(demo.PROMPTS).to_pylist()
FOLDERS = {EngineName.GENAI: demo.MODEL_DIR, EngineName.TRANSFORMERS: demo.TWIN_DIR}


@pytest.fixture(scope="module", params=FOLDERS, ids=str)
def engine(request):
    return load_engine(FOLDERS[request.param], "digest", EngineOptions(request.param, batch_size=8, threads=2))


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
