import hashlib
import json
import re
from datetime import UTC, datetime

import pyarrow as pa
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
    def build(rows, generation=None, digest="d1", keep_columns=(), schema=None):
        settings = InputConfig(path=write_parquet(rows, schema=schema))
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
    assert re.fullmatch("v2:[0-9a-f]{64}", base)
    assert lines(plan([{"custom_id": "b", "prompt": "q"}]))[0]["request_key"] == base
    keys = {
        base,
        lines(plan([{"custom_id": "a", "prompt": "r"}]))[0]["request_key"],
        lines(plan([{"custom_id": "a", "prompt": "q", "max_tokens": 5}]))[0]["request_key"],
        lines(plan([{"custom_id": "a", "prompt": "q"}], digest="d2"))[0]["request_key"],
        lines(plan([{"custom_id": "a", "prompt": "q"}], GenerationConfig(stop=("x",))))[0]["request_key"],
    }
    assert len(keys) == 5


def test_keys_and_requests_are_the_same_in_any_session(spark):
    """No setting of the session is in a key, a row's name or a request; two orders of a schema's keys are one key."""
    schema = '{"type": "json_schema", "json_schema": {"schema": {"properties": {"reasoning": {}, "answer": {}}}}}'
    turned = '{"json_schema": {"schema": {"properties": {"answer": {}, "reasoning": {}}}}, "type": "json_schema"}'
    frame = "prompt string, messages array<struct<role:string,content:string,at:timestamp>>, temperature double"
    frame += ", response_format string"
    conversation = [("user", "q", datetime(2026, 1, 1, tzinfo=UTC)), ("assistant", None, None), ("user", "r", None)]
    rows = [
        ("q", None, 0.7, schema),
        ("q", None, 0.7, turned),
        ("q", None, None, "{oops"),
        (None, conversation, 0.0, ""),
    ]
    config = InputConfig(path="unused")

    def look(**settings):
        session = spark.newSession()
        for key, value in settings.items():
            session.conf.set(f"spark.sql.{key.replace('_', '.')}", value)
        table = session.createDataFrame(rows, frame)
        requests = build_requests(table, check_columns(table, config), config, GenerationConfig())
        return lines(group(identify(requests, "d1")))

    base = look()
    assert look(jsonGenerator_ignoreNullFields="false") == base
    assert look(ansi_enabled="false", caseSensitive="true", session_timeZone="Asia/Tokyo") == base
    shared = [row for row in base if row["request"] and "reasoning" in row["request"]]
    assert len({row["request_key"] for row in base}) == 3
    assert len({row["request_key"] for row in shared}) == 1
    assert {json.loads(row["request"])["response_format"] for row in shared} == {schema, turned}


def test_columns_are_found_by_any_case_in_a_case_sensitive_session(spark):
    """A table's `Prompt` is the job's `prompt` whatever the session says."""
    session = spark.newSession()
    session.conf.set("spark.sql.caseSensitive", "true")
    table = session.createDataFrame([("a", "q")], "Custom_ID string, Prompt string")
    config = InputConfig(path="unused")
    requests = build_requests(table, check_columns(table, config), config, GenerationConfig())
    (row,) = lines(group(identify(requests, "d1")))
    assert (row["custom_id"], row["reason"]) == ("a", None)


def test_a_parameter_at_its_default_is_not_in_the_key(plan):
    """Written out or left out, it is the same request; so is one before and after a new parameter came."""
    written = {"prompt": "q", "max_tokens": 300, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    written |= {"repetition_penalty": 1.0, "response_format": '{"type": "text"}'}
    kinds = {str: pa.string(), int: pa.int64(), float: pa.float64()}
    schema = pa.schema([(name, kinds[type(value)]) for name, value in written.items()])
    schema = schema.append(pa.field("stop", pa.list_(pa.string())))
    (out,) = lines(plan([{"prompt": "q"}]))
    (whole,) = lines(plan([{**written, "stop": []}], schema=schema))
    assert whole["request_key"] == out["request_key"]
    text = '{"messages":[{"role":"user","content":"q"}]}\nd1'
    assert out["request_key"] == f"v2:{hashlib.sha256(text.encode()).hexdigest()}"


def test_a_rows_own_name_is_as_it_was(plan):
    """The hash of the content that stands in for a `custom_id` is that of phibatch 0.1.0."""
    schema = pa.schema([("prompt", pa.string()), ("system", pa.string()), ("max_tokens", pa.int64())])
    (row,) = lines(plan([{"prompt": "q", "system": None, "max_tokens": 5}], schema=schema))
    text = '{"prompt":"q","max_tokens":5,"_prompt":"q"}'
    assert row["custom_id"] == hashlib.sha256(text.encode()).hexdigest()


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
