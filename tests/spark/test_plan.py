import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyspark.sql import functions as F

from phibatch.config import GenerationConfig, InputConfig
from phibatch.job.plan import group, identify, lay_out
from phibatch.job.prompts import build_requests, check_columns, read_prompts
from phibatch.job.stage import PARTITION_BITS


@pytest.fixture
def plan(spark, write_parquet):
    def build(rows, generation=None, digest="d1", keep_columns=()):
        settings = InputConfig(path=write_parquet(rows))
        prompts = read_prompts(spark, settings)
        columns = check_columns(prompts, settings)
        requests = build_requests(prompts, columns, settings, generation or GenerationConfig(), keep_columns)
        return group(identify(requests, digest))

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
    assert [len(row["rows"]) for row in built.collect()] == [5, 5]
    assert "seed" not in json.loads(lines(built)[0]["request"])


@pytest.mark.parametrize(("seed", "generations"), [(None, 4), (7, 1)])
def test_sampled_requests_are_generated_once_only_with_equal_seeds(plan, seed, generations):
    """Sampled rows are one generation when their seeds are given and equal; without seeds each has its own."""
    rows = [{"custom_id": str(n), "prompt": "q"} for n in range(4)]
    assert plan(rows, GenerationConfig(temperature=0.8, seed=seed)).count() == generations


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


WORDS = st.sampled_from(["a", "b", "c", "-"])
TABLE = st.lists(
    st.fixed_dictionaries(
        {
            "custom_id": st.none() | WORDS,
            "prompt": st.none() | WORDS | st.just(" "),
            "temperature": st.sampled_from([0.0, 0.8, 3.0]),
            "seed": st.none() | st.integers(min_value=0, max_value=1),
        }
    ),
    min_size=1,
    max_size=30,
)
SCHEMA = "custom_id string, prompt string, temperature double, seed bigint"
COLUMNS = ("custom_id", "prompt", "temperature", "seed")


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=TABLE, order=st.randoms())
def test_any_table_has_one_outcome_a_row_in_any_order(spark, rows, order):
    """Every row is in just one group; a custom_id is answered once at the most; and shuffling changes none of it."""
    config = InputConfig(path="unused")

    def outcomes(table):
        frame = spark.createDataFrame([tuple(row[name] for name in COLUMNS) for row in table], SCHEMA)
        requests = build_requests(frame, check_columns(frame, config), config, GenerationConfig())
        return lines(group(identify(requests, "d")))

    first = outcomes(rows)
    assert len(first) == len(rows)
    answered = [row["custom_id"] for row in first if row["reason"] is None]
    assert len(answered) == len(set(answered))
    assert {row["custom_id"] for row in rows if row["custom_id"]} <= {row["custom_id"] for row in first}
    shuffled = list(rows)
    order.shuffle(shuffled)

    def key(row):
        return [str(row[name]) for name in ("custom_id", "request_key", "reason")]

    assert sorted(outcomes(shuffled), key=key) == sorted(first, key=key)


def test_kept_columns_stay_with_their_row(plan):
    """Rows that share a generation keep their own columns."""
    rows = [{"custom_id": str(n), "prompt": "q", "tag.x": n} for n in range(3)]
    built = plan(rows, keep_columns=("tag.x",))
    assert [(row["custom_id"], row["kept"]["tag.x"]) for row in lines(built)] == [("0", 0), ("1", 1), ("2", 2)]


def test_requests_that_begin_alike_lie_together(spark, plan, request):
    """Generations are laid out by their text, those rejected first, with places that grow."""
    for key, value in {"shuffle.partitions": 4, "adaptive.coalescePartitions.enabled": "false"}.items():
        before = spark.conf.get(f"spark.sql.{key}")
        request.addfinalizer(lambda key=key, before=before: spark.conf.set(f"spark.sql.{key}", before))
        spark.conf.set(f"spark.sql.{key}", value)
    systems = [f"{n % 3} is a number" for n in range(60)]
    rows = [{"prompt": f"q{n}" if n % 10 else None, "system": system} for n, system in enumerate(systems)]
    laid = sorted(lay_out(plan(rows)).collect(), key=lambda row: row["place"])
    assert [row["request"] is None for row in laid] == [True] * 6 + [False] * 54
    requests = [row["request"] for row in laid[6:]]
    assert requests == sorted(requests)
    assert len({row["place"] for row in laid}) == 60
    assert len({row["place"] >> PARTITION_BITS for row in laid}) > 1


def test_ordinals_follow_the_kept_columns_and_not_the_tables_order(plan):
    """Rows alike but for a kept column have the same ordinal, and so the same sampled answer, in any order."""
    rows = [{"prompt": "q", "tag": n} for n in range(5)]
    first, again = (
        [(row["custom_id"], row["kept"]["tag"]) for row in lines(plan(each, keep_columns=("tag",)))]
        for each in (rows, rows[::-1])
    )
    assert first == again
