"""OpenAI's file objects, and the form that makes one."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from fastapi import Query

from lapis.api.form import Form
from lapis.api.protocol.lists import Listed
from lapis.errors import InputError
from lapis.gateway.files import StoredFile

Purpose = Literal["assistants", "batch", "fine-tune", "vision", "user_data", "evals"]  # of uploads
AnyPurpose = Purpose | Literal["assistants_output", "batch_output", "fine-tune-results"]
PURPOSES = get_args(Purpose)
FilesLimit = Annotated[int, Query(ge=1, le=10_000)]
HOUR, MONTH = 3600, 30 * 86_400  # seconds; the bounds of an expiry
EXPIRY = ("expires_after[anchor]", "expires_after[seconds]")


class FileObject(Listed):
    """A file. It can be used as soon as it is there, so its status is always `processed`."""

    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: AnyPurpose
    status: Literal["processed"] = "processed"
    status_details: None = None


def file_object(file: StoredFile) -> FileObject:
    """A stored file as OpenAI's object."""
    return FileObject(
        id=file.id,
        bytes=file.bytes,
        created_at=int(file.created_at),
        expires_at=None if file.expires_at is None else int(file.expires_at),
        filename=file.filename,
        purpose=file.purpose,  # type: ignore[arg-type]
    )


def read_fields(form: Form) -> tuple[str, float | None]:
    """Purpose and lifetime in seconds (None: for ever) that a form asks for. Raises InputError."""
    fields = form.fields
    if form.filename is None:
        raise InputError("The field 'file' is required and missing.", param="file")
    unknown = next((name for name in fields if name not in ("purpose", *EXPIRY)), None)
    if unknown is not None:
        raise InputError(f"Unknown field {unknown[:80]!r}.", param=unknown[:80])
    purpose = checked_purpose(fields.get("purpose"))
    if not fields.keys() & set(EXPIRY):
        return purpose, float(MONTH) if purpose == "batch" else None
    if fields.get(EXPIRY[0]) != "created_at":
        raise InputError("expires_after.anchor must be 'created_at'.", param="expires_after.anchor")
    text = fields.get(EXPIRY[1], "")
    return purpose, checked_lifetime(
        int(text) if text.isascii() and text.isdigit() and len(text) < 10 else -1
    )


def checked_purpose(purpose: str | None) -> str:
    """A purpose that an upload may have. Raises InputError."""
    if purpose is None or purpose not in PURPOSES:
        raise InputError(f"purpose must be one of {', '.join(PURPOSES)}.", param="purpose")
    return purpose


def checked_lifetime(seconds: int) -> float:
    """Seconds of `expires_after`, if it may be that many. Raises InputError."""
    if not HOUR <= seconds <= MONTH:
        raise InputError(
            f"expires_after.seconds must be a whole number from {HOUR} to {MONTH}.",
            param="expires_after.seconds",
        )
    return float(seconds)


FORM_SCHEMA: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": list(PURPOSES)},
                        EXPIRY[0]: {"type": "string", "enum": ["created_at"]},
                        EXPIRY[1]: {"type": "integer", "minimum": HOUR, "maximum": MONTH},
                    },
                    "additionalProperties": False,
                }
            }
        },
    }
}
