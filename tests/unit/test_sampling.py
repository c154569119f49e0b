import numpy as np
import pytest

from phibatch.contract import GenerationParams
from phibatch.model.engine.sampling import Sampler, _heaviest, _nucleus_size

LOGITS = np.array([1.0, 3.0, 2.0, -1.0, 2.5], dtype=np.float32)


def draws(params, n=4000, logits=LOGITS, prompt=()):
    sampler = Sampler(params, list(prompt))
    return [sampler.choose(logits) for _ in range(n)]


def shares(tokens):
    return np.bincount(tokens, minlength=len(LOGITS)) / len(tokens)


def test_temperature_zero_is_greedy():
    """Without temperature the likeliest token is taken, whatever the seed."""
    assert set(draws(GenerationParams(seed=7), 20)) == {1}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_softmax_of_the_scaled_logits(temperature):
    """The share of each token is its probability at that temperature, within four standard errors."""
    expected = np.exp(LOGITS / temperature) / np.exp(LOGITS / temperature).sum()
    found = shares(draws(GenerationParams(temperature=temperature, seed=1), 20000))
    assert np.all(np.abs(found - expected) < 4 * np.sqrt(expected * (1 - expected) / 20000))


def test_top_k_keeps_the_likeliest():
    """With `top_k` 2 only the two likeliest tokens are ever drawn, and both are."""
    assert set(draws(GenerationParams(temperature=2.0, top_k=2, seed=1))) == {1, 4}


def test_top_p_keeps_the_smallest_set_that_reaches_the_mass():
    """`top_p` keeps just as many of the likeliest tokens as reach the mass, and at least one."""
    probabilities = np.sort(np.exp(LOGITS) / np.exp(LOGITS).sum())[::-1]
    first_two = float(probabilities[:2].sum())
    assert set(draws(GenerationParams(temperature=1.0, top_p=first_two - 0.01, seed=1))) == {1, 4}
    assert set(draws(GenerationParams(temperature=1.0, top_p=first_two + 0.01, seed=1))) == {1, 4, 2}
    assert set(draws(GenerationParams(temperature=1.0, top_p=1e-9, seed=1))) == {1}


def test_min_p_keeps_what_is_near_the_likeliest():
    """`min_p` keeps the tokens of at least its share of the likeliest one's probability."""
    share = float(np.exp(LOGITS[2] - LOGITS[1]))
    assert set(draws(GenerationParams(temperature=1.0, min_p=share - 0.01, seed=1))) == {1, 2, 4}
    assert set(draws(GenerationParams(temperature=1.0, min_p=share + 0.01, seed=1))) == {1, 4}
    assert set(draws(GenerationParams(temperature=1.0, min_p=1, seed=1), 50)) == {1}


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("spread", [0.01, 1.0, 10.0])
def test_a_nucleus_is_found_without_sorting_the_vocabulary(top_p, spread):
    """On flat and on peaked distributions, what is kept is what sorting all tokens would keep."""
    weights = np.exp(np.random.default_rng(4).normal(scale=spread, size=5000))
    order = np.argsort(-weights, kind="stable")
    mass = np.cumsum(weights[order])
    expected = order[: int(np.searchsorted(mass, top_p * mass[-1])) + 1]
    count = _nucleus_size(weights, top_p)
    # Sums in another order: at the edge one token more or less.
    assert abs(count - len(expected)) <= 1
    assert _heaviest(weights, np.arange(5000), count).tolist() == sorted(order[:count].tolist())


def test_extreme_parameters_do_not_overflow():
    """The lowest temperature is as good as greedy."""
    assert set(draws(GenerationParams(temperature=1e-308, seed=1), 50)) == {1}


def test_a_seed_is_a_stream():
    """Equal seeds draw alike, other seeds otherwise, and negative ones are seeds too."""
    params = [GenerationParams(temperature=1.0, seed=seed) for seed in (5, 5, 6, -5)]
    first, second, third, fourth = (draws(each, 50) for each in params)
    assert first == second
    assert len({tuple(first), tuple(third), tuple(fourth)}) == 3


def test_the_repetition_penalty_counts_prompt_and_answer():
    """Seen tokens lose: positive logits are divided, negative ones multiplied, and what was said is seen."""
    assert draws(GenerationParams(repetition_penalty=2.0), 1, prompt=[1]) == [4]
    assert draws(GenerationParams(repetition_penalty=10.0), 4, prompt=[]) == [1, 4, 2, 0]
    negative = np.array([-1.0, -2.0], dtype=np.float32)
    assert draws(GenerationParams(repetition_penalty=3.0), 2, logits=negative) == [0, 1]


def test_the_logits_are_left_as_they_were():
    """Choosing does not write into the engine's logits."""
    before = LOGITS.copy()
    draws(GenerationParams(temperature=1.0, repetition_penalty=2.0, top_k=3, top_p=0.5), 3, prompt=[0, 1])
    assert np.array_equal(LOGITS, before)


def test_equal_logits_are_settled_by_token_id():
    """Ties do not depend on how a sort happens to go: top_k takes the lowest ids."""
    flat = np.zeros(50, dtype=np.float32)
    assert set(draws(GenerationParams(temperature=1.0, top_k=3, seed=2), 200, logits=flat)) == {0, 1, 2}
