"""Fine-tuning: adapters beside a frozen model, preferences, and that what was trained is what is served."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lapis.data.samples import Sample, Samples, Tokens, packed_batches
from lapis.errors import ConfigError
from lapis.inference.engine import LocalEngine
from lapis.inference.request import Request, SamplingParams
from lapis.kernels.batch import packed
from lapis.kernels.stock import StockOps
from lapis.model.adapters import read_adapter, write_adapter
from lapis.model.config import ModelConfig
from lapis.model.families import Decoder, build
from lapis.model.manifest import Source, copy_folder
from lapis.model.weights import read_model, write_model
from lapis.train.lora import attach, merged
from lapis.train.objective import Objective, of_model
from lapis.train.preference import Preferences, judge
from lapis.train.recipe import DpoSection, LoraSection, TrainSection
from lapis.train.recompute import recompute_layers
from lapis.train.sft import Supervised
from tests import small_models

SHAPES = {name: small_models.families()[name] for name in ("llama", "qwen3 moe", "gpt2")}
VOCABULARY = 300


def texts(count: int, seed: int = 0, longest: int = 40) -> tuple[Tokens, ...]:
    """Random tokens; the second half of each is trained on."""
    numbers = np.random.default_rng(seed)
    lengths = [int(n) for n in numbers.integers(6, longest, count)]
    return tuple(Tokens(numbers.integers(3, VOCABULARY, n), np.arange(n) >= n // 2) for n in lengths)


def samples(count: int, size: int) -> Samples:
    """Samples of one text each, or pairs of two."""
    found = texts(count * size)
    whole: tuple[Sample, ...] = tuple(found[n : n + size] for n in range(0, count * size, size))
    return Samples(whole, whole[:2], 0, "digest")


def model(shape: ModelConfig, exact: bool = False) -> Decoder:
    """The shape with lively weights; `exact` in fp32 over plain torch."""
    made = build(shape, StockOps(dtype=torch.float32), torch.float32) if exact else build(shape)
    made.load_state_dict(
        {key: value.to(made.dtype) for key, value in small_models.random_state(shape).items()}
    )
    made.requires_grad_(True)
    return made


def section(**changes: object) -> TrainSection:
    return TrainSection(**{"steps": 10, "batch": 4, "sequence": 64, "seed": 3, **changes})  # type: ignore[arg-type]


def trained(made: Decoder, objective: Objective, steps: int, rate: float) -> list[float]:
    """A few steps of plain SGD; the losses."""
    losses = []
    for step in range(steps):
        batch = objective.step(step % 2, 0, 1)
        for weight in made.parameters():
            weight.grad = None
        parts = [objective.loss(made, micro, batch.weight) for micro in batch.micros]
        torch.autograd.backward(parts)
        losses.append(sum(part.item() for part in parts))
        with torch.no_grad():
            for weight in made.parameters():
                if weight.grad is not None:
                    weight -= rate * weight.grad
        made.ops.weights_changed()
    return losses


def shaken(made: Decoder) -> None:
    """Give an adapter in training lively values: bf16 numbers."""
    assert made.lora is not None
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in made.lora.parameters():
            weight.copy_((torch.randn(weight.shape, generator=generator) * 0.1).bfloat16())


def supervised(found: Samples, **changes: object) -> Supervised:
    return Supervised(section(**changes), found, small_models.tokenizer())


@pytest.mark.parametrize("name", SHAPES)
def test_a_new_adapter_changes_no_bit_and_only_adapters_learn(name: str) -> None:
    made = model(SHAPES[name])
    ids = torch.from_numpy(texts(1)[0].ids)
    before = made(ids, packed([len(ids)])).detach()
    attach(made, LoraSection(rank=3, alpha=6.0), seed=1)
    assert torch.equal(made(ids, packed([len(ids)])), before)
    names = {name for name, weight in made.named_parameters() if weight.requires_grad}
    assert names == {name for name, _ in made.named_parameters() if name.startswith("lora.")}
    losses = trained(made, supervised(samples(8, 1)), 6, 0.1)
    assert losses[4] < losses[0]
    assert losses[5] < losses[1]
    frozen = [weight.grad for name, weight in made.named_parameters() if name not in names]
    assert frozen == [None] * len(frozen)


def test_layers_that_are_computed_again_give_adapters_the_same_gradients() -> None:
    found = []
    for how in ("none", "full"):
        made = model(SHAPES["llama"])
        attach(made, LoraSection(rank=4, alpha=8.0), seed=1)
        shaken(made)
        recompute_layers(made, how)
        objective = supervised(samples(8, 1))
        batch = objective.step(0, 0, 1)
        torch.autograd.backward([objective.loss(made, micro, batch.weight) for micro in batch.micros])
        found.append([weight.grad for weight in made.parameters() if weight.requires_grad])
    for plain, again in zip(*found, strict=True):
        assert plain is not None and again is not None
        assert torch.equal(plain, again)


def test_targets_are_named_as_peft_does_and_others_are_refused() -> None:
    made = model(SHAPES["llama"])
    lora = attach(made, LoraSection(rank=3, targets=("q_proj", "v_proj")), seed=1)
    pairs = lora.pairs()[0]
    assert {name: pair[0].shape[0] for name, pair in pairs.items()} == {"qkv": 6}
    with pytest.raises(ConfigError, match=r"no linear map 'w1'.*\n.*q_proj"):
        attach(made, LoraSection(targets=("w1",)), seed=1)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", SHAPES)
def test_peft_computes_the_same_with_an_adapter_trained_here(tmp_path: Path, name: str) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    shape = SHAPES[name]
    made = model(shape, exact=True)
    lora = attach(made, LoraSection(rank=3, alpha=6.0), seed=1)
    shaken(made)
    ids = torch.from_numpy(texts(1)[0].ids)
    with torch.no_grad():
        found = made(ids, packed([len(ids)]))
    write_adapter(tmp_path / "adapter", shape, lora.adapter(), "m")
    state = small_models.random_state(shape)
    write_model(tmp_path / "m", shape, state, small_models.tokenizer(), source=Source("run", "test"))
    copy_folder(tmp_path / "m", tmp_path / "plain", sealed=False)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(ids[None]).logits[0]
    assert (found - theirs).abs().max() < 2e-4 * theirs.abs().max()
    whole = build(shape, StockOps(dtype=torch.float32), torch.float32)
    weights = {key: value for key, value in made.state_dict().items() if not key.startswith("lora.")}
    whole.load_state_dict(merged(weights, lora.adapter()))
    with torch.no_grad():
        assert (whole(ids, packed([len(ids)])) - theirs).abs().max() < 2e-4 * theirs.abs().max()


def test_what_was_trained_is_what_is_served(tmp_path: Path) -> None:
    shape = small_models.config(context=288)
    write_model(
        tmp_path / "m",
        shape,
        small_models.random_state(shape),
        small_models.tokenizer(),
        source=Source("run", "test"),
    )
    loaded = read_model(tmp_path / "m")
    if not loaded.model.ops.bit_exact:
        pytest.skip(f"only compiled kernels promise bits; these are {loaded.model.ops.name}")
    made = read_model(tmp_path / "m").model
    lora = attach(made, LoraSection(rank=5, alpha=7.0, targets=("q_proj", "v_proj", "down_proj")), seed=1)
    trained(made, supervised(samples(8, 1)), 4, 0.1)
    write_adapter(tmp_path / "adapter", shape, lora.adapter(), "m")
    written = read_adapter(tmp_path / "adapter", shape).layers
    for mine, other in zip(lora.adapter().layers, written, strict=True):
        assert all(torch.equal(mine[key][1] @ mine[key][0], other[key][1] @ other[key][0]) for key in mine)
    prompt = texts(1, seed=5, longest=30)[0].ids.tolist()
    with closing(LocalEngine(loaded, "m")) as engine:
        engine.add_adapter("tuned", tmp_path / "adapter")
        greedy = SamplingParams(temperature=0.0, max_tokens=20, logprobs=1, stop_ids=frozenset())
        output = engine.submit(Request("0", prompt, greedy, adapter="tuned")).result()
        plain = engine.submit(Request("1", prompt, greedy)).result()
    whole = torch.tensor([*prompt, *output.token_ids])
    with torch.no_grad():
        x_TH = made.hidden(whole[:-1], packed([len(whole) - 1]))
        trained_T = made.ops.linear_logprobs(x_TH, made.head_weight, whole[1:])
    served = [logprob.logprob for logprob in output.logprobs]
    assert served == trained_T[len(prompt) - 1 :].tolist()
    assert served != [logprob.logprob for logprob in plain.logprobs]


@pytest.mark.parametrize("make", [lambda: supervised(samples(9, 1)), lambda: preferences(samples(9, 2))])
def test_the_shares_of_ranks_add_up_to_the_step(make: Callable[[], Objective]) -> None:
    made, objective = model(small_models.config(), exact=True), make()
    objective.begin(made)
    whole = objective.step(1, 0, 1)
    alone = sum(objective.loss(made, micro, whole.weight).item() for micro in whole.micros)
    shares = [objective.step(1, rank, 3) for rank in range(3)]
    assert sorted(n for share in shares for n in share.samples) == sorted(whole.samples)
    assert len({len(share.micros) for share in shares}) == 1
    losses = [objective.loss(made, micro, share.weight) for share in shares for micro in share.micros]
    assert sum(loss.item() for loss in losses) == pytest.approx(alone, rel=1e-5)
    assert all(loss.requires_grad for loss in losses)


def test_no_text_of_a_batch_sees_another_one() -> None:
    made = model(small_models.config(), exact=True)
    (batch,) = packed_batches(samples(4, 1).trained, 1000)
    made.embed.grad = None
    x_TH = made.embedded(torch.from_numpy(batch.ids_T), packed(batch.lengths)).detach().requires_grad_()
    made.embedded = lambda ids_T, batch: x_TH  # type: ignore[method-assign]
    y_TH = made.hidden(torch.from_numpy(batch.ids_T), packed(batch.lengths))
    first, second = batch.lengths[0], batch.lengths[0] + batch.lengths[1]
    y_TH[first:second].sum().backward()
    assert x_TH.grad is not None
    seen = x_TH.grad.abs().sum(1) > 0
    assert seen[first:second].all()
    assert not seen[:first].any()
    assert not seen[second:].any()


def preferences(found: Samples, **dpo: float) -> Preferences:
    return Preferences(section(), DpoSection(**dpo), found, small_models.tokenizer())


def plain_dpo(
    policy: Decoder, reference: Decoder, pairs: tuple[Sample, ...], beta: float, eps: float
) -> Tensor:
    """Equation 7 of the paper as it is written, logits whole; with label smoothing."""

    def logprob(network: Decoder, text: Tokens) -> Tensor:
        ids = torch.from_numpy(text.ids)
        logits = network(ids[:-1], packed([len(ids) - 1]))
        picked = F.log_softmax(logits, -1).gather(1, ids[1:, None])[:, 0]
        return (picked * torch.from_numpy(text.trained[1:])).sum()

    losses = []
    for better, worse in pairs:
        gains = [logprob(policy, text) - logprob(reference, text).detach() for text in (better, worse)]
        margin = beta * (gains[0] - gains[1])
        losses.append(-(1 - eps) * F.logsigmoid(margin) - eps * F.logsigmoid(-margin))
    return torch.stack(losses).mean()


def test_the_preference_loss_and_its_gradient_are_those_of_the_plain_form() -> None:
    shape, found = small_models.config(), samples(4, 2)
    policy, reference = model(shape, exact=True), model(shape, exact=True)
    objective = preferences(found, beta=0.3, label_smoothing=0.1)
    objective.begin(policy)
    with torch.no_grad():
        for weight in policy.parameters():
            weight += 0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    batch = objective.step(0, 0, 1)
    loss = objective.loss(policy, batch.micros[0], batch.weight)
    loss.backward()
    mine = {
        name: weight.grad.clone() for name, weight in policy.named_parameters() if weight.grad is not None
    }
    policy.zero_grad()
    pairs = tuple(found.trained[n] for n in batch.samples)
    want = plain_dpo(policy, reference, pairs, 0.3, 0.1)
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    for name, weight in policy.named_parameters():
        assert weight.grad is not None
        assert (mine[name] - weight.grad).norm() <= 1e-4 * weight.grad.norm() + 1e-7, name


@pytest.mark.parametrize("adapters", [True, False])
def test_preferences_are_learnt_against_the_first_weights(adapters: bool) -> None:
    made = model(SHAPES["llama"])
    if adapters:
        attach(made, LoraSection(rank=4, alpha=8.0), seed=1)
    objective = preferences(samples(4, 2), beta=0.5)
    objective.begin(made)
    losses = trained(made, objective, 8, 0.05)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < 0.5
    assert objective.metrics()["accuracy"] == 1.0
    assert objective.metrics()["margin"] > 0.3
    held = objective.heldout(of_model(made))
    assert held["loss"] < 0.6
    assert held["accuracy"] == 1.0


def test_a_margin_of_nothing_costs_log_2() -> None:
    judged = judge(torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.5, -2.5, 0.0]), 0.1, 0.0, pairs=1)
    assert judged.losses_P.tolist() == pytest.approx([math.log(2)])
    assert judged.slope_S.tolist() == pytest.approx([-0.05, 0.05, 0.0])


def test_the_held_out_loss_is_the_mean_over_trained_tokens() -> None:
    made, found = model(small_models.config(), exact=True), samples(3, 1)
    objective = supervised(found)
    total = count = 0.0
    for (text,) in found.heldout:
        ids = torch.from_numpy(text.ids)
        logits = made(ids[:-1], packed([len(ids) - 1]))
        losses = F.cross_entropy(logits, ids[1:], reduction="none") * torch.from_numpy(text.trained[1:])
        total, count = total + losses.sum().item(), count + text.targets
    assert objective.heldout(of_model(made))["loss"] == pytest.approx(total / count, rel=1e-5)
