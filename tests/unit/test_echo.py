import pytest

from phibatch.contract import FinishReason, GenerationParams, Message, Request
from phibatch.model.engine.echo import EchoEngine


def echo(text, **params):
    request = Request(GenerationParams(**params), messages=(Message("system", "two words"), Message("user", text)))
    return EchoEngine().generate([request])[0]


@pytest.mark.parametrize(
    ("params", "text", "finish_reason", "tokens"),
    [
        ({}, "one two  three", FinishReason.STOP, 3),
        ({"max_tokens": 2}, "one two", FinishReason.LENGTH, 2),
        ({"max_tokens": 3}, "one two  three", FinishReason.STOP, 3),
        ({"stop": ("three", "wo")}, "one t", FinishReason.STOP, 2),
        ({"max_tokens": 1, "stop": ("two",)}, "one", FinishReason.LENGTH, 1),
    ],
)
def test_echo_keeps_limits_and_stops(params, text, finish_reason, tokens):
    """The stand-in obeys `max_tokens` and `stop` and counts words, prompt and completion apart."""
    completion = echo("one two  three", **params)
    assert (completion.text, completion.finish_reason) == (text, finish_reason)
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (5, tokens)
