import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phibatch.contract import PARAMETERS, ROLES, GenerationParams, Message, Request, Usage, build_messages, build_params


def test_parameters_are_the_dataclass_fields():
    """The list of parameters that both sides loop over is the record's own."""
    assert set(PARAMETERS) == set(GenerationParams.__dataclass_fields__)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"max_tokens": 0}, "max_tokens is 0; it must be a whole number from 1"),
        ({"max_tokens": 1.5}, "max_tokens is 1.5; it must be a whole number"),
        ({"temperature": -0.1}, "temperature is -0.1; it must be a number from 0 up to 2"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0}, "top_p is 0; it must be a number above 0 up to 1"),
        ({"top_k": True}, "top_k is True"),
        ({"seed": "x"}, "seed is 'x'"),
        ({"stop": ["a", ""]}, "stop must be a list of non-empty strings"),
    ],
)
def test_a_parameter_out_of_bounds_is_refused(values, sentence):
    """A value out of its bounds is one sentence with the name, the value and the bounds."""
    with pytest.raises(ValueError, match="^" + sentence.replace(".", r"\.")):
        build_params(values)


def test_whole_numbers_may_arrive_as_doubles():
    """A whole number in a double is that number, since tables and MLflow write doubles."""
    assert build_params({"max_tokens": 7.0, "stop": "x"}) == GenerationParams(max_tokens=7, stop=("x",))


def test_the_jobs_json_reads_back():
    """The compact form holds OpenAI's words, a seed of 60 bits survives it, and nulls are absent."""
    text = json.dumps(
        {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "seed": 2**60 + 1, "stop": ["."]}
    )
    expected = Request(GenerationParams(max_tokens=3, seed=2**60 + 1, stop=(".",)), messages=(Message("user", "hi"),))
    assert Request.from_json(text) == expected
    nulls = {name: None for name in PARAMETERS if name not in {"max_tokens", "seed", "stop"}}
    assert Request.from_json(json.dumps({**json.loads(text), **nulls})) == expected


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([], "messages is empty"),
        (["hi"], r"messages\[0\] is not an object"),
        (
            [{"role": "robot", "content": "x"}],
            r"messages\[0\]\.role is 'robot'; it must be one of system, user, assistant",
        ),
        ([{"role": "user", "content": None}], r"messages\[0\]\.content is not text"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"messages\[0\]\.content is not text"),
    ],
)
def test_what_is_no_conversation_is_refused(messages, sentence):
    """A conversation has messages, each with a known role and text."""
    with pytest.raises(ValueError, match=sentence):
        build_messages(messages)


def test_total_tokens_are_prompt_and_completion():
    """`total_tokens` is derived, so that it can not disagree."""
    assert Usage(3, 4, 1).as_dict() == {
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "cached_tokens": 1,
        "total_tokens": 7,
    }


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from([*ROLES, "robot"]), "content": st.text(max_size=8) | st.none()}),
    max_size=4,
)
bodies = st.fixed_dictionaries(
    {"messages": messages | json_values}, optional=dict.fromkeys((*PARAMETERS, "other"), json_values)
)


@settings(max_examples=400, deadline=None)
@given(body=bodies)
def test_any_body_is_a_request_or_a_sentence(body):
    """What the job sends is read, or refused by a ValueError; nothing else is ever raised."""
    try:
        request = Request.from_json(json.dumps(body))
    except ValueError:
        return
    assert request.messages[-1].role == "user"
    assert [(each.role, each.content) for each in request.messages] == [
        (each["role"], each["content"]) for each in body["messages"]
    ]
