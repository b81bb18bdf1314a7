"""Evaluation: bits per byte and minimal pairs, against plain references and published suites."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections import Counter
from difflib import SequenceMatcher
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, run_script
from rich.console import Console
from tokenizers import Tokenizer as TokenizersTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch.nn.functional import log_softmax
from transformers import (
    AutoTokenizer,
    Gemma3ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from kiem.cli import parse
from kiem.config import EvaluationOptions
from kiem.core.errors import ExitCode, UserError
from kiem.data.read.rows import Document
from kiem.evaluation.bits_per_byte import Measured, bits_per_byte, measure
from kiem.evaluation.command import evaluate, open_language_model
from kiem.evaluation.language_model import (
    LanguageModel,
    own_language_model,
    windows,
)
from kiem.evaluation.minimal_pairs import BUILT_IN, Pair, accuracy, prefers_good, read_suite
from kiem.model.config import preset
from kiem.model.gemma3 import Gemma3, initialize
from kiem.tokenizer.tokenizer import Tokenizer

CONTEXT = 24  # tokens in a row, <bos> included; shorter than the model's sliding window
LENGTHS = [1, 2, 22, 23, 24, 25, 34, 35, 36, 46, 47, 69, 200]


@pytest.fixture(scope="module")
def model(trained: Tokenizer) -> Gemma3:
    """Weights far from zero, so that every token before another changes its probability."""
    model = Gemma3(preset("gemma3-micro", trained.num_rows))
    initialize(model, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model.eval()


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory, sample_texts: list[str]) -> Path:
    """A tiny model of another kind with a byte-level tokenizer of its own and no <bos>."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = TokenizersTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample_texts[:20], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.2}
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(fast), **shape, **ids)).save_pretrained(folder)
    return folder


def sliding_reference(log_probs, ids: list[int], bos_id: int, context: int) -> float:
    """Nats of a document, one token at a time: which window it is in follows from its place.

    The first window has `room` tokens; each later one adds half of that. A window is <bos> and the
    `room` tokens that end with its last one.
    """
    room = context - 1
    half = room - room // 2
    nats = 0.0
    for place, token in enumerate(ids):
        end = room
        while end <= place:
            end += half
        end = min(end, len(ids))
        row = [bos_id, *ids[max(0, end - room) : place]]
        nats -= float(log_probs(row)[token])
    return nats


def count_nats(model: LanguageModel, text_ids: list[list[int]]) -> np.ndarray:
    """Measures token sequences as if they were documents."""
    numbered = LanguageModel(**{**vars(model), "encode": lambda t: [text_ids[int(i)] for i in t]})
    return measure(numbered, (Document(str(i), "x", i) for i in range(len(text_ids)))).nats


def test_windows_score_every_token_once_with_half_a_context() -> None:
    for context in (8, 9, 24):
        for length in range(1, 60):
            scored = []
            for row in windows(list(range(length)), -1, context):
                assert row.ids[0] == -1
                assert len(row.ids) <= context
                scored += row.ids[row.first_scored :]
                if scored[0] not in row.ids:
                    assert row.first_scored > (context - 1) // 2
            assert scored == list(range(length))


@pytest.mark.parametrize("context", [CONTEXT, 128, 129, 160])
def test_own_model_equals_a_plain_reference(
    model: Gemma3, context: int, trained: Tokenizer
) -> None:
    """At lengths around the context, and contexts around the sliding window of 128.

    Of the tokenizer only the control ids are used; the ids of text are made up here.
    """

    def log_probs(row: list[int]) -> torch.Tensor:
        with torch.no_grad():
            hidden = model.hidden_states(torch.tensor([row]))
            return log_softmax(model.logits(hidden[:, -1])[0].double(), -1)

    room = context - 1
    lengths = LENGTHS if context == CONTEXT else [room, room + 1]
    generator = np.random.default_rng(0)
    documents = [generator.integers(4, 1500, n).tolist() for n in lengths]
    own = LanguageModel(
        **{
            **vars(own_language_model(model, trained, context)),
            "tokens_per_batch": 100,
        }
    )
    expected = [sliding_reference(log_probs, ids, own.bos_id, context) for ids in documents]
    np.testing.assert_allclose(count_nats(own, documents), expected, rtol=1e-5)


def test_bits_per_byte_of_a_run_equal_transformers(
    trained_run: Path, sample_texts: list[str], tmp_path: Path
) -> None:
    """One full forward pass a document, as transformers computes it; bytes by hand."""
    folder = trained_run / "final_model"
    texts = [sample_texts[0], "Één zin.", sample_texts[1][:300]]
    lines = [{"text": text, "source": f"bron {n % 2}"} for n, text in enumerate(texts)]
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    done = run_script(
        *("evaluate.py", "--model-path", folder, "--data", data, "--json", tmp_path / "out.json"),
        *("--context", "4096"),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    reference = Gemma3ForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    nats, tokens = [], []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]  # begins with <bos>
        with torch.no_grad():
            loss = reference(ids, labels=ids).loss
        nats.append(float(loss) * (ids.shape[1] - 1))
        tokens.append(ids.shape[1] - 1)
    num_bytes = [len(text.encode()) for text in texts]
    assert found["bpb"] == pytest.approx(sum(nats) / sum(num_bytes) / math.log(2), rel=1e-4)
    expected = (nats[0] + nats[2]) / (num_bytes[0] + num_bytes[2]) / math.log(2)
    assert found["per_source"]["bron 0"]["bpb"] == pytest.approx(expected, rel=1e-4)
    assert (found["documents"], found["bytes"], found["tokens"]) == (3, sum(num_bytes), sum(tokens))
    assert found["bpb_low"] <= found["bpb"] <= found["bpb_high"]
    assert sum(part["bytes"] for part in found["per_source"].values()) == found["bytes"]


def test_foreign_model_equals_a_plain_reference(gpt2: Path, sample_texts: list[str]) -> None:
    foreign = open_language_model(str(gpt2), "auto", None)
    assert foreign.context == 64
    reference = GPT2LMHeadModel.from_pretrained(gpt2).eval()
    tokenizer = AutoTokenizer.from_pretrained(gpt2)

    def log_probs(row: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return log_softmax(reference(torch.tensor([row])).logits[0, -1].double(), -1)

    texts = [sample_texts[3][:400], "Kort.", "<|endoftext|> is hier tekst", sample_texts[4][:90]]
    measured = measure(foreign, iter(Document(text, "x", 1) for text in texts))
    for number, text in enumerate(texts):
        ids = foreign.encode([text])[0]
        assert tokenizer.decode(ids) == text
        assert tokenizer.eos_token_id not in ids
        expected = sliding_reference(log_probs, ids, tokenizer.eos_token_id, 64)
        assert measured.nats[number] == pytest.approx(expected, rel=1e-5)
    assert measured.num_bytes.tolist() == [len(text.encode()) for text in texts]
    with pytest.raises(UserError, match="65 tokens are more than its 64"):
        open_language_model(str(gpt2), "auto", 65)


def test_text_that_the_tokenizer_cannot_express_is_told(gpt2: Path, tmp_path: Path) -> None:
    """Such text costs no bits, so a model whose tokenizer lacks it would seem better."""
    folder, data = tmp_path / "model", tmp_path / "text.txt"
    shutil.copytree(gpt2, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["unk_token"] = "Q"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    data.write_text("Q is geen klinker, Q.", encoding="utf-8")
    console = Console(record=True)
    evaluate(EvaluationOptions(str(folder), data=(str(data),)), console)
    assert "2 tokens stand for text that the tokenizer cannot express" in console.export_text()


def test_interval_is_that_of_resampled_documents() -> None:
    """Of equal documents it has no width; of 400 drawn ones, that of the normal approximation."""
    even = Measured(np.full(9, 2.0), np.full(9, 5), np.full(9, 3), ["x"] * 9, 0)
    figure = bits_per_byte(even, None, 1)
    assert figure["bpb"] == pytest.approx(2 / 5 / math.log(2))
    assert figure["bpb_low"] == pytest.approx(figure["bpb_high"])
    nats = np.random.default_rng(0).normal(100, 20, 400)
    drawn = Measured(nats, np.full(400, 50), np.full(400, 30), ["x"] * 400, 0)
    figure = bits_per_byte(drawn, "x", 1)
    error = 1.96 * nats.std() / 20 / 50 / math.log(2)
    assert figure["bpb_high"] - figure["bpb"] == pytest.approx(error, rel=0.15)
    assert figure["bpb"] - figure["bpb_low"] == pytest.approx(error, rel=0.15)
    assert bits_per_byte(drawn, "x", 1) == figure
    assert bits_per_byte(drawn, "x", 2) != figure


def test_test_split_of_a_chunk_directory(
    sample_chunks: Path, trained_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    done = run_script(
        *("evaluate.py", "--model-path", trained_run / "final_model", "--data", sample_chunks),
        *("--json", out),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    counts = json.loads((sample_chunks / "manifest.json").read_text())["splits"]["test"]
    assert (found["documents"], found["bytes"]) == (counts["documents"], counts["bytes"])
    assert found["tokens"] == counts["tokens"] - 2 * counts["documents"]  # no <bos>, no <eos>
    assert found["context"] == 64  # the chunks it was trained with
    summary = json.loads((trained_run / "final_model" / "training_summary.json").read_text())
    assert found["bpb"] == pytest.approx(summary["test_bpb"], rel=0.1)


def test_preference_is_for_the_likelier_sentence(model: Gemma3, trained: Tokenizer) -> None:
    texts = ["De kat slaapt.", "De kat slapen.", "Een heel ander en langer verhaal."]

    def nats(text: str) -> float:
        ids = torch.tensor([[trained.bos_id, *trained.encode(text)]])
        with torch.no_grad():
            logits = model.logits(model.hidden_states(ids))[0, :-1]
        return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))

    pairs = [Pair(a, b, "x") for a in texts for b in texts if a != b]
    found = prefers_good(own_language_model(model, trained, 128), pairs)
    assert len(prefers_good(own_language_model(model, trained, 8), pairs)) == len(pairs)
    assert found.tolist() == [nats(pair.good) < nats(pair.bad) for pair in pairs]
    assert found.sum() == 3


def test_wilson_interval() -> None:
    """8 of 10: 0.4902 to 0.9433 (R, binom::binom.wilson)."""
    found = accuracy(8, 10)
    assert (round(found["accuracy_low"], 4), round(found["accuracy_high"], 4)) == (0.4902, 0.9433)
    assert accuracy(5, 5)["accuracy_high"] == 1
    assert accuracy(0, 5)["accuracy_low"] == 0


def test_built_in_suite_is_well_formed() -> None:
    file = ROOT / "kiem" / "evaluation" / "suite" / "minimal_pairs.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    per_phenomenon = Counter(row["linguistics_term"] for row in rows)
    assert len(rows) >= 300
    assert len(per_phenomenon) >= 15
    assert min(per_phenomenon.values()) >= 20
    sentences = [row[key] for row in rows for key in ("sentence_good", "sentence_bad")]
    assert len(set(sentences)) == len(sentences)
    assert len({(row["UID"], row["pairID"]) for row in rows}) == len(rows)
    for row in rows:
        good, bad = row["sentence_good"], row["sentence_bad"]
        for sentence in (good, bad):
            assert re.fullmatch(r"[A-ZÀ-Ý][^\s].*[^\s][.?!]", sentence), sentence
            assert "  " not in sentence
        # The same words but for one place: one replaced stretch, or a verb in two parts.
        words, others = good.split(), bad.split()
        edits = [o for o in SequenceMatcher(None, words, others).get_opcodes() if o[0] != "equal"]
        assert len(edits) <= 2, (good, bad)
        assert abs(len(words) - len(others)) <= 2, (good, bad)
        assert len(set(words) ^ set(others)) <= 5, (good, bad)
    assert len(read_suite((BUILT_IN,))) == len(rows)


def test_published_shapes_of_suites(tmp_path: Path) -> None:
    """BLiMP is JSON Lines with linguistics_term; BLiMP-NL is Parquet with linguistic_phenomenon."""
    blimp = {"sentence_good": "A b.", "sentence_bad": "A c.", "linguistics_term": "island_effects"}
    (tmp_path / "adjunct_island.jsonl").write_text(json.dumps(blimp) + "\n")
    columns = {
        "sentence_good": ["Wie belt hij?"],
        "sentence_bad": ["Wie hij belt?"],
        "linguistic_phenomenon": ["wh_movement"],
        "paradigm": ["stranding"],
        "item_id": [1],
    }
    pq.write_table(pa.table(columns), tmp_path / "nl.parquet")
    pairs = read_suite((str(tmp_path),))
    assert [pair.phenomenon for pair in pairs] == ["island_effects", "wh_movement"]
    assert len(read_suite((BUILT_IN, str(tmp_path / "nl.parquet")))) == 1 + len(
        read_suite((BUILT_IN,))
    )


@pytest.mark.parametrize(
    "line", ['{"sentence_good": "A"}', "[]", "{", '{"sentence_good": "A", "sentence_bad": "A "}']
)
def test_bad_suites_are_named(line: str, tmp_path: Path) -> None:
    file = tmp_path / "suite.jsonl"
    file.write_text('{"sentence_good": "A.", "sentence_bad": "B."}\n' + line + "\n")
    with pytest.raises(UserError) as caught:
        read_suite((str(file),))
    assert str(caught.value.where) == f"{file}:2"


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--data", "nergens.txt"), ExitCode.NOT_FOUND, "--data nergens.txt"),
        (("--data", "hub"), ExitCode.BAD_OPTION, "--data hub"),
        (("--suite", "nergens.jsonl"), ExitCode.NOT_FOUND, "--suite nergens.jsonl"),
        (("--context", "2"), ExitCode.BAD_OPTION, "--context"),
        (("--max-documents", "3"), ExitCode.NO_EFFECT, "without --data"),
        (("--text-column", "t", "--data", "CHUNKS"), ExitCode.NO_EFFECT, "chunk directory"),
        (("--text-column", "tekst", "--data", "sample"), ExitCode.BAD_INPUT, "sample:1"),
        (("--model-path", "nergens"), ExitCode.NOT_FOUND, "nergens"),
    ],
)
def test_mistakes(
    options: tuple[str, ...], code: int, words: str, trained_run: Path, sample_chunks: Path
) -> None:
    given = [str(sample_chunks) if word == "CHUNKS" else word for word in options]
    model = [] if "--model-path" in options else ["--model-path", str(trained_run / "final_model")]
    with pytest.raises(UserError) as caught:
        evaluate(parse(EvaluationOptions, [*model, *given], "evaluate.py"), Console(quiet=True))
    assert caught.value.exit_code == code
    assert words in str(caught.value)


def test_a_file_that_cannot_be_written_is_found_before_the_model_is_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="something else than a file") as caught:
        evaluate(EvaluationOptions("nergens", json=tmp_path), Console(quiet=True))
    assert caught.value.where == str(tmp_path)
