import json

import pyarrow as pa
import pytest

from phibatch.config import GenerationConfig, InputConfig
from phibatch.errors import InputError
from phibatch.job.prompts import build_requests, check_columns, read_prompts


@pytest.fixture
def requests(spark, write_parquet):
    """The requests of some rows, as dicts, in the rows' order."""

    def build(rows, schema=None, generation=None, **config):
        path = write_parquet(rows, schema=schema)
        settings = InputConfig(path=path, **config)
        prompts = read_prompts(spark, settings)
        columns = check_columns(prompts, settings)
        built = build_requests(prompts, columns, settings, generation or GenerationConfig())
        return [row.asDict(recursive=True) for row in built.collect()]

    return build


def user(text):
    return {"role": "user", "content": text}


def system(text):
    return {"role": "system", "content": text}


MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string()), ("name", pa.string())]))


def test_a_prompt_becomes_a_conversation_with_the_rows_own_system_message(requests):
    """The row's system message wins over the configuration's, and an empty one means none."""
    rows = [{"prompt": "q", "system": value} for value in ("own", None, "")]
    found = [row["_messages"] for row in requests(rows, system="default")]
    assert found == [[system("own"), user("q")], [system("default"), user("q")], [user("q")]]


def test_messages_come_as_structs_or_as_json(requests):
    """Both forms give the same conversation, and the default system message only joins one without its own."""
    conversations = [[user("a")], [system("s"), user("a"), {"role": "assistant", "content": ""}, user("b")]]
    typed = requests(
        [{"messages": each} for each in conversations], pa.schema([("messages", MESSAGES)]), system="default"
    )
    text = requests([{"messages": json.dumps(each)} for each in conversations], system="default")
    expected = [[system("default"), user("a")], conversations[1]]
    assert [row["_messages"] for row in typed] == [row["_messages"] for row in text] == expected
    assert [row["_reason"] for row in typed + text] == [None] * 4


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": None}, "the row has no prompt: prompt is null"),
        ({"prompt": " \n\t\u3000"}, "prompt is blank"),
        ({"messages": "nope"}, "messages is not a JSON array of objects with role and content"),
        (
            {"messages": '{"role":"user","content":"x"}'},
            "messages is not a JSON array of objects with role and content",
        ),
        ({"messages": "[]"}, "messages is empty"),
        ({"messages": "[null]"}, "unknown role 'null' in messages; it must be one of system, user, assistant"),
        (
            {"messages": '[{"role":"robot","content":"x"}]'},
            "unknown role 'robot' in messages; it must be one of system, user, assistant",
        ),
        (
            {"messages": '[{"content":"x"}]'},
            "unknown role 'null' in messages; it must be one of system, user, assistant",
        ),
        ({"messages": '[{"role":"user"}]'}, "the content of a message is not text"),
        ({"messages": '[{"role":"user","content":5}]'}, "the content of a message is not text"),
        (
            {"messages": '[{"role":"user","content":[{"type":"text","text":"x"}]}]'},
            "the content of a message is not text",
        ),
        ({"messages": '[{"role":"user","content":" "}]'}, "the content of a message is blank"),
        ({"messages": json.dumps([user("a"), system("b"), user("c")])}, "a system message may only come first"),
        (
            {"messages": json.dumps([user("a"), {"role": "assistant", "content": "b"}])},
            "the last message is not the user's",
        ),
        ({"messages": json.dumps([user("a")]), "prompt": "b"}, "the row has both a prompt and messages"),
        (
            {"messages": json.dumps([system("a"), user("b")]), "system": "c"},
            "the row has a system column and a system message",
        ),
        ({"prompt": "q", "max_tokens": 0.0}, "max_tokens is 0.0; it must be a whole number from 1 up to 2147483647"),
        ({"prompt": "q", "max_tokens": 1.5}, "max_tokens is 1.5; it must be a whole number from 1 up to 2147483647"),
        (
            {"prompt": "q", "max_tokens": float("inf")},
            "max_tokens is Infinity; it must be a whole number from 1 up to 2147483647",
        ),
        ({"prompt": "q", "temperature": 2.5}, "temperature is 2.5; it must be a number from 0 up to 2"),
        ({"prompt": "q", "top_p": 0.0}, "top_p is 0.0; it must be a number above 0 up to 1"),
        ({"prompt": "q", "top_k": -1}, "top_k is -1; it must be a whole number from 0 up to 2147483647"),
        ({"prompt": "q", "stop": ["a", ""]}, "stop holds an empty string"),
    ],
)
def test_a_bad_row_has_its_reason(requests, row, reason):
    """Each kind of bad row is told apart, beside a good row that stays good."""
    schema = pa.schema(
        [
            ("prompt", pa.string()),
            ("messages", pa.string()),
            ("system", pa.string()),
            ("max_tokens", pa.float64()),
            ("temperature", pa.float64()),
            ("top_p", pa.float64()),
            ("top_k", pa.int32()),
            ("stop", pa.list_(pa.string())),
        ]
    )
    found = requests([row, {"prompt": "good"}], schema)
    assert [each["_reason"] for each in found] == [reason, None]


def test_a_rows_parameters_override_the_configurations(requests):
    """Null and NaN leave the configuration's value, doubles may hold whole numbers, and a seed keeps all its bits."""
    schema = pa.schema(
        [("prompt", pa.string()), ("max_tokens", pa.float64()), ("seed", pa.int64()), ("stop", pa.string())]
    )
    rows = [
        {"prompt": "a", "max_tokens": 7.0, "seed": 2**60 + 1, "stop": "."},
        {"prompt": "b", "max_tokens": float("nan")},
        {"prompt": "c"},
    ]
    found = [
        row["_params"] for row in requests(rows, schema, GenerationConfig(max_tokens=5, temperature=0.5, stop=("x",)))
    ]
    assert [(each["max_tokens"], each["seed"], each["stop"]) for each in found] == [
        (7, 2**60 + 1, ["."]),
        (5, None, ["x"]),
        (5, None, ["x"]),
    ]
    assert {each["temperature"] for each in found} == {0.5}


def test_a_template_builds_the_prompt_from_other_columns(requests):
    """`input.template` fills in columns of any plain type, and a row that lacks one is rejected."""
    rows = [{"text": "long", "n": 3}, {"text": None, "n": 4}]
    found = requests(rows, template="Summarise {{in}} {n} words: {text}")
    assert found[0]["_messages"] == [user("Summarise {in} 3 words: long")]
    assert found[1]["_reason"] == "the row has no prompt: prompt is null"


def test_column_names_may_be_set(requests):
    """`input.columns` names the table's columns, also those with dots in them."""
    found = requests([{"my.id": 5, "q": "hi"}], columns={"custom_id": "my.id", "prompt": "q"})
    assert (found[0]["_custom_id"], found[0]["_messages"]) == ("5", [user("hi")])


@pytest.mark.parametrize(
    ("row", "config", "sentence"),
    [
        (
            {"promt": "x"},
            {},
            "the input has no column prompt and no column messages: did you mean promt? (its columns are promt)",
        ),
        ({"zzz": 1}, {}, "the input has no column prompt and no column messages: its columns are zzz"),
        (
            {"prompt": "x"},
            {"columns": {"seed": "sead"}},
            "the input has no column sead (input.columns.seed): its columns are prompt",
        ),
        (
            {"text": "x"},
            {"template": "{txt}"},
            "the input has no column txt: did you mean text? (its columns are text)",
        ),
        ({"prompt": 5}, {}, "the column prompt is bigint; it must be string"),
        ({"prompt": "x", "custom_id": 1.5}, {}, "the column custom_id is double; it must be string or integer"),
        ({"prompt": "x", "max_tokens": "9"}, {}, "the column max_tokens is string; it must be a number"),
        ({"prompt": "x", "stop": [1]}, {}, "the column stop is array<bigint>; it must be string or array<string>"),
        (
            {"messages": [{"role": "user", "text": "x"}]},
            {},
            (
                "the column messages is array<struct<role:string,text:string>>; "
                "it must be array<struct<role:string,content:string>> or a JSON string of it"
            ),
        ),
    ],
)
def test_a_table_of_the_wrong_shape_is_one_sentence(requests, row, config, sentence):
    """A missing column or one of another type is named, with the nearest there is."""
    with pytest.raises(InputError) as error:
        requests([row], **config)
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"path": "/nope/prompts"}, "input.path /nope/prompts does not exist"),
        ({"table": "nope"}, "input.table nope does not exist"),
    ],
)
def test_an_input_that_is_not_there_is_named(spark, config, sentence):
    """A missing path or table is one sentence."""
    with pytest.raises(InputError) as error:
        read_prompts(spark, InputConfig(**config))
    assert str(error.value) == sentence


def test_a_file_that_is_not_parquet_is_named(spark, tmp_path):
    """A file in another format is one sentence, not a Java stack trace."""
    file = tmp_path / "prompts.parquet"
    file.write_text("not parquet at all")
    with pytest.raises(InputError, match=r"^input.path .*prompts.parquet can not be read as parquet: ") as error:
        read_prompts(spark, InputConfig(path=str(file)))
    assert "\n" not in str(error.value)
