"""Engine: what answers requests. LocalEngine answers them with a model in this process."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from lapis.errors import ConfigError
from lapis.inference.footprint import kept_pages
from lapis.inference.loop import EngineLoop, Limits
from lapis.inference.request import Pooling, Request
from lapis.inference.stream import Stream
from lapis.model import manifest
from lapis.tokenizer.bpe import Tokenizer
from lapis.tokenizer.chat import ChatTemplate
from lapis.tokenizer.grammar import Grammar

if TYPE_CHECKING:
    from lapis.model.adapters import Adapter
    from lapis.model.weights import LoadedModel


DRAFTS = 7  # with its own token a request fills `Limits.draft_rows`, which cost little more than one row


Weights = Literal["bf16", "fp32", "int8", "int4"]
CacheDtype = Literal["bf16", "int8"]


class Engine(Protocol):
    """A model that continues token ids and scores them. Everything may be called from any thread."""

    @property
    def name(self) -> str:
        """The name under which the model is asked for."""

    @property
    def context(self) -> int:
        """Tokens of prompt and completion together."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""

    @property
    def chat(self) -> ChatTemplate | None:
        """The model's chat template; None for a model that only completes text."""

    @property
    def add_bos(self) -> bool:
        """Whether the prompt of a plain completion starts with `bos_id`."""

    @property
    def bos_id(self) -> int | None:
        """The token that starts a sequence."""

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer when the request names no others."""

    @property
    def bit_exact(self) -> bool:
        """Whether logits are those of training, bit for bit, whatever else is in the batch."""

    @property
    def vector_width(self) -> int | None:
        """How many numbers an embedding has; None for an engine that makes none."""

    def submit(self, request: Request) -> Stream:
        """Queue a request.

        Raises InputError, NotFoundError (no such adapter), LimitError (the queue is full), UnavailableError.
        """

    def prepare(self, structure: Grammar) -> None:
        """Compile a grammar beforehand, off the thread that submits. Blocks; raises InputError."""

    def score(self, ids: Sequence[int], tenant: str = "default") -> list[float]:
        """The log probability of each token after the first, computed in pieces beside what runs.

        Blocks. Raises InputError, LimitError (the queue is full), UnavailableError (closed).
        """

    def embed(
        self, ids: Sequence[Sequence[int]], pooling: Pooling = "mean", tenant: str = "default"
    ) -> list[list[float]]:
        """One vector of length 1 for each text: the mean of its hidden rows, or the last one.

        Blocks; `submit` with `pooling` can be awaited and cancelled. Raises as `score`.
        """

    def add_adapter(self, name: str, folder: Path) -> None:
        """Answer requests that name this low-rank adapter of the model. Raises what reading it raises."""

    def remove_adapter(self, name: str) -> None:
        """Take no more requests for an adapter; those under way keep it. Raises NotFoundError."""

    def stats(self) -> dict[str, Any]:
        """What is running, waiting and cached now, and what has been done since the start."""

    def close(self) -> None:
        """Accept nothing more and end within 2 s; what still runs then ends with an error."""


class LocalEngine(EngineLoop):
    """A loaded model in this process, stepped by one thread; `cache_bytes` bounds its key/value memory.

    By default cached prefixes take less of it than what runs may take; with `cache_bytes` they may fill it.

    `drafts` is how many tokens it guesses ahead for a request while few run; 0 for none. `weights` are by default
    as loaded; in 8 or 4 bits the model, which is the engine's own from then on, is changed in place. Raises
    ConfigError for a model that is loaded in another type than is asked for.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        name: str,
        *,
        cache_bytes: int | None = None,
        step_tokens: int = Limits.step_tokens,
        running: int = Limits.running,
        queued_tokens: int = Limits.queued_tokens,
        drafts: int = DRAFTS,
        weights: Weights | None = None,
        cache_dtype: CacheDtype = "bf16",
    ) -> None:
        from lapis.inference.runner import ModelRunner  # torch is loaded here, not by whoever knows engines

        stored: Weights = "fp32" if loaded.model.dtype.itemsize == 4 else "bf16"
        weights = stored if weights is None else weights
        if stored != weights and "fp32" in (stored, weights):
            raise ConfigError(
                f"{name!r} is loaded in {stored}, not in {weights}.",
                hint="LocalEngine.load(folder, name, weights=…) reads it as it is wanted.",
            )
        if weights == "int8" or weights == "int4":
            loaded.model.quantize(weights)
        runner = ModelRunner(loaded, cache_bytes, cache_dtype, step_tokens)
        context = loaded.config.context
        kept = kept_pages(loaded.config, weights, cache_dtype) if cache_bytes is None else None
        limits = Limits(
            context, runner.pages, step_tokens, running, queued_tokens, drafts=drafts, kept_pages=kept
        )
        self.chat = loaded.chat
        self.add_bos = loaded.add_bos
        self.bos_id = loaded.bos_id
        self.vector_width = loaded.config.width
        self.bit_exact = runner.bit_exact and weights == stored
        self.kernels = runner.kernels
        self._read_adapter = runner.read_adapter
        self._replayed = runner.steps
        self._stored = {"weights": weights, "cache_dtype": cache_dtype}
        super().__init__(name, runner, limits, loaded.tokenizer, loaded.stop_ids)

    @staticmethod
    def load(
        folder: Path, name: str, *, weights: Weights | None = None, cache_dtype: CacheDtype = "bf16"
    ) -> LocalEngine:
        """Serve a model folder, every digest verified first. Raises what `read_model` raises.

        `weights` are by default as the folder stores them, bf16 or fp32: those of training. In 8 or 4 bits they
        are faster and smaller, keys and values in int8 take half the memory; logits then are no longer those of
        training, but still do not depend on what else runs.
        """
        with ThreadPoolExecutor(1) as pool:
            verified = pool.submit(manifest.verify, folder)
            # loads torch, meanwhile the files are hashed
            from lapis.model.weights import DTYPES, read_model

            dtype = None if weights is None else DTYPES["fp32" if weights == "fp32" else "bf16"]
            loaded = read_model(folder, manifest=verified.result(), dtype=dtype)
        if weights == "int8" or weights == "int4":
            loaded.model.quantize(weights)
        loaded.model.seal()
        return LocalEngine(loaded, name, weights=weights, cache_dtype=cache_dtype)

    def add_adapter(self, name: str, folder: Path) -> None:
        """Answer requests that name this PEFT folder. Raises InputError for what is no adapter of the model."""
        self._put_adapter(name, self._read_adapter(folder))

    def put_adapter(self, name: str, adapter: Adapter) -> None:
        """Answer requests that name this adapter, which lies in memory; it must not change meanwhile."""
        from lapis.inference.runner import LoadedAdapter

        self._put_adapter(name, LoadedAdapter(f"{name} in memory", adapter))

    def stats(self) -> dict[str, Any]:
        """As EngineLoop, with the kernels' name and whether small steps are replayed without Python."""
        facts = {
            "kernels": self.kernels,
            "bit_exact": self.bit_exact,
            "replay": self._replayed.active,
            "replay_refused": self._replayed.reason,
        }
        return {**super().stats(), **facts, **self._stored}


def prompt_ids(engine: Engine, text: str) -> list[int]:
    """The token ids of a plain completion's prompt, with the start token where the model wants one."""
    start = [engine.bos_id] if engine.add_bos and engine.bos_id is not None else []
    return start + engine.tokenizer.encode(text)
