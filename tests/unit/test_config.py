import pytest

from phibatch.config import build_config, read_config
from phibatch.errors import ConfigError

MINIMAL = {"input": {"path": "in"}, "model": {"uri": "models:/m/1"}, "output": {"path": "out"}}


def document(**sections):
    return {name: {**MINIMAL.get(name, {}), **sections.get(name, {})} for name in {*MINIMAL, *sections}}


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"generation": {"max_token": 5}}, "unknown key generation.max_token: did you mean generation.max_tokens?"),
        ({"input": {"columns": {"promt": "x"}}}, "unknown key input.columns.promt: did you mean input.columns.prompt?"),
        ({"generations": {"seed": 1}}, "unknown key generations: did you mean generation?"),
        (
            {"model": {"zzz": 1}},
            "unknown key model.zzz: known here are uri, engine, batch_size, memory",
        ),
        ({"generation": {"temperature": 3}}, "generation.temperature is 3: it must be a number from 0 up to 2"),
        ({"generation": {"top_p": 0}}, "generation.top_p is 0: it must be a number above 0 up to 1"),
        (
            {"generation": {"max_tokens": 0}},
            "generation.max_tokens is 0: it must be a whole number from 1 up to 2147483647",
        ),
        ({"input": {"table": "t"}}, "input: exactly one of path and table must be set"),
        (
            {"output": {"keep_columns": ["model"]}},
            "output: keep_columns names 'model', which is a column of the response table itself",
        ),
        (
            {"output": {"keep_columns": ["Choices"]}},
            "output: keep_columns names 'Choices', which is a column of the response table itself",
        ),
        (
            {"output": {"keep_columns": ["code", "a", "Code"]}},
            "output: keep_columns names 'Code' twice: names that differ in case alone are one",
        ),
        (
            {"output": {"keep_columns": ["a`b"], "format": "orc"}},
            "output: keep_columns names 'a`b', and format orc would cut the name at its backtick",
        ),
        ({"output": {"path": "in/"}}, "the output in is the input itself"),
        (
            {"input": {"template": "{a:.2f}"}},
            "input.template is '{a:.2f}': it may only hold {column}, and {{ and }} for braces themselves",
        ),
        ({"output": {"keep_columns": "a"}}, "output.keep_columns is 'a': Input should be a list, such as [a, b]"),
        ({"generation": {"stop": [""]}}, "generation.stop is ['']: it must be a list of non-empty strings"),
    ],
)
def test_a_mistake_is_one_sentence_with_the_field_the_value_and_the_way_out(sections, sentence):
    """Each mistake in a configuration is named by field and value, with the nearest right name or the bounds."""
    with pytest.raises(ConfigError) as error:
        build_config(document(**sections))
    assert str(error.value) == sentence


def test_a_missing_section_is_named():
    """A configuration without a model says so."""
    with pytest.raises(ConfigError, match=r"^model is missing$"):
        build_config({name: MINIMAL[name] for name in ("input", "output")})


def test_settings_are_yaml_and_values_are_themselves(tmp_path):
    """`--set` reads its value as YAML, and the named options take theirs as it stands; both win over the file."""
    file = tmp_path / "job.yaml"
    file.write_text("input: {path: a}\nmodel: {uri: m}\noutput: {path: b}\ngeneration: {max_tokens: 5}\n")
    config = read_config(file, {"generation.max_tokens": "7", "generation.stop": "[x, y]"}, {"input.path": "1"})
    assert (config.generation.max_tokens, config.generation.stop, config.input.path) == (7, ("x", "y"), "1")


def test_a_section_of_comments_is_none_and_text_may_hold_a_colon(tmp_path):
    """What conf/batch.yaml invites to leave out may be left out, and a template with a colon is a text."""
    file = tmp_path / "job.yaml"
    file.write_text("input: {path: a}\nmodel: {uri: m}\noutput: {path: b}\ngeneration:\n  # seed: 1\n")
    assert read_config(file, {"input.template": "Summarise: {text}"}).input.template == "Summarise: {text}"


def test_a_config_can_not_be_changed():
    """A checked configuration stays as it was checked."""
    config = build_config(document())
    with pytest.raises(ValueError, match="frozen"):
        config.generation.max_tokens = 1


@pytest.mark.parametrize(("content", "sentence"), [("[1]", "is not a mapping"), ("a: [", "is not YAML")])
def test_a_file_that_is_no_configuration_is_said_to_be_none(tmp_path, content, sentence):
    """A file that is not YAML, or not a mapping, is one sentence."""
    file = tmp_path / "job.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=sentence):
        read_config(file)


def test_a_file_that_is_not_there_is_named(tmp_path):
    """A missing file is named."""
    with pytest.raises(ConfigError, match=r"nope.yaml can not be read: No such file"):
        read_config(tmp_path / "nope.yaml")


def test_a_readers_secrets_come_from_the_environment(monkeypatch):
    """`${NAME}` in an option is the variable's value; no option is shown, in a mistake's sentence either."""
    monkeypatch.setenv("DB_PASSWORD", "hunter2")
    options = {"password": "${DB_PASSWORD}", "url": "jdbc:x?u=${DB_PASSWORD}$1", "port": 5}
    config = build_config(document(input={"options": options}))
    found = {key: value.get_secret_value() for key, value in config.input.options.items()}
    assert found == {"password": "hunter2", "url": "jdbc:x?u=hunter2$1", "port": "5"}
    assert "hunter2" not in f"{config!r}{config.model_dump_json()}"
    with pytest.raises(ConfigError, match=r"^input\.options: the environment has no variable NO_SUCH$"):
        build_config(document(input={"options": {"a": "hunter2", "password": "${NO_SUCH}"}}))


@pytest.mark.parametrize(
    ("spellings", "usage"),
    [
        (["o8", "./o8/", "o8/.", "x/..//o8"], "o8_usage"),
        (["s3a://bucket/a/o8", "s3a://bucket//a/b/../o8//"], "s3a://bucket/a/o8_usage"),
        (["file:/a/o8", "file:/a/./o8/"], "file:/a/o8_usage"),
        (["file:///a/o8", "file:///a//o8"], "file:///a/o8_usage"),
        (["/o8", "/x/../o8"], "/o8_usage"),
    ],
)
def test_what_is_beside_an_output_is_named_alike_for_its_spellings(spellings, usage):
    """Dots and slashes that lead nowhere do not move the usage table."""
    for path in spellings:
        assert build_config(document(output={"path": path})).output.usage_place == usage
        with pytest.raises(ConfigError, match="is the input itself"):
            build_config(document(input={"path": f"{path}/"}, output={"path": path}))


def test_a_quoted_tables_usage_is_quoted_too():
    """The suffix belongs to the name within the quotes."""
    output = {"path": None, "table": "main.`o-8`"}
    assert build_config(document(output=output)).output.usage_place == "main.`o-8_usage`"
