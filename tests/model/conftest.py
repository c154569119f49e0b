import json
import shutil
from pathlib import Path

import onnx
import pytest

from phibatch import demo

TEMPLATES = Path(__file__).with_name("templates")
GRAPH = "phi3-mini-4k-instruct-cpu-int4-rtn-block-32-acc-level-4.onnx"
SPECIAL = ["<unk>", "<s>", "</s>"]
LETTERS = "▁etainosrhldcumfpgwybvk,.?'WTSYUAB"
"""What the toy tokenizer knows beside bytes, as Llama's does; their ids begin at 259."""
BASE = 300
"""The real one's is 32000: its control tokens stand after it, in this order."""
CONTROLS = ["<|endoftext|>", "<|assistant|>", *(f"<|placeholder{n}|>" for n in range(1, 5)), "<|system|>"]
CONTROLS += ["<|end|>", "<|placeholder5|>", "<|placeholder6|>", "<|user|>"]


@pytest.fixture(scope="session")
def april_template() -> str:
    """Of Phi-3-mini as of April 2024: begins with BOS, has no system turn, opens the answer after each user turn."""
    return (TEMPLATES / "phi3_april_2024.jinja").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def later_template() -> str:
    """Of Phi-3-mini since: a system turn, no BOS."""
    return (TEMPLATES / "phi3_later.jinja").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def phi3_tokenizer() -> dict:
    """A `tokenizer.json` in Phi-3's shape: Llama's letters and spaces, greedy control tokens, BOS added in front."""
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *LETTERS]
    pieces += [f"▁filler{number}" for number in range(BASE - len(pieces))]
    shape = {"single_word": False, "lstrip": False, "normalized": False}
    added = [{"id": n, "content": name, **shape, "rstrip": False, "special": True} for n, name in enumerate(SPECIAL)]
    added[2] |= {"rstrip": True, "special": False}
    added += [
        {"id": BASE + n, "content": name, **shape, "rstrip": True, "special": True} for n, name in enumerate(CONTROLS)
    ]
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    spoken = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, space]},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, bos, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [*spoken, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {piece: number for number, piece in enumerate(pieces)},
            "merges": [],
        },
    }


@pytest.fixture(scope="session")
def published(tmp_path_factory, april_template, phi3_tokenizer) -> Path:
    """A folder laid out as the one that Microsoft published in 2024, with the embedded model's weights."""
    folder = tmp_path_factory.mktemp("published") / "cpu-int4-rtn-block-32-acc-level-4"
    folder.mkdir()
    graph = onnx.load(str(demo.MODEL_DIR / "model.onnx"), load_external_data=False)
    graph.ir_version = 7
    for opset in graph.opset_import:
        opset.version = 1 if opset.domain else 14
    for tensor in graph.graph.initializer:
        for entry in tensor.external_data:
            entry.value = f"{GRAPH}.data" if entry.key == "location" else entry.value
    (folder / GRAPH).write_bytes(graph.SerializeToString())
    shutil.copyfile(demo.MODEL_DIR / "model.onnx.data", folder / f"{GRAPH}.data")
    config = json.loads((demo.MODEL_DIR / "genai_config.json").read_text(encoding="utf-8"))
    config["model"]["decoder"]["filename"] = GRAPH
    ends = [BASE + CONTROLS.index(name) for name in ("<|endoftext|>", "<|assistant|>", "<|end|>")]
    config["model"] |= {"bos_token_id": 1, "eos_token_id": ends, "pad_token_id": ends[0]}
    config["search"] |= {"do_sample": True, "top_k": 1}
    tokenizer_config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"}
            for token in phi3_tokenizer["added_tokens"]
        },
        "bos_token": "<s>",
        "chat_template": april_template,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "legacy": False,
        "model_max_length": 4096,
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
        "use_default_system_prompt": False,
    }
    documents = {
        "genai_config.json": config,
        "tokenizer.json": phi3_tokenizer,
        "tokenizer_config.json": tokenizer_config,
        "added_tokens.json": {name: BASE + number for number, name in enumerate(CONTROLS)},
        "config.json": {
            "architectures": ["Phi3ForCausalLM"],
            "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
            "model_type": "phi3",
        },
        "special_tokens_map.json": {"bos_token": "<s>", "eos_token": "<|endoftext|>", "unk_token": "<unk>"},
    }
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document, indent=2, ensure_ascii=False), encoding="utf-8")
    (folder / "configuration_phi3.py").write_text("raise SystemExit('this must never run')\n")
    (folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02")
    return folder
