"""Personal data: what is found, what only looks like it, and what becomes of it from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import run_script
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console
from stdnum import iban
from stdnum.nl import bsn

from kiem.config import PreprocessOptions
from kiem.core.errors import ExitCode, UserError
from kiem.data.chunks import open_split, read_manifest, read_tokenizer
from kiem.data.clean.personal_data import PLACEHOLDERS, replace_personal_data
from kiem.data.prepare.preprocess import preprocess
from kiem.data.prepare.verify import verify_directory
from kiem.look.survey import survey

QUIET = Console(quiet=True)
KINDS = tuple(PLACEHOLDERS)

# In each text the part between braces is replaced. No number is known to be anyone's: they are
# examples of standards, of banks and of ministries, or made up.
FOUND = {
    "email": [
        "Mail naar {jan.de-boer+nieuws@mail.bedrijf.nl}.",
        "Schrijf <{J_Jansen@Voorbeeld.NL}> of 'mailto:{a@b.museum}'",
        "{renée@café.fr}, {info@gemeente.amsterdam};{x@y.nl}",
        "op {example@voorbeeld.com} of {jan@example.nl}",
    ],
    "iban": [
        "IBAN: {NL91ABNA0417164300}.",
        "op {NL91 ABNA 0417 1643 00} ten name van",
        "op {nl91.abna.0417.1643.00} TEN NAME VAN",
        "op {BE68\u00a05390\u00a00754\u00a07034} of {GB82-WEST-1234-5698-7654-32}",
        "{DE89370400440532013000}\n{FR14 2004 1010 0505 0001 3M02 606}",
        "Code XX12 {NO93 8601 1117 947} 1234",
    ],
    "bsn": [
        "BSN {123456782}",
        "Haar burgerservicenummer is {123.456.782}, het zijne {1112.22.333}.",
        "{123456782} (BSN), {111222333} (sofi-nummer)",
        "sofinummer: {123 456 782}\nen dan",
    ],
    "phone": [
        "Bel {06-12345678} of {06 12 34 56 78}.",
        "Tel. {(020) 123 45 67}, ({070-123 45 67}), {010 - 4123456}",
        "{+31 (0)20 123 4567}, {0031612345678}, {++31 20-1234567}",
        "Tel: {050-5991234}Fax: {050-5991235}",
        "{0475/12.34.56} of {02 206 12 34} of {+32 475 12 34 56}",
        "{+44 20 7946 0018}; {00 49 30 123456}",
        "{088 1234567}/{030-1234567}",
        "op 01-02-2003 {0612345678}",
    ],
}
# What only looks like one.
NONE = [
    "email@example.com, piet@sub.example.org, a@b.test, a@localhost, @naam, x@y, een @ b.nl",
    "foo@1.2.3, user@host:~$, @media.print, @.com, jan@@x.nl, jan@x.n",
    "IBAN NL00BANK0123456789, NL92ABNA0417164300, NL91ABNA041716430, XX91ABNA0417164300",
    "IPV6ADRES00000000000, rechtsbron BWBR0001827, ECLI:NL:HR:2004:AO1234, KB4490320",
    "ordernummer 123456782\nBSN 123456783, BSN 1234567820, BSN 0,123456782\nBSN\n123456782",
    "BSN: 000000000\nhet absnummer 123456782",
    "artikel 9.2.2.1, 8.40 en 0.1.2; § 3.6.1.2, bijlage 0123; 2001-2002, 01-02-2003 14:30",
    "van 01.02.2003 09:00 tot 02/03/2004 12.00 uur, 1914-1918, 1 januari 2003 0900 uur",
    "ISBN 978-90-274-3964-2, ISBN 90-274-3964-0, ISBN 0-87-553242-X, ISSN 0028-9922",
    "KvK 01234567, btw NL001234567B01, btw BE 0466.158.640, RSIN 001234567",
    "€ 1.234.567,89, f 0.575.350.000, 10.000.000.000, 0,0704976935 en 0.0209708029",
    "0x0612345678ab, 0612345678abcdef, id_0612345678, pad/01/04060106.xhp, 00490825806749606",
    "02 03 04 05 06 07 08 09, 00 00 00 00 00 00 00, 1 + 0 = 1, +1 +2 +3",
    "112, 0800-8051, 0900-1234, 0900 555 4555, 14 020, 1-2-3, 06-00000000",
]


@pytest.mark.parametrize(
    ("kind", "marked"), [(kind, text) for kind, texts in FOUND.items() for text in texts]
)
def test_what_is_between_braces_is_replaced(kind: str, marked: str) -> None:
    text = marked.replace("{", "").replace("}", "")
    parts = marked.replace("}", "{").split("{")
    expected = PLACEHOLDERS[kind].join(parts[::2])
    assert replace_personal_data(text, [kind]) == (expected, [len(parts) // 2])
    assert replace_personal_data(text, [k for k in KINDS if k != kind])[0] is text
    counts = [len(parts) // 2 * (k == kind) for k in KINDS]
    assert replace_personal_data(text, KINDS) == (expected, counts)


@pytest.mark.parametrize("text", NONE)
def test_what_only_looks_like_it_stays(text: str) -> None:
    found, counts = replace_personal_data(text, KINDS)
    assert (found, counts) == (text, [0, 0, 0, 0])
    assert found is text


_PIECES = st.one_of(
    st.sampled_from([part for texts in FOUND.values() for t in texts for part in t.split("{")]),
    st.sampled_from(
        ["BSN ", "NL91", "00", "06-", "+31", "@", ".nl", "(0)", *PLACEHOLDERS.values()]
    ),
    st.text("0123456789 .-/()+@aZé_\n,", max_size=12),
)


@given(st.lists(_PIECES, max_size=12).map("".join))
@example("jan@x.nl_foo@y.nl")
@example("+49 30 1234567 06-12345678")
@example("0(070) 3026847")
def test_replacing_twice_is_replacing_once(text: str) -> None:
    text = text.replace("}", "")
    once, counts = replace_personal_data(text, KINDS)
    again, more = replace_personal_data(once, KINDS)
    assert again is once
    assert more == [0, 0, 0, 0]
    assert (once is text) == (sum(counts) == 0)
    for kind in KINDS:
        found, (number,) = replace_personal_data(text, [kind])
        assert replace_personal_data(found, [kind])[0] is found
        assert found.count(PLACEHOLDERS[kind]) - text.count(PLACEHOLDERS[kind]) <= number


@given(st.integers(0, 10**9 - 1))
def test_numbers_with_wrong_check_digits_stay(number: int) -> None:
    """Most numbers of that form are no one's: their check digits say so."""
    text = f"Zijn BSN is {number:09}."
    assert replace_personal_data(text, ["bsn"])[1] == [int(bsn.is_valid(f"{number:09}"))]
    account = f"NL{number % 97 + 2:02}ABNA{number:010}"
    assert replace_personal_data(account, ["iban"])[1] == [int(iban.is_valid(account))]


def made(folder: Path, texts: list[str], **changes: object) -> Path:
    (folder / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    given = {
        "source": (str(folder / "in.jsonl"),),
        "tokenizer": "train:600",
        "chunk_size": 64,
        "output_dir": folder / "out",
        "replace_personal_data": ("phone", "email"),
        "keep_rejected": True,
        "clean": "dutch",
    }
    return preprocess(PreprocessOptions(**{**given, **changes}), QUIET)  # type: ignore[arg-type]


def decoded(folder: Path) -> str:
    manifest = read_manifest(folder)
    tokenizer = read_tokenizer(folder, manifest)
    splits = [open_split(folder, manifest, split) for split in ("train", "test")]
    chunks = [split.read(np.arange(split.num_chunks)).reshape(-1) for split in splits]
    return "".join(tokenizer.decode(ids.tolist()) for ids in chunks)


def test_nothing_of_it_is_in_the_chunk_directory(tmp_path: Path, sample_texts: list[str]) -> None:
    good = [text for text in sample_texts if len(text.split()) >= 60][:20]
    secret = "Mail cafe\u0301.jan@geheim.nl of bel 06-12345678, IBAN NL91ABNA0417164300."
    texts = [
        f"{good[0]} {secret}",
        # The same but for the person.
        f"{good[0]} {secret.replace('jan@', 'piet@').replace('678', '679')}",
        f"Te kort\x00: {secret}",
        *good[1:],
        f"{good[1]} Bel 020-1234567.",
    ]
    folder = made(tmp_path, texts)
    manifest = read_manifest(folder)
    assert manifest["rejected"] == {"duplicate": 1, "too short": 1}
    assert manifest["options"]["replace_personal_data"] == ["email", "phone"]
    # Those of rejected documents do not count.
    assert manifest["personal_data_replaced"] == {"email": 1, "phone": 2}
    text = decoded(folder)
    assert "Mail email@example.com of bel 06-00000000, IBAN NL91ABNA0417164300." in text
    for file in folder.rglob("*"):
        content = file.read_bytes() if file.is_file() else b""
        assert b"geheim" not in content
        assert b"12345678" not in content
    rejected = (folder / "rejected.jsonl").read_text()
    assert rejected.count("email@example.com") == 2
    assert "Te kort\\u0000: Mail" in rejected
    verify_directory(folder)
    overview = {row[0]: row[1] for row in next(iter(survey(folder, 2, 0))).rows}
    assert (overview["email replaced"], overview["phone replaced"]) == ("1", "2")
    # It is another directory with other kinds, and the same whatever their order.
    assert made(tmp_path, texts, replace_personal_data=("email", "phone", "email")) == folder
    for kinds in ((), ("email",)):
        with pytest.raises(UserError, match="--replace-personal-data was"):
            made(tmp_path, texts, replace_personal_data=kinds)


@pytest.mark.parametrize("clean", ["none", "dutch"])
def test_a_document_that_is_cut_is_cut_where_it_is_replaced(
    clean: str, tmp_path: Path, sample_texts: list[str]
) -> None:
    """Its text is read again for the cut, and must be the one whose bytes were counted."""
    parts = [f"{text} Bel 020-1234567 of mail jan.jansen@geheim.nl.\r\n" for text in sample_texts]
    folder = made(
        tmp_path, ["\n".join(parts)], keep_rejected=False, clean=clean, near_duplicates=True
    )
    manifest = read_manifest(folder)
    assert manifest["cut_for_test"]["documents"] == 1
    number = len(sample_texts)
    assert manifest["personal_data_replaced"] == {"email": number, "phone": number}
    text = decoded(folder)
    assert text.count("06-00000000") == text.count("email@example.com") == number
    assert "jan.jansen" not in text


def test_evaluation_texts_are_found_with_what_is_personal_in_them(
    tmp_path: Path, sample_texts: list[str]
) -> None:
    exam = "Schrijf vandaag nog aan jan@geheim.nl of bel 020-1234567 voor een brochure"
    (tmp_path / "exam.txt").write_text(exam)
    texts = [*sample_texts[:9], f"{sample_texts[9]} {exam}."]
    folder = made(tmp_path, texts, clean="none", decontaminate=(tmp_path / "exam.txt",))
    assert read_manifest(folder)["rejected"] == {"contaminated": 1}
    assert b"geheim" not in (folder / "rejected.jsonl").read_bytes()


@pytest.mark.parametrize("library", ["phonenumbers", "stdnum"])
def test_a_missing_library_is_named(library: str, tmp_path: Path) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.modules[{library!r}] = None\n"
        "sys.argv = ['preprocess.py', '--source', 'sample', '--tokenizer', 'train:600',"
        f" '--replace-personal-data', 'email', '--output-dir', {str(tmp_path)!r}]\n"
        "runpy.run_path('preprocess.py', run_name='__main__')"
    )
    done = run_script("-c", code)
    assert done.returncode == ExitCode.BAD_OPTION
    assert "pip install phonenumberslite python-stdnum" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
