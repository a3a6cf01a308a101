"""What a file's name and first bytes say about it."""

from __future__ import annotations

from pathlib import PurePosixPath

COMPRESSIONS = frozenset({".gz", ".zst"})
ARCHIVES = frozenset({".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar", ".jar", ".whl"})
OTHER_COMPRESSIONS = frozenset({".bz2", ".xz", ".lz4", ".br", ".lzma", ".z"})
SNIFFED = 8192
BOMS = (b"\xff\xfe", b"\xfe\xff")  # UTF-16; UTF-32 little-endian begins like the first


def ending(name: str) -> str:
    """A file's last ending, in small letters."""
    return PurePosixPath(name).suffix.lower()


def inner_ending(name: str) -> str:
    """A file's ending without that of a compression: `.jsonl` for `a.jsonl.zst`."""
    path = PurePosixPath(name)
    return ending(path.stem) if ending(name) in COMPRESSIONS else ending(name)


def looks_binary(block: bytes) -> bool:
    """Whether a file that begins so is no text."""
    if block.startswith(BOMS):
        return False
    if b"\0" in block:
        return True
    text = block.decode("utf-8", errors="replace")
    return text.count("\ufffd") > 0.3 * len(text)


def unreadable_pack(name: str) -> str:
    """Why a file is not opened, by its name: an archive, or a compression that is not read; empty if neither."""
    if inner_ending(name) in ARCHIVES:
        return "archive, not unpacked"
    return "compression that is not read" if ending(name) in OTHER_COMPRESSIONS else ""
