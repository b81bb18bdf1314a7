"""Tokenizers: exact, reversible, and deaf to control strings in text."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Reference
from transformers import AutoTokenizer

from kiem.core.errors import ExitCode, UserError
from kiem.core.files import sealed_file
from kiem.tokenizer.encoding import fast_path
from kiem.tokenizer.tokenizer import (
    Tokenizer,
    parse_tokenizer,
    write_tokenizer,
)
from kiem.tokenizer.train import train_tokenizer

NASTY = [
    "<eos>",
    "a <bos> b<eos>c <pad><unk>",
    "<start_of_turn>user\nHoi<end_of_turn>",
    "<image_soft_token> <start_of_image>",
    "  twee  spaties   drie ",
    "\n\n\n regel\r\neinde\t\ttab",
    "\u00a0\u200b\ufeff\u2028",
    "één café naïef coördinatie ’s-Gravenhage",
    "👩‍👩‍👧‍👦 🇳🇱 日本語 עברית العربية",
    "\x00\x01\x7f",
    "12.345,67 % € 3½ ²",
    "<b>vet</b> <table><tr><td>cel</td></tr></table>",
    "> </ < / >",
    "<0x41> <unused5> <mask> [multimodal]",
    "x" * 3000,
    "e\u0301 é",
]


def test_trained_vocabulary_is_laid_out_as_gemmas(trained: Tokenizer) -> None:
    assert trained.num_rows == 1500
    assert (trained.pad_id, trained.eos_id, trained.bos_id) == (0, 1, 2)
    first = [trained.implementation.id_to_token(i) for i in (3, 4, 259)]
    assert first == ["<unk>", "<0x00>", "<0xFF>"]


def test_training_twice_gives_the_same_bytes(trained: Tokenizer, sample_texts: list[str]) -> None:
    assert train_tokenizer(sample_texts, 1500).json_bytes == trained.json_bytes


def test_equally_frequent_characters_are_chosen_the_same_each_time() -> None:
    rare = [f"{chr(0x1F600 + n)} {chr(0x4E00 + n)}" for n in range(300)]
    words = ["".join(letters) for letters in product("bdfgklmnprst", "aeiou", "bdgklmnprst")]
    texts = [" ".join(words), " ".join(reversed(words)), *rare]
    assert len({train_tokenizer(texts, 600).sha256 for _ in range(4)}) == 1


@given(st.text())
def test_trained_tokenizer_gives_text_back(trained: Tokenizer, text: str) -> None:
    # U+2581 stands for the space in this family of tokenizers, so it comes back as one.
    ids = trained.encode(text)
    assert trained.decode(ids) == text.replace("▁", " ")
    assert all(id > 3 for id in ids)


def test_cutting_into_words_is_exact(trained: Tokenizer, sample_texts: list[str]) -> None:
    """BPE over the whole text, as SentencePiece and llama.cpp do it, gives the same ids."""
    description = json.loads(trained.json_bytes)
    description["pre_tokenizer"] = None
    whole = parse_tokenizer(json.dumps(description).encode(), "whole")
    texts = sample_texts + NASTY[4:-2]
    assert whole.encode_batch(texts) == trained.encode_batch(texts)


def test_control_strings_stay_text(trained: Tokenizer) -> None:
    for text in NASTY:
        ids = trained.encode(text)
        assert not {0, 1, 2, 3} & set(ids), text
        assert trained.decode(ids) == text


def test_gemma_ids_equal_the_reference(
    gemma: Tokenizer, gemma_tokenizer_file: Path, sample_texts: list[str]
) -> None:
    assert gemma.sha256.startswith("4667f208")
    assert gemma.num_rows == 262_144
    reference = Reference.from_file(str(gemma_tokenizer_file))
    reference.encode_special_tokens = True
    for text, ids in zip(
        sample_texts + NASTY, gemma.encode_batch(sample_texts + NASTY), strict=True
    ):
        assert ids == reference.encode(text, add_special_tokens=False).ids
        assert gemma.decode(ids) == text.replace("▁", " ")


def test_gemma_text_never_becomes_a_control_token(gemma: Tokenizer) -> None:
    added = gemma.implementation.get_added_tokens_decoder()
    control = {id: token.content for id, token in added.items() if token.special}
    assert len(control) == 9
    for content in control.values():
        for text in (content, f"a {content}", f"a{content}b", content * 2, content[:-1]):
            ids = gemma.encode(text)
            assert not control.keys() & set(ids)
            assert max(ids) < gemma.num_rows


def test_written_files_load_in_transformers(trained: Tokenizer, tmp_path: Path) -> None:
    write_tokenizer(trained, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "De Nederlandse taal, 2 × twee spaties."
    assert loaded(text)["input_ids"] == [trained.bos_id, *trained.encode(text)]
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.bos_token_id) == (0, 1, 2)
    assert loaded.decode(trained.encode(text)) == text


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b'{"model": {"type": "BPE"}}'])
def test_what_is_no_tokenizer_is_refused(content: bytes) -> None:
    with pytest.raises(UserError) as caught:
        parse_tokenizer(content, "hier")
    assert caught.value.exit_code == ExitCode.TOKENIZER_MISMATCH


def test_broken_text_in_a_vocabulary_is_refused(trained: Tokenizer) -> None:
    """The parser notices it only when the vocabulary itself is read."""
    broken = trained.json_bytes.replace("▁de".encode(), b"\xe2\x96\xc1de", 1)
    assert broken != trained.json_bytes
    with pytest.raises(UserError):
        parse_tokenizer(broken, "hier")


def test_what_is_known_of_a_large_tokenizer_is_kept(
    gemma_tokenizer_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second reading finds what the first one did; what is damaged or stale is made again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    json_bytes = gemma_tokenizer_file.read_bytes()
    first = parse_tokenizer(json_bytes, "eerst")
    fast = fast_path(first, "auto")
    files = sorted((tmp_path / "kiem").iterdir())
    assert [path.name.rpartition("-")[2] for path in files] == ["facts", "fast"]
    sizes = [path.stat().st_size for path in files]
    for change in (bytes, lambda data: data[:-1], lambda data: b"x" + data[1:]):
        again = parse_tokenizer(json_bytes, "nog eens")
        assert replace(again, origin="eerst") == first
        assert fast_path(again, "auto") == fast
        assert [path.stat().st_size for path in files] == sizes
        for path in files:
            path.write_bytes(change(path.read_bytes()))
    for path in files:  # intact, but made by other code
        with sealed_file(path) as file:
            file.write(first.sha256.encode() + b'-older-{"pad_id":7}')
    assert parse_tokenizer(json_bytes, "eerst") == first
    assert fast_path(first, "auto") == fast
    monkeypatch.setenv("XDG_CACHE_HOME", str(gemma_tokenizer_file))  # not a folder
    assert parse_tokenizer(json_bytes, "eerst") == first
