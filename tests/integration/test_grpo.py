"""Group relative policy optimisation: what the engine samples is what the trainer computes, and rewards are learnt."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lapis.data.examples import Prompt
from lapis.data.loader import TokenBatch
from lapis.data.prompts import Asked, Prompts
from lapis.errors import ConfigError, InputError
from lapis.kernels.batch import packed
from lapis.kernels.stock import StockOps
from lapis.model.config import ModelConfig
from lapis.model.families import Decoder, build
from lapis.model.manifest import Manifest, Source
from lapis.train.grpo import GroupRelative, advantages
from lapis.train.lora import attach
from lapis.train.objective import StepBatch, of_model
from lapis.train.recipe import GrpoSection, LoraSection, TrainSection
from lapis.train.replica import Alone
from lapis.train.reward import Reward
from tests import small_models

SHAPES = {name: small_models.families()[name] for name in ("llama", "gpt2", "olmoe")}
TOKENIZER = small_models.tokenizer()
MANIFEST = Manifest("digest", Source("run", "test"), {}, 0, False, None, (TOKENIZER.end_id,))


def prompts(count: int = 6) -> Prompts:
    """Random tokens to go on with."""
    numbers = np.random.default_rng(0)
    lengths = numbers.integers(1, 70, count)
    texts = [tuple(numbers.integers(3, 300, length).tolist()) for length in lengths]
    asked = tuple(Asked(Prompt(f"{n}?", {}), ids, f"file:{n}") for n, ids in enumerate(texts))
    return Prompts(asked, asked[:2], 0, "digest")


def model(shape: ModelConfig, exact: bool = False) -> Decoder:
    """The shape with lively weights; `exact` in fp32 over plain torch."""
    made = build(shape, StockOps(dtype=torch.float32), torch.float32) if exact else build(shape)
    state = small_models.random_state(shape)
    made.load_state_dict({key: value.to(made.dtype) for key, value in state.items()})
    made.requires_grad_(True)
    return made


def section(**changes: Any) -> TrainSection:
    given = {"steps": 10, "batch": 2, "sequence": 128, "seed": 3, "optimizer": "adamw", **changes}
    return TrainSection.model_validate(given)


def objective(grade: Callable[[str], float] = len, batch: int = 2, **grpo: Any) -> GroupRelative:
    asked = GrpoSection.model_validate({"regex": ".", "group": 4, "max_tokens": 12, **grpo})
    reward = Reward("test", lambda prompt, answer, fields: grade(answer))
    return GroupRelative(section(batch=batch), asked, prompts(), reward, TOKENIZER, MANIFEST)


def passed(goal: GroupRelative, replica: Alone, step: int, rate: float) -> StepBatch:
    """One whole step."""
    batch = goal.step(step, 0, 1)
    loss = replica.backward(lambda made, micro: goal.loss(made, micro, batch.weight), batch.micros)
    replica.update(replica.finish(loss).norm, lr=rate, embed_lr=rate)
    return batch


def trained_logprobs(made: Decoder, micro: TokenBatch, temperature: float) -> list[float]:
    """The log probabilities of the answers' tokens by the forward of training, gradients on."""
    assert micro.weights_T is not None
    logits_TV = made(torch.from_numpy(micro.ids_T), packed(micro.lengths))
    assert logits_TV.requires_grad
    logprob_T = made.ops.logprobs(logits_TV / temperature, torch.from_numpy(micro.targets_T))
    return logprob_T[torch.from_numpy(micro.weights_T > 0)].tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", [*SHAPES, "adapters"])
def test_the_sampler_is_the_trainer_bit_for_bit(name: str, temperature: float) -> None:
    """Also after the weights have moved: the engine reads the very memory that is trained."""
    made = model(SHAPES.get(name, SHAPES["llama"]))
    if not made.ops.bit_exact:
        pytest.skip(f"only compiled kernels promise bits; these are {made.ops.name}")
    if name == "adapters":
        attach(made, LoraSection(rank=3, alpha=6.0), seed=1)
    goal = objective(temperature=temperature)
    goal.begin(made)
    replica = Alone(made, section())
    for step in range(3):
        batch = passed(goal, replica, step, 0.0)
        (micro,) = batch.micros
        assert micro.facts_NT is not None and micro.weights_T is not None
        sampled = micro.facts_NT[0][micro.weights_T > 0].tolist()
        assert len(sampled) > 20
        assert sampled == trained_logprobs(made, micro, temperature)
        assert goal.metrics()["ratio_off"] == 0.0
        if step == 0:
            assert goal.metrics()["kl"] == 0.0
        passed(goal, replica, 5, 0.01)
    assert goal.metrics()["kl"] > 0.0


def test_weights_in_fp32_and_layers_that_are_computed_again_are_sampled_from_as_well() -> None:
    shape = SHAPES["llama"]
    made = build(shape, dtype=torch.float32)
    if not made.ops.bit_exact:
        pytest.skip(f"only compiled kernels promise bits; these are {made.ops.name}")
    made.load_state_dict({key: value.float() for key, value in small_models.random_state(shape).items()})
    made.requires_grad_(True)
    goal, whole = objective(), section(recompute="full")
    goal.begin(made)
    replica = Alone(made, whole)
    for step in range(2):
        passed(goal, replica, step, 0.01)
        assert goal.metrics()["ratio_off"] == 0.0


def test_with_plain_torch_sampler_and_trainer_differ() -> None:
    made = build(SHAPES["llama"], StockOps())
    made.load_state_dict(small_models.random_state(SHAPES["llama"]))
    made.requires_grad_(True)
    goal = objective()
    goal.begin(made)
    passed(goal, Alone(made, section()), 0, 0.0)
    assert 0.0 < goal.metrics()["ratio_off"] < 1.0


def plain_loss(made: Decoder, first: Decoder, micro: TokenBatch, goal: GroupRelative, answers: int) -> Tensor:
    """Equation 3 of the paper as it is written, logits whole, one answer at a time."""
    grpo, start, total = goal.grpo, 0, torch.zeros(())
    for length in micro.lengths:
        part = slice(start, start + length)
        start += length
        assert micro.facts_NT is not None and micro.weights_T is not None
        counts = torch.from_numpy(micro.weights_T[part] > 0)
        ids, targets = torch.from_numpy(micro.ids_T[part]), torch.from_numpy(micro.targets_T[part])[counts]
        old, advantage = torch.from_numpy(micro.facts_NT[:, part])[:, counts]

        def logprob(network: Decoder) -> Tensor:
            logits = network(ids, packed([len(ids)]))[counts] / grpo.temperature  # noqa: B023
            return torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]  # noqa: B023

        policy, reference = logprob(made), logprob(first).detach()
        ratio = (policy - old).exp()
        bound = ratio.clamp(1 - grpo.clip, 1 + grpo.clip)
        surrogate = torch.minimum(ratio * advantage, bound * advantage)
        divergence = (reference - policy).exp() - (reference - policy) - 1
        total = total - (surrogate - grpo.beta * divergence).mean()
    return total / answers


@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_loss_and_gradient_are_those_of_the_plain_form(temperature: float) -> None:
    shape = small_models.config()
    made, first = model(shape, exact=True), model(shape, exact=True)
    goal = objective(temperature=temperature, beta=0.3, clip=0.05)
    goal.begin(made)
    batch = goal.step(0, 0, 1)
    with torch.no_grad():  # off the policy that was sampled from, so that some ratios are clipped
        for weight in made.parameters():
            weight += 0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    loss = goal.loss(made, batch.micros[0], batch.weight)
    loss.backward()
    mine = {name: weight.grad.clone() for name, weight in made.named_parameters() if weight.grad is not None}
    assert goal.metrics()["ratio_off"] > 0.05
    made.zero_grad()
    want = plain_loss(made, first, batch.micros[0], goal, 8)
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-4, abs=1e-6)
    for name, weight in made.named_parameters():
        assert weight.grad is not None
        assert (mine[name] - weight.grad).norm() <= 1e-4 * weight.grad.norm() + 1e-7, name


def test_an_advantage_is_told_in_deviations_of_its_group() -> None:
    assert advantages([0.0, 1.0, 0.0, 1.0]) == pytest.approx([-1, 1, -1, 1], abs=1e-3)
    assert advantages([3.0, 3.0]) == [0.0, 0.0]
    assert advantages([0.1] * 3) == pytest.approx([0.0] * 3)


@pytest.mark.parametrize("adapters", [True, False])
def test_the_reward_rises(adapters: bool) -> None:
    made = model(SHAPES["llama"])
    if adapters:
        attach(made, LoraSection(rank=4, alpha=8.0), seed=1)

    def share_of_e(answer: str) -> float:
        return answer.count("e") / max(1, len(answer))

    goal = objective(share_of_e, batch=4, group=8, max_tokens=8, beta=0.0)
    goal.begin(made)
    replica, rewards = Alone(made, section()), []
    for step in range(20):
        passed(goal, replica, step, 0.02 if adapters else 0.003)
        rewards.append(goal.metrics()["reward"])
    assert statistics.fmean(rewards[-3:]) > statistics.fmean(rewards[:3]) + 0.3
    held = goal.heldout(of_model(made))
    assert held["reward"] > 0.4
    told = goal.answered()
    assert [one.reward for one in told] == [share_of_e(one.text) for one in told]
    assert statistics.fmean(one.reward or 0.0 for one in told) == held["reward"]  # the two prompts are all


def test_a_step_is_a_function_of_weights_seed_and_step() -> None:
    made = model(SHAPES["llama"])
    goal, again = objective(), objective()
    goal.begin(made)
    again.begin(made)
    other = again.graded(4)
    assert goal.graded(3) != goal.graded(4) == other
    assert len({one.answer.ids for one in other[:4]}) > 1


def test_the_shares_of_ranks_are_the_step() -> None:
    made, goal = model(SHAPES["llama"]), objective(batch=4)
    if not made.ops.bit_exact:
        pytest.skip("an answer may depend on what runs beside it")
    goal.begin(made)
    whole = goal.step(1, 0, 1)
    shares = [goal.step(1, rank, 2) for rank in range(2)]
    assert sorted(n for share in shares for n in share.samples) == sorted(whole.samples)
    assert {share.weight for share in shares} == {whole.weight}
    texts = [texts_of(micro) for share in shares for micro in share.micros]
    assert sorted(text for some in texts for text in some) == sorted(texts_of(whole.micros[0]))
    with pytest.raises(ConfigError, match="cannot be shared by 3"):
        goal.step(1, 0, 3)


def texts_of(micro: TokenBatch) -> list[list[int]]:
    return [part.tolist() for part in np.split(micro.targets_T, np.cumsum(micro.lengths)[:-1])]


@pytest.mark.parametrize("value", [float("nan"), "much", None, float("inf")])
def test_a_reward_that_is_no_number_is_refused(value: Any) -> None:
    goal = objective(lambda answer: value)
    goal.begin(model(SHAPES["llama"]))
    with pytest.raises(InputError, match=r"The reward test failed for file:\d: it gave .*no finite number"):
        goal.step(0, 0, 1)
