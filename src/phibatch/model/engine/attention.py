"""How far a decoder's attention sees, and up to which length one table of angles turns its positions."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from phibatch.contract import ErrorCode
from phibatch.errors import ModelError, RowError
from phibatch.model.engine.row import Row
from phibatch.model.folder import CONFIG, ModelFolder, read_json

ATTENTION = "GroupQueryAttention"
WINDOW = "local_window_size"
WINDOW_CACHE = "sliding_window_cache"

ONE_WINDOW = {"phi3", "mistral", "mixtral", "starcoder2"}
"""Model types whose `config.json` means all layers where it names a window and no layers."""

LAYER_TYPES = ("sliding_attention", "full_attention")
"""What `layer_types` may name; a layer of another type is not known to have the window."""


class UnsupportedGraph(Exception):
    """Raised for a graph that an engine can not run; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Windows:
    """How many tokens attention sees, itself among them.

    Attributes:
        sizes: of each layer; None is all tokens.
        certain: whether it is known which layers have a window, and each of them has an attention node that is known.
    """

    sizes: tuple[int | None, ...]
    certain: bool = True

    @property
    def smallest(self) -> int | None:
        return min((size for size in self.sizes if size is not None), default=None)


@dataclass(frozen=True, slots=True)
class Reach:
    """The longest row, prompt and limit together in tokens, that an engine answers, and why no longer one."""

    tokens: int
    reason: str

    def check(self, row: Row) -> None:
        """Raise RowError where a row is longer."""
        need = len(row.prompt) + row.limit
        if need > self.tokens:
            raise RowError(
                ErrorCode.CONTEXT_LENGTH_EXCEEDED,
                f"prompt and max_tokens need {need} tokens, and the engine answers up to {self.tokens}: {self.reason}",
            )


def read_reach(graph: Any, windows: Windows) -> Reach | None:
    """How long a row may be for an engine that runs the graph as it is, with its windows written; None for any length.

    Raises:
        UnsupportedGraph: as `read_boundary`.
    """
    reaches = []
    if windows.smallest and not windows.certain:
        reason = f"the model has a sliding window of {windows.smallest} tokens that can not be written into its graph"
        reaches.append(Reach(windows.smallest, reason))
    boundary = read_boundary(graph)
    if boundary is not None:
        reason = "the graph picks LongRoPE's other table by the longest row of a batch"
        reaches.append(Reach(boundary, reason))
    return min(reaches, key=lambda reach: reach.tokens, default=None)


def read_windows(graph: Any, folder: Path) -> Windows:
    """A decoder's windows: from its graph where it says one, else `genai_config.json`, else `config.json`.

    A window of `local_window_size` tokens is one of `sliding_window` tokens in transformers' words.

    Args:
        graph: the ONNX graph.
        folder: where the model's configuration lies.

    Raises:
        ModelError: a configuration is not JSON, or gives a window that is none.
    """
    document = read_json(folder / CONFIG)
    decoder = document["model"]["decoder"]
    own = {number: attributes(node).get(WINDOW, -1) for node in graph.node if (number := layer_of(node)) is not None}
    layers = range(max(own) + 1 if own else _read_number(decoder, "num_hidden_layers", folder / CONFIG) or 1)
    window = decoder.get("sliding_window") or {}
    size = _read_number(window, "window_size", folder / CONFIG)
    file = folder / "config.json"
    if any(each > 0 for each in own.values()):
        found = Windows(tuple(own[layer] if own.get(layer, -1) > 0 else None for layer in layers))
    elif size > 0:
        chosen = _read_layers(window, layers, folder / CONFIG)
        found = Windows(tuple(size if layer in chosen else None for layer in layers))
    elif file.is_file():
        found = _from_checkpoint(file, len(layers))
    else:
        found = Windows((None,) * len(layers))
    # One as long as the context hides nothing.
    context = int(document["model"]["context_length"])
    sizes = tuple(size if size is not None and size < context else None for size in found.sizes)
    # A window can be written into nodes that are known, and into no others.
    written = all(layer in own for layer, size in zip(layers, sizes, strict=True) if size)
    return replace(found, sizes=sizes, certain=found.certain and written)


def check_windows(folder: ModelFolder) -> None:
    """Raise ModelError where a folder gives a window that is none."""
    read_windows(onnx.load(str(folder.graph), load_external_data=False).graph, folder.path)


def read_boundary(graph: Any) -> int | None:
    """The width of the mask beyond which a graph turns positions by LongRoPE's other table; None where it has one.

    The model builder writes an `If` on `Greater(Gather(Shape(attention_mask)), boundary)`.

    Raises:
        UnsupportedGraph: it branches on something else.
    """
    branches = [node for node in graph.node if node.op_type == "If"]
    if not branches:
        return None
    makers = {name: node for node in graph.node for name in node.output}
    known = {each.name: numpy_helper.to_array(each) for each in graph.initializer if not each.external_data}
    for node in graph.node:
        if node.op_type == "Constant" and "value" in attributes(node):
            known[node.output[0]] = numpy_helper.to_array(attributes(node)["value"])
    boundaries = {_read_comparison(branch.input[0], makers, known) for branch in branches}
    if None in boundaries:
        raise UnsupportedGraph("it branches on something else than the length of its input")
    if len(boundaries) > 1:
        raise UnsupportedGraph("it branches on several lengths of its input")
    return boundaries.pop()


def _read_comparison(name: str, makers: dict[str, Any], known: dict[str, Any]) -> int | None:
    """What the width of the mask is compared with by the value of this name; None where it is another value."""
    boundary = None
    for operator in ("Greater", "Gather", "Shape"):
        node = makers.get(name)
        if node is None or node.op_type != operator:
            return None
        if operator == "Greater" and node.input[1] in known:
            boundary = int(np.asarray(known[node.input[1]]).item())
        name = node.input[0]
    return boundary if name == "attention_mask" else None


def write_windows(graph: Any, windows: Windows) -> None:
    """Have a graph's attention honour the windows, if it is certain which, over keys and values of the whole row."""
    if not windows.certain:
        return
    for node in graph.node:
        number = layer_of(node)
        if number is None:
            continue
        kept = [each for each in node.attribute if each.name not in {WINDOW, WINDOW_CACHE}]
        del node.attribute[:]
        node.attribute.extend(kept)
        node.attribute.append(helper.make_attribute(WINDOW, windows.sizes[number] or -1))


def attributes(node: Any) -> dict[str, Any]:
    """A node's attributes by name."""
    return {each.name: helper.get_attribute_value(each) for each in node.attribute}


def layer_of(node: Any) -> int | None:
    """The number of the layer whose attention a node is; None for other nodes."""
    if node.op_type != ATTENTION:
        return None
    found = next((match for name in node.input if (match := re.fullmatch(r"past_key_values\.(\d+)\.key", name))), None)
    return int(found[1]) if found else None


def _from_checkpoint(file: Path, count: int) -> Windows:
    """By transformers' own configuration of the model."""
    config = read_json(file)
    config = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    size = _read_number(config, "sliding_window", file)
    if not size or config.get("use_sliding_window") is False:
        return Windows((None,) * count)
    kinds = config.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != count or any(kind not in LAYER_TYPES for kind in kinds):
            return Windows((size,) * count, certain=False)
        return Windows(tuple(size if kind == "sliding_attention" else None for kind in kinds))
    if config.get("max_window_layers") is not None:
        # Qwen's: the layers from this one on.
        first = _read_number(config, "max_window_layers", file)
        return Windows(tuple(size if place >= first else None for place in range(count)))
    return Windows((size,) * count, certain=config.get("model_type") in ONE_WINDOW)


def _read_number(values: dict[str, Any], key: str, file: Path) -> int:
    """A whole number of a configuration; 0 where it is absent."""
    value = values.get(key)
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ModelError(f"{file} gives {key} as {value!r}; it must be a whole number from 0 up")
    return value


def _read_layers(window: dict[str, Any], layers: range, file: Path) -> Sequence[int]:
    """The layers that have the window; the builder writes none where all have it."""
    chosen = window.get("layers") or layers
    if not isinstance(chosen, list | range) or not all(layer in layers for layer in chosen):
        raise ModelError(f"{file} names layers of the sliding window that the model has not: it has {len(layers)}")
    return chosen
