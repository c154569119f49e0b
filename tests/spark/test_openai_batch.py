"""Files of the OpenAI Batch API, in and out."""

import json

import pytest
from openai.types.chat import ChatCompletion
from pydantic import BaseModel, ConfigDict

from phibatch.config import InputConfig
from phibatch.errors import ConfigError, OutputError
from phibatch.job.openai_batch import parse_lines
from phibatch.job.pipeline import run_batch
from phibatch.job.prompts import build_requests, check_columns
from phibatch.job.publish import find_output

pytestmark = pytest.mark.usefixtures("demo_model")

# The three requests of https://platform.openai.com/docs/guides/batch, the last one without its conversation.
DOCUMENTED = """\
{"custom_id": "request-1", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "gpt-3.5-turbo-0125", \
"messages": [{"role": "system", "content": "You are a helpful assistant."},\
{"role": "user", "content": "Hello world!"}],\
"max_tokens": 1000}}
{"custom_id": "request-2", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "gpt-3.5-turbo-0125", \
"messages": [{"role": "system", "content": "You are an unhelpful assistant."},\
{"role": "user", "content": "Hello world!"}],\
"max_tokens": 1000}}
{"custom_id": "request-3", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "gpt-3.5-turbo-0125"}}
"""


REASONING, ANSWER = '"reasoning": {"maximum": 1.50}', '"answer": {"const": "\\u00e9\\n"}'
ORDERS = (f"{REASONING}, {ANSWER}", f"{ANSWER}, {REASONING}")


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ErrorBody(Strict):
    """https://platform.openai.com/docs/guides/error-codes: what `body` holds of a request that failed."""

    message: str
    type: str
    param: str | None
    code: str | None


class Response(Strict):
    status_code: int
    request_id: str
    body: dict


class Failure(Strict):
    code: str
    message: str


class Line(Strict):
    """The request output object, https://platform.openai.com/docs/api-reference/batch/request-output."""

    id: str
    custom_id: str
    response: Response | None
    error: Failure | None


def body(content="hello", **fields):
    return {"messages": [{"role": "user", "content": content}], **fields}


def line(custom_id="a", **fields):
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body(), **fields}


@pytest.fixture
def batch(spark, job, tmp_path):
    """Run a batch file and give its lines by custom_id."""

    def run(text, **sections):
        path = tmp_path / "requests.jsonl"
        path.write_text(text if isinstance(text, str) else "".join(json.dumps(each) + "\n" for each in text))
        output = {"path": str(tmp_path / "answers.jsonl"), "format": "openai-batch"}
        config = job(str(path), **{"input": {"format": "openai-batch"}, "output": output, **sections})
        summary = run_batch(spark, config)
        lines = [Line.model_validate_json(text) for text in (tmp_path / "answers.jsonl").read_text().splitlines()]
        return summary, {each.custom_id: each for each in lines}

    return run


def test_the_documented_file_comes_back_in_the_documented_shape(batch, tmp_path):
    """Three requests, one malformed: two completions of OpenAI's type, one error, each under its custom_id."""
    _, lines = batch(DOCUMENTED, model={"engine": "auto"}, generation={"max_tokens": 40})
    assert sorted(lines) == ["request-1", "request-2", "request-3"]
    for name in ("request-1", "request-2"):
        response = lines[name].response
        assert (response.status_code, lines[name].error) == (200, None)
        completion = ChatCompletion.model_validate(response.body, strict=True)
        assert completion.choices[0].message.content
        assert completion.choices[0].finish_reason in {"stop", "length"}
        assert completion.usage.total_tokens == completion.usage.prompt_tokens + completion.usage.completion_tokens
        assert completion.model == "models:/demo/1"
    failed = lines["request-3"]
    assert failed.response.status_code == 400
    assert ErrorBody.model_validate(failed.response.body["error"]).code == "invalid_request"
    assert failed.error.message == "body.messages is not a list of objects with role and content"
    assert (tmp_path / "answers.jsonl").is_file()


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"method": "GET"}, "method is not POST"),
        ({"url": "/v1/embeddings"}, "url is not /v1/chat/completions"),
        ({"body": [1]}, "the line has no body"),
        ({"body": body(tools=[{"type": "function"}])}, "body.tools is not supported"),
        ({"body": body(stream=True)}, "body.stream is not supported"),
        ({"body": body(presence_penalty=0.5)}, "body.presence_penalty is not supported"),
        ({"body": body(max_tokens="9")}, "body.max_tokens is not a whole number from 1"),
        ({"body": body(max_tokens=1.5)}, "body.max_tokens is not a whole number from 1"),
        ({"body": body(max_tokens=0)}, "max_tokens is 0; it must be"),
        ({"body": body(stop=[1])}, "body.stop is not text or a list of texts"),
        ({"body": body(response_format="json")}, "body.response_format is not an object"),
        ({"body": body([{"type": "image_url", "image_url": {"url": "x"}}])}, "the content of a message is not text"),
        ({"body": body(7)}, "the content of a message is not text"),
        ({"body": {"messages": [{"role": 7, "content": "x"}]}}, "unknown role 'null' in messages"),
        ({"custom_id": 7}, "the line has no custom_id of text"),
    ],
)
def test_what_can_not_be_given_is_refused(spark, given, reason, job):
    """With the reason, and never by leaving out what was asked for."""
    text = spark.createDataFrame([(json.dumps(line(**given)),)], "value string")
    config = InputConfig(path="x", format="openai-batch")
    table = parse_lines(text)
    requests = build_requests(table, check_columns(table, config), config, job("x").generation)
    (row,) = requests.select("_reason").collect()
    assert (row["_reason"] or "").startswith(reason)


def test_what_changes_nothing_is_let_through(batch):
    """Neutral values of what is not supported, OpenAI's newer words, parts of text, and each line's own parameters."""
    neutral = {
        "stream": False,
        "tools": None,
        "presence_penalty": 0,
        "logit_bias": {},
        "user": "me",
        "metadata": {"a": "b"},
    }
    _, lines = batch(
        [
            line("neutral", body=body("one two three", **neutral)),
            line("newer", body=body("one two three", max_completion_tokens=2)),
            line("parts", body=body([{"type": "text", "text": "one"}, {"type": "text", "text": "two"}])),
            line("stop", body=body("one two three", stop="two")),
            line("big seed", body=body("one", temperature=0.5, seed=2**62 + 1)),
            line(
                "developer",
                body={"messages": [{"role": "developer", "content": "x"}, {"role": "user", "content": "hi"}]},
            ),
        ]
    )
    said = {name: each.response.body["choices"][0]["message"]["content"] for name, each in lines.items()}
    assert said == {
        "neutral": "one two three",
        "newer": "one two",
        "parts": "one\ntwo",
        "stop": "one ",
        "big seed": "one",
        "developer": "hi",
    }


def test_a_schemas_properties_keep_their_order(spark, job):
    """As they stand in the line, they stand in the request."""
    schemas = [
        f'{{"type": "json_schema", "json_schema": {{"schema": {{"properties": {{{both}}}}}}}}}' for both in ORDERS
    ]
    start = (
        '{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [{"role": "user", '
    )
    texts = [(f'{start}"content": "hi"}}], "response_format": {schema}}}}}',) for schema in schemas]
    table = parse_lines(spark.createDataFrame(texts, "value string"))
    config = InputConfig(path="x", format="openai-batch")
    requests = build_requests(table, check_columns(table, config), config, job("x").generation)
    rows = requests.select("_reason", "_params.response_format").collect()
    assert [row["_reason"] for row in rows] == [None, None]
    found = [json.loads(row["response_format"]) for row in rows]
    assert [list(each["json_schema"]["schema"]["properties"].items()) for each in found] == [
        [("reasoning", {"maximum": 1.5}), ("answer", {"const": "\u00e9\n"})],
        [("answer", {"const": "\u00e9\n"}), ("reasoning", {"maximum": 1.5})],
    ]


def test_lines_that_are_no_json_have_their_answer_too(batch):
    """Each under the hash of its text; empty lines are none."""
    _, lines = batch(f"oops\n\n[1]\n{json.dumps(line('good'))}\n")
    reasons = sorted(each.error.message for name, each in lines.items() if name != "good")
    assert reasons == ["the line is not a JSON object", "the line is not a JSON object"]
    assert lines["good"].error is None


def test_several_answers_are_several_choices(batch):
    """`n` of a body: so many choices, the first of which is the one without it; the prompt's tokens count once."""
    text = "What is the capital of Spain?"
    _, lines = batch(
        [
            line("one", body=body(text, temperature=0.9, seed=5)),
            line("three", body=body(text, temperature=0.9, seed=5, n=3)),
        ],
        model={"engine": "auto"},
    )
    one, three = (ChatCompletion.model_validate(lines[name].response.body, strict=True) for name in ("one", "three"))
    assert [choice.index for choice in three.choices] == [0, 1, 2]
    assert three.choices[0].message.content == one.choices[0].message.content
    assert three.usage.prompt_tokens == one.usage.prompt_tokens
    assert three.usage.completion_tokens > one.usage.completion_tokens


def test_a_batch_file_is_resumed(batch, spark, tmp_path):
    """The next run does what is new, and the file has all answers; a file that no run has made is not touched."""
    batch([line("a")])
    summary, lines = batch([line("a"), line("b")])
    assert (summary.skipped, summary.rows) == (1, 1)
    assert sorted(lines) == ["a", "b"]
    assert find_output(spark, str(tmp_path / "answers.jsonl"), "parquet").format == "openai-batch"
    mine = tmp_path / "mine.jsonl"
    mine.write_text("mine")
    with pytest.raises(OutputError, match="no run has made it"):
        batch([line("a")], output={"path": str(mine), "format": "openai-batch"})
    assert mine.read_text() == "mine"


def test_settings_that_a_batch_file_can_not_have_are_refused(job):
    """A template, other columns, a table."""
    for settings in ({"template": "{x}"}, {"columns": {"prompt": "x"}}):
        with pytest.raises(ConfigError, match="openai-batch is a file of requests"):
            job("x", input={"format": "openai-batch", **settings})
    with pytest.raises(ConfigError, match="set path, not table"):
        job("x", output={"path": None, "table": "t", "format": "openai-batch"})
