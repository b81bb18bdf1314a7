"""The fast path gives the reference's ids, or is not taken."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from test_tokenizer import NASTY

from kiem.config import PreprocessOptions
from kiem.data.encoding import Encoder, FastPath, prepare_fast_path
from kiem.data.packing import frame
from kiem.data.preprocess import preprocess
from kiem.data.tokenizer import Tokenizer, parse_tokenizer, train_tokenizer
from kiem.errors import ExitCode, UserError


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
    encoder = Encoder(tokenizer, prepare_fast_path(tokenizer.json_bytes))
    assert encoder.reason is None
    texts = [*sample_texts, *NASTY, *fragments(tokenizer, 5000)]
    assert encode(encoder, texts) == tokenizer.encode_batch(texts)


def test_gemmas_one_crossing_entry_is_left_to_the_reference(gemma: Tokenizer) -> None:
    fast = prepare_fast_path(gemma.json_bytes)
    assert isinstance(fast, FastPath)
    assert fast.crossing is not None
    assert fast.crossing.pattern == r">\ </"
    texts = ["gewoon", "<a>b</a> </p>", "x > </ y", "nog een"]
    assert encode(Encoder(gemma, fast), texts) == gemma.encode_batch(texts)


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
        changed(trained, model={"vocab": {**vocabulary, "a▁b": 1500}}),
    ]
    for tokenizer in cases:
        encoder = Encoder(tokenizer, prepare_fast_path(tokenizer.json_bytes))
        assert encoder.reason is not None
        assert encode(encoder, ["een twee", "drie"]) == tokenizer.encode_batch(["een twee", "drie"])


def test_difference_names_the_document(trained: Tokenizer, sample_texts: list[str]) -> None:
    of_another_vocabulary = prepare_fast_path(train_tokenizer(sample_texts, 700).json_bytes)
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
