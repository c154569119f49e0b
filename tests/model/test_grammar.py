import json
import re

import pytest

from phibatch import demo
from phibatch.contract import EngineName, GenerationParams, Message, Request
from phibatch.errors import ConfigError
from phibatch.model.engine.base import EngineOptions, load_engine
from phibatch.model.grammar import build_grammar, check_response_format

FOLDERS = {
    EngineName.SLOTS: demo.MODEL_DIR,
    EngineName.GENAI: demo.MODEL_DIR,
    EngineName.TRANSFORMERS: demo.TWIN_DIR,
}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "sure": {"type": "boolean"}},
    "required": ["city", "sure"],
    "additionalProperties": False,
}
BY_SCHEMA = json.dumps({"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}})
BY_REGEX = json.dumps({"type": "regex", "regex": "(yes|no), [0-9]{3}"})


@pytest.fixture(params=FOLDERS, ids=str)
def engine(request):
    folder = FOLDERS[request.param]
    return load_engine(folder, str(folder), EngineOptions(request.param, 8, 2))


def ask(text="What is the capital of Spain?", **params):
    return Request(GenerationParams(**{"max_tokens": 100, **params}), messages=(Message("user", text),))


def test_answers_are_of_the_form_that_was_asked_for(engine):
    """By schema and by expression, greedy and sampled, beside rows without a form, every answer parses."""
    formats = [BY_SCHEMA, BY_REGEX, None] * 8
    made = [ask(response_format=wanted, temperature=0.9 * (n % 2), seed=n) for n, wanted in enumerate(formats)]
    answers = engine.generate(made)
    for wanted, answer in zip(formats, answers, strict=True):
        assert answer.error_code is None, answer.error_message
        if wanted == BY_SCHEMA:
            found = json.loads(answer.text)
            assert set(found) == {"city", "sure"}
            assert type(found["sure"]) is bool
        elif wanted == BY_REGEX:
            assert re.fullmatch("(yes|no), [0-9]{3}", answer.text)
    free = engine.generate([ask()])[0]
    assert answers[2].text == free.text == "The capital of Spain is Madrid."


def test_properties_are_answered_in_the_users_order(engine):
    """The model reasons before it answers where the schema says so, and the other way round."""
    orders = [["reasoning", "answer"], ["answer", "reasoning"]]
    kinds = {"reasoning": {"type": "string", "maxLength": 8}, "answer": {"enum": ["yes", "no"]}}
    schemas = [
        {"type": "object", "properties": {name: kinds[name] for name in order}, "required": order} for order in orders
    ]
    wanted = [
        json.dumps({"type": "json_schema", "json_schema": {"schema": {**schema, "additionalProperties": False}}})
        for schema in schemas
    ]
    answers = engine.generate([ask(response_format=each) for each in wanted])
    assert [list(json.loads(answer.text)) for answer in answers] == orders


def test_an_answer_that_is_cut_is_no_answer(engine):
    """A limit or a stop string within the form makes the row `invalid_output`, and what it cost is counted."""
    cut, stopped = engine.generate(
        [ask(response_format=BY_SCHEMA, max_tokens=3), ask(response_format=BY_REGEX, stop=(",",))]
    )
    assert [each.error_code for each in (cut, stopped)] == ["invalid_output"] * 2
    assert cut.error_message == "max_tokens cut the answer before it was of its response_format"
    assert stopped.error_message == "a stop string cut the answer before it was of its response_format"
    assert (cut.text, cut.usage.completion_tokens) == (None, 3)


def test_a_form_that_can_not_be_honoured_fails_its_row(engine):
    """A schema that is none is that row's own error, with the reason."""
    broken = json.dumps({"type": "json_schema", "json_schema": {"schema": {"type": "nope"}}})
    failed, answered = engine.generate([ask(response_format=broken), ask()])
    assert (failed.error_code, failed.error_message) == (
        "invalid_request",
        "response_format can not be honoured: Invalid type: nope",
    )
    assert answered.text


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "must be JSON with a type of text, json_object or json_schema or regex"),
        ('{"type": "xml"}', "must be JSON with a type of text"),
        ('{"type": "json_schema", "json_schema": {}}', "of type json_schema needs json_schema.schema"),
        ('{"type": "regex", "regex": 1}', "of type regex needs regex"),
    ],
)
def test_a_format_that_is_none_is_refused(text, sentence):
    """What is no response format is one sentence."""
    with pytest.raises(ValueError, match=sentence):
        GenerationParams(response_format=text)


def test_equal_formats_are_equal_requests():
    """White space does not tell requests apart, and `text` asks for nothing."""
    left, right = ('{"type": "regex", "regex": "a"}', '{"type":"regex","regex":"a"}')
    assert GenerationParams(response_format=left) == GenerationParams(response_format=right)
    assert GenerationParams(response_format='{"type": "text"}') == GenerationParams()


def test_a_form_for_all_rows_is_checked_before_anything_is_generated():
    """What the configuration asks for is refused by its name."""
    with pytest.raises(ConfigError, match=r"^generation.response_format can not be honoured: .*unclosed character"):
        check_response_format(json.dumps({"type": "regex", "regex": "[a"}))
    check_response_format(None)
    assert build_grammar('{"type": "json_object"}')
