import mlflow
import pytest

from phibatch.errors import InputError
from phibatch.job.output import read_responses
from phibatch.job.pipeline import run_batch

pytestmark = pytest.mark.usefixtures("demo_model")


@pytest.fixture
def run(spark, job, write_parquet):
    def run(**source):
        config = job(write_parquet([{"custom_id": "a", "text": "tea"}]), input=source)
        summary = run_batch(spark, config)
        return summary, read_responses(spark, config.output).collect()

    return run


def test_a_registered_prompt_is_in_the_lineage_of_every_row(run):
    """The version behind an alias stands in each row and in the run; a new version does its rows again."""
    mlflow.genai.register_prompt("ask", "Say {{ text }}, {once}")
    mlflow.genai.set_prompt_alias("ask", "live", 1)
    mlflow.genai.register_prompt("tone", "Be brief.")
    source = {"template": "prompts:/ask@live", "system": "prompts:/tone/1"}
    summary, (row,) = run(**source)
    assert row["response"] == "Say tea, {once}"
    assert row["prompt_version"] == "prompts:/ask/1, prompts:/tone/1"
    tags = mlflow.get_run(summary.run_id).data.tags
    assert tags["phibatch.prompt_version"] == row["prompt_version"]
    mlflow.genai.register_prompt("ask", "Sing {{text}}")
    mlflow.genai.set_prompt_alias("ask", "live", 2)
    _, (row,) = run(**source)
    assert (row["response"], row["prompt_version"]) == ("Sing tea", "prompts:/ask/2, prompts:/tone/1")


def test_a_prompt_that_can_not_be_used_is_told(run):
    """One that is not there, a conversation, and a system message with variables."""
    with pytest.raises(InputError, match=r"input\.template prompts:/nope@live is not known"):
        run(template="prompts:/nope@live")
    mlflow.genai.register_prompt("talk", [{"role": "user", "content": "{{text}}"}])
    with pytest.raises(InputError, match="is a conversation"):
        run(template="prompts:/talk/1")
    mlflow.genai.register_prompt("open", "You like {{text}}")
    with pytest.raises(InputError, match="has variables"):
        run(system="prompts:/open/1", template="{text}")
    mlflow.genai.register_prompt("shaped", "Say {{text:>9}}")
    with pytest.raises(InputError, match="may only hold"):
        run(template="prompts:/shaped/1")
    mlflow.genai.register_prompt("typo", "Say {{txt}}")
    with pytest.raises(InputError, match="the input has no column txt: did you mean text"):
        run(template="prompts:/typo/1")
