"""Tiny models of real architectures, with random weights that are strong enough to show a wrong window or table."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

WEIGHTS = 0.12
QKV_WEIGHTS = 0.5
"""Standard deviations of the weights. With the usual 0.02 a wrong window changes three tokens in a hundred."""

BOUNDARY = 4096
"""`original_max_position_embeddings` of the LongRoPE models, as in the real ones."""


@dataclass(frozen=True)
class Architecture:
    """A model to build.

    Attributes:
        name: the real model that it is a tiny one of.
        config: its configuration, given the sizes that all share.
        window: its sliding window, in tokens; None where it has none.
        boundary: the length from which LongRoPE's other table is used; None where there is none.
    """

    name: str
    config: Callable[..., Any]
    window: int | None = None
    boundary: int | None = None


def _longrope(pairs: int, seed: int) -> dict[str, Any]:
    """LongRoPE's two tables, of one factor for each pair of numbers that is turned."""
    random = torch.Generator().manual_seed(seed)
    short = 1 + torch.rand(pairs, generator=random)
    long = 1 + 31 * torch.rand(pairs, generator=random)
    return {
        "rope_type": "longrope",
        "type": "longrope",
        "short_factor": short.sort().values.tolist(),
        "long_factor": long.sort().values.tolist(),
        "original_max_position_embeddings": BOUNDARY,
    }


def _phi3_longrope(seed: int, **more: Any) -> Callable[..., Any]:
    def build(**sizes: Any) -> Phi3Config:
        head = sizes["hidden_size"] // more.get("num_attention_heads", sizes["num_attention_heads"])
        turned = int(head * more.get("partial_rotary_factor", 1))
        rope = {**_longrope(turned // 2, seed), "rope_theta": 10000.0}
        if "partial_rotary_factor" in more:
            rope["partial_rotary_factor"] = more["partial_rotary_factor"]
        return Phi3Config(
            **{
                **sizes,
                "max_position_embeddings": 16384,
                "original_max_position_embeddings": BOUNDARY,
                "sliding_window": 262144,
                "rope_parameters": rope,
                **more,
            }
        )

    return build


def _phi3_4k(**sizes: Any) -> Phi3Config:
    return Phi3Config(
        **{**sizes, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "sliding_window": 2047}
    )


def _llama32(**sizes: Any) -> LlamaConfig:
    return LlamaConfig(
        **{
            **sizes,
            "num_key_value_heads": 2,
            "max_position_embeddings": 8192,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 512,
            },
        }
    )


def _mistral(**sizes: Any) -> MistralConfig:
    return MistralConfig(**{**sizes, "num_key_value_heads": 2, "sliding_window": 300})


def _qwen25(**sizes: Any) -> Qwen2Config:
    return Qwen2Config(**{**sizes, "num_key_value_heads": 2, "use_sliding_window": False})


def _qwen3(**sizes: Any) -> Qwen3Config:
    return Qwen3Config(**{**sizes, "num_key_value_heads": 2, "head_dim": 32})


def _smollm3(**sizes: Any) -> SmolLM3Config:
    return SmolLM3Config(**{**sizes, "num_key_value_heads": 2, "no_rope_layer_interval": 4})


def _gemma3(**sizes: Any) -> Gemma3TextConfig:
    return Gemma3TextConfig(
        **{**sizes, "num_key_value_heads": 1, "head_dim": 32, "sliding_window": 300, "query_pre_attn_scalar": 32}
    )


def _wide_heads(**sizes: Any) -> LlamaConfig:
    return LlamaConfig(**{**sizes, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 96})


ARCHITECTURES = {
    each.name: each
    for each in (
        Architecture("Phi-3-mini-4k", _phi3_4k, window=2047),
        Architecture("Phi-3-mini-128k", _phi3_longrope(1), boundary=BOUNDARY),
        Architecture("Phi-3.5-mini", _phi3_longrope(2), boundary=BOUNDARY),
        Architecture(
            "Phi-4-mini",
            _phi3_longrope(
                3, partial_rotary_factor=0.75, tie_word_embeddings=True, num_attention_heads=2, num_key_value_heads=1
            ),
            boundary=BOUNDARY,
        ),
        Architecture("Llama-3.2", _llama32),
        Architecture("Mistral-7B-v0.1", _mistral, window=300),
        Architecture("Qwen2.5", _qwen25),
        Architecture("Qwen3", _qwen3),
        Architecture("SmolLM3", _smollm3),
        Architecture("Gemma-3", _gemma3, window=300),
        Architecture("Llama, 32 heads of 96, 8 of keys", _wide_heads),
    )
}


def build_checkpoint(architecture: Architecture, vocabulary: int, out: Path, **tokens: Any) -> Any:
    """A checkpoint with random weights, saved for transformers and for the model builder.

    Args:
        architecture: what to build.
        vocabulary: number of tokens.
        out: the folder.
        tokens: `bos_token_id`, `eos_token_id`, `pad_token_id`.
    """
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }
    config = architecture.config(**sizes, **tokens)
    torch.manual_seed(20240423)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                qkv = any(part in name for part in ("qkv_proj", "q_proj", "k_proj", "v_proj"))
                weight.normal_(0, QKV_WEIGHTS if qkv else WEIGHTS)
            elif name.endswith("bias"):
                weight.normal_(0, WEIGHTS)
            else:
                weight.add_(torch.randn_like(weight) * WEIGHTS)
    model.save_pretrained(out)
    return model
