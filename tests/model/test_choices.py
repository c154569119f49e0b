"""Several answers for one row."""

import mlflow
import pandas as pd
import pytest

from phibatch.contract import RESPONSE_COLUMNS
from phibatch.job.output import read_responses
from phibatch.job.pipeline import run_batch

pytestmark = pytest.mark.usefixtures("demo_model")

WARM = {"temperature": 1.5, "seed": 3, "max_tokens": 12}


@pytest.fixture
def run(spark, job, write_parquet, tmp_path):
    def run(name, rows=None, **sections):
        rows = rows or [{"custom_id": "a", "prompt": "Roll a die."}, {"custom_id": "b", "prompt": None}]
        settings = {"model": {"engine": "slots"}, **sections}
        settings["output"] = {"path": str(tmp_path / name), **sections.get("output", {})}
        config = job(write_parquet(rows, name), **settings)
        summary = run_batch(spark, config)
        written = read_responses(spark, config.output)
        return summary, {row["custom_id"]: row for row in written.collect()}, written.columns

    return run


def test_choices_are_a_column(run):
    """One entry an answer; the first is `response` and the answer of `n: 1`; the table is as ever without `n`."""
    _, one, columns = run("one", generation=WARM)
    assert columns == list(RESPONSE_COLUMNS)
    _, three, columns = run("three", generation={**WARM, "n": 3})
    assert columns == [*RESPONSE_COLUMNS, "choices"]
    row = three["a"]
    assert [choice["index"] for choice in row["choices"]] == [0, 1, 2]
    assert row["choices"][0]["response"] == row["response"] == one["a"]["response"]
    assert len({choice["response"] for choice in row["choices"]}) > 1
    assert {choice["finish_reason"] for choice in row["choices"]} <= {"stop", "length"}
    assert row["usage"]["prompt_tokens"] == one["a"]["usage"]["prompt_tokens"]
    assert row["usage"]["completion_tokens"] > one["a"]["usage"]["completion_tokens"]
    assert (three["b"]["error"]["code"], three["b"]["choices"]) == ("invalid_request", [])


def test_a_number_of_answers_belongs_to_the_request(run):
    """Another `n` is another request, the same is done already, and no `n` is the request that it always was."""
    rows = [{"custom_id": "a", "prompt": "Tell me about tea"}]
    _, before, _ = run("out", rows, generation=WARM)
    summary, after, _ = run("out", rows, generation={**WARM, "n": 2})
    assert summary.rows == 1
    assert before["a"]["request_key"] != after["a"]["request_key"]
    assert run("out", rows, generation={**WARM, "n": 2})[0].rows == 0
    summary, again, _ = run("out", rows, generation={**WARM, "n": 1})
    assert again["a"]["request_key"] == before["a"]["request_key"]


def test_choices_stay_when_the_next_run_has_one(run):
    """The column is the table's from then on, with the only answer of new rows in it."""
    old, new = ({"custom_id": key, "prompt": f"Tell me about {key}"} for key in ("tea", "rain"))
    run("out", [old], generation={**WARM, "n": 2})
    summary, table, columns = run("out", [new], generation=WARM)
    assert (summary.rows, columns[-1]) == (1, "choices")
    assert [len(table[key]["choices"]) for key in ("tea", "rain")] == [2, 1]


def test_rows_may_have_numbers_of_their_own(run):
    """In the column that the configuration names; a column that happens to be called `n` is data."""
    rows = [{"custom_id": str(n), "prompt": "hello", "n": n} for n in (1, 2, 500)]
    _, table, columns = run("data", rows)
    assert "choices" not in columns
    _, table, _ = run("named", rows, input={"columns": {"n": "n"}}, generation=WARM)
    assert [len(table[key]["choices"]) for key in ("1", "2", "500")] == [1, 2, 0]
    assert table["500"]["error"]["message"].startswith("n is 500; it must be a whole number")


def test_predict_gives_several_choices():
    """Sampled ones differ; greedy ones are one, given so many times; one answer is as without `n`."""
    model = mlflow.pyfunc.load_model("models:/demo@champion")
    frame = pd.DataFrame({"messages": [[{"role": "user", "content": "Roll a die."}]]})
    (warm,) = model.predict(frame, params={**WARM, "n": 4})
    assert len({choice["message"]["content"] for choice in warm["choices"]}) > 1
    (greedy,) = model.predict(frame, params={"n": 2, "max_tokens": 12})
    (one,) = model.predict(frame, params={"max_tokens": 12})
    assert [choice["message"] for choice in greedy["choices"]] == [one["choices"][0]["message"]] * 2
    assert greedy["usage"]["completion_tokens"] == 2 * one["usage"]["completion_tokens"]


def test_counting_generates_nothing():
    """`count_only` tells of each row its prompt's tokens or its failure, as the run would."""
    model = mlflow.pyfunc.load_model("models:/demo@champion")
    frame = pd.DataFrame({"prompt": ["<|user|>hello<|end|><|assistant|>", "word " * 3000]})
    answered = model.predict(frame)
    for engine in ("slots", "genai"):
        short, long = model.predict(frame, params={"count_only": True, "engine": engine})
        assert short["usage"]["prompt_tokens"] == answered[0]["usage"]["prompt_tokens"]
        assert short["usage"]["completion_tokens"] == 0
        assert long["error"]["code"] == "context_length_exceeded"
