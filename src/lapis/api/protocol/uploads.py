"""OpenAI's uploads: files that come in parts."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr

from lapis.api.protocol.files import HOUR, MONTH, FileObject, Purpose, file_object
from lapis.api.protocol.lists import Listed
from lapis.gateway.files import StoredFile
from lapis.gateway.uploads import Upload, UploadPart

UPLOAD_LIMIT = 8 << 30  # bytes of the whole file
MOST_NAMED = 10_000  # parts


class ExpiresAfter(BaseModel):
    """How long an object lives."""

    model_config = ConfigDict(extra="forbid")

    anchor: Literal["created_at"]
    seconds: Annotated[StrictInt, Field(ge=HOUR, le=MONTH)]


class UploadRequest(BaseModel):
    """Begin an upload."""

    model_config = ConfigDict(extra="forbid")

    bytes: Annotated[StrictInt, Field(ge=1, le=UPLOAD_LIMIT)]
    filename: StrictStr
    mime_type: Annotated[
        StrictStr, Field(min_length=1, max_length=255)
    ]  # what is inside is looked at by its users
    purpose: Purpose
    expires_after: ExpiresAfter | None = None

    @property
    def file_seconds(self) -> float | None:
        """How long the file lives; None: until somebody deletes it."""
        if self.expires_after is None:
            return float(MONTH) if self.purpose == "batch" else None
        return float(self.expires_after.seconds)


class CompletionOfUpload(BaseModel):
    """End an upload: the parts in their order."""

    model_config = ConfigDict(extra="forbid")

    part_ids: Annotated[list[StrictStr], Field(max_length=MOST_NAMED)]
    md5: StrictStr | None = None


class UploadObject(Listed):
    """A file on its way."""

    object: Literal["upload"] = "upload"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: Purpose
    status: Literal["pending", "completed", "cancelled", "expired"]
    file: FileObject | None


class PartObject(Listed):
    """Some of its bytes."""

    object: Literal["upload.part"] = "upload.part"
    created_at: int
    upload_id: str


def upload_object(upload: Upload, file: StoredFile | None = None) -> UploadObject:
    """An upload as OpenAI's object."""
    return UploadObject(
        id=upload.id,
        bytes=upload.bytes,
        created_at=int(upload.created_at),
        expires_at=int(upload.expires_at),
        filename=upload.filename,
        purpose=upload.purpose,  # type: ignore[arg-type]
        status=upload.status,  # type: ignore[arg-type]
        file=None if file is None else file_object(file),
    )


def part_object(part: UploadPart) -> PartObject:
    """A part as OpenAI's object."""
    return PartObject(id=part.id, created_at=int(part.created_at), upload_id=part.upload_id)


PART_SCHEMA: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["data"],
                    "properties": {"data": {"type": "string", "format": "binary"}},
                    "additionalProperties": False,
                }
            }
        },
    }
}
