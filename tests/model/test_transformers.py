import json
import random
import shutil

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from phibatch import demo
from phibatch.contract import EngineName, GenerationParams, Message, Request
from phibatch.errors import EngineError
from phibatch.model.engine.base import EngineOptions
from phibatch.model.engine.transformers import TransformersEngine

PROMPTS = pq.read_table(demo.PROMPTS).to_pylist()


def build(folder=demo.TWIN_DIR, batch_size=8, threads=2):
    return TransformersEngine(folder, EngineOptions(EngineName.TRANSFORMERS, batch_size, threads))


def request(row, **params):
    messages = [Message("system", row["system"])] if row.get("system") else []
    return Request(GenerationParams(**params), messages=(*messages, Message("user", row["prompt"])))


def essence(completions):
    return [(each.text, each.finish_reason, each.usage) for each in completions]


@pytest.mark.parametrize("params", [{}, {"temperature": 0.9}], ids=["greedy", "sampled"])
def test_rows_of_a_batch_have_their_own_parameters(params):
    """In float32, text, finish_reason and usage are the same alone and in batches, in any order."""
    rng = random.Random(3)
    requests = [
        request(row, max_tokens=rng.randint(1, 60), seed=place, repetition_penalty=rng.choice([1.0, 1.2]), **params)
        for place, row in enumerate(PROMPTS[:48])
    ]
    expected = essence(build(batch_size=1).generate(requests))
    for size in (3, 8, 32):
        order = list(range(len(requests)))
        rng.shuffle(order)
        shuffled = essence(build(batch_size=size, threads=1).generate([requests[place] for place in order]))
        assert dict(zip(order, shuffled, strict=True)) == dict(enumerate(expected)), f"batch size {size}"


def test_threads_are_as_asked():
    """torch computes with the engine's threads, not with all that the machine has."""
    build(threads=1)
    assert torch.get_num_threads() == 1
    build(threads=2)
    assert torch.get_num_threads() == 2


def test_the_checkpoints_own_settings_do_not_touch_the_answers(tmp_path):
    """A checkpoint may ask for sampling, penalties or a minimum length; what counts is the request."""
    folder = shutil.copytree(demo.TWIN_DIR, tmp_path / "settings")
    config = json.loads((folder / "generation_config.json").read_text())
    config |= {"do_sample": True, "temperature": 2.0, "repetition_penalty": 3.0, "min_length": 500, "max_new_tokens": 3}
    config |= {"no_repeat_ngram_size": 1, "suppress_tokens": [300, 301], "num_return_sequences": 2}
    (folder / "generation_config.json").write_text(json.dumps(config))
    requests = [request(row) for row in PROMPTS[:6]]
    assert essence(build(folder).generate(requests)) == essence(build().generate(requests))


def test_broken_weights_fail_the_engine_and_not_the_row(tmp_path):
    """Logits that are not numbers raise: no row of such a model can be trusted."""
    folder = shutil.copytree(demo.TWIN_DIR, tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    broken = {name: torch.full_like(weight, torch.nan) for name, weight in weights.items()}
    save_file(broken, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EngineError, match="logits are not finite"):
        build(folder).generate([request(PROMPTS[0])])


def test_a_template_that_refuses_is_the_rows_own_error(tmp_path):
    """What a chat template raises fails its row, with the template's words."""
    folder = shutil.copytree(demo.TWIN_DIR, tmp_path / "refusing")
    template = (folder / "chat_template.jinja").read_text()
    check = "{% if messages[0]['content'] == 'no' %}{{ raise_exception('not that') }}{% endif %}"
    (folder / "chat_template.jinja").write_text(check + template)
    answered, failed = build(folder).generate([request(PROMPTS[0]), request({"prompt": "no"})])
    assert answered.text
    assert (failed.error_code, failed.error_message) == (
        "invalid_request",
        "the chat template refuses the conversation: not that",
    )
