import json

import pytest
from pyspark.sql import functions as F

from phibatch.config import GenerationConfig, InputConfig
from phibatch.job.plan import build_plan, count_partitions, count_plan
from phibatch.job.prompts import build_requests, check_columns, read_prompts


@pytest.fixture
def plan(spark, write_parquet):
    def build(rows, generation=None, digest="d1", keep_columns=()):
        settings = InputConfig(path=write_parquet(rows))
        prompts = read_prompts(spark, settings)
        columns = check_columns(prompts, settings)
        requests = build_requests(prompts, columns, settings, generation or GenerationConfig(), keep_columns)
        return build_plan(requests, digest)

    return build


def lines(plan):
    """Input rows with what becomes of them, by custom_id and then request_key."""
    rows = (
        plan.select(F.explode("rows").alias("row"), "request", "reason").select("row.*", "request", "reason").collect()
    )
    return sorted((row.asDict() for row in rows), key=lambda row: (row["custom_id"], row["reason"] or ""))


def test_equal_greedy_requests_are_generated_once(plan):
    """Under greedy decoding, rows that differ only in what sampling would use are one generation."""
    built = plan([{"custom_id": str(n), "prompt": f"q{n % 2}", "top_p": 0.5 + n / 100, "seed": n} for n in range(10)])
    counts = count_plan(built)
    assert (counts.rows, counts.rejected, counts.to_generate, counts.duplicates) == (10, 0, 2, 8)
    assert "seed" not in json.loads(lines(built)[0]["request"])


@pytest.mark.parametrize(("seed", "generations"), [(None, 4), (7, 1)])
def test_sampled_requests_are_generated_once_only_with_equal_seeds(plan, seed, generations):
    """Sampled rows are one generation when their seeds are given and equal; without seeds each has its own."""
    rows = [{"custom_id": str(n), "prompt": "q"} for n in range(4)]
    assert count_plan(plan(rows, GenerationConfig(temperature=0.8, seed=seed))).to_generate == generations


def test_a_missing_seed_comes_from_request_and_custom_id(plan):
    """The derived seed is the same on every run and in any order, and differs between rows and requests."""
    rows = [{"custom_id": str(n), "prompt": f"q{n % 2}"} for n in range(4)]
    sampled = GenerationConfig(temperature=0.8)
    first, again = (
        {row["custom_id"]: json.loads(row["request"])["seed"] for row in lines(plan(each, sampled))}
        for each in (rows, rows[::-1])
    )
    other = {row["custom_id"]: json.loads(row["request"])["seed"] for row in lines(plan(rows, sampled, digest="d2"))}
    assert first == again
    assert len({*first.values(), *other.values()}) == 8


def test_the_request_key_holds_messages_parameters_and_model(plan):
    """The key changes with each of the three, and with nothing else."""
    base = lines(plan([{"custom_id": "a", "prompt": "q"}]))[0]["request_key"]
    assert len(base) == 64
    assert lines(plan([{"custom_id": "b", "prompt": "q"}]))[0]["request_key"] == base
    keys = {
        base,
        lines(plan([{"custom_id": "a", "prompt": "r"}]))[0]["request_key"],
        lines(plan([{"custom_id": "a", "prompt": "q", "max_tokens": 5}]))[0]["request_key"],
        lines(plan([{"custom_id": "a", "prompt": "q"}], digest="d2"))[0]["request_key"],
        lines(plan([{"custom_id": "a", "prompt": "q"}], GenerationConfig(stop=("x",))))[0]["request_key"],
    }
    assert len(keys) == 5


def test_of_rows_with_one_custom_id_the_same_one_is_kept_in_any_order(plan):
    """A duplicate custom_id is rejected, and which row keeps the name does not hang on the table's order."""
    rows = [{"custom_id": "a", "prompt": prompt} for prompt in ("x", "y", "z", None)] + [
        {"custom_id": "b", "prompt": "x"}
    ]
    first, again = lines(plan(rows)), lines(plan(rows[::-1]))
    assert [(row["custom_id"], row["reason"] is None) for row in first] == [
        ("a", True),
        ("a", False),
        ("a", False),
        ("a", False),
        ("b", True),
    ]
    assert [row["request"] for row in first] == [row["request"] for row in again]
    assert (
        first[1]["reason"] == "duplicate custom_id: the input has it in another row too, and one row alone may keep it"
    )


def test_without_custom_id_rows_are_named_by_content_with_an_ordinal(plan):
    """Rows without an identity get the hash of their content, and repeats of it a number."""
    named = [row["custom_id"] for row in lines(plan([{"prompt": prompt} for prompt in ("x", "x", "y", "x")]))]
    names = sorted(named, key=len)
    assert len(names[0]) == len(names[1]) == 64
    assert {name[64:] for name in names[2:]} == {"-2", "-3"}
    assert len({name[:64] for name in names}) == 2


def test_kept_columns_stay_with_their_row(plan):
    """Rows that share a generation keep their own columns."""
    rows = [{"custom_id": str(n), "prompt": "q", "tag.x": n} for n in range(3)]
    built = plan(rows, keep_columns=("tag.x",))
    assert [(row["custom_id"], row["kept"]["tag.x"]) for row in lines(built)] == [("0", 0), ("1", 1), ("2", 2)]


@pytest.mark.parametrize(
    ("rows", "slots", "partitions"), [(0, 2, 2), (10, 2, 2), (256, 2, 2), (257, 2, 4), (10**6, 100, 7900)]
)
def test_partitions_are_whole_waves_of_the_slots(rows, slots, partitions):
    """Every slot has a partition in each wave, and no partition more than its rows."""
    assert count_partitions(rows, slots) == partitions


def test_ordinals_follow_the_kept_columns_and_not_the_tables_order(plan):
    """Rows alike but for a kept column have the same ordinal, and so the same sampled answer, in any order."""
    rows = [{"prompt": "q", "tag": n} for n in range(5)]
    first, again = (
        [(row["custom_id"], row["kept"]["tag"]) for row in lines(plan(each, keep_columns=("tag",)))]
        for each in (rows, rows[::-1])
    )
    assert first == again
