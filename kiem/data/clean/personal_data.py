"""Personal data in text: found by their form, proven by their check digits, and replaced.

A regular expression finds what looks like one, and a library decides: phonenumbers (Google's
libphonenumber) knows the numbering plans, python-stdnum the check digits and the lengths of account
numbers. docs/cleaning.md says what is not found.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec

from kiem.core.errors import not_installed

# No placeholder can be anyone's: example.com is reserved (RFC 2606), no Dutch number begins with
# 060, no account number has the check digits 00, and no one is given the number 0.
PLACEHOLDERS = {
    "email": "email@example.com",
    "iban": "NL00BANK0123456789",
    "bsn": "000000000",
    "phone": "06-00000000",
}
_REGIONS = ("NL", "BE")  # in which Dutch is spoken: whose numbers are known without a country code

# Each begins with a character that is rare in text, which makes the search several times as fast.
_DOMAIN = re.compile(r"@(?:[\w-]+\.)+[^\W\d_]{2,}(?![\w@])")
_LOCAL_PART = re.compile(r"\w[\w.+%&'’-]{0,63}\Z")
_EXAMPLE_DOMAIN = re.compile(r"@(?:.+\.)?(?:example(?:\.com|\.net|\.org)?|test|invalid)\Z", re.I)
_IBAN = re.compile(
    r"[0-9](?<=[A-Za-z]{2}.)(?<![A-Za-z0-9]...)[0-9](?:[ .\u00a0-]?[A-Za-z0-9]){11,30}"
)
_IBAN_END = re.compile(r"(?<=[A-Za-z0-9])(?![A-Za-z0-9])")
_BSN = re.compile(r"[0-9](?<!\w.)(?<![0-9][.,-].)(?:[ .]?[0-9]){8}(?!\w|[.,-][0-9])")
_LINE = re.compile(".+")
_BSN_WORD = re.compile(r"\bbsn\b|burgerservicen|\bsofi-?n", re.I)
# No number is in a decimal fraction, in a path, or a date with what follows it.
_PHONE = re.compile(
    r"(?:\+|0(?=0?[ .-]?[1-9]))(?<![\w+].)(?<![0-9][.,].)(?<![^\W0-9]/.)"
    r"(?![0-9]([-./])[0-9]{2}\1(?:[0-9]{4}|[0-9]{2})(?!\1?[0-9]))"
    r"\+?(?:[ \u00a0./()–-]{0,3}[0-9]){8,15}"
)
# A new word can follow at once: 050-1234567Fax.
_PHONE_END = re.compile(r"(?<=[0-9])(?![0-9a-z]|[A-Z](?![a-z-])|[.,][0-9])")
_COMPANY_NUMBER = re.compile(r"[01][0-9]{3}\.[0-9]{3}\.[0-9]{3}\Z")  # of Belgium

_Spans = Iterator[tuple[int, int]]


def require_libraries() -> None:
    """Raises a UserError if a library is missing."""
    if find_spec("phonenumbers") is None or find_spec("stdnum") is None:
        raise not_installed("phonenumberslite python-stdnum", "--replace-personal-data")


def replace_personal_data(text: str, kinds: Sequence[str]) -> tuple[str, list[int]]:
    """Replaces personal data by placeholders that are nobody's.

    Args:
        text: of a document.
        kinds: of PLACEHOLDERS.

    Returns:
        The text, the same object if nothing is found; and how many of each kind are replaced.
        Replacing again finds nothing.
    """
    counts = dict.fromkeys(kinds, 0)
    for kind, placeholder in PLACEHOLDERS.items():
        if kind not in counts:
            continue
        parts: list[str] = []
        end_before = 0
        for start, end in _FINDERS[kind](text):
            parts += (text[end_before:start], placeholder)
            end_before = end
            counts[kind] += 1
        if parts:
            text = "".join((*parts, text[end_before:]))
    return text, list(counts.values())


def _find_emails(text: str) -> _Spans:
    end = 0
    for domain in _DOMAIN.finditer(text):
        local_part = _LOCAL_PART.search(text[max(end, domain.start() - 64) : domain.start()])
        if local_part and not _EXAMPLE_DOMAIN.match(domain[0]):
            yield domain.start() - len(local_part[0]), domain.end()
            end = domain.end()


def _find_ibans(text: str) -> _Spans:
    place = 0
    while found := _IBAN.search(text, place):
        start = found.start() - 2  # with the letters of the country
        end = _longest(text, start, found.end(), _IBAN_END, _is_iban) if start >= place else 0
        if end:
            yield start, end
        place = end or found.start() + 1


def _find_bsns(text: str) -> _Spans:
    from stdnum.nl import bsn

    # One of eleven numbers passes the check, so the number has to be called so in its line.
    if not _BSN.search(text):
        return
    for line in _LINE.finditer(text):
        if _BSN_WORD.search(line[0]):
            for found in _BSN.finditer(text, *line.span()):
                if bsn.is_valid(re.sub("[ .]", "", found[0])):
                    yield found.span()


def _find_phones(text: str) -> _Spans:
    placeholder = PLACEHOLDERS["phone"]
    place = 0
    while found := _PHONE.search(text, place):
        start, end = found.span()
        if text.startswith(placeholder, start):
            place = start + len(placeholder)
            continue
        # Nothing goes on into a placeholder, so replacing again finds no more.
        before = text.find(placeholder, start, end + len(placeholder))
        end = _longest(text, start, end if before < 0 else before, _PHONE_END, _is_phone)
        if end:
            has_parentheses = text[start - 1 : start] == "(" and ")" in text[start:end]
            yield start - has_parentheses, end
        place = end or start + 1


def _longest(
    text: str, start: int, end: int, border: re.Pattern[str], is_valid: Callable[[str], bool]
) -> int:
    """Returns where the longest valid part from `start` ends, at a border up to `end`; 0: none."""
    for place in range(end, start, -1):
        if border.match(text, place) and is_valid(text[start:place]):
            return place
    return 0


def _is_iban(candidate: str) -> bool:
    from stdnum import iban

    # Without checks of single countries, whose lists of banks can be older than an account.
    return iban.is_valid(candidate.replace("\u00a0", " "), check_country=False)


def _is_phone(candidate: str) -> bool:
    """Says whether a number is one of a numbering plan, and not of a service such as 0800."""
    import phonenumbers as pn

    first, *others = re.findall("[0-9]+", candidate)
    num_digits = len(first) + sum(map(len, others))
    is_international = candidate.startswith(("+", "00"))
    if is_international:
        # An account or an item can have a number that begins with 00.
        is_possible = candidate[0] == "+" or others or first.startswith(("0031", "0032"))
    else:
        is_possible = 9 <= num_digits <= 10 and not _COMPANY_NUMBER.match(candidate)
    if not is_possible:
        return False
    services = (pn.PhoneNumberType.TOLL_FREE, pn.PhoneNumberType.PREMIUM_RATE)
    for region in _REGIONS[:1] if is_international else _REGIONS:
        try:
            number = pn.parse(candidate, region)
        except pn.NumberParseException:
            continue
        if not pn.is_valid_number(number) or pn.number_type(number) in services:
            continue
        # The area code is not divided: "02 03 04 05 06" are five numbers.
        if is_international or len(first) > pn.length_of_national_destination_code(number):
            return True
    return False


_FINDERS: dict[str, Callable[[str], _Spans]] = {
    "email": _find_emails,
    "iban": _find_ibans,
    "bsn": _find_bsns,
    "phone": _find_phones,
}
