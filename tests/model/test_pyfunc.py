import mlflow
import pandas as pd
import pytest

TUTORIAL = "<|system|>You are a stand-up comedian.<|end|><|user|>Tell me a joke about atom<|end|><|assistant|>"
SPAIN = [{"role": "user", "content": "What is the capital of Spain?"}]


@pytest.fixture(scope="module")
def model(demo_model):
    return mlflow.pyfunc.load_model(demo_model.uri)


def test_the_tutorials_prompt_is_answered(model):
    """A prompt with its own control tokens is passed through, and answered in OpenAI's shape."""
    response = model.predict({"prompt": TUTORIAL})
    assert "atoms" in response[0]["choices"][0]["message"]["content"]
    assert response[0]["choices"][0]["finish_reason"] == "stop"
    assert set(response[0]) == {"id", "object", "created", "model", "choices", "usage", "error", "generation_seconds"}
    assert response[0]["object"] == "chat.completion"
    assert all(value is not None for value in response[0].values())
    assert type(response[0]["choices"][0]["finish_reason"]) is str


def test_the_tutorials_messages_are_answered(model):
    """A conversation is formatted with the chat template, and its usage adds up."""
    response = model.predict({"messages": SPAIN})
    assert "Madrid" in response[0]["choices"][0]["message"]["content"]
    usage = response[0]["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_every_row_is_answered_in_order(model):
    """All rows of a frame are answered, prompts and conversations mixed; a bad one is its own error."""
    frame = pd.DataFrame(
        {"prompt": [TUTORIAL, None, None, None], "messages": [None, SPAIN, [{"role": "robot", "content": "x"}], None]}
    )
    responses = model.predict(frame)
    assert [len(response["choices"]) for response in responses] == [1, 1, 0, 0]
    assert "Madrid" in responses[1]["choices"][0]["message"]["content"]
    assert responses[1]["error"] == {"code": None, "message": None}
    assert [response["error"]["code"] for response in responses[2:]] == ["invalid_request"] * 2
    assert "it must be one of system, user, assistant" in responses[2]["error"]["message"]
    assert responses[3]["error"]["message"] == "the row has neither messages nor a prompt"


def test_params_hold_for_all_rows(model):
    """`params` are the generation parameters, checked as a row's own are."""
    cut = model.predict({"messages": SPAIN}, params={"max_tokens": 1, "stop": ["§"]})[0]
    assert (cut["usage"]["completion_tokens"], cut["choices"][0]["finish_reason"]) == (1, "length")
    bad = model.predict({"messages": SPAIN}, params={"temperature": 9.0})[0]
    assert bad["error"] == {
        "code": "invalid_request",
        "message": "temperature is 9.0; it must be a number from 0 up to 2",
    }


def test_the_echo_engine_is_chosen_by_name(model):
    """The same logged model answers with the stand-in when asked to."""
    response = model.predict({"messages": SPAIN}, params={"engine": "echo"})
    assert response[0]["choices"][0]["message"]["content"] == SPAIN[0]["content"]
