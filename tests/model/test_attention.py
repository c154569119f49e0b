import json

import pytest
from onnx import TensorProto, helper

from phibatch.errors import ModelError
from phibatch.model.engine.attention import (
    UnsupportedGraph,
    Windows,
    attributes,
    read_boundary,
    read_reach,
    read_windows,
    write_windows,
)

LAYERS = 3


def graph_of(*windows, rolling=False):
    """A graph with an attention node for each window."""
    more = {"sliding_window_cache": 1} if rolling else {}
    nodes = [
        helper.make_node(
            "GroupQueryAttention",
            ["q", "", "", f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"],
            [f"out.{layer}"],
            local_window_size=window,
            **more,
        )
        for layer, window in enumerate(windows)
    ]
    return helper.make_graph(nodes, "decoder", [], [])


def branching_graph(operator="Greater", source="attention_mask", boundary=4096):
    nodes = [
        helper.make_node("Constant", [], ["one"], value_int=1),
        helper.make_node("Shape", [source], ["shape"]),
        helper.make_node("Gather", ["shape", "one"], ["width"]),
        helper.make_node("Constant", [], ["c"], value=helper.make_tensor("c", TensorProto.INT64, [], [boundary])),
        helper.make_node(operator, ["width", "c"], ["long"]),
        helper.make_node("If", ["long"], ["cos", "sin"]),
    ]
    return helper.make_graph(nodes, "decoder", [], [])


@pytest.fixture
def folder(tmp_path):
    """Write a folder's two configurations."""

    def write(sliding_window=None, config=None, context=4096):
        decoder = {"num_hidden_layers": LAYERS, **({"sliding_window": sliding_window} if sliding_window else {})}
        document = {"model": {"context_length": context, "decoder": decoder}}
        (tmp_path / "genai_config.json").write_text(json.dumps(document))
        if config is not None:
            (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return write


def test_the_window_is_the_graphs_else_genai_configs_else_the_checkpoints(folder):
    """Of three places that may name a window, the first that does is believed."""
    config = {"model_type": "phi3", "sliding_window": 1000}
    place = folder({"window_size": 2047, "layers": [1]}, config)
    assert read_windows(graph_of(-1, 300, -1), place) == Windows((None, 300, None))
    assert read_windows(graph_of(-1, -1, -1), place) == Windows((None, 2047, None))
    assert read_windows(graph_of(-1, -1, -1), folder(None, config)) == Windows((1000,) * LAYERS)


@pytest.mark.parametrize(
    ("window", "config"),
    [
        ({"window_size": 32, "layers": [77]}, None),
        ({"window_size": -5}, None),
        ({"window_size": 32.0}, None),
        (None, {"sliding_window": "32"}),
        (None, {"sliding_window": True}),
        (None, {"sliding_window": 32, "max_window_layers": "x"}),
    ],
)
def test_a_window_that_is_none_is_told(folder, window, config):
    """A window that can not be read is never ignored: the folder is refused in one sentence."""
    with pytest.raises(ModelError, match=r"sliding_window|window_size|max_window_layers|layers of the sliding window"):
        read_windows(graph_of(-1, -1, -1), folder(window, config))


def test_no_layers_named_are_all(folder):
    """The builder writes an empty list of layers where all of them have the window."""
    found = read_windows(graph_of(-1, -1, -1), folder({"window_size": 2047, "layers": []}))
    assert found.sizes == (2047,) * LAYERS


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (
            {"sliding_window": 512, "layer_types": ["sliding_attention", *["full_attention"] * 2]},
            (512, None, None),
        ),
        ({"sliding_window": 512, "use_sliding_window": False, "max_window_layers": 1}, (None,) * LAYERS),
        ({"sliding_window": 512, "use_sliding_window": True, "max_window_layers": 1}, (None, 512, 512)),
        ({"text_config": {"model_type": "mistral", "sliding_window": 512}}, (512,) * LAYERS),
        ({"model_type": "phi3", "sliding_window": None}, (None,) * LAYERS),
        ({"model_type": "phi3", "sliding_window": 262144}, (None,) * LAYERS),
    ],
)
def test_a_checkpoints_own_words_for_its_window(folder, config, sizes):
    """config.json names the layers in its own ways; a window as long as the context is none."""
    found = read_windows(graph_of(-1, -1, -1), folder(None, config))
    assert (found.sizes, found.certain) == (sizes, True)


def test_a_window_of_unknown_layers_is_not_ignored(folder):
    """Where a model of another kind names a window and no layers, nobody can say which layers have it."""
    found = read_windows(graph_of(-1, -1, -1), folder(None, {"model_type": "gemma2", "sliding_window": 512}))
    strange = {"sliding_window": 512, "layer_types": ["chunked_attention"] * LAYERS}
    assert found == Windows((512,) * LAYERS, certain=False)
    assert read_windows(graph_of(-1, -1, -1), folder(None, strange)) == found
    assert read_reach(graph_of(-1, -1, -1), found).tokens == 512


def test_a_graph_without_attention_nodes_has_the_configured_window(folder):
    """A window can not be written into attention of other nodes, so rows beyond it are out of reach."""
    graph = helper.make_graph([], "decoder", [], [])
    windows = read_windows(graph, folder({"window_size": 2047, "layers": []}))
    assert windows == Windows((2047,) * LAYERS, certain=False)
    assert read_reach(graph, windows).tokens == 2047


def test_written_windows_stand_in_every_node_and_no_cache_rolls():
    """`sliding_window_cache` goes: slots hold a whole row, and its mathematics are the window's."""
    graph = graph_of(-1, -1, rolling=True)
    write_windows(graph, Windows((300, None)))
    assert [attributes(node) for node in graph.node] == [{"local_window_size": 300}, {"local_window_size": -1}]


def test_the_boundary_of_longrope_is_what_the_graph_compares_with():
    """An `If` on the length of the input gives the boundary; on anything else it refuses the graph."""
    assert read_boundary(graph_of(-1)) is None
    assert read_boundary(branching_graph()) == 4096
    for other in (branching_graph("Less"), branching_graph(source="input_ids")):
        with pytest.raises(UnsupportedGraph, match="branches"):
            read_boundary(other)
