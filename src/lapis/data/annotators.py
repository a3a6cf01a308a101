"""What a recipe asks for: its annotators, and the rules that decide from what they wrote.

A new annotator is a file with an `Annotator` and, if documents are dropped for what it finds, a function from its
recipe table to rules; each has one line here.
"""

from __future__ import annotations

from lapis.data.annotate import Annotator
from lapis.data.decide import Rule
from lapis.data.decontaminate import OverlapAnnotator, overlap_rules
from lapis.data.filters import QualityAnnotator, quality_rules
from lapis.data.language import LanguageAnnotator, language_rules, model_digest
from lapis.data.licences import licence_rules
from lapis.data.masking import PiiAnnotator, pii_rules
from lapis.data.recipe import DataConfig
from lapis.data.score import ScoreAnnotator, score_rules
from lapis.data.sketch import SketchAnnotator


def annotators(data: DataConfig) -> tuple[Annotator, ...]:
    """The annotators of a recipe."""
    found: list[Annotator] = [SketchAnnotator()]
    if data.filters.enabled:
        found.append(QualityAnnotator())
    if data.language.asked:
        found.append(LanguageAnnotator(model_digest()))
    if data.score.model:
        found.append(ScoreAnnotator.of(data.score))
    if data.pii.enabled:
        found.append(PiiAnnotator())
    if data.decontamination.sets:
        found.append(OverlapAnnotator(data.decontamination))
    return tuple(found)


def rules(data: DataConfig) -> tuple[Rule, ...]:
    """The rules of a recipe; the first that hits a document is the reason it is dropped for."""
    return (
        *licence_rules(data.licences),
        *language_rules(data.language),
        *quality_rules(data.filters),
        *score_rules(data.score),
        *overlap_rules(data.decontamination),
        *pii_rules(data.pii),
    )
