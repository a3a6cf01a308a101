"""The dataset card in the Croissant format 1.1 (docs.mlcommons.org/croissant): a dataset for machines."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from lapis.data.shards import Dataset
from lapis.storage import write_text

FILE = "croissant.json"
CONFORMS = "http://mlcommons.org/croissant/1.1"
CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "containedIn": "cr:containedIn",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileObject": "cr:fileObject",
    "fileProperty": "cr:fileProperty",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
TEXT, INTEGER = "sc:Text", "sc:Integer"
DOCUMENT_FIELDS = {
    "id": (TEXT, "Digest of the document's text"),
    "source": (TEXT, "The source of the recipe that it came from"),
    "path": (TEXT, "Where it lay in that source"),
    "licence": (TEXT, "Its licence; empty if unknown"),
    "kind": (TEXT, "prose or code"),
    "bytes": (INTEGER, "UTF-8 bytes of its text"),
    "tokens": (INTEGER, "Tokens of it in the shard, the one that begins it included"),
}


def write_card(dataset: Dataset) -> None:
    """Write `croissant.json` into a dataset's folder."""
    card = croissant(dataset, datetime.now(UTC).date().isoformat())
    write_text(dataset.folder / FILE, json.dumps(card, indent=1, ensure_ascii=False) + "\n")


def croissant(dataset: Dataset, published: str) -> dict[str, Any]:
    """The card as JSON-LD; `published` is a date."""
    manifest = dataset.manifest
    documents = f"{manifest['documents']:,} documents, {manifest['tokens']:,} tokens"
    return {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": CONFORMS,
        "name": f"lapis-{dataset.digest[:16]}",
        "description": f"{documents}, a vocabulary of {manifest['tokenizer']['vocab_size']:,}; each token leads to its "
        "document, source and licence.",
        "url": f"urn:lapis:dataset:{dataset.digest}",
        "version": "1.0.0",
        "datePublished": published,
        "license": sorted({row["licence"] or "unknown" for row in manifest["licences"]}),
        "distribution": [*_files(manifest), _documents_set()],
        "recordSet": [_documents()],
    }


def _files(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    files = [
        _file("tokenizer.json", "application/json", manifest["tokenizer"]["sha256"]),
        _file("heldout.jsonl", "application/jsonlines", manifest["heldout"]["sha256"]),
    ]
    kinds = {"documents.jsonl": "application/jsonlines"}
    for shard in manifest["shards"]:
        for ending, digest in sorted(shard["sha256"].items()):
            kind = kinds.get(ending, "application/octet-stream")
            files.append(_file(f"{shard['name']}.{ending}", kind, digest))
    return files


def _file(name: str, kind: str, digest: str) -> dict[str, Any]:
    facts = {"@type": "cr:FileObject", "@id": name, "name": name, "contentUrl": name}
    return {**facts, "encodingFormat": kind, "sha256": digest}


def _documents_set() -> dict[str, Any]:
    facts = {"@type": "cr:FileSet", "@id": "document-tables", "name": "document-tables"}
    return {**facts, "encodingFormat": "application/jsonlines", "includes": "shard-*.documents.jsonl"}


def _documents() -> dict[str, Any]:
    fields = [
        {
            "@type": "cr:Field",
            "@id": f"documents/{name}",
            "name": name,
            "description": description,
            "dataType": kind,
            "source": {"fileSet": {"@id": "document-tables"}, "extract": {"column": name}},
        }
        for name, (kind, description) in DOCUMENT_FIELDS.items()
    ]
    return {"@type": "cr:RecordSet", "@id": "documents", "name": "documents", "field": fields}
