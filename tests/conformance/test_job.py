"""The whole way: models of the builder's default options through `run_batch`, against transformers' `generate`."""

from typing import Any

import pytest
import torch
from reference import build_prompt
from transformers import AutoTokenizer

from phibatch.job.output import read_responses
from phibatch.job.pipeline import run_batch
from phibatch.model.registry import log_onnx

NEW_TOKENS = 12

LENGTHS = {
    "Phi-3-mini-4k": (20, 2300, 300, 2600, 1000, 3000, 60, 3400, 3700),
    "Phi-3-mini-128k": (20, 4300, 300, 5000, 1312, 4600, 60, 3000),
}
ANSWERED_UP_TO = {"Phi-3-mini-4k": 4096, "Phi-3-mini-128k": 4096 - NEW_TOKENS - 20}


@torch.inference_mode()
def ask_transformers(model: Any, tokenizer: Any, prompt: str) -> str:
    """The greedy answer to one prompt, alone, by transformers' own `generate`."""
    messages = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    return str(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


@pytest.mark.usefixtures("tracking")
@pytest.mark.parametrize("name", LENGTHS)
def test_long_rows_among_short_ones(spark, built, words, job, write_parquet, tmp_path, name):
    """Every answer that is given is transformers', in any order and batch; other rows are refused with the reason."""
    model = built(name)
    assert model.build("fp32") is None
    logged = log_onnx(model.folder("fp32"), f"conformance-{name.lower().replace('.', '-')}")
    tokenizer = AutoTokenizer.from_pretrained(model.checkpoint)
    prompts = {length: build_prompt(words, length)[0].strip() for length in LENGTHS[name]}
    expected = {
        length: ask_transformers(model.reference, tokenizer, prompt)
        for length, prompt in prompts.items()
        if length <= ANSWERED_UP_TO[name]
    }
    for batch_size, order in ((16, list(prompts)), (2, list(prompts)[::-1])):
        rows = [{"custom_id": str(length), "prompt": prompts[length]} for length in order]
        config = job(
            write_parquet(rows, f"input-{batch_size}"),
            model={"uri": logged.uri, "engine": "auto", "batch_size": batch_size},
            generation={"max_tokens": NEW_TOKENS},
            output={"path": str(tmp_path / f"output-{batch_size}")},
        )
        run_batch(spark, config)
        found = {int(row["custom_id"]): row for row in read_responses(spark, config.output).collect()}
        assert {length: row["response"] for length, row in found.items() if length in expected} == expected
        for length in found.keys() - expected.keys():
            assert found[length]["error"]["code"] == "context_length_exceeded"
            assert "LongRoPE" in found[length]["error"]["message"]
