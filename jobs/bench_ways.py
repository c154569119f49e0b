"""One measurement, in a process of its own: a task as JSON on standard input, its result as the last line of output.

It imports nothing that is not its way's: OpenVINO's Python has neither phibatch nor onnxruntime, and the two libraries
do not live in one process.
"""

import importlib
import json
import os
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read once, when onnxruntime is first imported

Row = dict[str, Any]
GENAI_BATCH = 8
CACHE_GIB = 2
"""What OpenVINO may take for keys and values."""

FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
"""Properties of OpenVINO for the precision of the ONNX ways; by itself it takes what the processor is fastest in."""

ROOF_CHUNKS = (64, 128, 256)
ROOF_REPEATS = 8


@dataclass(frozen=True)
class Task:
    """What to measure.

    Attributes:
        way: one of `WAYS`, or `roof`.
        model: the model's folder, with `onnx` and `openvino` in it; for llama.cpp its GGUF file.
        rows: as in bench_models.
        threads: compute threads of the engine.
        slots: rows generated together, where the way has slots.
    """

    way: str
    model: str
    rows: list[Row]
    threads: int
    slots: int


@dataclass(frozen=True)
class Answer:
    """One row's text and its tokens, without the end-of-turn token; cached_tokens is None where a way does not say."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None = 0


Generate = Callable[[list[Row]], list[Answer]]


def messages(row: Row) -> list[dict[str, str]]:
    system = [{"role": "system", "content": row["system"]}] if row["system"] else []
    return [*system, {"role": "user", "content": row["prompt"]}]


def load_tutorial(task: Task) -> Generate:
    """onnxruntime-genai's tutorial, with the calls of today: row by row, each with a fresh generator."""
    import onnxruntime_genai as og

    folder = Path(task.model, "onnx")
    config = og.Config(str(folder))
    # The library's own choice is half the cores; every way here has the same.
    session = {"intra_op_num_threads": task.threads}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
    model = og.Model(config)
    tokenizer = og.Tokenizer(model)
    eos = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]["eos_token_id"]
    stops = set(eos if isinstance(eos, list) else [eos])

    def answer(row: Row) -> Answer:
        prompt = tokenizer.encode(tokenizer.apply_chat_template(json.dumps(messages(row)), add_generation_prompt=True))
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=len(prompt) + row["max_tokens"], do_sample=False)
        generator = og.Generator(model, params)
        generator.append_tokens(prompt)
        ids: list[int] = []
        while not generator.is_done():
            generator.generate_next_token()
            ids.append(int(generator.get_next_tokens()[0]))
        if ids and ids[-1] in stops:
            ids.pop()
        return Answer(tokenizer.decode(ids) if ids else "", len(prompt), len(ids))

    return lambda rows: [answer(row) for row in rows]


def load_phibatch(task: Task) -> Generate:
    """An engine of phibatch, without Spark."""
    from phibatch.contract import EngineName, GenerationParams, Request, build_messages
    from phibatch.model.engine.base import EngineOptions, load_engine

    batch = GENAI_BATCH if task.way == "genai" else task.slots
    name = EngineName.GENAI if task.way == "genai" else EngineName.SLOTS
    engine = load_engine(Path(task.model, "onnx"), "benchmark", EngineOptions(name, batch, task.threads))

    def generate(rows: list[Row]) -> list[Answer]:
        requests = [
            Request(GenerationParams(max_tokens=row["max_tokens"]), build_messages(messages(row))) for row in rows
        ]
        answers = []
        for completion in engine.generate(requests):
            if completion.text is None:
                raise SystemExit(f"a row failed: {completion.error_message}")
            usage = completion.usage
            tokens = (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens)
            answers.append(Answer(completion.text, *tokens))
        return answers

    return generate


def load_slots_alone(task: Task) -> Generate:
    """The slots engine with prefixes neither found nor kept."""
    from phibatch.model.engine.prefixes import PrefixStore

    # The process is this measurement's own, so nothing is put back.
    patch.object(PrefixStore, "find", return_value=(0, [])).start()
    patch.object(PrefixStore, "room", return_value=0).start()
    return load_phibatch(task)


def load_openvino(task: Task) -> Generate:
    """OpenVINO GenAI's continuous batching with prefix caching, in the precision it chooses or in float32."""
    ov = importlib.import_module("openvino_genai")
    scheduler = ov.SchedulerConfig()
    scheduler.enable_prefix_caching = True
    scheduler.cache_size = CACHE_GIB
    scheduler.max_num_seqs = task.slots
    folder = str(Path(task.model, "openvino"))
    properties = {"INFERENCE_NUM_THREADS": task.threads, **(FLOAT32 if task.way == "openvino-f32" else {})}
    pipeline = ov.ContinuousBatchingPipeline(folder, scheduler, "CPU", properties)
    tokenizer = pipeline.get_tokenizer()

    def settings(row: Row) -> Any:
        config = pipeline.get_config()
        config.max_new_tokens = row["max_tokens"]
        config.do_sample = False
        return config

    def generate(rows: list[Row]) -> list[Answer]:
        texts = [tokenizer.apply_chat_template(messages(row), add_generation_prompt=True) for row in rows]
        prompts = [tokenizer.encode(text, add_special_tokens=False).input_ids for text in texts]
        results = pipeline.generate(prompts, [settings(row) for row in rows])
        answers = []
        for prompt, result in zip(prompts, results, strict=True):
            ids = list(result.m_generation_ids[0])
            answers.append(Answer(tokenizer.decode(ids), prompt.shape[1], len(ids), None))
        return answers

    return generate


def load_llamacpp(task: Task) -> Generate:
    """llama.cpp through llama-cpp-python, row by row; it re-uses what a prompt shares with the one before it."""
    llama = importlib.import_module("llama_cpp")
    threads = {"n_threads": task.threads, "n_threads_batch": task.threads}
    model = llama.Llama(task.model, n_ctx=4096, verbose=False, **threads)

    def answer(row: Row) -> Answer:
        limit = row["max_tokens"]
        done = model.create_chat_completion(messages(row), max_tokens=limit, temperature=0.0, repeat_penalty=1.0)
        usage = done["usage"]
        text = done["choices"][0]["message"]["content"]
        return Answer(text, usage["prompt_tokens"], usage["completion_tokens"], None)

    return lambda rows: [answer(row) for row in rows]


def load_job(task: Task) -> Generate:
    """The whole Spark job, one task with all cores. Loaded are Spark and the logged model; the weights are not."""
    import mlflow
    import pyarrow as pa
    import pyarrow.parquet as pq

    from phibatch.config import build_config
    from phibatch.job.pipeline import run_batch
    from phibatch.job.session import open_session
    from phibatch.model.registry import log_onnx

    work = Path.cwd()
    mlflow.set_tracking_uri(f"sqlite:///{work / 'mlflow.db'}")
    model = log_onnx(Path(task.model, "onnx"), "benchmark")
    spark = open_session("benchmark")
    text = [(name, pa.string()) for name in ("custom_id", "system", "prompt")]
    schema = pa.schema([*text, ("max_tokens", pa.int64())])
    pq.write_table(pa.Table.from_pylist(task.rows, schema), work / "input.parquet")
    config = build_config(
        {
            "input": {"path": str(work / "input.parquet")},
            "model": {"uri": model.uri, "batch_size": task.slots},
            "output": {"path": str(work / "output")},
        }
    )

    def generate(rows: list[Row]) -> list[Answer]:
        run_batch(spark, config)
        written = {row["custom_id"]: row for row in pq.read_table(work / "output").to_pylist()}
        seen: set[str] = set()
        answers = []
        for row in rows:
            given = written[row["custom_id"]]
            if given["response"] is None:
                raise SystemExit(f"a row failed: {given['error']}")
            usage = given["usage"]
            cached = usage["cached_tokens"]
            # A row answered with another's generation had nothing computed.
            if given["request_key"] in seen:
                cached = usage["prompt_tokens"] + usage["completion_tokens"]
            seen.add(given["request_key"])
            answers.append(Answer(given["response"], usage["prompt_tokens"], usage["completion_tokens"], cached))
        return answers

    return generate


WAYS: dict[str, Callable[[Task], Generate]] = {
    "tutorial": load_tutorial,
    "genai": load_phibatch,
    "slots": load_slots_alone,
    "slots-prefix": load_phibatch,
    "openvino": load_openvino,
    "openvino-f32": load_openvino,
    "llamacpp": load_llamacpp,
    "job": load_job,
}
LIBRARIES = {
    "openvino": "openvino-genai",
    "openvino-f32": "openvino-genai",
    "llamacpp": "llama-cpp-python",
    "job": "pyspark",
}


def measure_roof(task: Task) -> dict[str, float]:
    """The best prefill rate of the way's graph, in tokens a second, by tokens fed at once to an empty slot.

    As the engine runs it: the projection to the vocabulary is of the last token alone, which a step of decoding does
    for every token. So the roof is a little high for what is mostly decoding.
    """
    import numpy as np

    from phibatch.model.engine.graph import DecoderGraph
    from phibatch.model.engine.kv import KVSlots
    from phibatch.model.folder import ModelFolder

    folder = ModelFolder.open(Path(task.model, "onnx"))
    graph = DecoderGraph(folder, task.threads)
    slots = KVSlots(graph.kv, 2, max(ROOF_CHUNKS))
    rates = {}
    for chunk in ROOF_CHUNKS:
        ids = np.arange(chunk, dtype=np.int64)[None] + 100
        seconds = []
        for _ in range(ROOF_REPEATS):
            began = time.monotonic()
            graph.run(slots, 0, ids, [0])
            seconds.append(time.monotonic() - began)
        rates[str(chunk)] = chunk / min(seconds)
    return rates


@contextmanager
def watch_memory(way: str) -> Iterator[list[int]]:
    """A list that ends with the peak of resident memory, in bytes.

    It is the process's own as the kernel kept it; for the job, the sum over Python, the JVM and Spark's workers as
    sampled, with pages that they share counted in each.
    """
    peaks = [0]
    done = threading.Event()

    def sample() -> None:
        import psutil

        while not done.wait(0.2):
            total = 0
            for process in (me := psutil.Process(), *me.children(recursive=True)):
                try:
                    total += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            peaks.append(max(total, peaks.pop()))

    watcher = threading.Thread(target=sample, daemon=True)
    if way == "job":
        watcher.start()
    yield peaks
    done.set()
    if way == "job":
        watcher.join()
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peaks[0] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def note_precision(way: str) -> str | None:
    """In what OpenVINO computes on this machine where it is left to choose, and keeps keys and values."""
    if way != "openvino":
        return None
    core = importlib.import_module("openvino").Core()
    inference, kept = (
        core.get_property("CPU", name).to_string() for name in ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION")
    )
    return f"computes in {inference}, keys and values in {kept}"


def measure(task: Task) -> dict[str, Any]:
    """Load, warm up with one short row, then time the rows alone. The job is not warmed up: it is what a run takes."""
    with watch_memory(task.way) as peaks:
        generate = WAYS[task.way](task)
        if task.way != "job":
            generate([{"system": None, "prompt": "Good morning!", "max_tokens": 4}])
        began = time.monotonic()
        answers = generate(task.rows)
        seconds = time.monotonic() - began
    tokens = sum(answer.prompt_tokens + answer.completion_tokens for answer in answers)
    cached = [answer.cached_tokens for answer in answers if answer.cached_tokens is not None]
    return {
        "seconds": seconds,
        "rows": len(answers),
        "prompt_tokens": sum(answer.prompt_tokens for answer in answers),
        "new_tokens": sum(answer.completion_tokens for answer in answers),
        "computed_tokens": tokens - sum(cached) if len(cached) == len(answers) else None,
        "peak_bytes": peaks[0],
        "version": version(LIBRARIES.get(task.way, "onnxruntime-genai")),
        "note": note_precision(task.way),
        "texts": [answer.text for answer in answers],
    }


def main() -> None:
    task = Task(**json.load(sys.stdin))
    with tempfile.TemporaryDirectory(prefix="phibatch-bench-") as work:
        os.chdir(work)
        result = measure_roof(task) if task.way == "roof" else measure(task)
        print(json.dumps(result), flush=True)
        os.chdir("/")


if __name__ == "__main__":
    main()
