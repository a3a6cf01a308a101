"""A real model, SmolLM2-135M-Instruct as `lapis pull` converts it, judged by Hugging Face `transformers`.

What is compared, and why so. In bfloat16 every operation rounds, and two correct implementations round in
different places: their logits differ by about 0.1 (root mean square), so where the two best tokens are that
close, either may win. `transformers` in bfloat16 itself leaves its own float32 answer there. So the reference
is `transformers` in float32 on the converted weights. Of 43 short prompts tried, 28 were answered with the
reference's 32 tokens; each of the other 15 first left it at a near tie, the largest lead being 0.131.
Therefore three things are asked:

* our definition in float32 gives the reference's tokens for every prompt, near ties included;
* as served (bfloat16, the kernels of this machine) it gives the first 32 tokens of five prompts whose every
  token leads by more than NEAR_TIE in the reference;
* as served, over all prompts, it differs from the reference nowhere else than at near ties.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from lapis.errors import LapisError
from lapis.home import Home
from lapis.kernels.batch import Batch, packed
from lapis.kernels.quantized import Kind
from lapis.kernels.stock import StockOps
from lapis.model.catalogue import CATALOGUE
from lapis.model.families import Decoder, Llama
from lapis.model.pull import pull
from lapis.model.store import ModelStore
from lapis.model.weights import LoadedModel, read_model

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed (pip install lapis[dev])"
)

NAME = "smollm2-135m-instruct"
TOKENS = 32
NEAR_TIE = 0.15
KINDS: dict[Kind, float] = {"int8": 0.01, "int4": 0.03}  # how much higher the perplexity may be
CLEAR = (  # every token of the reference's answer leads by more than NEAR_TIE
    "How do plants make food?",
    "Name the four seasons.",
    "What is a prime number?",
    "Count from one to ten.",
    "How many days are in a week?",
)
CLOSE = (  # some tokens are near ties: the lead falls to 0.003
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Translate 'good morning' into Spanish.",
)
TEXTS = (
    "Hello world 12345, it's   fine\n\n\tdef f(x):\n    return x**2  # they'll\r\n",
    "Größe 東京 😀 ½ ٣٤ 2026-11-24 naïve I'LL we've",
    "  leading and trailing  ",
    "<|im_end|>",
    "",
)


class Answer(NamedTuple):
    """Token ids of a prompt and of the reference's answer, and the logits of the answer's tokens."""

    prompt: list[int]
    ids: list[int]
    logits: Tensor


@pytest.fixture(scope="module")
def folder() -> Path:
    """The pulled model, from the home that the installation filled, or fetched now if that is possible."""
    default = Path(__file__).parents[2] / ".venv" / "lapis-test-home"
    home = Home(Path(os.environ.get("LAPIS_TEST_MODELS") or default))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_RETRIES", "0")
        try:
            return pull(NAME, home).folder
        except LapisError as error:
            pytest.skip(f"{NAME} is not in {home.root} and cannot be pulled: {error.message}")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other at every step make a small model slow on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return read_model(folder)


@pytest.fixture(scope="module")
def answers(folder: Path, loaded: LoadedModel) -> dict[str, Answer]:
    """What the reference answers greedily to every prompt, with the float32 logits it chose from."""
    assert loaded.chat is not None
    chat, end = loaded.chat, 2
    prompts = [chat.prompt([{"role": "user", "content": text}], loaded.tokenizer) for text in CLEAR + CLOSE]
    width = max(map(len, prompts))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    padded = torch.tensor([[end] * (width - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
    options = {"max_new_tokens": TOKENS, "do_sample": False, "pad_token_id": end}
    with torch.no_grad():
        made = model.generate(
            padded, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **options
        )
    found = {}
    for row, (text, ids) in enumerate(zip(CLEAR + CLOSE, prompts, strict=True)):
        answer = made.sequences[row, width:].tolist()
        answer = answer[: answer.index(end) + 1] if end in answer else answer
        logits = torch.stack([step[row] for step in made.logits[: len(answer)]])
        found[text] = Answer(ids, answer, logits)
    return found


@torch.no_grad()
def logits_of(model: Llama, answers: Iterable[Answer]) -> list[Tensor]:
    """For each answer the logits from which its tokens are chosen, the answer so far being given."""
    whole = [(answer.prompt + answer.ids)[:-1] for answer in answers]
    rows, start = [], 0
    for answer, ids in zip(answers, whole, strict=True):
        start += len(ids)
        rows.append(torch.arange(start - len(answer.ids), start))
    ids = torch.tensor([id for ids in whole for id in ids])
    logits = model(ids, packed([len(ids) for ids in whole]), torch.cat(rows))
    return list(logits.split([len(part) for part in rows]))


@torch.no_grad()
def serve(loaded: LoadedModel, prompts: Sequence[list[int]]) -> tuple[list[list[int]], list[Tensor]]:
    """Greedy answers to all prompts at once, token by token through the paged cache, and their logits."""
    pages = 4  # of 32 tokens, for each prompt
    caches = loaded.model.new_caches(pages * len(prompts))
    table = torch.arange(pages * len(prompts), dtype=torch.int32).view(len(prompts), pages)
    given, positions = list(prompts), [0] * len(prompts)
    answers: list[list[int]] = [[] for _ in prompts]
    logits: list[list[Tensor]] = [[] for _ in prompts]
    while running := [n for n in range(len(prompts)) if given[n]]:
        ends = list(itertools.accumulate(len(given[n]) for n in running))
        sequence = torch.tensor([n for n in running for _ in given[n]], dtype=torch.int32)
        position = torch.cat([torch.arange(positions[n], positions[n] + len(given[n])) for n in running])
        spans = tuple(zip([0, *ends], ends, strict=False))
        batch = Batch(sequence, position.to(torch.int32), table, caches, spans)
        ids = torch.tensor([id for n in running for id in given[n]])
        for n, row in zip(running, loaded.model(ids, batch, torch.tensor(ends) - 1), strict=True):
            answers[n].append(int(row.argmax()))
            logits[n].append(row)
            positions[n] += len(given[n])
            done = answers[n][-1] in loaded.stop_ids or len(answers[n]) == TOKENS
            given[n] = [] if done else answers[n][-1:]
    return answers, [torch.stack(rows) for rows in logits]


def test_the_conversion_is_that_of_the_published_model(folder: Path, loaded: LoadedModel) -> None:
    stored, config = ModelStore(Home(folder.parents[1])).get(NAME), loaded.config
    assert (
        stored.parameters
        == config.parameters
        == sum(p.numel() for p in loaded.model.parameters())
        == 134_515_008
    )
    assert (config.layers, config.width, config.heads, config.kv_heads, config.head_size) == (
        30,
        576,
        9,
        3,
        64,
    )
    assert (config.vocab_size, config.context, config.rope_base, config.tied) == (49152, 8192, 1e5, True)
    assert stored.licence == "Apache-2.0"
    assert stored.source.digest == CATALOGUE[NAME].sha256
    assert (loaded.add_bos, loaded.stop_ids) == (False, frozenset({0, 2}))


def test_in_float32_every_answer_is_that_of_transformers(
    loaded: LoadedModel, answers: dict[str, Answer]
) -> None:
    model = Llama(loaded.config, StockOps(), torch.float32)
    model.load_state_dict({name: weight.float() for name, weight in loaded.model.state_dict().items()})
    for (prompt, answer), found in zip(answers.items(), logits_of(model, answers.values()), strict=True):
        # Each token is the best one after those before it: by induction that is the greedy answer.
        assert found.argmax(-1).tolist() == answer.ids, prompt
        assert torch.allclose(found, answer.logits, atol=1e-3), prompt


def test_as_served_the_first_32_tokens_of_five_prompts_are_those_of_transformers(
    loaded: LoadedModel, answers: dict[str, Answer]
) -> None:
    expected = [answers[prompt] for prompt in CLEAR]
    served, logits = serve(loaded, [answer.prompt for answer in expected])
    for prompt, answer, ids in zip(CLEAR, expected, served, strict=True):
        assert ids == answer.ids, (prompt, loaded.tokenizer.decode(ids), loaded.tokenizer.decode(answer.ids))
    if loaded.model.ops.bit_exact:  # what serves is what trains: the packed forward gives the same bits
        assert all(map(torch.equal, logits, logits_of(loaded.model, expected)))


def test_as_served_only_near_ties_may_fall_the_other_way(
    loaded: LoadedModel, answers: dict[str, Answer]
) -> None:
    for (prompt, answer), found in zip(
        answers.items(), logits_of(loaded.model, answers.values()), strict=True
    ):
        best = answer.logits.topk(2).values
        lead = best[:, 0] - best[:, 1]
        error = float((found - answer.logits).square().mean().sqrt())
        assert error < (0.25 if loaded.model.ops.bit_exact else 0.5), prompt  # plain torch rounds more often
        differs = found.argmax(-1) != torch.tensor(answer.ids)
        assert bool((lead[differs] <= NEAR_TIE).all()), (prompt, lead[differs])
        assert prompt not in CLEAR or float(lead.min()) > NEAR_TIE, f"{prompt!r} is no clear prompt any more"


def test_texts_and_chats_have_the_ids_of_transformers(folder: Path, loaded: LoadedModel) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert loaded.tokenizer.encode(text, special=True) == tokenizer.encode(text), text
    assert loaded.chat is not None
    messages = [
        {"role": "user", "content": "Hi, 2+2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "ok"},
    ]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]
    assert loaded.chat.prompt(messages, loaded.tokenizer) == expected


def test_texts_have_the_ids_of_byte_pair_encoding_written_out(folder: Path, loaded: LoadedModel) -> None:
    """The tokenizer was rebuilt from GGUF metadata: a plain form of GPT-2's algorithm is its judge."""
    import regex  # a requirement of transformers

    split = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    ranks = {tuple(pair): rank for rank, pair in enumerate(model["merges"])}
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {byte: chr(byte) for byte in printable}
    alphabet |= {byte: chr(256 + n) for n, byte in enumerate(b for b in range(256) if b not in printable)}
    for text in TEXTS[:3]:
        ids = []
        for run in regex.split(r"(\p{N})", text):  # digits one by one, first
            for word in split.findall(run):
                parts = [alphabet[byte] for byte in word.encode()]
                while pairs := [pair for pair in zip(parts, parts[1:], strict=False) if pair in ranks]:
                    at = list(zip(parts, parts[1:], strict=False)).index(
                        min(pairs, key=lambda pair: ranks[pair])
                    )
                    parts[at : at + 2] = ["".join(parts[at : at + 2])]
                ids += [model["vocab"][part] for part in parts]
        assert loaded.tokenizer.encode(text) == ids, text


@torch.inference_mode()
def losses(model: Decoder, windows_WT: Tensor) -> Tensor:
    """Negative log probabilities (W, T - 1) of every token after the first of a window."""
    rows = []
    for ids_T in windows_WT:
        hidden_TH = model.hidden(ids_T, packed([len(ids_T)]))
        rows.append(-model.ops.linear_logprobs(hidden_TH[:-1].contiguous(), model.head_weight, ids_T[1:]))
    return torch.stack(rows).double()


@pytest.mark.long
def test_weights_in_8_and_4_bits_cost_little_perplexity(folder: Path, loaded: LoadedModel) -> None:
    """At most 1 % and 3 %, as far as 4,000 tokens can tell: a bound is passed by three standard errors, or kept.

    The text is Python's own reference. Tokens are compared one by one with bf16, and the differences of a window count
    as one. `benchmarks/quality.py` decides more closely, on as much text as it is given.
    """
    ids = loaded.tokenizer.encode("\n".join(topics[name] for name in sorted(topics)))
    windows_WT = torch.tensor(ids[: 32 * 128]).view(32, 128)
    plain_WT = losses(loaded.model, windows_WT)
    for kind, bound in KINDS.items():
        model = read_model(folder).model
        model.quantize(kind)
        lost_W = (losses(model, windows_WT) - plain_WT).mean(1)
        error = float(lost_W.std()) / len(lost_W) ** 0.5
        assert error < 0.005, "the text is too short to tell"
        assert float(lost_W.mean().expm1()) < bound + 3 * error, kind
