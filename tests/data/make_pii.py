"""Makes tests/data/pii.jsonl: texts with personal data and secrets, labelled, and texts that only look like it.

    python tests/data/make_pii.py        in an environment with faker, phonenumbers and python-stdnum

What is to be found comes from those packages' own rules and from the descriptions of tokens, not from the patterns of
the detector. A line is a list of pieces: plain text, or [kind, value]. Values of secrets are lists of fragments, so that
no tool that scans repositories takes them for real ones; none of them ever was.
"""

from __future__ import annotations

import base64
import json
import random
import string
from collections.abc import Callable
from pathlib import Path

import phonenumbers
from faker import Faker
from stdnum import iban, luhn, verhoeff
from stdnum.br import cpf
from stdnum.de import idnr
from stdnum.es import dni
from stdnum.fr import nir
from stdnum.gb import nhs
from stdnum.kr import rrn
from stdnum.nl import bsn

Pieces = list[object]
chance = random.Random(20261129)
LOCALES = [
    "en_US",
    "en_GB",
    "de_DE",
    "fr_FR",
    "it_IT",
    "es_ES",
    "pl_PL",
    "sv_SE",
    "fi_FI",
    "no_NO",
    "pt_BR",
    "zh_CN",
    "ko_KR",
]
FAKERS = {locale: Faker(locale) for locale in LOCALES}
for number, fake in enumerate(FAKERS.values()):
    fake.seed_instance(number)

DOMAINS = [
    "gmail.com",
    "outlook.com",
    "yahoo.co.uk",
    "web.de",
    "gmx.net",
    "orange.fr",
    "libero.it",
    "mail.ru",
    "qq.com",
    "163.com",
    "naver.com",
    "uol.com.br",
    "wp.pl",
    "posteo.eu",
    "proton.me",
    "icloud.com",
    "cs.stanford.edu",
    "kernel.org",
    "inria.fr",
    "tum.de",
    "bbc.co.uk",
    "ox.ac.uk",
    "startup.io",
    "nordwind-logistik.de",
    "atelier-lumiere.fr",
    "k-b.dev",
    "mx.city.osaka.jp",
]
AROUND = {
    "email": (
        "Please write to {} before Friday.", "From: {name} <{}>\nSubject: Re: minutes", "mailto:{}", "Kontakt: {}, Büro 214",
        '{{"user": "{name}", "mail": "{}", "active": true}}', "{name} ({}) hat das Ticket geschlossen.", "# Author: {name} <{}>",
        "Signed-off-by: {name} <{}>", "联系人邮箱:{}", "Pour toute question : {}.", "login={};role=admin", "Reply to {}, not to the list.",
        "| {name} | {} | Sales |", '<a href="mailto:{}">{name}</a>', "email:{}",
    ),
    "phone": (
        "Call me on {} after six.", "Tel.: {}", "Telefon: {}", "phone={}", "Tél. : {}", "Fax {}", "Mobile: {} (evenings)",
        "{name}, {}, can open the gate.", "手机:{}", "Contact {name} at {}.", '{{"name": "{name}", "phone": "{}"}}', "WhatsApp {}",
        "Teléfono: {}", "tel:{}", "Hotline {}, Mo–Fr",
    ),
    "ipv4": (
        "Failed password for root from {} port 52110 ssh2", "The server at {} did not answer.", '{} - - [12/Mar/2024:10:11:12] "GET / HTTP/1.1" 200',
        "ping {}", "nameserver {}", "http://{}/admin/login.php", "host: {}\nport: 5432", "Received: from mx ([{}])", "ssh admin@{}",
        "Blocked {} (4 attempts)", "A record: {}", "client={}, bytes=4012", "remote_addr = '{}'",
    ),
    "ipv6": (
        "AAAA {}", "connection from [{}]:443", "inet6 {}/64 scope global", "The visitor {} was seen twice.", "client_ip={}", '{{"peer": "{}"}}',
    ),
    "iban": (
        "IBAN: {}", "Bitte überweisen Sie auf {} bis Montag.", "Please pay to account {}, thank you.", "bank_account = '{}'", "Virement : {}",
        "{name};{};EUR;120.00", '"iban": "{}"', "Kontonummer {}, BIC on request", "Conto corrente {}",
    ),
    "card": (
        "Card number: {}", "I paid with {} yesterday.", "Visa {} exp 04/27", "card={}&cvv=123", '{{"pan": "{}"}}', "Kreditkarte {}", "{name},{},12/26",
        "My card {} was charged twice!", "CC# {}",
    ),
}  # fmt: skip


def letters(alphabet: str, count: int) -> str:
    return "".join(chance.choice(alphabet) for _ in range(count))


def fill(template: str, kind: str, value: object) -> Pieces:
    name = chance.choice(list(FAKERS.values())).name()
    template = template.replace("{name}", name).replace("{{", "\0").replace("}}", "\1")
    before, after = template.split("{}")
    plain = lambda text: text.replace("\0", "{").replace("\1", "}")  # noqa: E731
    return [piece for piece in (plain(before), [kind, value], plain(after)) if piece]


def email() -> str:
    fake = FAKERS[chance.choice(["en_US", "de_DE", "fr_FR", "it_IT", "es_ES", "pl_PL", "sv_SE"])]
    user = chance.choice(
        [
            fake.user_name(),
            f"{fake.user_name()}.{chance.randrange(99)}",
            f"{fake.user_name()}+news",
            f"{fake.user_name()}_{fake.user_name()}",
            fake.user_name().upper(),
        ]
    )
    return f"{user}@{chance.choice(DOMAINS)}"


def phone() -> tuple[str, bool]:
    """A valid number of some region, and whether it is written nationally."""
    forms = phonenumbers.PhoneNumberFormat
    while True:
        region = chance.choice(
            [
                "US",
                "CA",
                "GB",
                "DE",
                "FR",
                "IT",
                "ES",
                "NL",
                "BE",
                "CH",
                "AT",
                "PL",
                "SE",
                "NO",
                "FI",
                "DK",
                "PT",
                "GR",
                "CZ",
                "HU",
                "IE",
                "IN",
                "CN",
                "JP",
                "KR",
                "AU",
                "NZ",
                "ZA",
                "BR",
                "MX",
                "AR",
                "NG",
                "KE",
                "EG",
                "TR",
                "IL",
                "SA",
                "AE",
                "SG",
                "MY",
                "TH",
                "VN",
                "ID",
                "PH",
                "PK",
                "BD",
                "UA",
                "RU",
            ]
        )
        example = phonenumbers.example_number_for_type(
            region,
            chance.choice([phonenumbers.PhoneNumberType.MOBILE, phonenumbers.PhoneNumberType.FIXED_LINE]),
        )
        digits = str(example.national_number)
        keep = chance.randrange(3, 5)
        digits = digits[:keep] + "".join(chance.choice(string.digits) for _ in digits[keep:])
        number = phonenumbers.PhoneNumber(
            country_code=example.country_code,
            national_number=int(digits),
            italian_leading_zero=example.italian_leading_zero,
        )
        if phonenumbers.is_valid_number(number):
            form = chance.choice([forms.INTERNATIONAL] * 3 + [forms.E164] * 2 + [forms.NATIONAL])
            return phonenumbers.format_number(number, form), form == forms.NATIONAL


def ipv4() -> str:
    import ipaddress

    while True:
        found = ipaddress.IPv4Address(chance.randrange(1 << 32))
        if found.is_global and not found.is_multicast:
            return str(found)


def ipv6() -> str:
    import ipaddress

    prefix = chance.choice([0x20014860, 0x2A001450, 0x26064700, 0x24008901, 0x2A01_04F8, 0x2804_0014]) << 96
    low = chance.choice([chance.getrandbits(64), chance.getrandbits(16), chance.getrandbits(96)])
    found = ipaddress.IPv6Address(prefix | low)
    return chance.choice([found.compressed, found.compressed, found.exploded, found.compressed.upper()])


def bank_account() -> str:
    """A country's number of digits, after its bank's letters, with the check digits that ISO 13616 asks for."""
    forms = "DE 0 18,GB 4 14,FR 0 23,NL 4 10,ES 0 20,BE 0 12,CH 0 17,IT 1 22,PL 0 24,AT 0 16,SE 0 20,NO 0 11,FI 0 14,MT 4 23,LU 0 16"
    country, bank, rest = chance.choice(forms.split(",")).split()
    body = letters(string.ascii_uppercase, int(bank)) + letters(string.digits, int(rest))
    checks = 98 - int("".join(str(int(char, 36)) for char in body + country + "00")) % 97
    compact = f"{country}{checks:02}{body}"
    assert iban.is_valid(compact, check_country=False)
    return chance.choice([compact, " ".join(compact[n : n + 4] for n in range(0, len(compact), 4))])


def card() -> str:
    fake = FAKERS["en_US"]
    number = fake.credit_card_number(
        chance.choice(["visa16", "mastercard", "amex", "discover", "jcb16", "visa16", "mastercard"])
    )
    while number.startswith("35") and not 3528 <= int(number[:4]) <= 3589:  # JCB has a part of 35 only
        number = fake.credit_card_number("jcb16")
    assert luhn.is_valid(number)
    if chance.random() < 0.5:
        return number
    mark = chance.choice([" ", " ", "-"])
    cuts = [4, 10] if len(number) == 15 else [4, 8, 12]
    return mark.join(number[low:high] for low, high in zip([0, *cuts], [*cuts, None], strict=True))


def national_id() -> tuple[str, str]:
    """A number and a text for it."""
    digits = lambda count: "".join(chance.choice(string.digits) for _ in range(count))  # noqa: E731
    kind = chance.choice(
        ["us", "es", "it", "fr", "pl", "se", "fi", "no", "br", "cn", "kr", "nl", "de", "gb", "in"]
    )
    if kind == "us":
        area, group, serial = FAKERS["en_US"].ssn().split("-")
        return f"{area}-{group}-{serial}", chance.choice(
            ["SSN: {}", "Her social security number is {}.", "{name},{},1984-02-11"]
        )
    if kind == "es":
        number = digits(8)
        return number + dni.calc_check_digit(number), chance.choice(
            ["DNI {}", "con documento {} y domicilio en Sevilla", "dni={}"]
        )
    if kind == "fr":
        number = (
            chance.choice("12")
            + f"{chance.randrange(40, 99)}{chance.randrange(1, 13):02}{chance.randrange(1, 96):02}{digits(6)}"
        )
        number += nir.calc_check_digits(number + "00") if len(number) == 13 else ""
        return chance.choice([number, nir.format(number)]), chance.choice(
            ["Numéro de sécurité sociale : {}", "NIR {}", "assuré {} depuis 2011"]
        )
    if kind == "nl":
        while not bsn.is_valid(number := digits(9)):
            pass
        return number, chance.choice(["BSN: {}", "burgerservicenummer {}"])
    if kind == "de":
        while True:
            body = [*chance.sample(string.digits, 9)]
            body.insert(chance.randrange(9), body[0])
            number = "".join(body)
            for check in string.digits:
                if number[0] != "0" and idnr.is_valid(number + check):
                    return chance.choice([number + check, idnr.format(number + check)]), chance.choice(
                        ["Steuer-ID: {}", "Identifikationsnummer {}", "IdNr. {}"]
                    )
    if kind == "gb":
        while not nhs.is_valid(number := digits(10)):
            pass
        return chance.choice([number, nhs.format(number)]), "NHS number {}"
    if kind == "br":
        while not cpf.is_valid(number := digits(11)):
            pass
        return chance.choice([cpf.format(number), number]), chance.choice(["CPF: {}", "CPF nº {}"])
    if kind == "kr":
        while not rrn.is_valid(
            number
            := f"{chance.randrange(40, 99)}{chance.randrange(1, 13):02}{digits(2)}{chance.choice('12')}{digits(6)}"
        ):
            pass
        return rrn.format(number), chance.choice(["주민등록번호 {}", "resident registration number {}"])
    if kind == "in":
        body = chance.choice("23456789") + digits(10)
        number = body + verhoeff.calc_check_digit(body)
        return f"{number[:4]} {number[4:8]} {number[8:]}", chance.choice(["Aadhaar {}", "aadhaar number: {}"])
    locale, texts = {
        "it": ("it_IT", ["Codice fiscale {}", "CF: {}", "nato a Bari, {}, residente"]),
        "pl": ("pl_PL", ["PESEL: {}", "pesel {}"]),
        "se": ("sv_SE", ["Personnummer {}", "född, {}, bosatt i Lund"]),
        "fi": ("fi_FI", ["Henkilötunnus: {}", "asiakas {} soitti"]),
        "no": ("no_NO", ["Fødselsnummer {}", "pasient {} innlagt"]),
        "cn": ("zh_CN", ["身份证号:{}", "居民身份证 {}", "id_card={}"]),
    }[kind]  # fmt: skip
    return FAKERS[locale].ssn(), chance.choice(texts)


ALNUM = string.ascii_letters + string.digits
B64 = ALNUM + "+/"
URL64 = ALNUM + "-_"
HEX = "0123456789abcdef"


def packed(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


def private_key(kind: str, lines: int, newline: str = "\n") -> list[str]:
    body = newline.join(letters(B64, 64) for _ in range(lines)) + newline + letters(B64, 30) + "=="
    return [
        "-----BEGIN ",
        f"{kind}PRIVATE ",
        f"KEY-----{newline}{body}{newline}-----END {kind}",
        "PRIVATE KEY-----",
    ]


def secrets() -> list[Pieces]:
    one: list[Callable[[], tuple[list[str], str]]] = [
        lambda: (["AK", "IA", letters(string.ascii_uppercase + "234567", 16)], chance.choice(["aws_access_key_id = {}", "export AWS_ACCESS_KEY_ID={}", "The key {} is still active."])),
        lambda: ([letters(B64, 20), letters(B64, 20)], chance.choice(["aws_secret_access_key = '{}'", 'AWS_SECRET_ACCESS_KEY="{}"', "secretAccessKey: '{}',"])),
        lambda: ([chance.choice(["gh", "gh"]), chance.choice("pousr") + "_", letters(ALNUM, 36)], chance.choice(["git clone https://x:{}@github.com/acme/app.git", 'token = "{}"', "Authorization: token {}", "GITHUB_TOKEN={}"])),
        lambda: (["glp", "at-", letters(URL64, 20)], chance.choice(["PRIVATE-TOKEN: {}", "CI_TOKEN={}"])),
        lambda: (["xo", "xb-", f"{chance.randrange(10**11, 10**12)}-{chance.randrange(10**12, 10**13)}-", letters(ALNUM, 24)], chance.choice(["slack: {}", 'client = WebClient("{}")'])),
        lambda: (["sk_", "live_", letters(ALNUM, 24)], chance.choice(['stripe.api_key = "{}"', "STRIPE={}"])),
        lambda: (["AI", "za", letters(URL64, 35)], chance.choice(["https://maps.googleapis.com/maps/api/js?key={}", 'apiKey: "{}"'])),
        lambda: (["np", "m_", letters(ALNUM, 36)], "//packages.example.com/:_authToken={}"),
        lambda: (["h", "f_", letters(string.ascii_letters, 34)], 'login(token="{}")'),
        lambda: (["sk-", "proj-", letters(URL64, 74)], chance.choice(["OPENAI_API_KEY={}", 'client = OpenAI(api_key="{}")'])),
        lambda: (["sk-", "ant-", "api03-", letters(URL64, 93), "AA"], "ANTHROPIC_API_KEY={}"),
        lambda: (["S", "G.", letters(URL64, 22), ".", letters(URL64, 43)], "SENDGRID_API_KEY={}"),
        lambda: ([packed({"alg": chance.choice(["HS256", "RS256"]), "typ": "JWT"}), ".", packed({"sub": str(chance.randrange(10**9)), "iat": 1_700_000_000}), ".", letters(URL64, 43)], chance.choice(["Authorization: Bearer {}", "jwt={}", "curl -H 'X-Token: {}'"])),
        lambda: ([letters(B64, 40), letters(B64, 46), "=="], "DefaultEndpointsProtocol=https;AccountName=acme;AccountKey={};EndpointSuffix=core.windows.net"),
        lambda: ([str(chance.randrange(10**9, 10**10)), ":A", "A", letters(URL64, 33)], 'bot = Bot("{}")'),
        lambda: ([letters(ALNUM, chance.randrange(18, 40))], chance.choice(['password = "{}"', "DB_PASSWORD={}", '"client_secret": "{}",', "api_key: '{}'", "const authToken = '{}';", "access_token => '{}'", 'SECRET_KEY = "{}"', 'encryption_key := "{}"'])),
        lambda: ([letters(HEX, chance.choice([32, 40, 64]))], chance.choice(['API_KEY = "{}"', "auth_token: '{}'", '"apiSecret": "{}"', "session_secret={}"])),
        lambda: ([letters(ALNUM + "!%^*", chance.randrange(9, 16))], chance.choice(["postgres://app:{}@db.acme.de:5432/app", "mongodb+srv://admin:{}@cluster0.acme.net/prod", "redis://default:{}@cache.acme.io:6379"])),
        lambda: (private_key(chance.choice(["RSA ", "EC ", "OPENSSH ", ""]), chance.randrange(3, 12)), chance.choice(["{}\n", "key.pem:\n{}\nend of file"])),
        lambda: (private_key("", 4, "\\n"), '"private_key": "{}\\n",'),
        lambda: (["do", "p_v1_", letters(HEX, 64)], "doctl auth init -t {}"),
        lambda: (["shp", "at_", letters(HEX, 32)], "X-Shopify-Access-Token: {}"),
    ]  # fmt: skip
    rows = []
    for _ in range(7):
        for make in one:
            value, template = make()
            before, after = template.split("{}")
            rows.append([piece for piece in (before, ["secret", value], after) if piece])
    return rows


def lookalikes() -> list[str]:
    """Texts with nothing to find in them."""
    digits = lambda count: "".join(chance.choice(string.digits) for _ in range(count))  # noqa: E731
    texts = """
Write to someone@example.com or admin@example.org.|git clone git@github.com:acme/tool.git|The icon lives in logo@2x.png and logo@3x.png.
npm install left-pad@1.3.0 @types/node@18.0.0|scores = q@k.transpose(-2, -1)|out = x@w.T + b|@app.route("/users/<id>")|root@localhost:~# ls
ssh user@host|user@server.local wrote this|docker pull ghcr.io/acme/app@sha256:9f86d081884c7d659a2feaa0c55ad015|Follow @jane.doe on the site.
a@b@c is not an address|SELECT @row := @row + 1|mail to user@test.invalid|foo@bar.notatld|assert p@q.shape == (3, 4)
Chrome/120.0.6099.109 Safari/537.36|version 1.2.3.4 fixes it|Upgrade to v10.14.2.1 now|requires foo>=4.17.21.3|pip install tool==2.31.0.6
See section 4.3.2.1 for details.|4.2.1.7 Overview of the parser|OID 1.3.6.1.4.1.311.21|127.0.0.1 localhost|0.0.0.0/0|10.0.0.12 is internal
The gateway is 192.168.178.1.|netmask 255.255.255.0|192.0.2.44 is for documentation, as are 198.51.100.7 and 203.0.113.9.|multicast 239.255.255.250
172.16.254.3 answers|100.64.0.1 (CGNAT)|169.254.1.1|use 8.8.8.8 or 1.1.1.1 as resolver|Kapitel 12.4.3.2 erklärt es|release 21.0.3.9
2001:db8::1 and 2001:db8:85a3::8a2e:370:7334|fe80::1%eth0|::1|fd00:1234::1|std::vector<int>|it took 12:34:56|20:15:30 until 22:45:10|a::b::c
00:1A:2B:3C:4D:5E|2023:11:15 10:22:33|ratio 2048:1024:512|sha1 2fd4e1c67a2d28fced849ee1bb76e7391b93eb12|ff02::2
ISBN 978-3-16-148410-0|ISBN-10 0-306-40615-2|ISBN 9780306406157|ISSN 2049-3630|EAN 4006381333931|DOI 10.1000/182|arXiv:2112.11446
Order no. 2023111500417|ticket #4412345678|invoice 0049-2231-7719|part 212-5550-12|SKU 415-55-26711|RFC 2822, RFC 5321|port 49152-65535
timestamp 1699999999|1699999999123 ms|2023-11-15T10:00:00+02:00|20231115T100000Z|12.11.2023 bis 15.12.2023|1914-1918 and 1939-1945|pages 1234-1250
0x7fffffffe4b0|0xdeadbeef12345678|3.14159265358979323846|6.02214076e23|1,234,567,890|123 456 789 inhabitants|lat 52.5200066, lon 13.404954
+40.6894-074.0447/|x = +1234567|diff: +12 -34|-273.15|555-0123 is fictional, so is (212) 555-0199|call 911|0800|dial 112|1 000 000 000
01 02 03 04 05 06 07 08|00 11 22 33 44 55 66 77 88 99 aa bb|12-34-56|99-99-9999|000-12-3456|123-45-6789 is an example|666-12-3456|987-65-4321
DE00 0000 0000 0000 0000 00|GB99 WEST 1234 5698 7654 31|DE12345678901234567890|FR2023 11 15|AB12 3456 7890 1234|NO1234567890
4111 1111 1111 1111 is a test number|4242424242424242|1234 5678 9012 3456|0000 0000 0000 0000|4539 1488 0343 6468|9999999999999999
tracking 9400 1000 0000 0000 0000 00|5105105105105100 in the manual|0.4539148803436467|7992739871|378282246310005 never works
6ba7b810-9dad-11d1-80b4-00c04fd430c8|sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08|d41d8cd98f00b204e9800998ecf8427e
integrity="sha512-z4PhNX7vuL3xVChQ1m2AB9Yg5AULVxXcg/SpIdNs6c5H0NE8XYXysP+DVBuFnWy8Nb7L"|ETag: "33a64df551425fcc55e4d42a148795d9f25f89d4"
password = "changeme"|password: ${DB_PASSWORD}|api_key = os.environ["API_KEY"]|token = get_token(user)|secret: <your-secret-here>
API_KEY=xxxxxxxxxxxxxxxxxxxxxxxx|password = "correct horse battery staple"|token_type: "urn:ietf:params:oauth:token-type:jwt"|auth_key = config.auth.key_name
password_hash = "5f4dcc3b5aa765d61d8327deb882cf99"|token: "placeholder-token-1234567890"|const TOKEN_ENDPOINT = "/oauth2/v1/token/introspect"
secret_name = "projects/acme/secrets/db"|access_key: "YOUR_ACCESS_KEY_1234567"|pass = sum(1 for x in xs if x > 12345678901234)|tokens = 1234567890123456
public_key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJx7e0VbR6uJ2mJm"|-----BEGIN PUBLIC KEY-----|-----BEGIN CERTIFICATE-----|eyJ is how they begin
A file begins with -----BEGIN PRIVATE KEY----- and ends with -----END PRIVATE KEY-----.|csrf_token_field_name = "csrfmiddlewaretoken"
https://user:password@example.com|ftp://anonymous:@ftp.example.org|http://localhost:8080/a:b@c|keyboard = "qwertyuiopasdfghjklzxcvbnm"
primary_key = "customer_order_2024_history"|cache_key = f"user:{user_id}:profile:v2024"|sort_key: "created_at_2024_desc"|foreign_key="orders_2024.customer_id"
""".strip().replace("\n", "|").split("|")  # fmt: skip
    rows = [text.strip() for text in texts]
    for _ in range(12):
        rows += [
            f"commit {letters(HEX, 40)}", f"order {digits(10)} shipped", f"revision {digits(4)}.{digits(2)}.{digits(1)}.{digits(3)}",
            f"id={digits(12)}", f"size {digits(3)},{digits(3)},{digits(3)} bytes", f"uuid {letters(HEX, 8)}-{letters(HEX, 4)}-4{letters(HEX, 3)}-a{letters(HEX, 3)}-{letters(HEX, 12)}",
            f"| {digits(4)} | {digits(4)} | {digits(4)} | {digits(4)} |", f"md5 {letters(HEX, 32)}  file.tar.gz", f"row {digits(6)}-{digits(2)}: {digits(3)}.{digits(6)}",
            f"asset-{letters(HEX, 20)}.js", f"build 20{digits(2)}.{digits(1)}.{digits(2)}.{digits(4)}", f"{digits(2)}:{digits(2)}:{digits(2)}.{digits(6)} INFO started",
        ]  # fmt: skip
    return rows


def main() -> None:
    rows: list[Pieces] = []
    for kind, make in (
        ("email", email),
        ("ipv4", ipv4),
        ("ipv6", ipv6),
        ("iban", bank_account),
        ("card", card),
    ):
        rows += [fill(chance.choice(AROUND[kind]), kind, make()) for _ in range(80)]
    for _ in range(140):
        number, national = phone()
        cued = [text for text in AROUND["phone"] if not text.startswith(("{name},", "Contact", "Call"))]
        rows.append(fill(chance.choice(cued if national else list(AROUND["phone"])), "phone", number))
    for _ in range(140):
        number, text = national_id()
        rows.append(fill(text, "national_id", number))
    rows += secrets()
    rows += [[text] for text in lookalikes()]
    chance.shuffle(rows)
    place = Path(__file__).with_name("pii.jsonl")
    place.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
