"""The fast path gives the reference's ids, or is not taken."""

from __future__ import annotations

import json
import random
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from rich.console import Console
from test_tokenizer import NASTY

from kiem.config import PreprocessOptions
from kiem.core.errors import ExitCode, UserError
from kiem.data.prepare.packing import frame
from kiem.data.prepare.preprocess import preprocess
from kiem.tokenizer import encoding
from kiem.tokenizer.encoding import Encoder, cut_long, fast_path, load_encoders, set_apart
from kiem.tokenizer.tokenizer import Tokenizer, parse_tokenizer
from kiem.tokenizer.train import train_tokenizer


def encode(encoder: Encoder, texts: list[str]) -> list[list[int]]:
    encoded = encoder.encode(texts, "text {}".format)
    ends = np.cumsum(encoded.lengths)
    return [ids.tolist() for ids in np.split(encoded.ids, ends[:-1])]


def fragments(tokenizer: Tokenizer, how_many: int) -> list[str]:
    """Texts put together from vocabulary entries, control strings and difficult characters."""
    vocabulary = list(tokenizer.implementation.get_vocab())
    pieces = [vocabulary[n].replace("▁", " ") for n in range(0, len(vocabulary), 97)]
    added = tokenizer.implementation.get_added_tokens_decoder().values()
    pieces += [token.content for token in added][::40]
    pieces += ["<eos>", "<bos>", "> </", "<", ">", " ", "  ", "\n\n", "\t", "\r", "é", "e\u0301"]
    chance = random.Random(0)
    return ["".join(chance.choices(pieces, k=chance.randrange(1, 12))) for _ in range(how_many)]


@pytest.mark.parametrize("name", ["trained", "gemma"])
def test_fast_equals_reference(
    name: str, sample_texts: list[str], request: pytest.FixtureRequest
) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    fast = fast_path(tokenizer, "auto")
    assert isinstance(fast, bytes)
    encoder = Encoder(tokenizer, fast)
    texts = [*sample_texts, *NASTY, *fragments(tokenizer, 5000)]
    assert encode(encoder, texts) == tokenizer.encode_batch(texts)


def test_gemmas_one_crossing_entry_is_left_to_the_reference(gemma: Tokenizer) -> None:
    fast = fast_path(gemma, "auto")
    assert isinstance(fast, bytes)
    texts = ["gewoon", "<a>b</a> </p>", "x > </ y", "nog een", "een > </ twee > </ drie"]
    assert encode(Encoder(gemma, fast), texts) == gemma.encode_batch(texts)


@pytest.mark.parametrize("name", ["trained", "gemma"])
def test_long_documents_are_checked_in_parts(
    name: str,
    sample_texts: list[str],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the reference says of the parts is what it says of the whole."""
    tokenizer: Tokenizer = request.getfixturevalue(name)
    texts = [" ".join(fragments(tokenizer, 40)), "  ".join(sample_texts), "\n".join(sample_texts)]
    for text in texts:
        for part_characters in (1, 10, 1000):
            parts = list(cut_long(text, part_characters))
            assert "".join(parts) == text
            assert len(parts) > 3 or part_characters == 1000
            joined = [token for ids in tokenizer.encode_batch(parts) for token in ids]
            assert joined == tokenizer.encode(text)
    monkeypatch.setattr(encoding, "_PART_CHARACTERS", 100)
    encoder = Encoder(tokenizer, fast_path(tokenizer, "auto"))
    assert encode(encoder, texts) == tokenizer.encode_batch(texts)
    wrong = Encoder(tokenizer, fast_path(train_tokenizer(sample_texts, 700), "auto"))
    for text in (texts[2], f"De dag < {texts[2]}"):
        with pytest.raises(UserError, match="differently"):
            wrong.encode([text], str)
    text = "De <dag>"  # is left to the reference
    assert encode(wrong, [text]) == tokenizer.encode_batch([text])


@pytest.mark.parametrize("name", ["trained", "gemma"])
def test_parts_with_a_sign_are_encoded_as_in_the_whole(
    name: str, request: pytest.FixtureRequest
) -> None:
    """Every cut is one at which a long document may be cut, and none is missing around a "<"."""
    tokenizer: Tokenizer = request.getfixturevalue(name)
    chance = random.Random(0)
    texts = ["".join(chance.choices("a<> \n/", k=chance.randrange(14))) for _ in range(5000)]
    texts += ["<" * 10**5, " " * 10**5 + "<", " <" * 10**5, "< " * 10**5, "a" * 10**5 + " <"]
    for text in texts:
        shortest = list(cut_long(text, 1)) if len(text) < 14 else []
        parts = list(set_apart(text))
        assert "".join(parts) == text
        assert not any("<" in part for part in parts[::2])
        if shortest:
            with_sign = ["".join(part for part in c if "<" in part) for c in (parts, shortest)]
            assert with_sign[0] == with_sign[1]
    parts_of = [list(filter(None, set_apart(text))) for text in texts[:5000]]
    joined = [[*chain.from_iterable(tokenizer.encode_batch(parts))] for parts in parts_of]
    assert joined == tokenizer.encode_batch(texts[:5000])


def test_memory_of_words_is_bounded(gemma: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """gigatoken keeps every word it has seen: some ten bytes for each byte of new words."""
    monkeypatch.setattr(encoding, "_MAX_REMEMBERED_BYTES", 40_000_000)
    encoder = Encoder(gemma, fast_path(gemma, "auto"))
    chance = random.Random(0)
    most = 0
    for _ in range(16):
        words = ["".join(chance.choices("abcdefghijklmnop", k=9)) for _ in range(100_000)]
        encoder.encode([" ".join(words)], str)
        most = max(most, psutil.Process().memory_info().rss - encoder._loaded_bytes)
    assert most < 100_000_000  # without a bound: 160 million


def test_the_process_that_checks_may_be_killed(trained: Tokenizer) -> None:
    others = psutil.Process().children()  # of other tests
    with load_encoders(trained, fast_path(trained, "auto"), 1) as (encoder,):
        encode(encoder, ["Een dag"])
        (child,) = (child for child in psutil.Process().children() if child not in others)
        child.kill()
        child.wait()
        with pytest.raises(UserError, match="ended from outside") as caught:
            encode(encoder, ["in mei"])
    assert caught.value.exit_code == ExitCode.OUT_OF_MEMORY


def changed(tokenizer: Tokenizer, **changes: Any) -> Tokenizer:
    description = json.loads(tokenizer.json_bytes)
    description["model"].update(changes.pop("model", {}))
    description.update(changes)
    return parse_tokenizer(json.dumps(description).encode(), "changed")


def test_tokenizers_without_proof_go_to_the_reference(trained: Tokenizer) -> None:
    vocabulary = json.loads(trained.json_bytes)["model"]["vocab"]
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    cases = [
        changed(trained, normalizer=None),
        changed(trained, normalizer={"type": "NFC"}),
        changed(trained, pre_tokenizer={"type": "Whitespace"}),
        changed(trained, pre_tokenizer={**split, "pattern": {"Regex": "a"}}),
        *(
            changed(trained, model={"vocab": {**vocabulary, entry: 1500}})
            for entry in ("a▁b", "a▁", "<▁b", "a▁▁b<", "a▁<b▁c")
        ),
    ]
    for tokenizer in cases:
        reason = fast_path(tokenizer, "auto")
        assert isinstance(reason, str)
        encoder = Encoder(tokenizer, reason)
        assert encode(encoder, ["een twee", "drie"]) == tokenizer.encode_batch(["een twee", "drie"])


def test_difference_names_the_document(trained: Tokenizer, sample_texts: list[str]) -> None:
    of_another_vocabulary = fast_path(train_tokenizer(sample_texts, 700), "auto")
    encoder = Encoder(trained, of_another_vocabulary)
    with pytest.raises(UserError, match="differently") as caught:
        encoder.encode(["De provincie Noord-Holland"], "a.jsonl:{}".format)
    assert caught.value.exit_code == ExitCode.TOKENIZER_MISMATCH
    assert caught.value.where == "a.jsonl:0"


def test_both_encoders_give_the_same_shards(tmp_path: Path) -> None:
    shards = []
    for choice in ("auto", "reference"):
        given = PreprocessOptions(
            source=("sample",),
            tokenizer="train:600",
            chunk_size=64,
            output_dir=tmp_path / choice,
            encoder=choice,
        )
        folder = preprocess(given, Console(quiet=True))
        shards.append([path.read_bytes() for path in sorted(folder.rglob("*.arrow"))])
    assert shards[0] == shards[1]


def test_frame_puts_control_tokens_around_every_document(trained: Tokenizer) -> None:
    encoded = Encoder(trained, "slow").encode(["een", "twee drie"], str)
    framed = frame(encoded, bos_id=2, eos_id=1)
    first, second = trained.encode_batch(["een", "twee drie"])
    assert framed.ids.tolist() == [2, *first, 1, 2, *second, 1]
    assert framed.lengths.tolist() == [len(first) + 2, len(second) + 2]
    nothing = Encoder(trained, "slow").encode([], str)
    assert frame(nothing, 2, 1).ids.tolist() == []
