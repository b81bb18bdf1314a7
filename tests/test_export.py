"""Export: every tensor, the vocabulary and the metadata of a GGUF file, and the Hub."""

from __future__ import annotations

import heapq
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import run_script
from hub_server import HubServer
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoTokenizer, Gemma3ForCausalLM

from kiem.cli import parse
from kiem.config import ExportOptions
from kiem.core.errors import ExitCode, UserError
from kiem.export.export import export
from kiem.export.vocabulary import Vocabulary, make_vocabulary
from kiem.tokenizer.tokenizer import Tokenizer, parse_tokenizer

HARD_TEXTS = (
    "Een   zin met    spaties\n\n\nen regels.\tTab",
    "<eos> één 🇳🇱 日本 <h1>Kop</h1> ’s-Gravenhage: 1.234,56",
    " " * 31 + "a" + " " * 40 + "b" + "\n" * 33,
    "aaaaaaaaaaaaa hahahaha !!!!!!!",
)


@pytest.fixture(scope="module")
def final_model(trained_run: Path) -> Path:
    return trained_run / "final_model"


def run_export(final_model: Path, *options: str | Path) -> None:
    arguments = ["--model-path", str(final_model), *map(str, options)]
    export(parse(ExportOptions, arguments, "export.py"), Console(quiet=True))


def rounded(values: torch.Tensor, dtype: str) -> np.ndarray:
    """What a matrix in this precision says: rounded to the nearest by torch, blocks of q8_0 by
    hand (ggml's definition: 32 values share a scale in fp16, the largest one is 127)."""
    if dtype in ("f16", "bf16"):
        return values.to({"f16": torch.float16, "bf16": torch.bfloat16}[dtype]).float().numpy()
    if dtype == "f32":
        return values.numpy()
    blocks = values.double().reshape(-1, 32)
    scale = blocks.abs().amax(1, keepdim=True) / 127
    return (torch.round(blocks / scale) * scale.half()).reshape(values.shape).numpy()


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8_0"])
def test_gguf_reads_back(final_model: Path, dtype: str, tmp_path: Path) -> None:
    """Names and shapes are those of gguf's own table for the architecture."""
    run_export(final_model, "--dtype", dtype, "--output", tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    weights = load_file(final_model / "model.safetensors")
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, 6)
    expected = {f"{table.get_name(key.removesuffix('.weight'))}.weight": key for key in weights}
    assert {tensor.name for tensor in reader.tensors} == set(expected)
    for tensor in reader.tensors:
        original = weights[expected[tensor.name]]
        found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert found.shape == original.shape
        if original.ndim == 1:
            assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
            np.testing.assert_array_equal(found, 1 + original.numpy())
        else:
            assert tensor.tensor_type.name == dtype.upper()
            difference = np.abs(found - rounded(original, dtype))
            # In q8_0 a value halfway between two steps may go either way.
            step = float(original.abs().max()) / 127 * 1.01 if dtype == "q8_0" else 0
            assert difference.max() <= step
            assert np.mean(difference > step / 1000) <= 1e-3
    config = json.loads((final_model / "config.json").read_text())
    for key, value in {
        "general.architecture": "gemma3",
        "general.name": "short",
        "general.languages": ["nl"],
        "general.license": "unknown",
        "gemma3.block_count": config["num_hidden_layers"],
        "gemma3.context_length": config["max_position_embeddings"],
        "gemma3.embedding_length": config["hidden_size"],
        "gemma3.feed_forward_length": config["intermediate_size"],
        "gemma3.attention.head_count": config["num_attention_heads"],
        "gemma3.attention.head_count_kv": config["num_key_value_heads"],
        "gemma3.attention.key_length": config["head_dim"],
        "gemma3.attention.value_length": config["head_dim"],
        "gemma3.attention.sliding_window": config["sliding_window"],
        "gemma3.rope.freq_base": config["rope_theta"],
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
    }.items():
        assert reader.get_field(key).contents() == value, key
    epsilon = reader.get_field("gemma3.attention.layer_norm_rms_epsilon").contents()
    assert epsilon == pytest.approx(config["rms_norm_eps"])
    tokens = reader.get_field("tokenizer.ggml.tokens").contents()
    tokenizer = AutoTokenizer.from_pretrained(final_model)
    assert tokens == tokenizer.convert_ids_to_tokens(range(config["vocab_size"]))
    scores = reader.get_field("tokenizer.ggml.scores").contents()
    types = reader.get_field("tokenizer.ggml.token_type").contents()
    assert len(scores) == len(types) == len(tokens)
    kinds = [gguf.TokenType(kind) for kind in types]
    assert kinds[:4] == [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.UNKNOWN]
    assert kinds[4:260] == [gguf.TokenType.BYTE] * 256
    assert set(kinds[260:]) == {gguf.TokenType.NORMAL}


def encode_as_llama_cpp(vocabulary: Vocabulary, text: str) -> list[int]:
    """The encoding that llama.cpp documents for SentencePiece vocabularies, written down anew:
    user-defined entries first, the longest first; then the neighbours with the highest score."""
    ids = {token: number for number, token in enumerate(vocabulary.tokens)}
    defined = [
        token
        for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
        if kind == gguf.TokenType.USER_DEFINED and token in text
    ]
    parts: list[str | int] = [text]
    for token in sorted(defined, key=len, reverse=True):
        cut: list[str | int] = []
        for part in parts:
            pieces = part.split(token) if isinstance(part, str) else [part]
            for place, piece in enumerate(pieces):
                cut += [ids[token], piece] if place else [piece]
        parts = [part for part in cut if part != ""]
    found: list[int] = []
    for part in parts:
        found += [part] if isinstance(part, int) else _merge(part, ids, vocabulary.scores)
    return found


def _merge(text: str, ids: dict[str, int], scores: list[float]) -> list[int]:
    symbols: list[str] = list(text.replace(" ", "▁"))
    left, right = [*range(-1, len(symbols) - 1)], [*range(1, len(symbols)), -1]
    waiting: list[tuple[float, int, int, str]] = []

    def consider(a: int, b: int) -> None:
        if a >= 0 and b >= 0 and (made := symbols[a] + symbols[b]) in ids:
            heapq.heappush(waiting, (-scores[ids[made]], a, b, made))

    for place in range(len(symbols) - 1):
        consider(place, place + 1)
    while waiting:
        _, a, b, made = heapq.heappop(waiting)
        if right[a] == b and symbols[a] + symbols[b] == made and symbols[a] and symbols[b]:
            symbols[a], symbols[b] = made, ""
            right[a] = right[b]
            if right[a] >= 0:
                left[right[a]] = a
            consider(left[a], a)
            consider(a, right[a])
    found = []
    for symbol in filter(None, symbols):
        known = symbol in ids
        found += [ids[symbol]] if known else [ids[f"<0x{b:02X}>"] for b in symbol.encode()]
    return found


def test_trained_vocabulary_encodes_the_same(trained: Tokenizer, sample_texts: list[str]) -> None:
    vocabulary = make_vocabulary(trained, trained.num_rows)
    for text in (*HARD_TEXTS, *sample_texts):
        assert encode_as_llama_cpp(vocabulary, text) == trained.encode(text)


def test_gemma_vocabulary_encodes_the_same(gemma: Tokenizer, sample_texts: list[str]) -> None:
    vocabulary = make_vocabulary(gemma, gemma.num_rows)
    assert len(vocabulary.tokens) == 262_144
    assert vocabulary.types[106] == gguf.TokenType.CONTROL  # <end_of_turn>
    assert vocabulary.types[107] == gguf.TokenType.USER_DEFINED  # a line end
    assert vocabulary.types[138] == gguf.TokenType.NORMAL  # two spaces
    for text in (*HARD_TEXTS, *sample_texts):
        assert encode_as_llama_cpp(vocabulary, text) == gemma.encode(text)


def test_rows_without_an_entry_are_unused(trained: Tokenizer) -> None:
    vocabulary = make_vocabulary(trained, trained.num_rows + 2)
    assert vocabulary.types[-3:] == [
        gguf.TokenType.NORMAL,
        gguf.TokenType.UNUSED,
        gguf.TokenType.UNUSED,
    ]
    assert len(set(vocabulary.tokens)) == trained.num_rows + 2


@pytest.mark.parametrize("change", ["reverse", "drop", "normalizer"])
def test_vocabularies_that_llama_cpp_would_read_otherwise(trained: Tokenizer, change: str) -> None:
    description = json.loads(trained.json_bytes)
    merges = description["model"]["merges"]
    if change == "reverse":
        # The two ways to make an entry are no longer together.
        made = ["".join(merge) for merge in merges]
        twice = next(n for n in range(len(made) - 1) if made[n] == made[n + 1])
        merges.append(merges.pop(twice))
    elif change == "drop":
        del merges[-1]
    else:
        description["normalizer"] = None
    changed = parse_tokenizer(json.dumps(description).encode(), "changed")
    with pytest.raises(UserError, match=r"llama\.cpp would encode") as caught:
        make_vocabulary(changed, changed.num_rows)
    assert caught.value.exit_code == ExitCode.TOKENIZER_MISMATCH


def test_shapes_that_llama_cpp_cannot_run(final_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in final_model.iterdir():
        if path.name != "manifest.json":  # which would tell of the change below
            (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "query_pre_attn_scalar": 31}))
    with pytest.raises(UserError, match="query_pre_attn_scalar is 31"):
        run_export(folder, "--output", tmp_path / "model.gguf")
    assert not list(tmp_path.glob("*.gguf"))


def test_safetensors_in_bf16(final_model: Path, tmp_path: Path) -> None:
    run_export(final_model, "--format", "safetensors", "--output", tmp_path / "out")
    reference = Gemma3ForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert reference.dtype == torch.bfloat16
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in load_file(final_model / "model.safetensors").items():
        assert torch.equal(found[name], weight.to(torch.bfloat16))
    names = {path.name for path in final_model.iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    for name in ("tokenizer.json", "README.md", "training_summary.json"):
        assert (tmp_path / "out" / name).read_bytes() == (final_model / name).read_bytes()


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (("--format", "safetensors", "--dtype", "q8_0"), ExitCode.BAD_OPTION),
        (("--dry-run",), ExitCode.NO_EFFECT),
        (("--no-private",), ExitCode.NO_EFFECT),
        (("--output", "MODEL", "--format", "safetensors", "--overwrite"), ExitCode.ALREADY_EXISTS),
        (("--output", "FILE"), ExitCode.ALREADY_EXISTS),
        (("--output", "WEIGHTS", "--overwrite"), ExitCode.BAD_OPTION),
        (("--output", "FOLDER", "--overwrite"), ExitCode.BAD_OPTION),
        (("--output", "FOLDER", "--format", "safetensors", "--overwrite"), ExitCode.ALREADY_EXISTS),
        (("--output", "FILE", "--format", "safetensors", "--overwrite"), ExitCode.ALREADY_EXISTS),
        (("--push-to-hub", "model"), ExitCode.BAD_OPTION),
    ],
)
def test_mistakes(options: tuple[str, ...], code: int, final_model: Path, tmp_path: Path) -> None:
    (tmp_path / "file.gguf").write_text("mine")
    (tmp_path / "folder").mkdir()
    weights = (final_model / "model.safetensors").read_bytes()
    places = {
        "MODEL": final_model,
        "WEIGHTS": final_model / "model.safetensors",
        "FILE": tmp_path / "file.gguf",
        "FOLDER": tmp_path / "folder",
    }
    given = [str(places.get(word, word)) for word in options]
    output = [] if "--output" in given else ["--output", str(tmp_path / "new.gguf")]
    with pytest.raises(UserError) as caught:
        run_export(final_model, *given, *output)
    assert caught.value.exit_code == code
    assert (tmp_path / "file.gguf").read_text() == "mine"
    assert (tmp_path / "folder").is_dir()
    assert (final_model / "model.safetensors").read_bytes() == weights


def test_dry_run_asks_the_hub_nothing(final_model: Path, tmp_path: Path) -> None:
    with HubServer({}, tokens=["hf_test"]) as hub:
        done = run_script(
            *("export.py", "--model-path", final_model, "--format", "safetensors"),
            *("--output", tmp_path / "out", "--push-to-hub", "iemand/model", "--dry-run"),
            env=hub.environment(tmp_path / "cache", token="hf_test"),
        )
        assert done.returncode == 0, done.stderr
        assert hub.log == []
    assert "would be uploaded to iemand/model" in done.stdout
    for path in final_model.iterdir():
        assert path.name in done.stdout


@pytest.mark.parametrize("output", ["out", "model.gguf"])
def test_push_to_hub(output: str, final_model: Path, tmp_path: Path) -> None:
    """Twice, since the second time the repository is there; then it loads from there."""
    kind = "gguf" if output.endswith(".gguf") else "safetensors"
    command = (
        *("export.py", "--model-path", final_model, "--format", kind, "--overwrite"),
        *("--output", tmp_path / output, "--push-to-hub", "iemand/model"),
    )
    with HubServer({}, writers=["hf_test"]) as hub:
        env = hub.environment(tmp_path / "cache", token="hf_test")
        for _ in range(2):
            done = run_script(*command, env=env)
            assert done.returncode == 0, done.stderr
            assert f"{hub.url}/iemand/model" in done.stdout
        assert hub.private == {"iemand/model"}
        written = tmp_path / output
        paths = written.iterdir() if written.is_dir() else [written]
        found = hub.contents("iemand/model")
        del found[".gitattributes"]
        assert found == {path.name: path.read_bytes() for path in paths}
        if kind == "safetensors":
            prompt = ("--prompt", "De zee", "--max-new-tokens", "2")
            done = run_script("inference.py", "--model-path", "iemand/model", *prompt, env=env)
            assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("token", "words"), [(None, "log"), ("hf_reader", "may write to")])
def test_push_without_the_right(
    token: str | None, words: str, final_model: Path, tmp_path: Path
) -> None:
    with HubServer({}, tokens=["hf_reader"]) as hub:
        done = run_script(
            *("export.py", "--model-path", final_model, "--output", tmp_path / "model.gguf"),
            *("--push-to-hub", "iemand/model"),
            env=hub.environment(tmp_path / "cache", token=token),
        )
    assert done.returncode == ExitCode.HUB_LOGIN, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "model.gguf").is_file()
