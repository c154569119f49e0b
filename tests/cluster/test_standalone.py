import pandas as pd
import pyarrow.parquet as pq
import pytest

from phibatch import demo
from phibatch.job.pipeline import run_batch

BAD = {"null prompt": "invalid_request", "unknown role": "invalid_request", "over-long": "context_length_exceeded"}


@pytest.fixture
def thousand(write_parquet):
    """1,000 rows, greedy and sampled by turns, three of them bad."""
    prompts = pq.read_table(demo.PROMPTS).to_pylist()
    rows = []
    for place in range(997):
        prompt = prompts[place % len(prompts)]
        sampling = {"temperature": 0.8 if place % 2 else 0.0, "seed": place}
        rows.append({"custom_id": f"row-{place}", "prompt": prompt["prompt"], "system": prompt["system"], **sampling})
    rows += [
        {"custom_id": "null prompt"},
        {"custom_id": "unknown role", "messages": '[{"role": "robot", "content": "hi"}]'},
        {"custom_id": "over-long", "prompt": "word " * 3000},
    ]
    columns = ("custom_id", "prompt", "system", "messages", "temperature", "seed")
    return write_parquet([{name: row.get(name) for name in columns} for row in rows])


def read(path):
    return pd.read_parquet(path).set_index("custom_id").sort_index()


@pytest.mark.usefixtures("demo_model")
def test_a_cluster_answers_as_one_core_does(cluster, submit, spark, job, thousand, tmp_path):
    """1,000 rows: two workers of one core under spark-submit, and one task here, write the same table, bad rows too."""
    arguments = ("--input", thousand, "--output", str(tmp_path / "cluster"), "--model", "models:/demo@champion")
    done = submit(cluster.url, *arguments, "--set", "generation.max_tokens=24")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "997" in done.stdout
    here = {"generation": {"max_tokens": 24}, "model": {"engine": "auto"}, "job": {"partitions": 1}}
    run_batch(spark, job(thousand, **here))
    table, alone = read(tmp_path / "cluster"), read(tmp_path / "output")
    for column in ("response", "finish_reason", "error", "request_key", "model"):
        assert table[column].tolist() == alone[column].tolist(), column
    # How much of a prompt was found computed hangs on the rows before it; nothing else does.
    counted = [[{**usage, "cached_tokens": 0} for usage in each["usage"]] for each in (table, alone)]
    assert counted[0] == counted[1]
    assert len(table) == 1000
    failed = table[table["response"].isna()]
    assert {name: error["code"] for name, error in failed["error"].items()} == BAD


@pytest.mark.soak
def test_the_chat_variant_runs_on_a_cluster(cluster, submit, chat_model, tmp_path):
    """The checkpoint reaches the workers with the model, and conversations have their trained answers."""
    arguments = (
        "--input",
        str(demo.CONVERSATIONS),
        "--output",
        str(tmp_path / "chat"),
        "--model",
        "models:/chat@champion",
    )
    done = submit(cluster.url, *arguments, "--set", "output.keep_columns=[expected]", "--set", "job.partitions=2")
    assert done.returncode == 0, done.stdout + done.stderr
    table = read(tmp_path / "chat")
    assert (table["response"] == table["expected"]).mean() >= 0.95
    assert set(table["model"]) == {chat_model.uri}
