"""The int4 weights of a built folder, as float32 in a transformers model."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper

Matrix = NDArray[np.float32]


def read_int4_weights(folder: Path, model: Any) -> None:
    """Put what the folder's MatMulNBits nodes multiply with into a model's linear layers.

    The format is that of `com.microsoft.MatMulNBits`: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
    """
    graph = onnx.load(str(folder / "model.onnx")).graph
    arrays = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    matrices = {_name(node.name): _dequantise(node, arrays) for node in graph.node if node.op_type == "MatMulNBits"}
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                weight = _find(name, module, matrices)
                assert weight.shape == tuple(module.weight.shape), name
                module.weight.copy_(torch.from_numpy(weight))
    # Tied embeddings are the vocabulary's matrix, in the graph as in the model.


def _name(node: str) -> str:
    """`/model/layers.0/attn/qkv_proj/MatMul_Q4` as `layers.0.qkv_proj`."""
    parts = node.strip("/").split("/")
    layer = next((part for part in parts if part.startswith("layers.")), "")
    return f"{layer}.{parts[-2]}".lstrip(".")


def _dequantise(node: Any, arrays: dict[str, Any]) -> Matrix:
    attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    bits, block, rows, width = (attributes[name] for name in ("bits", "block_size", "N", "K"))
    packed, scales = arrays[node.input[1]].reshape(rows, -1), arrays[node.input[2]].reshape(rows, -1)
    values = _unpack(packed, bits)
    zeros: Any = 2 ** (bits - 1)
    if len(node.input) > 3 and node.input[3]:
        zeros = _unpack(arrays[node.input[3]].reshape(rows, -1), bits)[:, : scales.shape[1], None]
    blocks = values.reshape(rows, scales.shape[1], block).astype(np.float32)
    return np.asarray((blocks - zeros) * scales[:, :, None], dtype=np.float32).reshape(rows, -1)[:, :width]


def _unpack(packed: Any, bits: int) -> Any:
    return packed if bits == 8 else np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)


def _find(name: str, module: Any, matrices: dict[str, Matrix]) -> Matrix:
    parts = name.split(".")
    layer = f"layers.{parts[parts.index('layers') + 1]}." if "layers" in parts else ""
    own = parts[-1]
    if layer + own in matrices:
        return matrices[layer + own]
    if own == "gate_up_proj":
        return np.concatenate([matrices[f"{layer}gate_proj"], matrices[f"{layer}up_proj"]])
    # The builder joins the three.
    joined = matrices[f"{layer}qkv_proj"]
    size = module.out_features
    begin = {"q_proj": 0, "k_proj": len(joined) - 2 * size, "v_proj": len(joined) - size}[own]
    return joined[begin : begin + size]
