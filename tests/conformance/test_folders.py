"""The same model where its window stands in other places, as builders of other times have written it."""

import json
import shutil

import onnx
import pytest
from onnx import helper
from reference import NEW_TOKENS, reference_logits

from phibatch.contract import EngineName

NAME = "Mistral-7B-v0.1"
WINDOW = 300
LENGTHS = (40, WINDOW - NEW_TOKENS, WINDOW, 700)


def move_window(folder, place, checkpoint):
    """Have the window stand in the graph, with a rolling cache or not, in config.json alone, or far from the graph."""
    config = json.loads((folder / "genai_config.json").read_text())
    decoder = config["model"]["decoder"]
    if place == "subfolder":
        decoder["filename"] = "onnx/model.onnx"
        (folder / "onnx").mkdir()
        for file in folder.glob("model.onnx*"):
            file.rename(folder / "onnx" / file.name)
    elif place == "config.json":
        shutil.copyfile(checkpoint / "config.json", folder / "config.json")
        del decoder["sliding_window"]
    else:
        model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
        for node in model.graph.node:
            for attribute in node.attribute:
                if attribute.name == "local_window_size":
                    attribute.i = WINDOW
            if node.op_type == "GroupQueryAttention" and place == "rolling cache":
                node.attribute.append(helper.make_attribute("sliding_window_cache", 1))
        onnx.save(model, str(folder / "model.onnx"))
        if place == "graph":
            del decoder["sliding_window"]
        else:
            decoder["sliding_window"]["layers"] = list(range(decoder["num_hidden_layers"]))
    (folder / "genai_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("place", ["graph", "rolling cache", "config.json", "subfolder"])
def test_a_window_is_honoured_wherever_it_stands(built, generate, tmp_path, place):
    """Every answer is transformers', of rows within the window and beyond it, on both engines."""
    model = built(NAME)
    assert model.build("fp32") is None
    folder = shutil.copytree(model.folder("fp32"), tmp_path / "folder")
    move_window(folder, place, model.checkpoint)
    for engine in (EngineName.SLOTS, EngineName.GENAI):
        answers = generate(folder, engine, LENGTHS)
        for answer in answers.values():
            expected = reference_logits(model.reference, answer).argmax(axis=-1).tolist()
            assert answer.tokens == expected
