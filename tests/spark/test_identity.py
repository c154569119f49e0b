"""One output is one output, however it is spelled: it has one owner, and each row one answer."""

import os
from datetime import UTC, datetime

import pytest
from pyspark.sql import functions as F

from phibatch.contract import RESPONSE_COLUMNS
from phibatch.errors import OutputError, RunError
from phibatch.job import answer, work
from phibatch.job.output import ResponseTable, build_schema
from phibatch.job.plan import DUPLICATE, mark, number_responses
from phibatch.job.work import CHUNKS, WorkFolder

THREE = {"a": "one", "b": "two", "c": "three"}


def spell(path):
    """A path's spellings: absolute and relative, with and without a scheme, with detours, slashes and links."""
    link = path.parent / "link"
    link.symlink_to(path.parent, target_is_directory=True)
    relative = os.path.relpath(path)
    return [
        str(path),
        relative,
        f"./{relative}/",
        f"{path.parent}//detour/../{path.name}/.",
        f"file:{path}",
        f"file://{path.parent}/../{path.parent.name}/{path.name}//",
        f"{link}/{path.name}",
    ]


@pytest.fixture
def claim(spark, monkeypatch):
    """Claim the first of several outputs; gives those of the others that may be claimed meanwhile."""
    monkeypatch.setattr(work, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(work, "TAKE_OVER_SECONDS", 0.0)

    def go(configs):
        first, *others = configs
        free, told = [], []
        with WorkFolder(spark, first).claimed():
            for config in others:
                try:
                    with WorkFolder(spark, config).claimed():
                        free.append(config.name)
                except OutputError as error:
                    told.append(str(error))
        assert all("another run is at work on this output" in each for each in told)
        return free

    return go


@pytest.mark.parametrize("with_work_path", [False, True])
def test_an_output_has_one_owner_under_every_spelling(job, claim, tmp_path, with_work_path):
    """Of two runs on one folder the second is refused; another folder of that name, in another place, is free."""
    more = {"work_path": str(tmp_path / "scratch")} if with_work_path else {}
    (tmp_path / "here").mkdir()
    paths = [*spell(tmp_path / "here" / "o8"), str(tmp_path / "elsewhere" / "o8")]
    assert claim([job("x", output={"path": path, **more}).output for path in paths]) == [paths[-1]]


def test_a_linked_output_has_one_owner(job, claim, tmp_path):
    """The link and the folder it leads to are one output."""
    (tmp_path / "o8").mkdir()
    (tmp_path / "other").symlink_to(tmp_path / "o8", target_is_directory=True)
    assert claim([job("x", output={"path": str(tmp_path / name)}).output for name in ("o8", "other")]) == []


@pytest.mark.parametrize("with_work_path", [False, True])
def test_a_table_has_one_owner_under_every_spelling(spark, job, claim, tmp_path, with_work_path):
    """With its database and catalog or without, quoted, and in any case, as the catalog takes names."""
    more = {"work_path": str(tmp_path)} if with_work_path else {}
    spark.sql("CREATE DATABASE elsewhere")
    names = ["o8", "`O8`", "default.o8", "Default.`o8`", "spark_catalog.default.o8", "SPARK_CATALOG.default.o8"]
    names.append("elsewhere.o8")
    try:
        free = claim([job("x", output={"path": None, "table": name, **more}).output for name in names])
    finally:
        spark.sql("DROP DATABASE elsewhere")
    assert free == names[-1:]


def test_a_table_in_a_database_that_is_not_there_is_told(spark, job):
    """Before anything is generated for it."""
    with pytest.raises(OutputError, match="nowhere"):
        WorkFolder(spark, job("x", output={"path": None, "table": "nowhere.o8"}).output)


@pytest.mark.usefixtures("demo_model")
@pytest.mark.parametrize("with_work_path", [False, True])
def test_a_chunk_is_recovered_under_another_spelling(run, monkeypatch, tmp_path, with_work_path):
    """What a run that died had finished is used by the next one, and every row keeps one answer."""
    more = {"work_path": str(tmp_path / "scratch")} if with_work_path else {}

    def die(self, chunks):
        raise RunError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(answer.Answers, "_commit", die)
        with pytest.raises(RunError, match="killed"):
            run(THREE, output={"path": os.path.relpath(tmp_path / "output"), **more})
    _, table, asked = run(THREE, output={"path": f"file:{tmp_path}/x/../output/", **more})
    # Asked by the run that died; not asked again.
    assert asked == ["one", "three", "two"]
    assert {row["custom_id"]: row["response"] for row in table} == THREE
    assert len(table) == 3
    assert not list(tmp_path.glob("**/owner.json"))


def test_nothing_is_recovered_beside_an_answer(spark, job):
    """Of a row one response is appended, the best there is, and none where the table has as good a one already."""
    config = job("x").output
    schema = build_schema({**RESPONSE_COLUMNS, "rank": "string", "known": "string"})

    def respond(custom_id, run_id, code=None, message="no"):
        created = datetime(2025, 1, 1, tzinfo=UTC)
        error = (code, message if code else None)
        text, reason = (None, None) if code else (f"of {run_id}", "stop")
        values = [custom_id, text, reason, (1, 1, 2, 0), error, f"key of {custom_id}", "models:/m/1", run_id, created]
        return (*values, 1.0, "kept", "kept too")

    def build(*rows):
        return spark.createDataFrame(list(rows), schema)

    table = ResponseTable(spark, config, schema, exists=False)
    table.append(
        build(
            respond("half", "dead"),
            respond("answered", "other"),
            respond("answered, failed now", "other"),
            respond("late", "other", "timeout"),
            respond("late again", "other", "timeout"),
            respond("too long", "other", "context_length_exceeded"),
            respond("a copy was rejected", "other", "invalid_request", DUPLICATE),
        )
    )
    folder = WorkFolder(spark, config)
    folder.write(
        build(
            respond("half", "dead"),
            respond("the other half", "dead"),
            respond("answered", "dead"),
            respond("answered, failed now", "dead", "timeout"),
            respond("late", "dead"),
            respond("late again", "dead", "timeout"),
            respond("too long", "dead", "timeout"),
            respond("a copy was rejected", "dead"),
            respond("twice", "dead", "worker_crashed"),
        ),
        f"{CHUNKS}/one",
    )
    folder.write(build(respond("twice", "dead too"), respond("late", "dead too")), f"{CHUNKS}/two")
    finished = answer.find_finished(folder, table, "resume")
    found = {row["custom_id"]: (row["error"]["code"], row["rank"], row["known"]) for row in finished.collect()}
    wanted = ("a copy was rejected", "late", "the other half", "twice")
    assert found == dict.fromkeys(wanted, (None, "kept", "kept too"))
    answer.recover(folder, table, "resume")
    assert table.read().count() == 7 + 4
    # Where these rows have left the input, the failure that an answer replaces goes; a rejected copy is a row.
    nothing = spark.createDataFrame([], "custom_id string, request_key string, copy int, reason string")
    marked = mark(number_responses(table.locate()), nothing, "failed", "keep")
    assert [row["code"] for row in marked.where(~F.col("keep")).collect()] == ["timeout"]
    folder.write(build(respond("late", "dead"), respond("twice", "dead")), f"{CHUNKS}/one")
    answer.recover(folder, table, "resume")
    assert table.read().count() == 7 + 4
