"""Personal data in the pipeline: what is found is written beside the documents, and masked when they are encoded.

The documents themselves stay as they were read. Finding depends on no setting, so what is masked, dropped or kept
can be changed without looking again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lapis.data.annotate import Chunk
from lapis.data.columns import Columns, Mask
from lapis.data.decide import Attributes, Rule
from lapis.data.pii import PII_VERSION, find_all
from lapis.data.recipe import PII_KINDS, PiiConfig

SCHEMA = pa.schema(
    [("what", pa.list_(pa.string())), ("start", pa.list_(pa.int32())), ("end", pa.list_(pa.int32()))]
)


@dataclass(frozen=True)
class PiiAnnotator:
    """Writes the spans of personal data and secrets: what each is, and its characters from `start` to `end`."""

    name: str = "pii"
    version: int = PII_VERSION
    schema: pa.Schema = SCHEMA

    def facts(self) -> dict[str, Any]:
        """The kinds that are looked for: always all of them."""
        return {"kinds": list(PII_KINDS)}

    def annotate(self, chunk: Chunk) -> pa.RecordBatch:
        """The spans of a chunk's documents."""
        found = find_all(chunk.texts)
        columns = {
            "what": [[span.what for span in spans] for spans in found],
            "start": [[span.start for span in spans] for spans in found],
            "end": [[span.end for span in spans] for spans in found],
        }
        return pa.RecordBatch.from_pydict(columns, schema=self.schema)


def pii_rules(config: PiiConfig) -> list[Rule]:
    """Documents that are dropped for a kind, and those with too many finds of the kinds that are not kept."""
    if not config.enabled:
        return []
    rules = [
        Rule("pii", f"holds {kind.replace('_', ' ')}", partial(_more_than, 0, (kind,)))
        for kind in config.kinds("drop")
    ]
    if config.max_hits:
        judged = (*config.kinds("mask"), *config.kinds("drop"))
        rules.append(Rule("pii", "too much personal data", partial(_more_than, config.max_hits, judged)))
    return rules


def _more_than(limit: int, kinds: tuple[str, ...], attributes: Attributes) -> Mask:
    found: Mask = count_spans(attributes["pii"], kinds) > limit
    return found


def count_spans(spans: Columns, kinds: tuple[str, ...]) -> NDArray[np.int64]:
    """How many spans of some kinds each document has."""
    import pyarrow.compute as compute

    what = spans.column("what")
    parent = compute.list_parent_indices(what).to_numpy()
    wanted = compute.is_in(compute.list_flatten(what), pa.array(kinds, pa.string())).to_numpy(
        zero_copy_only=False
    )
    return np.bincount(parent[wanted], minlength=len(spans)).astype(np.int64)
