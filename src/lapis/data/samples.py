"""Examples as token ids with the mask of what is trained on, held-out ones apart, packed into batches.

Letters: T = tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lapis.data.examples import Chat, Completion, Kind, Line, Preference, Prompt, Text, read_examples
from lapis.data.loader import TokenBatch
from lapis.data.order import sample_at
from lapis.data.recipe import ExamplesConfig
from lapis.errors import InputError
from lapis.hashing import digest_json
from lapis.log import Progress, silent
from lapis.tokenizer.bpe import TURN_END, TURN_START, Tokenizer
from lapis.tokenizer.chat import CHATML, ChatTemplate
from lapis.tokenizer.tools import encode_with_tools, prompt_with_tools


class Tokens(NamedTuple):
    """The token ids of one text, and which of them are trained on: the model predicts them from those before."""

    ids: NDArray[np.int64]
    trained: NDArray[np.bool_]

    @property
    def targets(self) -> int:
        """How many tokens are trained on."""
        return int(self.trained[1:].sum())


# What one example becomes: one text, or for a preference the chosen and the rejected one
Sample = tuple[Tokens, ...]


@dataclass(frozen=True)
class Encoder:
    """How texts become ids: a model's tokenizer, its chat template if it has one, the token before a plain text."""

    tokenizer: Tokenizer
    chat: ChatTemplate | None
    bos_id: int | None = None

    def encode(self, text: Text) -> Tokens:
        """Ids up to the last one that is trained on. Raises InputError."""
        ids, mask = self._completion(text) if isinstance(text, Completion) else self._chat(text)
        trained = np.array(mask, dtype=np.bool_)
        end = int(np.flatnonzero(trained)[-1]) + 1 if trained.any() else 0
        found = Tokens(np.array(ids, dtype=np.int64)[:end], trained[:end])
        if not found.targets:
            raise InputError("no token is left to train on")
        return found

    def prompt(self, prompt: Prompt) -> list[int]:
        """Ids of what is to be answered, as they are served. Raises InputError."""
        if isinstance(prompt.asked, str):
            return self._plain(prompt.asked)
        return prompt_with_tools(self._template(), self.tokenizer, prompt.asked, ()).ids

    def _plain(self, text: str) -> list[int]:
        return ([] if self.bos_id is None else [self.bos_id]) + self.tokenizer.encode(text)

    def _completion(self, text: Completion) -> tuple[list[int], list[bool]]:
        before = self._plain(text.prompt)
        answer = [*self.tokenizer.encode(text.completion), self.tokenizer.end_id]
        return before + answer, [False] * len(before) + [True] * len(answer)

    def _chat(self, text: Chat) -> tuple[list[int], list[bool]]:
        return encode_with_tools(self._template(), self.tokenizer, text.messages, text.tools, text.trained)

    def _template(self) -> ChatTemplate:
        if self.chat is None:
            raise InputError(
                "the model has no chat template",
                hint="Name a file with one: examples.template = …, or train on prompts and completions.",
            )
        return self.chat


@dataclass(frozen=True)
class Samples:
    """A fine-tuning set. `digest` covers the examples, the template, the tokenizer and the model they are for."""

    trained: tuple[Sample, ...]
    heldout: tuple[Sample, ...]
    dropped: int  # too long
    digest: str

    @property
    def tokens(self) -> int:
        """Tokens that one pass over the training samples reads."""
        return sum(len(tokens.ids) for sample in self.trained for tokens in sample)


def template_of(path: str, own: ChatTemplate | None, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The chat template to use: of a file, else the model's own, else ChatML where the tokenizer has its marks."""
    if path:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"The chat template {path} cannot be read: {error}.") from error
        return ChatTemplate(text) if own is None else ChatTemplate(text, own.bos, own.eos)
    if own is not None:
        return own
    known = {TURN_START, TURN_END} <= tokenizer.special_tokens.keys()
    return ChatTemplate(CHATML) if known else None


def prepare_samples(
    config: ExamplesConfig,
    encoder: Encoder,
    *,
    longest: int,
    preferences: bool,
    model: str = "",
    progress: Progress = silent,
) -> Samples:
    """Read, check and encode all examples; those of more than `longest` tokens are refused or dropped, as asked.

    `model` is the digest of the model that they are for.

    Raises InputError naming file and line.
    """
    lines, apart, digest = read_sets(
        config, encoder, "preferences" if preferences else "texts", longest, model
    )
    wanted = [*lines, *apart]
    encoded: list[Sample | None] = []
    for number, line in enumerate(wanted):
        progress(number, len(wanted), f"example {number:,} of {len(wanted):,}")
        encoded.append(_encoded(line, encoder, longest, config.too_long == "drop"))
    trained = tuple(sample for sample in encoded[: len(lines)] if sample is not None)
    heldout = tuple(sample for sample in encoded[len(lines) :] if sample is not None)
    if not trained:
        raise nothing_left(lines, longest)
    return Samples(trained, heldout, encoded.count(None), digest)


def read_sets(
    config: ExamplesConfig, encoder: Encoder, kind: Kind, longest: int, model: str
) -> tuple[list[Line], list[Line], str]:
    """The lines to train on, the held-out ones, and the digest of all that they become. Raises InputError."""
    lines = read_examples([Path(path) for path in config.files], kind)
    apart = read_examples([Path(path) for path in config.heldout_files], kind)
    identity = {
        "lines": [line.digest for line in lines],
        "heldout": [line.digest for line in apart] if apart else config.heldout,
        "template": encoder.chat.template if encoder.chat else None,
        "tokenizer": encoder.tokenizer.digest,
        "bos": encoder.bos_id,
        "longest": longest,
        "preferences": kind == "preferences",
        "model": model,
        **({"prompts": True} if kind == "prompts" else {}),
    }
    if not apart:
        lines, apart = split(lines, config.heldout)
    return lines, apart, digest_json(identity)


def nothing_left(lines: Sequence[Line], longest: int) -> InputError:
    """What is said when every line is dropped."""
    return InputError(
        f"No example is left to train on: all {len(lines):,} are longer than {longest:,} tokens.",
        hint="Raise train.sequence, up to the model's context.",
    )


def split(lines: Sequence[Line], share: float) -> tuple[list[Line], list[Line]]:
    """Those to train on and those held out: so many of the smallest digests, equal lines on one side together."""
    digests = sorted({line.digest for line in lines})
    apart = set(digests[: min(len(digests) - 1, max(1, round(share * len(digests))))] if share else ())
    return [line for line in lines if line.digest not in apart], [
        line for line in lines if line.digest in apart
    ]


def _encoded(line: Line, encoder: Encoder, longest: int, drop: bool) -> Sample | None:
    example = line.example
    assert not isinstance(example, Prompt), "texts or pairs were asked for"
    texts = (example.chosen, example.rejected) if isinstance(example, Preference) else (example,)
    try:
        sample = tuple(encoder.encode(text) for text in texts)
    except InputError as error:
        raise InputError(f"{line.place}: {error.message.rstrip('.')}.", hint=error.hint) from error
    length = max(len(tokens.ids) for tokens in sample)
    return sample if fits(line, length, longest, drop, "train.sequence") else None


def fits(line: Line, length: int, longest: int, drop: bool, limit: str) -> bool:
    """Whether a line has at most the `longest` tokens that a limit allows. Raises InputError if it is to be refused."""
    if length <= longest or drop:
        return length <= longest
    raise InputError(
        f"{line.place}: the example has {length:,} tokens, more than {limit} = {longest:,}.",
        hint="Raise train.sequence (up to the model's context), or leave such examples out: examples.too_long = "
        '"drop".',
    )


def of_step(samples: Sequence[object], step: int, batch: int, seed: int) -> tuple[int, ...]:
    """Which samples a step (from 0 on) sees: a pure function, each epoch in another order."""
    return tuple(sample_at(index, len(samples), seed) for index in range(step * batch, (step + 1) * batch))


def packed_batches(samples: Sequence[Sample], longest: int) -> Iterator[TokenBatch]:
    """The samples in order, laid one after the other into batches of at most `longest` tokens, none of them cut.

    A sample longer than that has a batch of its own. `lengths` keep texts apart; no place is padded.
    """
    held: list[Sample] = []
    size = 0
    for sample in samples:
        tokens = sum(len(text.ids) - 1 for text in sample)
        if held and size + tokens > longest:
            yield _joined(held)
            held, size = [], 0
        held.append(sample)
        size += tokens
    if held:
        yield _joined(held)


def _joined(samples: Sequence[Sample]) -> TokenBatch:
    """Inputs, the tokens they predict, and the weight 1 of those that are trained on."""
    texts = [text for sample in samples for text in sample]
    ids_T = np.concatenate([text.ids[:-1] for text in texts])
    targets_T = np.concatenate([text.ids[1:] for text in texts])
    weights_T = np.concatenate([text.trained[1:] for text in texts]).astype(np.float32)
    return TokenBatch(ids_T, targets_T, tuple(len(text.ids) - 1 for text in texts), weights_T)
