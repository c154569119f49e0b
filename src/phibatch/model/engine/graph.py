"""The decoder graph that onnxruntime-genai's builder writes, run by onnxruntime itself over keys and values of ours."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper

from phibatch.model.engine.attention import (
    ATTENTION,
    UnsupportedGraph,
    attributes,
    read_reach,
    read_windows,
    write_windows,
)
from phibatch.model.engine.kv import KVShape, KVSlots
from phibatch.model.engine.sampling import Logits
from phibatch.model.folder import ModelFolder

PROJECTIONS = {"MatMul", "MatMulNBits"}
TOKENS = {"input_ids", "attention_mask"}
PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")


class DecoderGraph:
    """A checked graph, cut down to the logits of the last position.

    Args:
        folder: the model's; the graph's external data lies beside the graph.
        threads: of onnxruntime.

    Attributes:
        kv: the keys and values of one token.
        reach: the longest row that can be run; None is the context's.

    Raises:
        UnsupportedGraph: its inputs or its attention are not those that slots can be run over.
    """

    def __init__(self, folder: ModelFolder, threads: int) -> None:
        model = onnx.load(str(folder.graph), load_external_data=False)
        self.kv = _check(model.graph, folder.head_size)
        windows = read_windows(model.graph, folder.path)
        self.reach = read_reach(model.graph, windows)
        write_windows(model.graph, windows)
        _keep_last_position(model.graph)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # The library's own pool would keep the most that any one prompt needed.
        options.enable_cpu_mem_arena = False
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(folder.graph.parent)
        )
        self._session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def run(self, slots: KVSlots, first: int, ids: NDArray[np.int64], lengths: Sequence[int]) -> Logits:
        """Feed neighbouring slots their next tokens.

        Args:
            slots: where keys and values are read, and the new ones written.
            first: the first slot.
            ids: shape [slots, tokens].
            lengths: how many tokens each of the slots holds already.

        Returns:
            The logits of the last position, shape [slots, vocabulary].
        """
        count, new = ids.shape
        totals = np.asarray(lengths)[:, None] + new
        mask = (np.arange(totals.max()) < totals).astype(np.int64)
        binding = self._session.io_binding()
        # First, since outputs are read by position.
        binding.bind_output("logits", "cpu")
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("attention_mask", mask)
        for name, array in slots.arrays.items():
            part = array[first : first + count]
            place = ("cpu", 0, np.float32, part.shape, part.ctypes.data)
            binding.bind_input(f"past_key_values.{name}", *place)
            binding.bind_output(f"present.{name}", *place)
        self._session.run_with_iobinding(binding)
        logits: Logits = binding.get_outputs()[0].numpy()
        return logits[:, -1]


def _check(graph: Any, head_size: int) -> KVShape:
    past = {each.name: each.type.tensor_type for each in graph.input if PAST.fullmatch(each.name)}
    others = {each.name for each in graph.input} - set(past)
    if others != TOKENS:
        raise UnsupportedGraph(f"its inputs are {', '.join(sorted(others))}, not {', '.join(sorted(TOKENS))}")
    layers = len(past) // 2
    if set(past) != {f"past_key_values.{layer}.{part}" for layer in range(layers) for part in ("key", "value")}:
        raise UnsupportedGraph("its keys and values are not a pair for each layer")
    kinds = {kind.elem_type for kind in past.values()}
    heads = {kind.shape.dim[1].dim_value for kind in past.values()}
    if kinds != {TensorProto.FLOAT} or len(heads) != 1:
        raise UnsupportedGraph("its keys and values are not float32 of one shape in all layers")
    attentions = [node for node in graph.node if node.op_type == ATTENTION]
    if len(attentions) != layers:
        raise UnsupportedGraph(f"it has {layers} layers and {len(attentions)} {ATTENTION} nodes")
    for node in attentions:
        if attributes(node).get("do_rotary", 0) != 1:
            raise UnsupportedGraph("its attention does not turn positions itself")
    return KVShape(layers, heads.pop(), head_size)


def _keep_last_position(graph: Any) -> None:
    """Have the projection to the vocabulary, the widest of all, compute what is read: the last position.

    Safe here, where a prompt is fed alone and a step feeds one token a row. The builder's `prune_lm_head` does the
    same; a graph that ends in another way is left as it is.
    """
    head = next((node for node in graph.node if "logits" in node.output), None)
    if head is None or head.op_type not in PROJECTIONS:
        return
    last = helper.make_tensor("phibatch.last", TensorProto.INT64, [1], [-1])
    graph.initializer.append(last)
    hidden = "phibatch.hidden"
    gather = helper.make_node("Gather", [head.input[0], last.name], [hidden], name="phibatch.gather", axis=1)
    head.input[0] = hidden
    graph.node.insert(list(graph.node).index(head), gather)
