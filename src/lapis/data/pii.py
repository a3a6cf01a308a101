"""Personal data and secrets: where they stand in a text, and the text with placeholders in their place.

`find` is the slow simple form, every detector over the whole text; `Finder` looks where `hints` says that something
can stand, and finds the same. Both work line by line: nothing but a private key goes over a line's end.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from lapis.data.credentials import find_passwords, find_private_keys, find_tokens
from lapis.data.hints import Hint, hinted_lines
from lapis.data.identifiers import before, find_national_ids, iban_length, is_card, is_iban
from lapis.data.phones import find_phones

PII_VERSION = 2


class Span(NamedTuple):
    """One find: characters `start` to `end` of the repaired text."""

    start: int
    end: int
    what: str


Detector = Callable[[str, int, int], Iterator[tuple[int, int]]]

_COUNTRIES = """
ac ad ae af ag ai al am ao aq ar as at au aw ax az ba bb bd be bf bg bh bi bj bm bn bo br bs bt bw by bz ca cc cd cf
cg ch ci ck cl cm cn co cr cu cv cw cx cy cz de dj dk dm do dz ec ee eg er es et eu fi fj fk fm fo fr ga gd ge gf gg
gh gi gl gm gn gp gq gr gs gt gu gw gy hk hm hn hr ht hu id ie il im in io iq ir is it je jm jo jp ke kg kh ki km kn
kp kr kw ky kz la lb lc li lk lr ls lt lu lv ly ma mc md me mg mh mk ml mm mn mo mp mq mr ms mt mu mv mw mx my mz na
nc ne nf ng ni nl no np nr nu nz om pa pe pf pg ph pk pl pm pn pr ps pt pw py qa re ro rs ru rw sa sb sc sd se sg sh
si sk sl sm sn so sr ss st su sv sx sy sz tc td tf tg th tj tk tl tm tn to tr tt tv tw tz ua ug uk us uy uz va vc ve
vg vi vn vu wf ws ye yt za zm zw
"""
_GENERIC = """
com org net edu gov mil int info biz name pro aero coop museum jobs mobi travel tel cat asia post xxx xyz online site
tech store app dev cloud blog shop club email space website live agency company group world today news media digital
systems solutions services network software technology center consulting academy education university school institute
foundation international global health care clinic legal law bank finance capital ventures studio design art photography
music film games game fun link page wiki science engineering energy earth eco bio green london berlin paris tokyo nyc
hamburg wien koeln vip top work works team one life love plus guru ninja rocks expert support help chat social codes
"""
_ENDINGS = frozenset([*_COUNTRIES.split(), *_GENERIC.split()])

_EMAIL = re.compile(
    r"(?<![\w.%+&'/=-])([^\W_](?:[\w.%+&'=-]{0,62}[\w+=-])?|_[\w.%+-]{1,62})@((?:[^\W_](?:[\w-]{0,61}[^\W_])?\.){1,6})"
    r"([^\W\d_]{2,24}|xn--[a-z0-9-]{2,59})(?![\w@-]|\.\w)"
)
_USER = 66  # longest user of an address, and more
_RESERVED = re.compile(
    r"(?:^|\.)(?:example(?:\.(?:com|org|net|edu))?|test|invalid|localhost|local|localdomain|internal)$",
    re.IGNORECASE,
)


def find_emails(text: str, low: int, high: int) -> Iterator[tuple[int, int]]:
    """E-mail addresses under a real top-level domain, but for reserved names and the user of an SSH address."""
    at = text.find("@", low, high)
    while at >= 0:
        found = _EMAIL.search(text, max(low, at - _USER), high)
        if found is None:
            return
        low = found.end()
        at = text.find("@", low, high)
        user, host, ending = found.groups()
        if (ending.lower() not in _ENDINGS and not ending.startswith("xn--")) or _RESERVED.search(
            host + ending
        ):
            continue
        if user == "git" or ".." in user or text[found.end() : found.end() + 2] == "::":
            continue
        yield found.span()


_IPV4 = re.compile(
    r"(?<![\w.+-])(?:(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)\.){3}(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)(?![\w-]|\.\w)"
)
_IPV6 = re.compile(r"(?<![\w:.])[23][0-9a-fA-F]{3}:(?:[0-9a-fA-F]{0,4}:){1,6}[0-9a-fA-F]{0,4}(?![\w:]|\.\w)")
_VERSION = re.compile(
    r"(?:\b(?:version|versions|ver|v|release|rev|revision|build|section|chapter|clause|table|figure|oid|firmware|driver"
    r"|sección|seção|sezione|abschnitt|kapitel|tabelle|раздел)|[=<>~!]=|[<>~^]|[§#])[\s\"':=]{0,3}$|[A-Za-z]/$|[A-Za-z]-$",
    re.IGNORECASE,
)  # fmt: skip
_ADDRESS = re.compile(
    r"\b(?:ip|ipv4|ips|addr|address|host|hosts|server|servers|client|dns|nameserver|gateway|peer|remote|inet|ping)\b",
    re.IGNORECASE,
)  # fmt: skip
_NOBODYS = {"1.2.3.4", "4.3.2.1", "5.6.7.8", "1.1.1.1", "1.0.0.1", "2.2.2.2", "3.3.3.3", "4.4.4.4", "5.5.5.5"}
_RESOLVERS = {"8.8.8.8", "8.8.4.4", "9.9.9.9", "208.67.222.222", "208.67.220.220", "4.2.2.1", "4.2.2.2"}
_NOT_PUBLIC = tuple(
    (int.from_bytes(bytes(map(int, net.split("/")[0].split(".")))), 32 - int(net.split("/")[1]))
    for net in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
        "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
        "224.0.0.0/3",
    )
)  # fmt: skip


def find_ips(text: str, low: int, high: int) -> Iterator[tuple[int, int]]:
    """Public IPv4 addresses, but for what reads as a version or the number of a section, and public resolvers."""
    for found in _IPV4.finditer(text, low, high):
        parts = list(map(int, found[0].split(".")))
        number = int.from_bytes(bytes(parts))
        if any(number >> bits == net >> bits for net, bits in _NOT_PUBLIC):
            continue
        context = before(text, found.start(), 40)
        if found[0] in _NOBODYS or found[0] in _RESOLVERS or _VERSION.search(context):
            continue
        if max(parts[1:]) < 32 and (parts[0] < 100 or not context.strip()) and not _ADDRESS.search(context):
            continue
        yield found.span()


def find_ipv6s(text: str, low: int, high: int) -> Iterator[tuple[int, int]]:
    """Public IPv6 addresses: 2000::/3 without what is reserved for documentation and tunnels."""
    for found in _IPV6.finditer(text, low, high):
        address = found[0].lower()
        whole = "::" not in address and address.count(":") == 7 and not address.endswith(":")
        short = address.count("::") == 1 and ":::" not in address and address.count(":") <= 7
        lone = address.endswith(":") and not address.endswith("::")
        if (
            not (whole or short)
            or lone
            or address.startswith(("2001:db8:", "2001:0db8:", "3fff:", "2001:0:", "2002:"))
        ):
            continue
        yield found.span()


_IBAN = re.compile(r"[A-Z](?<![\w+/-][A-Z])[A-Z]\d\d(?: ?[A-Z0-9]){11,30}", re.ASCII)


def find_ibans(text: str, low: int, high: int) -> Iterator[tuple[int, int]]:
    """IBANs, in groups or in one, whose check digits are right."""
    for found in _IBAN.finditer(text, low, high):
        wanted = iban_length(found[0][:2])
        size = end = 0
        while size < wanted and end < len(found[0]):
            size += found[0][end] != " "
            end += 1
        following = text[found.start() + end : found.start() + end + 1]
        if size == wanted and not following.isalnum() and is_iban(found[0][:end].replace(" ", "")):
            yield found.start(), found.start() + end


_CARD = re.compile(
    r"\d(?<![\w.+/-]\d)(?<!\d \d)(?:\d{11,18}|\d{3}([ -])\d{4}\1\d{4}\1\d{4}(?:\1\d{3})?|\d{3}([ -])\d{6}\2\d{4,5})"
    r"(?![\w/-]|\.\d| \d)",
    re.ASCII,
)


def find_cards(text: str, low: int, high: int) -> Iterator[tuple[int, int]]:
    """Numbers of payment cards: an issuer's first digits, its length, Luhn's check digit."""
    for found in _CARD.finditer(text, low, high):
        if is_card(found[0].replace(" ", "").replace("-", "")):
            yield found.span()


# In the order of who wins where finds overlap: what is checked goes before what is guessed.
_DETECTORS: tuple[tuple[str, Hint, Detector], ...] = (
    ("secret", Hint.TOKEN, find_tokens),
    ("secret", Hint.AT, find_passwords),
    ("email", Hint.AT, find_emails),
    ("iban", Hint.DIGITS, find_ibans),
    ("card", Hint.DIGITS, find_cards),
    ("national_id", Hint.DIGITS, find_national_ids),
    ("ip", Hint.IPV4, find_ips),
    ("ip", Hint.IPV6, find_ipv6s),
    ("phone", Hint.DIGITS, find_phones),
)


def find(text: str) -> list[Span]:
    """All personal data and secrets of a text, in order, none inside another."""
    return _resolved(text, {hint: [(0, len(text))] for hint in Hint})


def find_all(texts: Sequence[str]) -> list[list[Span]]:
    """The same for many texts, looking only at lines in which something can stand."""
    return [_resolved(text, lines) for text, lines in zip(texts, hinted_lines(texts), strict=True)]


def _resolved(text: str, lines: dict[Hint, list[tuple[int, int]]]) -> list[Span]:
    keys = find_private_keys(text) if lines.get(Hint.PRIVATE_KEY) else ()
    taken = [Span(start, end, "secret") for start, end in keys]
    for what, hint, detector in _DETECTORS:
        for low, high in lines.get(hint, ()):
            for start, end in detector(text, low, high):
                if all(end <= other.start or start >= other.end for other in taken):
                    taken.append(Span(start, end, what))
    return sorted(taken)


def masked(text: str, spans: Iterable[Span], kinds: frozenset[str]) -> str:
    """The text with a placeholder for each span of these kinds: `<EMAIL_1>`, `<EMAIL_2>`, …

    The same value has the same placeholder throughout a document; nothing outside the document matters.
    """
    parts: list[str] = []
    numbers: dict[tuple[str, str], int] = {}
    counts: dict[str, int] = {}
    end = 0
    for span in spans:
        if span.what not in kinds:
            continue
        key = (span.what, _value(text[span.start : span.end], span.what))
        if key not in numbers:
            counts[span.what] = numbers[key] = counts.get(span.what, 0) + 1
        parts += text[end : span.start], f"<{span.what.upper()}_{numbers[key]}>"
        end = span.end
    return "".join([*parts, text[end:]])


def _value(found: str, what: str) -> str:
    """What two spellings of one value have in common."""
    if what == "secret":
        return found
    if what in ("email", "ip"):
        return found.casefold()
    return re.sub(r"\W", "", found).upper()
