import json
import random
import shutil
from dataclasses import replace

import numpy as np
import onnx
import pyarrow.parquet as pq
import pytest
from onnx import helper

from phibatch import demo
from phibatch.contract import EngineName, GenerationParams, Message, ModelFormat, Request
from phibatch.errors import EngineError
from phibatch.model.engine.attention import UnsupportedGraph
from phibatch.model.engine.base import EngineOptions, load_engine
from phibatch.model.engine.genai import GenaiEngine
from phibatch.model.engine.graph import DecoderGraph
from phibatch.model.engine.kv import KVShape, KVSlots
from phibatch.model.engine.memory import default_memory, plan_pools
from phibatch.model.engine.prefixes import MIN_LENGTH, PrefixStore, common_length, shared_lengths
from phibatch.model.engine.slots import SlotsEngine
from phibatch.model.engine.transformers import TransformersEngine
from phibatch.model.folder import ModelFolder

PROMPTS = pq.read_table(demo.PROMPTS).to_pylist()
SYSTEMS = (
    "You are a patient teacher who explains things to children in one short sentence, with a smile.",
    "Be brief.",
)
SHAPE = KVShape(layers=2, heads=3, head_size=4)


def build(batch_size=8, memory=0, threads=2, folder=demo.MODEL_DIR):
    return SlotsEngine(folder, EngineOptions(EngineName.SLOTS, batch_size, threads, memory))


def requests(count, seed=7):
    """Greedy and sampled by turns, with a shared system prompt, another, or none, and limits of their own."""
    rng = random.Random(seed)
    made = []
    for place in range(count):
        system = (*SYSTEMS, None)[place % 3]
        opening = [Message("system", system)] if system else []
        params = GenerationParams(max_tokens=rng.randint(1, 60), temperature=0.9 * (place % 2), seed=place)
        made.append(Request(params, messages=(*opening, Message("user", rng.choice(PROMPTS)["prompt"]))))
    return made


def essence(completions):
    return [(each.text, each.finish_reason, replace(each.usage, cached_tokens=0)) for each in completions]


def cached(completions):
    return sum(each.usage.cached_tokens for each in completions)


@pytest.mark.parametrize("slots", [2, 5, 8, 16])
def test_answers_are_the_same_in_any_slots_order_and_with_any_prefix(slots, monkeypatch):
    """200 rows, greedy and sampled: 0 differ between numbers of slots, orders, and prefixes re-used or not."""
    made = requests(200)
    expected = essence(build(3).generate(made))
    engine = build(slots)
    found = engine.generate(made)
    assert essence(found) == expected
    assert cached(found) > 1000
    order = list(range(len(made)))
    random.Random(slots).shuffle(order)
    shuffled = essence(engine.generate([made[place] for place in order]))
    assert dict(zip(order, shuffled, strict=True)) == dict(enumerate(expected))
    monkeypatch.setattr(PrefixStore, "find", lambda *_: (0, []))
    alone = build(slots, threads=1).generate(made)
    assert essence(alone) == expected
    assert cached(alone) == 0


def test_slots_and_the_librarys_own_generator_agree():
    """The two ONNX engines give the same answers on the embedded model."""
    made = requests(60)
    library = GenaiEngine(demo.MODEL_DIR, EngineOptions(EngineName.GENAI, 8, 2))
    assert essence(build().generate(made)) == essence(library.generate(made))


def test_a_long_row_among_short_ones_takes_no_more_than_its_memory():
    """With memory for few tokens, a row near the context's end is answered apart, and its neighbours as without it."""
    words = " ".join(["word"] * 300)
    long = Request(GenerationParams(max_tokens=20), messages=(Message("user", words),))
    made = requests(40)
    expected = essence(build().generate([*made, long]))
    token = KVShape(4, 4, 32).token_bytes
    weights = sum(file.stat().st_size for file in demo.MODEL_DIR.iterdir())
    tight = build(memory=weights + 2400 * token)
    assert essence(tight.generate([*made[:20], long, *made[20:]])) == [*expected[:20], expected[-1], *expected[20:-1]]


def test_a_row_that_memory_can_not_hold_fails_alone():
    """A row whose slot would not fit twice is told so; the others are answered."""
    weights = sum(file.stat().st_size for file in demo.MODEL_DIR.iterdir())
    tight = build(memory=weights + 1000 * KVShape(4, 4, 32).token_bytes)
    small, large = (
        Request(GenerationParams(max_tokens=limit), messages=(Message("user", "Name a colour."),))
        for limit in (40, 900)
    )
    answered, failed = tight.generate([small, large])
    assert answered.text
    assert failed.error_code == "insufficient_memory"
    assert "model.memory holds 437" in failed.error_message


def test_too_little_memory_for_the_weights_is_an_engines_failure():
    """A budget that the weights alone exceed is one sentence, not a failure of every row."""
    with pytest.raises(
        EngineError, match=r"the weights alone take 1 MiB, more than the 0 MiB of the engine: set model.memory"
    ):
        build(memory=1000)


def test_prefixes_outlive_a_call():
    """What one call has computed is known to the next."""
    engine = build()
    made = requests(30)
    first = engine.generate(made)
    again = engine.generate(made)
    assert essence(first) == essence(again)
    assert cached(again) > cached(first)


def test_a_graph_that_is_not_made_for_slots_runs_on_genai(tmp_path, caplog):
    """`auto` says why it falls back, and answers; `slots` by name fails with the reason."""
    folder = shutil.copytree(demo.MODEL_DIR, tmp_path / "model")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for names in [[each.name for each in model.graph.input], *(node.input for node in model.graph.node)]:
        names[:] = ["tokens" if name == "input_ids" else name for name in names]
    model.graph.input[0].name = "tokens"
    onnx.save(model, folder / "model.onnx")
    config = json.loads((folder / "genai_config.json").read_text())
    config["model"]["decoder"]["inputs"]["input_ids"] = "tokens"
    (folder / "genai_config.json").write_text(json.dumps(config))
    options = EngineOptions(EngineName.AUTO, 8, 2, model_format=ModelFormat.ONNX)
    engine = load_engine(folder, "renamed", options)
    assert isinstance(engine, GenaiEngine)
    reason = "its inputs are attention_mask, tokens, not attention_mask, input_ids"
    assert f"the model runs on the genai engine, not on slots: {reason}" in caplog.text
    assert essence(engine.generate(requests(9))) == essence(build().generate(requests(9)))
    with pytest.raises(EngineError, match=f"the slots engine can not run this graph: {reason}"):
        load_engine(folder, "renamed", replace(options, engine=EngineName.SLOTS))
    assert isinstance(load_engine(demo.MODEL_DIR, "demo", options), SlotsEngine)


def test_a_sliding_window_is_honoured(tmp_path):
    """With a window of 32 tokens in the graph, answers are those of the twin with that window."""
    folder = shutil.copytree(demo.MODEL_DIR, tmp_path / "model")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "local_window_size":
                attribute.i = 32
    onnx.save(model, folder / "model.onnx")
    twin = shutil.copytree(demo.TWIN_DIR, tmp_path / "twin")
    config = json.loads((twin / "config.json").read_text())
    (twin / "config.json").write_text(json.dumps({**config, "sliding_window": 32}))
    made = [replace(each, params=GenerationParams(max_tokens=4)) for each in requests(90) if len(each.messages) == 2]
    expected = TransformersEngine(twin, EngineOptions(EngineName.TRANSFORMERS, 8, 2)).generate(made)
    found = build(folder=folder).generate(made)
    assert cached(found) > 0
    assert essence(build(3, folder=folder).generate(made)) == essence(found)
    same = sum(left.text == right.text for left, right in zip(found, expected, strict=True))
    whole = sum(left.text == right.text for left, right in zip(build().generate(made), expected, strict=True))
    assert same >= 0.8 * len(made) > whole


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda graph: graph.input.append(helper.make_tensor_value_info("position_ids", 7, ["a"])), "position_ids"),
        (lambda graph: graph.input.remove(graph.input[-1]), "not a pair for each layer"),
        (lambda graph: setattr(graph.input[2].type.tensor_type, "elem_type", 10), "not float32"),
        (
            lambda graph: graph.node.remove(next(n for n in graph.node if n.op_type == "GroupQueryAttention")),
            "4 layers and 3 GroupQueryAttention",
        ),
    ],
)
def test_what_slots_can_not_honour_is_named(tmp_path, change, reason):
    """A graph of other inputs or attention is refused before it is run."""
    model = onnx.load(demo.MODEL_DIR / "model.onnx", load_external_data=False)
    change(model.graph)
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(UnsupportedGraph, match=reason):
        DecoderGraph(replace(ModelFolder.open(demo.MODEL_DIR), graph=tmp_path / "model.onnx"), threads=1)


def test_only_the_last_position_is_projected():
    """A prompt's logits are one line, and the same as the whole graph's last."""
    graph = DecoderGraph(ModelFolder.open(demo.MODEL_DIR), threads=1)
    ids = np.arange(5, 25, dtype=np.int64)[None]
    assert graph._session.get_outputs()[0].name == "logits"
    logits = graph.run(KVSlots(graph.kv, 2, 32), 0, ids, [0])
    binding_free = graph.run(KVSlots(graph.kv, 2, 64), 1, ids, [0])
    assert logits.shape == (1, 911)
    assert np.array_equal(logits, binding_free)


def test_slots_are_read_written_and_moved():
    """A copy of a slot's beginning put elsewhere is that beginning."""
    slots = KVSlots(SHAPE, 3, 8)
    for number, array in enumerate(slots.arrays.values()):
        array[:] = np.random.default_rng(number).normal(size=array.shape)
    parts = slots.read(0, 5)
    slots.write(1, parts, 4)
    slots.move(0, 2, 8)
    for array in slots.arrays.values():
        assert np.array_equal(array[1, :, :4], array[0, :, :4])
        assert not np.array_equal(array[1, :, 4], array[0, :, 4])
        assert np.array_equal(array[2], array[0])
    assert SHAPE.token_bytes * 3 * 8 == sum(array.nbytes for array in slots.arrays.values())


def test_shared_beginnings_are_found_without_being_declared():
    """In token order each prompt's neighbour shares the most; the store finds the longest stretch that it holds."""
    head = list(range(100, 140))
    prompts = sorted([[*head, 1, 2], [*head, 1, 3], [*head[:30], 9], [5, 6]])
    arrays = [np.asarray(prompt) for prompt in prompts]
    assert shared_lengths(arrays) == [0, 30, 41, 0]
    assert shared_lengths([]) == []
    store = PrefixStore(SHAPE, 1000 * SHAPE.token_bytes)
    store.keep(np.asarray(head), ["parts"])
    assert store.find(np.asarray([*head, 7])) == (40, ["parts"])
    assert store.find(np.asarray([*head[:20], 7])) == (20, ["parts"])
    assert store.find(np.asarray(head[: MIN_LENGTH - 1])) == (0, [])
    assert common_length(np.asarray([1, 2]), np.asarray([1, 2, 3])) == 2


def test_the_store_keeps_within_its_bound_what_was_used_last():
    """The prefix used longest ago makes room."""
    store = PrefixStore(SHAPE, 60 * SHAPE.token_bytes)
    first, second, third = (np.arange(start, start + 25) for start in (0, 100, 200))
    for each in (first, second):
        store.keep(each, [])
    store.find(first)
    store.keep(third, [])
    assert [store.find(each)[0] for each in (first, second, third)] == [25, 0, 25]
    assert store.room(100) == 60


def test_pools_hold_every_row_once_within_the_memory():
    """Whatever rows need, each is in one pool that it fits, and no pool of more than two slots exceeds the tokens."""
    rng = random.Random(2)
    for tokens in (2000, 9000, 100_000):
        needs = [rng.choice([rng.randint(2, 300), rng.randint(300, 1000)]) for _ in range(200)]
        pools = plan_pools(needs, 16, tokens)
        assert sorted(place for _, places in pools for place in places) == list(range(200))
        for pool, places in pools:
            assert pool.capacity == max(needs[place] for place in places)
            assert 2 <= pool.slots <= 16
            assert pool.slots * pool.capacity <= tokens
    assert [pool.slots for pool, _ in plan_pools([100] * 50, 16, 10**6)] == [16]
    assert [pool.slots for pool, _ in plan_pools([100], 16, 10**6)] == [2]
    # A long row among short ones does not stretch their slots, however much memory there is.
    assert [(pool.slots, pool.capacity) for pool, _ in plan_pools([3000, *[90] * 200], 16, 10**6)] == [
        (2, 3000),
        (16, 90),
    ]


def test_memory_is_a_share_of_what_there_is(tmp_path, monkeypatch):
    """A container's limit counts, and a task has its cores' part of half of it."""
    limit = tmp_path / "memory.max"
    limit.write_text("1000000\n")
    monkeypatch.setattr("phibatch.model.engine.memory.CGROUP_LIMITS", (limit, tmp_path / "absent"))
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3})
    assert default_memory(4) == 500_000
    assert default_memory(1) == 125_000
    limit.write_text("max\n")
    assert default_memory(4) > 10**8
