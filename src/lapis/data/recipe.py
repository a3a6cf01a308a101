"""What a recipe says about data and tokenizer: the sections [data] and [tokenizer]."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lapis.config import Section
from lapis.data.document import Kind
from lapis.data.thresholds import FilterConfig

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Limit = Annotated[float, Field(ge=0)]
Part = Annotated[float, Field(gt=0, lt=1)]
Format = Literal["auto", "text", "jsonl", "parquet", "arrow", "html", "warc", "pdf"]
PII_KINDS = ("email", "phone", "ip", "iban", "card", "national_id", "secret")


LEAST_MEMORY = 500_000_000  # bytes: the directing process, one worker, and tables


class SourceConfig(Section):
    """Where text comes from: one `[[data.sources]]` table."""

    path: str = ""
    """A file, a folder or a pattern with `*`, local or a URL (s3://, az://, gs://, https://, …)."""
    kind: Literal["files", "code", "environment"] = "files"
    """"files" reads path; "code" too, without vendored, minified and generated files and with the licences of the
    tree; "environment" the Python sources and texts installed with this interpreter."""
    format: Format = "auto"
    """How files are read; "auto" goes by their ending, and reads whatever is text."""
    name: str = ""
    """The source's name in reports and tables; by default the last part of path."""
    licence: str = ""
    """The licence of every document of this source, if no column says it."""
    text_column: str = "text"
    """The column or key that holds the text, in parquet and JSON lines."""
    licence_column: str = ""
    """The column or key that holds a document's licence."""
    kind_column: str = ""
    """The column or key that holds a document's kind: "code", or anything else for prose."""
    extractor: Literal["resiliparse", "trafilatura"] = "resiliparse"
    """What finds the main text of HTML: resiliparse is quick, trafilatura more precise and slow."""
    text_kind: Literal["auto", "prose", "code"] = "auto"
    """Which quality rules apply; "auto" goes by the file's ending."""
    priority: int = 0
    """Of duplicates, the copy of the source with the smallest priority survives."""

    @model_validator(mode="after")
    def _place(self) -> SourceConfig:
        if self.kind != "environment" and not self.path:
            raise ValueError("a source of files needs a path")
        if self.kind == "environment" and self.path:
            raise ValueError("the environment source takes no path")
        return self


class LanguageConfig(Section):
    """Which languages are kept; identified for prose alone."""

    identify: bool = False
    """Whether the language of each document is written down and counted; asking for languages does it too."""
    keep: tuple[str, ...] = ()
    """Languages to keep, as fastText's codes, such as "en" or "zh"; empty keeps all."""
    min_score: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The least probability of a document's language (FineWeb: 0.65)."""

    @property
    def asked(self) -> bool:
        """Whether languages are identified at all."""
        return self.identify or bool(self.keep) or self.min_score > 0


class ScoreConfig(Section):
    """A quality score by a classifier of one's own (`lapis data classifier train`), for prose."""

    model: str = ""
    """The classifier's file; empty is no score."""
    min_score: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The least score of a document that is kept."""
    keep: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The share of the documents of prose that is kept, the best of them."""


class DedupConfig(Section):
    """Which duplicates are removed."""

    exact: bool = True
    """Whether documents that are equal up to white space are removed."""
    near: bool = True
    """Whether near-duplicates are removed."""
    threshold: Part = 0.75
    """The Jaccard similarity of word 5-grams from which two documents are near-duplicates."""
    heldout_threshold: Part = 0.5
    """The looser similarity from which a document is too close to a held-out one to be trained on."""


class BoilerplateConfig(Section):
    """Lines that many documents of one source share, such as navigation and licence notes."""

    sources: Literal["html", "all", "none"] = "html"
    """Whose repeated lines are taken out: those of sources of web pages (HTML, WARC), of all, or of none."""
    min_documents: Annotated[int, Field(ge=2)] = 10
    """The number of documents of one source from which a line is boilerplate."""
    min_chars: Positive = 20
    """Shorter lines stay, since a short line may well occur often."""


Action = Literal["mask", "drop", "keep"]


class PiiConfig(Section):
    """Personal data and secrets: "mask" puts a placeholder in their place, "drop" drops the document."""

    enabled: bool = True
    """Whether they are looked for."""
    email: Action = "mask"
    """E-mail addresses."""
    phone: Action = "mask"
    """Telephone numbers."""
    ip: Action = "mask"
    """Public IPv4 and IPv6 addresses."""
    iban: Action = "mask"
    """Bank accounts, checked."""
    card: Action = "mask"
    """Numbers of payment cards, checked."""
    national_id: Action = "mask"
    """National identity numbers, checked."""
    secret: Action = "mask"
    """Private keys, tokens, passwords."""
    max_hits: Count = 50
    """Most finds in a document, of the kinds that are not kept: it is dropped beyond; 0 sets no limit."""

    def kinds(self, action: Action) -> tuple[str, ...]:
        """The kinds that an action is chosen for."""
        if not self.enabled:
            return ()
        return tuple(kind for kind in PII_KINDS if getattr(self, kind) == action)


class EvaluationSet(Section):
    """A file with evaluation items: one `[[data.decontamination.sets]]` table."""

    path: str
    """A .jsonl or .parquet file with an item a row, or a .txt file with a blank line between items."""
    columns: tuple[str, ...] = ()
    """The columns or keys that make an item, the question first; a list (of choices) counts as its texts."""


class DecontaminationConfig(Section):
    """Documents that hold items of evaluation sets are dropped."""

    sets: tuple[EvaluationSet, ...] = ()
    """The evaluation sets; none of them, no decontamination."""
    ngram: Annotated[int, Field(ge=5, le=50)] = 13
    """How many words in a row have to be the same for a match."""
    short: Annotated[int, Field(ge=2)] = 6
    """Items shorter than ngram have to be there whole; those with fewer words than this cannot be looked for."""
    item_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """The part of an item's words from which a document is dropped."""
    document_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """The part of a document's words in evaluation text from which it is dropped, whatever the item's part is."""


class LicencesConfig(Section):
    """Which documents may be used, by their licence: SPDX ids, or families.

    The families are permissive, copyleft, non-commercial, public-domain and unknown.
    """

    allow: tuple[str, ...] = ()
    """Only these, if there are any; an id outweighs a family."""
    deny: tuple[str, ...] = ()
    """None of these."""
    unknown: Literal["keep", "drop"] = "keep"
    """What happens to documents without a licence, or with one that is not known, if no entry names it."""


class HeldoutConfig(Section):
    """The held-out documents: never trained on, and nothing close to them."""

    fraction: Part = 0.02
    """Their part of the clean text."""
    min_bytes: Positive = 10_000
    """Fewest bytes; the training text must be at least as long."""
    max_bytes: Positive = 1_000_000
    """Most bytes, roughly."""

    @model_validator(mode="after")
    def _ordered(self) -> HeldoutConfig:
        if self.min_bytes > self.max_bytes:
            raise ValueError(f"min_bytes = {self.min_bytes} is more than max_bytes = {self.max_bytes}")
        return self


Weights = dict[str, Limit]
# Of a source with a weight: windows are drawn in blocks that hold each source at least once.
LEAST_SHARE = 1e-4


class MixtureSegment(Section):
    """A stretch of the training with weights of its own: one `[[data.mixture.segments]]` table."""

    weights: Weights
    """How much each source counts, by its name; 0 leaves it out."""
    share: Annotated[float, Field(gt=0, le=1)] | None = None
    """How long it is, as a part of train.steps; all segments together are 1."""
    tokens: Positive | None = None
    """How long it is, in training tokens; the last segment has none and lasts to the end."""

    @model_validator(mode="after")
    def _enough(self) -> MixtureSegment:
        check_weights(self.weights)
        return self


class MixtureConfig(Section):
    """How much of the training comes from each source, and how often its text may come again."""

    weights: Weights = Field({})
    """How much each source counts, by its name; 0 leaves it out. Give this or `segments`."""
    epochs: dict[str, Annotated[float, Field(gt=0)]] = Field({})
    """How often a source may be gone through in the whole run, such as 4.0; then the others take its part."""
    segments: tuple[MixtureSegment, ...] = ()
    """Weights that change on the way, one stretch of the training after the other."""

    @model_validator(mode="after")
    def _one_form(self) -> MixtureConfig:
        if bool(self.weights) == bool(self.segments):
            raise ValueError("give exactly one of data.mixture.weights and [[data.mixture.segments]]")
        if self.weights:
            check_weights(self.weights)
            return self
        shares = [segment.share for segment in self.segments if segment.share is not None]
        counts = [segment.tokens for segment in self.segments if segment.tokens is not None]
        by_share = not counts and len(shares) == len(self.segments) and abs(sum(shares) - 1) < 1e-9
        by_tokens = not shares and len(counts) == len(self.segments) - 1 and self.segments[-1].tokens is None
        if not by_share and not by_tokens:
            raise ValueError(
                "each of [[data.mixture.segments]] has a share, together 1, or each but the last has tokens"
            )
        return self


def check_weights(weights: Weights) -> None:
    """Raise ValueError for weights that are all 0, or for one that is too small beside the others."""
    total = sum(weights.values())
    if total <= 0:
        raise ValueError("at least one source needs a weight above 0")
    for name, weight in weights.items():
        if 0 < weight < LEAST_SHARE * total:
            raise ValueError(f"the weight of {name!r} is less than {LEAST_SHARE} of all: leave it out with 0")


class DataConfig(Section):
    """The section [data]: from sources to token shards."""

    sources: tuple[SourceConfig, ...]
    """Where the text comes from."""
    max_bytes: Count = 0
    """Most bytes of raw text that are used, files taken in the order of their names' digests; 0 uses all."""
    document_chars: Annotated[int, Field(ge=1_000)] = 65_536
    """Longer texts are cut into pieces of at most so many characters, at paragraph, line or word borders."""
    filters: FilterConfig = FilterConfig()
    """The quality rules."""
    language: LanguageConfig = LanguageConfig()
    """Which languages are kept."""
    score: ScoreConfig = ScoreConfig()
    """A learned quality score."""
    licences: LicencesConfig = LicencesConfig()
    """Which licences may be used."""
    pii: PiiConfig = PiiConfig()
    """Personal data and secrets."""
    decontamination: DecontaminationConfig = DecontaminationConfig()
    """Evaluation sets that must not be trained on."""
    dedup: DedupConfig = DedupConfig()
    """Which duplicates are removed."""
    memory_bytes: Count = 0
    """Most memory of all processes together, above that of mapped files; at least 500 MB. 0 bounds nothing."""
    boilerplate: BoilerplateConfig = BoilerplateConfig()
    """Lines that many documents share."""
    heldout: HeldoutConfig = HeldoutConfig()
    """How much text is held out."""
    mixture: MixtureConfig | None = None
    """How the sources are mixed in training; without it the text comes as it lies. No part of the dataset."""

    @model_validator(mode="after")
    def _some(self) -> DataConfig:
        if not self.sources:
            raise ValueError("at least one [[data.sources]] is needed")
        if 0 < self.memory_bytes < LEAST_MEMORY:
            raise ValueError(f"memory_bytes = {self.memory_bytes} is too little: {LEAST_MEMORY:,} at least")
        return self


class TokenizerConfig(Section):
    """The section [tokenizer]: trained on the data, or an existing one."""

    vocab_size: Annotated[int, Field(ge=259)] = 8192
    """Entries of the vocabulary that is trained: at least 256 bytes and 3 special tokens."""
    path: str = ""
    """An existing tokenizer.json to use instead of training one."""
    sample_bytes: Positive = 10_000_000
    """How many bytes of the training documents the vocabulary is trained on."""


class ExamplesConfig(Section):
    """The section [examples]: what a model is fine-tuned on, in place of [data]."""

    files: tuple[str, ...]
    """JSON lines: chats, prompts with completions, or preferences (docs/finetune.md has the forms)."""
    heldout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """The part of the examples that is never trained on but measured."""
    heldout_files: tuple[str, ...] = ()
    """Files of examples to measure on, in place of a part of `files`."""
    too_long: Literal["refuse", "drop"] = "refuse"
    """What happens to an example longer than train.sequence; how many were dropped is reported."""
    template: str = ""
    """A file with the chat template to use in place of the model's own."""

    @model_validator(mode="after")
    def _some(self) -> ExamplesConfig:
        if not self.files:
            raise ValueError("at least one file of examples is needed")
        return self


def kind_named(value: object) -> Kind:
    """The kind that a column's value names."""
    return "code" if value == "code" else "prose"
