"""GPT-2's printable stand-in for each byte: printable Latin-1 stays, the rest moves to U+0100 and up."""

from __future__ import annotations

_KEPT = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_MOVED = sorted(set(range(256)) - set(_KEPT))
_BYTES = {chr(byte): byte for byte in _KEPT} | {chr(0x100 + n): byte for n, byte in enumerate(_MOVED)}

BYTE_CHARS = "".join(sorted(_BYTES, key=_BYTES.__getitem__))  # the stand-in of byte n stands at place n


def from_byte_level(piece: str) -> bytes:
    """The bytes that an entry stands for; one outside the alphabet stands for itself."""
    try:
        return bytes(_BYTES[char] for char in piece)
    except KeyError:
        return piece.encode()
