"""What the fields of stored files may hold, whoever wrote them: names, lines, digests, nothing unknown."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

# Control, bidirectional and zero-width characters would let a name rewrite a reader's terminal.
HIDDEN = r"\u0000-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
NAME = r"^[a-z0-9][a-z0-9._+-]{0,63}$"
SHA256 = r"^[0-9a-f]{64}$"

Name = Annotated[str, Field(pattern=NAME)]
Line = Annotated[str, Field(min_length=1, max_length=200, pattern=f"^[^{HIDDEN}]+$")]
Sha256 = Annotated[str, Field(pattern=SHA256)]
Bytes = Annotated[int, Field(ge=0, le=1 << 53)]


def only_const(schema: dict[str, Any]) -> None:
    """Drops from a JSON Schema what older pydantic repeats, so that all give the same bytes."""
    schema.pop("enum", None)


class Strict(BaseModel):
    """Unknown fields, NaN and infinity are refused, and nothing changes once it is made."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        json_schema_serialization_defaults_required=True,
    )


def printable(text: str, limit: int = 300) -> str:
    """`text`, cut short, with what could move a terminal's cursor shown as an escape."""
    shown = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "replace").decode()
        for c in text[:limit]
    )
    return shown + ("..." if len(text) > limit else "")
