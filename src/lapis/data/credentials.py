"""Secrets: keys and tokens of well-known forms, private keys, passwords in URLs, random values under telling names."""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from collections import Counter
from collections.abc import Iterator

from lapis.data.identifiers import before

_FORMS = (
    r"(?:AKIA|ASIA)[A-Z2-7]{16}",  # AWS
    r"gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9]{22}_[A-Za-z0-9]{59}",
    r"gl(?:pat|ptt|dt|rt|soat)-[A-Za-z0-9_-]{20,}",  # GitLab
    r"xox[abeoprs]-(?:[A-Za-z0-9]+-){1,4}[A-Za-z0-9]{16,}|xapp-1-[A-Z0-9]+-\d+-[a-f0-9]{64}",  # Slack
    r"[sr]k_live_[A-Za-z0-9]{20,}|whsec_[A-Za-z0-9+/=]{32,}",  # Stripe
    r"AIza[A-Za-z0-9_-]{35}|GOCSPX-[A-Za-z0-9_-]{28}|ya29\.[A-Za-z0-9_-]{40,}",  # Google
    r"npm_[A-Za-z0-9]{36}|pypi-AgE[A-Za-z0-9_-]{50,}|hf_[A-Za-z]{34}|rubygems_[a-f0-9]{48}|dckr_pat_[A-Za-z0-9_-]{27}",
    r"sk-(?:proj-|svcacct-|ant-[a-z0-9]+-|or-v1-)?[A-Za-z0-9_-]{40,}|sk-[A-Za-z0-9]{20}T3BlbkFJ[A-Za-z0-9]{20}",
    r"SG\.[A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43}",  # SendGrid
    r"[MNO][A-Za-z0-9_-]{23,27}\.[A-Za-z0-9_-]{6}\.[A-Za-z0-9_-]{27,38}",  # Discord
    r"do[por]_v1_[a-f0-9]{64}|shp(?:at|ca|pa|ss)_[a-f0-9]{32}|dapi[a-f0-9]{32}|hvs\.[A-Za-z0-9_-]{24,}",
    r"eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{16,}",  # JSON Web Token
)
_TOKEN = re.compile(rf"(?:{'|'.join(_FORMS)})(?![A-Za-z0-9_])")
_RUN = re.compile(r"[A-Za-z0-9_.-]{20,}")  # what a token lies in, from its first character
_TELEGRAM = re.compile(r"(?<!\d)\d{8,10}:AA[A-Za-z0-9_-]{33}(?![A-Za-z0-9_-])")
_WEBHOOK = re.compile(r"hooks\.slack\.com/services/(T[A-Z0-9]{8,}/B[A-Z0-9]{8,}/[A-Za-z0-9]{20,})")
_AZURE = re.compile(r"(?:AccountKey|SharedAccessKey|[?&]sig)=([A-Za-z0-9+/%]{40,}={0,2})")
_URL_PASSWORD = re.compile(r"\b[a-z][a-z0-9+.-]{1,20}://[^\s:/@'\"<>]{0,64}:([^\s:/@'\"<>]{6,128})@[\w.\[-]")
_PRIVATE_KEY = re.compile(
    r"-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----(?P<body>(?:[A-Za-z0-9+/=\s:,.-]|\\[nr]|[\"'])*?)"
    r"(?:-----END (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----|\Z)"
)  # fmt: skip
_NAME = (
    r"(?:pass(?:word|wd|phrase)?|pwd|secret|token|credential|private_?key|(?:api|access|auth|account|client|encryption"
    r"|signing|storage|service|master|app|shared|subscription|write|admin)[_-]?key|apikey|authorization)"
)
_ASSIGNMENT = re.compile(
    rf"(?P<name>(?i:{_NAME})[\w-]{{0,24}})[\"'\]]{{0,2}}\s{{0,8}}(?:=>|:=|[:=])\s{{0,8}}"
    r"(?:[a-zA-Z]?[\"'`]|Bearer |(?=[^\s\"']{16,}\s*$))(?:Bearer )?"
    r"(?P<value>[A-Za-z0-9+/=_.~!@#$%^&*-]{16,512})(?=[\"'`\s]|$)",
    re.MULTILINE,
)
_NAME_PARTS = ("pass", "pwd", "secret", "token", "credential", "key", "authorization")
_WORD_BEFORE = re.compile(r"[\w.-]*$")
_HARMLESS_NAME = re.compile(
    r"hash|digest|sha\d|md5|checksum|public|fingerprint|_id$|-id$|uri$|url$|endpoint|type|path|file|name|header|tokens"
    r"|tokeniz|placeholder|cancel|csrf_?field",
    re.IGNORECASE,
)
_PLACEHOLDER = re.compile(
    r"example|sample|placeholder|dummy|change.?me|replace|your|insert|redacted|xxxx|\*{3}|\.\.\.|<|\$\{|\{\{|%\(|0123456789"
    r"|1234567890|abcdef(?:gh|12)|deadbeef|(?:0{8}|1{8}|a{8}|f{8})|secret_?key|password|lorem",
    re.IGNORECASE,
)
_CODE = re.compile(r"[A-Za-z_]\w*(?:(?:\.|->|::)[A-Za-z_]\w*)+$|[a-z]+(?:[_-][a-z]+)+$|[A-Z]+(?:_[A-Z]+)+$")
_MIXED = re.compile(r"[A-Za-z]\d|\d[A-Za-z]")  # as `hints` wants it
_WITHOUT_DIGITS = ("hf_", "AKIA", "ASIA")  # tokens that can do without digits
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}$", re.IGNORECASE)


def find_tokens(text: str, low: int, high: int) -> Iterator[tuple[int, int]]:
    """Where secrets stand in a part of a text that ends at line ends; they may overlap."""
    for run in _RUN.finditer(text, low, high):
        found = _TOKEN.match(text, run.start(), high)
        if found and not _PLACEHOLDER.search(found[0]) and _is_token(found[0]):
            yield found.span()
    line = text[low:high].lower()
    if ":aa" in line:
        yield from (found.span() for found in _TELEGRAM.finditer(text, low, high))
    if "hooks.slack.com" in line:
        yield from (found.span(1) for found in _WEBHOOK.finditer(text, low, high))
    if "key=" in line or "sig=" in line:
        yield from (found.span(1) for found in _AZURE.finditer(text, low, high) if is_random(found[1]))
    if any(part in line for part in _NAME_PARTS):
        for found in _ASSIGNMENT.finditer(text, low, high):
            name = _WORD_BEFORE.findall(before(text, found.start(), 40))[0] + found["name"]
            if not _HARMLESS_NAME.search(name) and is_random(found["value"]):
                yield found.span("value")


def find_passwords(text: str, low: int, high: int) -> Iterator[tuple[int, int]]:
    """Where passwords stand in URLs, in a part of a text that ends at line ends."""
    scheme = text.find("://", low, high)
    if scheme < 0:
        return
    for found in _URL_PASSWORD.finditer(text, max(low, scheme - 24), high):
        value = found[1]
        if (
            not _PLACEHOLDER.search(value)
            and value[0] not in "$%{<["
            and len(set(value)) >= 5
            and _mixed(value)
        ):
            yield found.span(1)


def find_private_keys(text: str) -> Iterator[tuple[int, int]]:
    """Where private keys stand, from their BEGIN line to their END line."""
    if "PRIVATE KEY" not in text:
        return
    for found in _PRIVATE_KEY.finditer(text):
        body = re.sub(r"\\[nr]|[\s\"']", "", found["body"])
        if len(body) >= 64 and entropy(body) > 4:
            yield found.span()


def is_random(value: str) -> bool:
    """Whether a value looks drawn at random: long, of mixed characters, no placeholder, no path or name of code."""
    if (
        len(value) < 16
        or _PLACEHOLDER.search(value)
        or _CODE.match(value)
        or _UUID.match(value)
        or " " in value
    ):
        return False
    if not _MIXED.search(value):
        return False
    if re.fullmatch(r"[0-9a-fA-F]+", value):
        return len(value) >= 24 and entropy(value) > 3
    if (value.count("/") > 2 and "." in value) or value.count(".") > 2:
        return False
    return entropy(value) > min(3.4, 0.85 * math.log2(len(value)))


def entropy(value: str) -> float:
    """Shannon's entropy of the value's characters, in bits a character."""
    counts = Counter(value).values()
    return -sum(count / len(value) * math.log2(count / len(value)) for count in counts)


def _mixed(value: str) -> bool:
    kinds = (str.isdigit, str.isupper, str.islower, lambda char: not char.isalnum())
    return sum(any(map(kind, value)) for kind in kinds) >= 2


def _is_token(value: str) -> bool:
    if value.startswith("eyJ"):
        return _is_jwt(value)
    return entropy(value[4:]) > 2.5 and (value.startswith(_WITHOUT_DIGITS) or bool(_MIXED.search(value)))


def _is_jwt(value: str) -> bool:
    header = value.split(".")[0]
    try:
        fields = json.loads(base64.urlsafe_b64decode(header + "=" * (-len(header) % 4)))
    except (ValueError, binascii.Error):
        return False
    return isinstance(fields, dict) and "alg" in fields
