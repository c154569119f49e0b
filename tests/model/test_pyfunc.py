from concurrent.futures import ThreadPoolExecutor

import mlflow
import pandas as pd
import pyarrow.parquet as pq
import pytest

import phibatch
from phibatch import demo
from phibatch.errors import InputError, ModelError

TUTORIAL = "<|system|>You are a stand-up comedian.<|end|><|user|>Tell me a joke about atom<|end|><|assistant|>"
JOKE = "Why don't scientists trust atoms? Because they make up everything!"
SPAIN = [{"role": "user", "content": "What is the capital of Spain?"}]


@pytest.fixture(scope="module", params=["demo_model", "chat_model"])
def model(request):
    """Both variants, which keep one contract."""
    return mlflow.pyfunc.load_model(request.getfixturevalue(request.param).uri)


def test_the_tutorials_prompt_is_answered(model):
    """A prompt with its own control tokens is passed through, and answered whole, in OpenAI's shape."""
    response = model.predict({"prompt": TUTORIAL})
    assert response[0]["choices"][0]["message"] == {"role": "assistant", "content": JOKE}
    assert response[0]["choices"][0]["finish_reason"] == "stop"
    fields = {"id", "object", "created", "model", "choices", "usage", "error", "generation_seconds"}
    assert set(response[0]) == {*fields, "engine", "engine_version"}
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
    assert (response[0]["engine"], response[0]["engine_version"]) == ("echo", f"phibatch {phibatch.__version__}")


@pytest.mark.parametrize(
    ("columns", "lengths"),
    [
        ({"max_tokens": [1, 3, 30]}, [1, 3, 7]),
        ({"max_tokens": [1.0, None, 2.0]}, [1, 7, 2]),
        ({"max_tokens": [None, None, None]}, [7, 7, 7]),
        ({"stop": [["Spain"], None, ["§", "The"]]}, [4, 7, 1]),
        ({"stop": ["Spain", None, "The"]}, [4, 7, 1]),
    ],
    ids=str,
)
def test_parameters_hold_row_by_row(model, columns, lengths):
    """A row's own parameters are its own, whole or with gaps, as numbers of either kind, and as a text or a list."""
    responses = model.predict(pd.DataFrame({"messages": [SPAIN] * 3, **columns}))
    assert [response["error"]["message"] for response in responses] == [None] * 3
    counts = [response["usage"]["completion_tokens"] for response in responses]
    assert [min(count, 7) for count in counts] == lengths


def test_a_rows_own_parameters_go_before_those_for_all(model):
    """`params` are for the rows that say nothing; seeds tell rows apart and repeat themselves."""
    frame = pd.DataFrame({"messages": [SPAIN] * 3, "max_tokens": [None, 2, None]})
    responses = model.predict(frame, params={"max_tokens": 1})
    assert [response["usage"]["completion_tokens"] for response in responses] == [1, 2, 1]
    coin = [{"role": "user", "content": "Flip a coin."}]
    frame = pd.DataFrame({"messages": [coin] * 24, "seed": [*range(12), *range(12)]})
    texts = [each["choices"][0]["message"]["content"] for each in model.predict(frame, params={"temperature": 1.0})]
    assert texts[:12] == texts[12:]
    assert len(set(texts)) > 1


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"max_tokens": ["many"]}, "max_tokens is 'many'; it must be a whole number from 1 up to 2147483647"),
        ({"max_tokens": [1.5]}, "max_tokens is 1.5; it must be a whole number from 1 up to 2147483647"),
        ({"top_k": [2**40]}, "top_k is 1099511627776.0; it must be a whole number from 0 up to 2147483647"),
        ({"stop": [5]}, "stop is 5.0; it must be a list of non-empty strings"),
        ({"stop": [[None]]}, "stop must be a list of non-empty strings"),
    ],
    ids=str,
)
def test_a_bad_parameter_fails_its_row_alone(model, columns, sentence):
    """A value out of its bounds is that row's error, and its neighbour is answered."""
    values = {name: [*column, None] for name, column in columns.items()}
    failed, answered = model.predict(pd.DataFrame({"messages": [SPAIN] * 2, **values}))
    assert failed["error"] == {"code": "invalid_request", "message": sentence}
    assert type(failed["error"]["code"]) is str
    assert "Madrid" in answered["choices"][0]["message"]["content"]


def test_both_variants_count_alike_and_agree(demo_model, chat_model):
    """On the same 120 prompts the int4 model and its twin count equal prompt tokens, and at least 95 % answer alike."""
    prompts = pq.read_table(demo.PROMPTS).to_pandas().head(120)
    messages = [
        [*([{"role": "system", "content": row.system}] if row.system else []), {"role": "user", "content": row.prompt}]
        for row in prompts.itertuples()
    ]
    frame = pd.DataFrame({"messages": messages})
    onnx, twin = (mlflow.pyfunc.load_model(each.uri).predict(frame) for each in (demo_model, chat_model))
    assert [each["usage"]["prompt_tokens"] for each in onnx] == [each["usage"]["prompt_tokens"] for each in twin]
    answers = [[each["choices"][0]["message"]["content"] for each in responses] for responses in (onnx, twin)]
    assert sum(left == right for left, right in zip(*answers, strict=True)) >= 0.95 * 120


@pytest.mark.parametrize("variant", ["demo_model", "chat_model"])
def test_an_engine_of_another_format_is_refused(request, variant):
    """A model is not run by an engine that can not read it."""
    model = mlflow.pyfunc.load_model(request.getfixturevalue(variant).uri)
    other = "transformers" if variant == "demo_model" else "genai"
    with pytest.raises(ModelError, match=f"the {other} engine can not run a model of .* format; set model.engine to"):
        model.predict({"messages": SPAIN}, params={"engine": other})


@pytest.mark.parametrize(
    "rows", [pd.DataFrame({"prmpt": ["a", "b"]}), ["a", "b"], "a"], ids=["misspelt", "list", "text"]
)
def test_an_input_without_anything_to_answer_is_refused(model, rows):
    """MLflow drops what the signature does not name; rows are not dropped with it."""
    with pytest.raises(InputError, match="the input has neither messages nor a prompt"):
        model.predict(rows)


def test_a_scoring_servers_threads_take_turns(model):
    """Calls from several threads at once are each answered as alone."""
    questions = [[{"role": "user", "content": text}] for text in ("Flip a coin.", "What is the capital of Spain?")]
    alone = [model.predict({"messages": each})[0]["choices"] for each in questions]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda each: model.predict({"messages": each})[0]["choices"], questions * 6))
    assert together == alone * 6
