import shutil

import torch

from phibatch import demo
from phibatch.contract import EngineName, GenerationParams, Message, Request
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
