"""Numbers that can be checked: payment cards, IBANs and national identity numbers, by their own arithmetic.

A number whose check is strong (two check digits, letters, a date) counts wherever it stands. One with a single
check digit, which a tenth of all numbers pass, counts after a word that names it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import NamedTuple

# First digits of the issuers' cards, and how many digits their cards have.
_ISSUERS = (
    (re.compile(r"4"), {16, 19}),  # Visa; cards of 13 digits are not issued any more
    (re.compile(r"5[1-5]|222[1-9]|22[3-9]|2[3-6]|27[01]|2720"), {16}),  # Mastercard
    (re.compile(r"3[47]"), {15}),  # American Express
    (re.compile(r"6011|64[4-9]|65"), {16, 17, 18, 19}),  # Discover
    (re.compile(r"30[0-5]|36|38|39"), {14}),  # Diners Club
    (re.compile(r"35(?:2[89]|[3-8])"), {16, 17, 18, 19}),  # JCB
    (re.compile(r"62|81"), {16, 17, 18, 19}),  # UnionPay
    (re.compile(r"50(?:18|20|38)|5893|6304|6759|676[1-3]"), {12, 13, 14, 15, 16, 17, 18, 19}),  # Maestro
    (re.compile(r"220[0-4]"), {16}),  # Mir
)
# that payment services print in their manuals
_PUBLISHED = """
4111111111111111 4242424242424242 4012888888881881 4000056655665556 5555555555554444 5105105105105100
2223003122003222 378282246310005 371449635398431 6011111111111117 6011000990139424 30569309025904
38520000023237 3530111333300000 3566002020360505 6200000000000005
"""
_TEST_CARDS = frozenset(_PUBLISHED.split())

_LENGTHS = """
AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BI27 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DJ27 DK18 DO28 EE20
EG29 ES24 FI18 FK18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30 KW30
KZ20 LB28 LC32 LI21 LT20 LU20 LV21 LY25 MC27 MD24 ME22 MK19 MN20 MR27 MT31 MU30 NI28 NL18 NO15 OM23 PK24
PL28 PS29 PT25 QA29 RO24 RS22 RU33 SA24 SC31 SD18 SE24 SI19 SK24 SM27 SO23 ST25 SV28 TL23 TN24 TR26 UA29
VA22 VG24 XK20 YE30
"""
_IBAN_LENGTHS = {word[:2]: int(word[2:]) for word in _LENGTHS.split()}


def luhn(digits: str) -> bool:
    """Whether the last digit is the Luhn check digit of those before it."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + place % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def is_card(digits: str) -> bool:
    """Whether the digits are a payment card of a known issuer, and none of the published test cards."""
    if digits in _TEST_CARDS or len(set(digits)) < 3 or not luhn(digits):
        return False
    return any(first.match(digits) and len(digits) in lengths for first, lengths in _ISSUERS)


def is_iban(compact: str) -> bool:
    """Whether letters and digits without spaces are an IBAN: its country's length, and modulo 97."""
    if _IBAN_LENGTHS.get(compact[:2]) != len(compact):
        return False
    return int("".join(str(int(char, 36)) for char in compact[4:] + compact[:4])) % 97 == 1


def iban_length(country: str) -> int:
    """How many letters and digits an IBAN of a country has; 0 if the country has none."""
    return _IBAN_LENGTHS.get(country, 0)


class NationalId(NamedTuple):
    """How the identity numbers of one country look and are checked, and the words that name them."""

    country: str
    pattern: re.Pattern[str]
    check: Callable[[str], bool]  # of the number without separators
    leading: frozenset[int]  # how many digits it can begin with
    cue: re.Pattern[str] | None = None  # must stand before it, where the number alone says too little


def _date(year: int, month: int, day: int) -> bool:
    days = (
        31,
        29 if year % 4 == 0 and (year % 100 or year % 400 == 0) else 28,
        31,
        30,
        31,
        30,
        31,
        31,
        30,
        31,
        30,
        31,
    )
    return 1 <= month <= 12 and 1 <= day <= days[month - 1]


def _weighted(digits: str, weights: tuple[int, ...]) -> int:
    return sum(int(digit) * weight for digit, weight in zip(digits, weights, strict=False))


def _ssn(n: str) -> bool:
    published = {"078051120", "219099999", "123456789", "987654321"}
    return (
        n[:3] not in ("000", "666")
        and n[0] != "9"
        and n[3:5] != "00"
        and n[5:] != "0000"
        and n not in published
    )


_DNI_LETTERS = "TRWAGMYFPDXBNJZSQVHLCKE"


def _spanish(n: str) -> bool:
    number = str("XYZ".index(n[0])) + n[1:-1] if n[0] in "XYZ" else n[:-1]
    return _DNI_LETTERS[int(number) % 23] == n[-1]


_ODD_PLACES = dict(
    zip(
        "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ",
        (1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 2, 4, 18, 20, 11, 3, 6, 8, 12, 14, 16,
         10, 22, 25, 24, 23),
        strict=True,
    )
)  # fmt: skip


def _italian(n: str) -> bool:
    even = sum(int(char) if char.isdigit() else ord(char) - 65 for char in n[1:15:2])
    return chr(65 + (even + sum(_ODD_PLACES[char] for char in n[0:15:2])) % 26) == n[15]


def _french(n: str) -> bool:
    return int(n[13:]) == 97 - int(n[:13]) % 97


def _belgian(n: str) -> bool:
    if not _date(2000 + int(n[:2]), int(n[2:4]), int(n[4:6])):
        return False
    return any(97 - int(century + n[:9]) % 97 == int(n[9:]) for century in ("", "2"))


def _polish(n: str) -> bool:
    if not _date(2000 + int(n[:2]), int(n[2:4]) % 20, int(n[4:6])):
        return False
    return _weighted(n, (1, 3, 7, 9, 1, 3, 7, 9, 1, 3, 1)) % 10 == 0


def _swedish(n: str) -> bool:
    n = n[-10:]
    day = int(n[4:6])
    return _date(2000 + int(n[:2]), int(n[2:4]), day - 60 if day > 60 else day) and luhn(n)


def _finnish(n: str) -> bool:
    n = n[:6] + n[-4:]  # the sign of the century is a letter since 2000
    if not _date(2000 + int(n[4:6]), int(n[2:4]), int(n[:2])):
        return False
    return "0123456789ABCDEFHJKLMNPRSTUVWXY"[int(n[:6] + n[6:9]) % 31] == n[9]


def _norwegian(n: str) -> bool:
    day = int(n[:2])
    if not _date(2000 + int(n[4:6]), int(n[2:4]), day - 40 if day > 40 else day):
        return False
    first = _weighted(n, (3, 7, 6, 1, 8, 9, 4, 5, 2, 1)) % 11 == 0
    return first and _weighted(n, (5, 4, 3, 2, 7, 6, 5, 4, 3, 2, 1)) % 11 == 0


def _brazilian(n: str) -> bool:
    if len(set(n)) == 1:
        return False
    for size in (9, 10):
        rest = _weighted(n, tuple(range(size + 1, 1, -1))) * 10 % 11 % 10
        if rest != int(n[size]):
            return False
    return True


def _chinese(n: str) -> bool:
    if not ("1900" <= n[6:10] <= "2100" and _date(int(n[6:10]), int(n[10:12]), int(n[12:14]))):
        return False
    return (
        "10X98765432"[_weighted(n[:17], (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)) % 11]
        == n[17].upper()
    )


def _korean(n: str) -> bool:
    if not _date(2000 + int(n[:2]), int(n[2:4]), int(n[4:6])):
        return False
    return (11 - _weighted(n, (2, 3, 4, 5, 6, 7, 8, 9, 2, 3, 4, 5)) % 11) % 10 == int(n[12])


def _dutch(n: str) -> bool:
    return int(n) > 0 and _weighted(n, (9, 8, 7, 6, 5, 4, 3, 2, -1)) % 11 == 0


def _german(n: str) -> bool:
    counts = sorted(n[:10].count(digit) for digit in set(n[:10]))
    if n[0] == "0" or counts[-1] > 3 or sum(count > 1 for count in counts) != 1:
        return False
    product = 10
    for digit in n[:10]:
        product = ((int(digit) + product) % 10 or 10) * 2 % 11
    return (11 - product) % 10 == int(n[10])


def _british(n: str) -> bool:
    rest = 11 - _weighted(n[:9], tuple(range(10, 1, -1))) % 11
    return rest != 10 and rest % 11 == int(n[9])


_VERHOEFF = (
    "0123456789",
    "1576283094",
    "5803796142",
    "8916043527",
    "9453126870",
    "4286573901",
    "2793806415",
    "7046913258",
)
_DIHEDRAL = (
    "0123456789", "1234067895", "2340178956", "3401289567", "4012395678",
    "5987604321", "6598710432", "7659821043", "8765932104", "9876543210",
)  # fmt: skip


def _indian(n: str) -> bool:
    check = 0
    for permutation, digit in zip(cycle(_VERHOEFF), reversed(n), strict=False):
        check = int(_DIHEDRAL[check][int(permutation[int(digit)])])
    return check == 0


def _form(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![\w.+-])(?:{pattern})(?![\w-]|\.\d)", re.ASCII)


def _named(words: str) -> re.Pattern[str]:
    return re.compile(rf"(?:\b|_)(?:{words})(?:\b|_)", re.IGNORECASE)


def _leading(*counts: int) -> frozenset[int]:
    return frozenset(counts)


NATIONAL_IDS = (
    NationalId("us", _form(r"\d{3}-\d{2}-\d{4}"), _ssn, _leading(3)),
    NationalId("es", _form(r"(?:\d{8}|[XYZ]-?\d{7})-?[A-HJ-NP-TV-Z]"), _spanish, _leading(8, 0)),
    NationalId("it", _form(r"[A-Z]{6}\d\d[A-EHLMPRST]\d\d[A-Z]\d{3}[A-Z]"), _italian, _leading(0)),
    NationalId(
        "fr", _form(r"[12] ?\d\d ?(?:0[1-9]|1[0-2]|[2-4]\d) ?\d\d ?\d{3} ?\d{3} ?\d\d"), _french,
        _leading(1, 3, 5, 7, 10, 13, 15),
    ),
    NationalId("be", _form(r"\d\d\.\d\d\.\d\d-\d{3}\.\d\d"), _belgian, _leading(2)),
    NationalId("se", _form(r"(?:19|20)?\d{6}[-+]\d{4}"), _swedish, _leading(6, 8)),
    NationalId("fi", _form(r"\d{6}[-+A]\d{3}[0-9A-FHJ-NPR-Y]"), _finnish, _leading(6)),
    NationalId("no", _form(r"\d{6} ?\d{5}"), _norwegian, _leading(6, 11)),
    NationalId("br", _form(r"\d{3}\.\d{3}\.\d{3}-\d\d"), _brazilian, _leading(3)),
    NationalId("cn", _form(r"[1-8]\d{16}[\dXx]"), _chinese, _leading(17, 18)),
    NationalId("kr", _form(r"\d{6}-[1-4]\d{6}"), _korean, _leading(6)),
    NationalId("pl", _form(r"\d{11}"), _polish, _leading(11), _named("pesel")),
    NationalId("br", _form(r"\d{11}"), _brazilian, _leading(11), _named("cpf")),
    NationalId(
        "nl", _form(r"\d{9}|\d{4}[. ]\d\d[. ]\d{3}"), _dutch, _leading(9, 4),
        _named("bsn|burgerservicenummer|sofi-?nummer"),
    ),
    NationalId(
        "de", _form(r"\d{11}|\d\d \d{3} \d{3} \d{3}"), _german, _leading(11, 2),
        _named(r"steuer-?(?:id|identifikationsnummer)|id-?nr\.?|identifikationsnummer|tax id"),
    ),
    NationalId("gb", _form(r"\d{10}|\d{3}[ -]\d{3}[ -]\d{4}"), _british, _leading(10, 3), _named("nhs")),
    NationalId(
        "in", _form(r"[2-9]\d{11}|[2-9]\d{3}[ -]\d{4}[ -]\d{4}"), _indian, _leading(12, 4),
        _named("aadha+r|uidai?|आधार"),
    ),
    NationalId(
        "ca", _form(r"\d{9}|\d{3}[ -]\d{3}[ -]\d{3}"), luhn, _leading(9, 3),
        _named("sin|nas|social insurance(?: number)?"),
    ),
)  # fmt: skip

_BY_LEADING = {
    count: tuple(form for form in NATIONAL_IDS if count in form.leading)
    for count in frozenset().union(*(form.leading for form in NATIONAL_IDS))
}
_BEGIN = re.compile(
    r"[\dA-Z](?<![\w.+-][\dA-Z])(?:(?<=\d)(\d*)|(?<=[XYZ])(?=-?\d{7})|[A-Z]{5}(?=\d\d[A-Z]))", re.ASCII
)


def find_national_ids(text: str, low: int, high: int) -> Iterator[tuple[int, int]]:
    """Where national identity numbers whose check digits are right stand in a part of a text."""
    for begin in _BEGIN.finditer(text, low, high):
        for form in _BY_LEADING.get(0 if begin[1] is None else 1 + len(begin[1]), ()):
            found = form.pattern.match(text, begin.start(), high)
            if found is None or not form.check(re.sub(r"[ .+-]", "", found[0])):
                continue
            if form.cue is None or form.cue.search(before(text, found.start(), 60)):
                yield found.span()


def before(text: str, place: int, size: int) -> str:
    """Up to `size` characters that stand before a place in its line."""
    return text[max(0, place - size) : place].rpartition("\n")[2]
