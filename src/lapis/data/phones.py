"""Telephone numbers: which runs of digits are plausibly one.

A number with `+` and an assigned country code counts if the rest is as long as that country's numbers are. So does
a North American one that follows its numbering plan and is written as one, and a British one in its usual groups.
Any other national number counts after a word that announces it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from lapis.data.identifiers import before

# Country code, fewest and most digits after it (ITU E.164 plans); codes that are not here take 5 to 12.
_PLANS = """
1:10-10 7:10-10 20:8-10 27:9-9 30:10-10 31:9-9 32:8-9 33:9-9 34:9-9 36:8-9 39:6-11 40:9-9 41:9-9 43:6-13
44:9-10 45:8-8 46:7-10 47:8-8 48:9-9 49:6-12 51:8-9 52:10-10 53:6-8 54:10-11 55:10-11 56:9-9 57:10-10
58:10-10 60:8-10 61:9-9 62:7-12 63:8-10 64:8-10 65:8-8 66:8-9 81:9-10 82:8-10 84:9-10 86:10-11 90:10-10
91:10-10 92:9-10 93:9-9 94:9-9 95:7-10 98:10-10
"""
_LENGTHS = {
    code: (int(sizes[0]), int(sizes[-1])) for code, *sizes in map(re.compile("[:-]").split, _PLANS.split())
}
_CODES = """
211 212 213 216 218 220 221 222 223 224 225 226 227 228 229 230 231 232 233 234 235 236 237 238 239 240 241
242 243 244 245 246 247 248 249 250 251 252 253 254 255 256 257 258 260 261 262 263 264 265 266 267 268 269
290 291 297 298 299 350 351 352 353 354 355 356 357 358 359 370 371 372 373 374 375 376 377 378 380 381 382
383 385 386 387 389 420 421 423 500 501 502 503 504 505 506 507 508 509 590 591 592 593 594 595 596 597 598
599 670 672 673 674 675 676 677 678 679 680 681 682 683 685 686 687 688 689 690 691 692 800 808 850 852 853
855 856 870 880 881 882 883 886 888 960 961 962 963 964 965 966 967 968 970 971 972 973 974 975 976 977 979
992 993 994 995 996 998
"""
_THREE_DIGITS = frozenset(_CODES.split())

_EXTENSION = r"(?:,? ?(?:x|ext\.?|extension) ?\d{1,6})?"
_INTERNATIONAL = re.compile(
    r"\+(?<![\w+]\+)(?=\(?[1-9])[\d(](?:[\d()]|[ ./\-\u00a0\u2011](?![ ./-]{2})){6,22}\d"
    + _EXTENSION
    + r"(?!\w|[./]\w)"
)
_AMERICAN = re.compile(
    r"(?:\((?<![\w.+/-]\()[2-9]\d\d\)[ -]?[2-9]\d\d[ .-]\d{4}"
    r"|[2-9](?:(?<![\w.+/-][2-9])|(?<=[^\w.+/-]1[ .-][2-9]))\d\d([.-])[2-9]\d\d\1\d{4})"
    + _EXTENSION
    + r"(?![\w/-]|\.\w)"
)
_BRITISH = re.compile(r"0(?<![\w.+-]0)(?<!\d 0)\d{2,4}\)? \d{3,4} \d{3,4}(?![\w-]|\.\d| \d)")
_NATIONAL = re.compile(
    r"[(\d](?<![\w.+-][(\d])(?:[\d()]|[ ./\-\u00a0\u2011](?![ ./-])){5,19}\d" + _EXTENSION + r"(?!\w|\.\w)"
)
_CUE = re.compile(
    r"(?:(?<![\w/])(?:tel|phone|telephone|mobile|cell|cellphone|fax|telefax|sms|whatsapp|hotline|helpline|dial"
    r"|(?:call|ring|text|reach) (?:me|us|him|her|them)|telefon|telefonnummer|telefono|mobil|handy|tél|téléphone"
    r"|portable|teléfono|móvil|telefone|celular|tlf|tfn|puh|gsm|rufnummer|phone_?number)|_(?:tel|phone|mobile|fax)"
    r"|电话|手机|電話|전화|тел|телефон)[^\d\n/\\]{0,14}$",
    re.IGNORECASE,
)  # fmt: skip
# One of them is in all that _CUE finds.
_WORDS = """
tel phone mobil cell fax sms whatsapp hotline helpline dial call ring text reach handy tél portable móvil celular tlf
tfn puh gsm rufnummer 电话 手机 電話 전화 тел
"""
_CUE_WORDS = _WORDS.split()
_DIGITS = re.compile(r"\d")
_YEARS = re.compile(
    r"\d{4}[ ./-]\d{1,2}[ ./-]\d{1,2}$|\d{1,2}[ ./-]\d{1,2}[ ./-]\d{4}$|(?:19|20)\d\d ?- ?(?:19|20)\d\d$"
)


def find_phones(text: str, low: int, high: int) -> Iterator[tuple[int, int]]:
    """Where telephone numbers stand in a part of a text that ends at line ends; they may overlap."""
    for found in _INTERNATIONAL.finditer(text, low, high):
        if _balanced(found[0]) and is_international(_dialled(found[0])):
            yield found.span()
    for found in _AMERICAN.finditer(text, low, high):
        if is_american(_dialled(found[0])[-10:]):
            yield found.span()
    for found in _BRITISH.finditer(text, low, high):
        if 10 <= len(_dialled(found[0])) <= 11 and found[0].count(")") == (
            text[found.start() - 1 : found.start()] == "("
        ):
            yield found.start() - found[0].count(")"), found.end()
    line = text[low:high].lower()
    if not any(word in line for word in _CUE_WORDS):
        return
    for found in _NATIONAL.finditer(text, low, high):
        if _is_national(found[0]) and _CUE.search(before(text, found.start(), 40)):
            yield found.span()


def is_international(digits: str) -> bool:
    """Whether digits after `+` are an assigned country code and as many more as that country's numbers have."""
    if len(set(digits)) < 3:
        return False
    for size in (1, 2):
        if digits[:size] in _LENGTHS:
            fewest, most = _LENGTHS[digits[:size]]
            rest = len(digits) - size
            # the (0) of the national form is written into international ones: +44 (0)20 …
            return fewest <= rest <= most or (digits[size] == "0" and fewest <= rest - 1 <= most)
    return digits[:3] in _THREE_DIGITS and 5 <= len(digits) - 3 <= 12


def is_american(digits: str) -> bool:
    """Whether ten digits are a number of the North American plan, and not one that is reserved for fiction."""
    area, exchange, line = digits[:3], digits[3:6], digits[6:]
    if area[1:] == "11" or exchange[1:] == "11" or area[1] == "9":
        return False
    return not (exchange == "555" and line.startswith("01"))


def _is_national(number: str) -> bool:
    digits = _dialled(number)
    if digits.startswith("00"):
        return is_international(digits[2:])
    return 7 <= len(digits) <= 12 and len(set(digits)) > 2 and _balanced(number) and not _YEARS.match(number)


def _dialled(number: str) -> str:
    """The digits of a number without its extension."""
    before = re.split(r"[xe]", number, maxsplit=1)[0]
    return "".join(_DIGITS.findall(before))


def _balanced(number: str) -> bool:
    return number.count("(") == number.count(")") <= 1
