import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from phibatch import demo
from phibatch.contract import EngineName, GenerationParams, Message, Request
from phibatch.errors import EngineError
from phibatch.model.engine.base import EngineOptions
from phibatch.model.engine.transformers import TransformersEngine


def build(folder=demo.TWIN_DIR, threads=2):
    return TransformersEngine(folder, EngineOptions(EngineName.TRANSFORMERS, batch_size=8, threads=threads))


def test_threads_are_as_asked():
    """torch computes with the engine's threads, not with all that the machine has."""
    build(threads=1)
    assert torch.get_num_threads() == 1
    build(threads=2)
    assert torch.get_num_threads() == 2


def test_a_template_that_refuses_is_the_rows_own_error(tmp_path):
    """What a chat template raises fails its row, with the template's words."""
    folder = shutil.copytree(demo.TWIN_DIR, tmp_path / "refusing")
    template = (folder / "chat_template.jinja").read_text()
    check = "{% if messages[0]['content'] == 'no' %}{{ raise_exception('not that') }}{% endif %}"
    (folder / "chat_template.jinja").write_text(check + template)
    answered, failed = build(folder).generate(
        [Request(GenerationParams(), messages=(Message("user", text),)) for text in ("Name a colour.", "no")]
    )
    assert answered.text
    assert (failed.error_code, failed.error_message) == (
        "invalid_request",
        "the chat template refuses the conversation: not that",
    )


def test_a_template_that_fails_is_the_rows_own_error(tmp_path):
    """A template that was not written for a conversation fails that row, whatever it stumbles over."""
    folder = shutil.copytree(demo.TWIN_DIR, tmp_path / "stumbling")
    template = (folder / "chat_template.jinja").read_text()
    check = "{% if messages[0]['content'] == 'no' %}{{ 'a' + 1 }}{% endif %}"
    (folder / "chat_template.jinja").write_text(check + template)
    requests = [Request(GenerationParams(), messages=(Message("user", text),)) for text in ("Name a colour.", "no")]
    answered, failed = build(folder).generate(requests)
    assert answered.text
    assert failed.error_message.startswith("the chat template refuses the conversation: ")


def test_weights_that_are_not_there_fail_the_engine(tmp_path):
    """A tensor that the files do not hold would be drawn at random, by every worker for itself."""
    folder = shutil.copytree(demo.TWIN_DIR, tmp_path / "incomplete")
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EngineError, match=r"no weights for 1 of the model's tensors: lm_head.weight"):
        build(folder)
