"""The recipe: one TOML file is one run, from its text sources to its evaluation. No torch here."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from lapis.config import Section
from lapis.data.recipe import DataConfig, ExamplesConfig, MixtureConfig, TokenizerConfig
from lapis.errors import ConfigError, InputError
from lapis.evaluate.graders.grader import read_grader
from lapis.hashing import digest_json
from lapis.model.config import NAMED, ModelConfig
from lapis.train.mesh import Mesh
from lapis.train.schedule import Schedule
from lapis.train.stages import Pipelining

MOST_PROMPTS = 8  # whose continuations are told
VOCAB_STEP = 64  # rows; the rest of the last step belongs to no token and is never chosen

Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0, le=1e30)]  # what a rate is multiplied with stays an fp32 number
Fraction = Annotated[float, Field(ge=0, le=1)]
Memory = Annotated[float, Field(ge=0, lt=1)]  # of a moment that forgets
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]


class ModelSection(Section):
    """Which model is trained: a named size, any part of which can be replaced, or one that is there already."""

    name: str = "laptop"
    """A named size: laptop, gpt2-124m, llama-1b, … (docs/model.md tells all and what they are)."""
    source: str | None = Field(None, alias="from")
    """Train on from the weights of a model instead: its name in the store, or a model folder's path."""
    layers: Positive | None = None
    """Replaces the number of layers of the named size."""
    width: Positive | None = None
    """Replaces the width of the residual stream; heads follow as width / head_size."""
    ffn: Positive | None = None
    """Replaces the width of the feed-forward layers, or of each expert."""
    context: Positive | None = None
    """Replaces the longest sequence the model is built for, in tokens."""

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.name not in NAMED:
            raise ValueError(f"unknown size {self.name!r}; known: {', '.join(NAMED)}")
        if self.source is not None and self._changes():
            raise ValueError("a model that is there already has its size: leave name, layers, width … out")
        return self

    def _changes(self) -> bool:
        sizes = (self.layers, self.width, self.ffn, self.context)
        return self.name != "laptop" or any(size is not None for size in sizes)

    def resolve(self, vocab_size: int) -> ModelConfig:
        """The whole configuration for a tokenizer's vocabulary, rounded up to full rows of the kernels' tiles."""
        base = NAMED[self.name]
        width = self.width or base.width
        heads = width // base.head_size
        return replace(
            base,
            vocab_size=-(-vocab_size // VOCAB_STEP) * VOCAB_STEP,
            layers=self.layers or base.layers,
            width=width,
            heads=heads,
            kv_heads=base.kv_heads if base.kv_heads < base.heads else heads,
            ffn=self.ffn or base.ffn,
            expert_ffn=(self.ffn or base.expert_ffn) if base.experts else 0,
            context=self.context or base.context,
        )


class SamplesSection(Section):
    """What the model writes while it trains, for people to read; the training is the same with and without it."""

    prompts: Annotated[tuple[str, ...], Field(max_length=MOST_PROMPTS)] = ()
    """Texts (at most 8) that are continued with the likeliest tokens at the start, at every checkpoint and at the end;
    a chat model that is fine-tuned answers them."""
    heldout: Annotated[int, Field(ge=0, le=MOST_PROMPTS)] = 0
    """The prompts of so many held-out examples are answered as well; for the objectives sft and dpo."""
    tokens: Positive = 64
    """Longest continuation, in tokens."""


class TrainSection(Section):
    """What is learned, how long, in which steps, and with which optimizer."""

    steps: Positive | None = None
    """Number of optimizer steps. Give this or `minutes`."""
    minutes: Annotated[float, Field(gt=0)] | None = None
    """Training time in minutes; the number of steps follows from the speed that is measured on the way."""
    sequence: Positive = 256
    """Tokens in one training window; documents inside it do not see each other."""
    objective: Literal["pretrain", "sft", "dpo", "grpo"] = "pretrain"
    """What is learned: to continue text, to answer as the examples do, to prefer one answer, or to earn a reward."""
    batch: Positive = 8
    """Windows, examples, pairs or prompts in one optimizer step, on all ranks together."""
    micro_batch: Positive | None = None
    """Windows in one forward pass of a rank: fewer take less memory. By default all of its share."""
    seed: Seed = 0
    """Decides the first weights and the order of the data."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """Optimizer of the hidden matrices; embeddings and norms always use AdamW."""
    lr: Rate = 0.02
    """Peak learning rate of the hidden matrices; with "adamw" 0.0006 by default."""
    embed_lr: Rate = 0.03
    """Peak learning rate of embeddings, head and norms; with "adamw" that of the matrices by default."""
    betas: tuple[Memory, Memory] = (0.8, 0.95)
    """Decay of AdamW's two moments; with "adamw" 0.9 and 0.95 by default."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay of all matrices, embeddings included; norms and biases never decay."""
    clip: Annotated[float, Field(gt=0)] = 1.0
    """The gradient's norm is scaled down to this."""
    schedule: Schedule = "wsd"
    """How the rate falls: "wsd" at the end of the run, "linear" and "cosine" from the end of the rise on."""
    warmup: Positive = 20
    """Steps in which the learning rate rises."""
    decay: Fraction = 0.6
    """Fraction of the run, at its end, in which the learning rate of "wsd" falls."""
    final: Fraction = 0.0
    """What the learning rate falls to, as a fraction of its peak."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Keep an average of the weights that forgets with this factor a step; export can choose it."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """What weights and activations are stored in; the optimizer's own weights are always fp32."""
    fp8: bool = False
    """Multiply the layers' large linear maps in 8-bit floats; needs a GPU of compute capability 8.9 or more."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Layers that are computed again for the gradient, to save memory: none, every second one, all."""
    compile: bool = False
    """Compile the layers with torch.compile, where the kernels are plain torch; kept for the next start."""
    mesh: str = ""
    """How several ranks share the work, such as "fsdp=4,tp=2"; by default all share the weights (fsdp), or have
    copies where whole models are needed (dp)."""
    pipeline: Pipelining = "1f1b"
    """In which order the stages of a mesh with pp take micro-batches forward and back."""
    bad_step: Literal["stop", "skip"] = "stop"
    """What follows a step whose loss or gradient is bad, after it was done once more: stop, or go on without it."""
    outlier: Annotated[float, Field(ge=3)] | None = None
    """From which robust z-score on loss or gradient a step is bad, such as 20.0; unset: only if not finite."""
    samples: SamplesSection = SamplesSection()
    """What the model writes meanwhile."""

    def micros(self, ranks: int) -> int:
        """How many micro-batches a data-parallel rank has in a step, if its windows divide."""
        share = self.batch // ranks
        return max(1, share // (self.micro_batch or share))

    def shares(self, ranks: int, each: int = 1) -> tuple[int, int]:
        """Sequences that a data-parallel rank has in a step, and in a micro-batch; a prompt has `each` answers.

        Raises ConfigError where they do not divide.
        """
        share, rest = divmod(self.batch, ranks)
        micro = self.micro_batch or share * each
        if rest or share * each % micro:
            what = "windows" if each == 1 else f"prompts with {each} answers each"
            raise ConfigError(
                f"train.batch = {self.batch} {what} cannot be shared by {ranks} data-parallel ranks in micro-batches "
                f"of {micro}.",
                hint="Make train.batch a multiple of ranks × train.micro_batch."
                if each == 1
                else "Make train.batch a multiple of the ranks, and answers of train.micro_batch.",
                param="train.batch",
            )
        return share * each, micro

    @model_validator(mode="before")
    @classmethod
    def _rates(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("optimizer") == "adamw":
            values = {"lr": 0.0006, "betas": (0.9, 0.95), **values}
            values.setdefault("embed_lr", values["lr"])
        return values

    @field_validator("mesh")
    @classmethod
    def _mesh(cls, line: str) -> str:
        try:
            return str(Mesh.parse(line))
        except ConfigError as error:
            raise ValueError(f"{error.message} {error.hint or ''}".strip()) from error

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.minutes is None):
            raise ValueError("give exactly one of train.steps and train.minutes")
        if self.minutes is not None and self.schedule != "wsd":
            raise ValueError(f'schedule = "{self.schedule}" needs train.steps: minutes are for "wsd"')
        return self

    @model_validator(mode="after")
    def _eight_bits(self) -> Self:
        if self.fp8 and (self.dtype != "bf16" or self.objective not in ("pretrain", "sft")):
            raise ValueError(
                'train.fp8 is for dtype = "bf16" and the objectives pretrain and sft: others compare with bf16'
            )
        return self

    @model_validator(mode="after")
    def _examples_to_answer(self) -> Self:
        if self.samples.heldout and self.objective not in ("sft", "dpo"):
            why = "answers are told anyway" if self.objective == "grpo" else "held-out text has no prompts"
            raise ValueError(f"train.samples.heldout is for sft and dpo: with {self.objective} {why}")
        return self


class LoraSection(Section):
    """Low-rank adapters are trained in place of the model's own weights (Hu et al. 2021)."""

    rank: Positive = 16
    """Inner width of an adapter."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """What an adapter adds is multiplied by alpha / rank."""
    targets: tuple[str, ...] = ()
    """Which linear maps of the layers, by PEFT's names such as q_proj; none named: all of them."""


class DpoSection(Section):
    """Direct preference optimisation (Rafailov et al. 2023)."""

    beta: Annotated[float, Field(gt=0)] = 0.1
    """How strongly the model is held to where it started: larger is closer."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """The part of the preferences that is thought to be the wrong way round."""


class GrpoSection(Section):
    """Group relative policy optimisation (Shao et al. 2024): of sampled answers, the better graded become likelier."""

    reward: str | None = None
    """A function that grades an answer: "path/to/file.py:function". Give this, `grader`, `regex` or `exact`."""
    grader: dict[str, Any] | None = None
    """A grader as OpenAI's API writes it, e.g. { type = "string_check", … }; docs/evaluate.md tells all kinds."""
    regex: str | None = None
    """The reward is 1 for an answer in which this regular expression is found, else 0."""
    exact: str | None = None
    """The reward is 1 for an answer that is the text of this field of its example, else 0."""
    group: Annotated[int, Field(ge=2)] = 8
    """Answers to one prompt, which are compared with each other."""
    max_tokens: Positive = 128
    """Longest answer, in tokens."""
    temperature: Annotated[float, Field(gt=0, le=2)] = 1.0
    """At which answers are sampled; what is trained is the model at this temperature."""
    clip: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """How far a token's probability may be from the sampler's and still be pushed further away."""
    beta: Annotated[float, Field(ge=0)] = 0.04
    """How strongly the model is held to where it started; 0 needs no reference."""

    @model_validator(mode="after")
    def _one_reward(self) -> Self:
        given = (self.reward, self.grader, self.regex, self.exact)
        if sum(value is not None for value in given) != 1:
            raise ValueError("give exactly one of grpo.reward, grpo.grader, grpo.regex and grpo.exact")
        if self.grader is not None:
            try:
                read_grader(self.grader, "grader")
            except InputError as error:
                raise ValueError(error.message) from error
        if self.reward is not None and not all(self.reward.rpartition(":")):
            raise ValueError(f'reward = {self.reward!r} names no function: write "path/to/file.py:function"')
        try:
            re.compile(self.regex or "")
        except re.error as error:
            raise ValueError(f"regex = {self.regex!r} is no regular expression: {error}") from error
        return self


class CheckpointSection(Section):
    """When the state of a run is saved, and what is kept."""

    seconds: Annotated[float, Field(gt=0)] = 60.0
    """Time between two checkpoints."""
    steps: Positive | None = None
    """Steps between two checkpoints, instead of `seconds`."""
    keep: Positive = 2
    """Newest checkpoints kept; the last good one always is."""
    every: Positive | None = None
    """Those whose step is a multiple of this are kept too."""
    best: Annotated[int, Field(ge=0)] = 0
    """So many of the lowest loss on held-out text or examples are kept too; pretraining then measures it."""
    asynchronous: bool = True
    """Save beside the training; takes memory for one more copy of weights and optimizer state."""


class SupervisorSection(Section):
    """When ranks count as lost or slow, and how often a group starts again (`lapis train --ranks`)."""

    restarts: Annotated[int, Field(ge=0)] = 3
    """Restarts without a new checkpoint in between after which it gives up."""
    hang_seconds: Annotated[float, Field(gt=0)] = 60.0
    """A group is hung when no rank gives a sign for so long, and for `hang_factor` steps."""
    hang_factor: Annotated[float, Field(ge=1)] = 20.0
    """Multiple of the median step."""
    start_seconds: Annotated[float, Field(gt=0)] = 900.0
    """The same limit where a rank is not stepping: it starts, compiles, loads or saves."""
    slow_factor: Annotated[float, Field(gt=1)] = 1.5
    """A rank is slow when its own work takes so many times that of the other ranks."""
    node_seconds: Annotated[float, Field(ge=1)] = 10.0
    """A node is lost when it gives no sign for so long (`--nodes`); it then has ended its ranks by itself."""


class Recipe(Section):
    """One run: what is read, how it is cut into tokens, which model is trained on it, and how."""

    name: str = "run"
    """Names the run; letters, digits, dots, dashes and underscores."""
    data: DataConfig | None = None
    """Sources and rules: what a model is pretrained on."""
    examples: ExamplesConfig | None = None
    """What a model is fine-tuned on."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """The tokenizer."""
    model: ModelSection = ModelSection.model_validate({})
    """The model."""
    train: TrainSection
    """The training."""
    checkpoint: CheckpointSection = CheckpointSection()
    """The checkpoints."""
    supervisor: SupervisorSection = SupervisorSection()
    """The supervisor of several ranks."""
    lora: LoraSection | None = None
    """Train low-rank adapters and leave the model itself as it is."""
    dpo: DpoSection = DpoSection()
    """Preferences."""
    grpo: GrpoSection | None = None
    """Answers that earn a reward."""

    @property
    def sources(self) -> DataConfig:
        """The section [data]. Raises ConfigError in a recipe that fine-tunes."""
        if self.data is None:
            raise ConfigError(
                "This recipe fine-tunes on [examples]; it has no [data].",
                hint="`lapis train RECIPE.toml --inspect` shows what it trains on.",
            )
        return self.data

    @property
    def mixture(self) -> MixtureConfig | None:
        """How the sources are mixed, if the recipe says so."""
        return None if self.data is None else self.data.mixture

    @model_validator(mode="after")
    def _of_one_kind(self) -> Self:
        objective, pretrains = self.train.objective, self.train.objective == "pretrain"
        if (self.data is None) == pretrains or (self.examples is None) != pretrains:
            wants = "data" if pretrains else "examples"
            raise ValueError(f"train.objective = {objective!r} needs [{wants}], and of the two only that")
        if (self.grpo is None) == (objective == "grpo"):
            raise ValueError('[grpo] and train.objective = "grpo" belong together')
        if self.grpo is not None and self.grpo.max_tokens >= self.train.sequence:
            raise ValueError(
                "train.sequence holds a prompt and its answer: it must be more than grpo.max_tokens"
            )
        if self.grpo is not None and self.checkpoint.best:
            raise ValueError("checkpoint.best goes by the loss, which tells nothing here: leave it out")
        if self.model.source is None and not pretrains:
            raise ValueError(f"train.objective = {objective!r} needs model.from: what is fine-tuned")
        if self.tokenizer.path and not pretrains:
            raise ValueError("fine-tuning uses the model's own tokenizer: leave tokenizer.path out")
        if self.lora is not None and (self.model.source is None or self.train.optimizer != "adamw"):
            raise ValueError('[lora] needs model.from, and train.optimizer = "adamw"')
        return self

    @property
    def answers(self) -> int:
        """How many sequences a sample of a step becomes: the answers to a prompt, else one."""
        return self.grpo.group if self.grpo is not None else 1

    def mesh(self, ranks: int) -> Mesh:
        """The mesh of so many ranks: the recipe's, else all share the weights (fsdp), or have copies of them (dp).

        Raises ConfigError for one that this training is not offered on.
        """
        if not self.train.mesh:
            mesh = Mesh(dp=ranks) if self.lora is not None else Mesh(fsdp=ranks)
        else:
            mesh = Mesh.parse(self.train.mesh)
        if refused := self._not_offered(mesh):
            raise ConfigError(f"{refused[0]} is not offered on the mesh {mesh}: {refused[1]}", hint=refused[2],
                              param="train.mesh")  # fmt: skip
        return mesh

    def _not_offered(self, mesh: Mesh) -> tuple[str, str, str] | None:
        """What of this recipe a mesh does not take, why, and what to do."""
        objective, copies, shards = f"The objective {self.train.objective}", mesh.dp, mesh.dp * mesh.fsdp
        if self.lora is not None and copies < mesh.size:
            why = "adapters are small, so each rank trains them beside a whole copy of the model."
            return "[lora]", why, f'Use train.mesh = "dp={mesh.size}", or none.'
        if self.train.objective == "grpo" and shards < mesh.size:
            why = "each rank samples answers from a copy of the weights, which is gathered from shards of whole layers."
            return objective, why, f'Use train.mesh = "fsdp={mesh.size}", or dp and fsdp.'
        if mesh.pp > 1 and (self.train.objective != "pretrain" or self.checkpoint.best):
            what = objective if self.train.objective != "pretrain" else "checkpoint.best"
            why = "held-out text is measured by passes forward alone, which the schedules of a pipeline do not have."
            return what, why, "Use the other axes: fsdp, tp, cp, ep."
        if self.train.compile and mesh.size > 1:
            return "train.compile", "it compiles whole layers of one process.", "Set train.compile=false."
        return None

    def digest(self) -> str:
        """The digest of what makes a run: not of the mesh, the mixture or the samples, which may change on the way."""
        return digest_json(
            self.model_dump(
                mode="json",
                exclude={"train": {"mesh", "pipeline", "samples"}, "supervisor": True, "data": {"mixture"}},
            )
        )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        context = self.model.context or NAMED[self.model.name].context
        if self.model.source is None and self.train.sequence > context:
            raise ValueError(
                f"train.sequence = {self.train.sequence} is longer than the model's context of {context} tokens"
            )
        return self
