"""Tokenizers: loaded from a folder, a file or the Hub, pinned by their hash, written for others.

A tokenizer is the tokenizer.json of a BPE that has the control tokens <pad>, <eos> and <bos>. Text
never becomes a control token: the string "<eos>" in a document is encoded as ordinary characters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import msgspec
from tokenizers import Tokenizer as TokenizersTokenizer

from kiem.core.cache import kept
from kiem.core.errors import ExitCode, UserError, not_found
from kiem.core.files import write_bytes, write_json
from kiem.hub.transfer import download_tokenizer, looks_like_hub_id
from kiem.tokenizer.process import TokenizerClient

TOKENIZER_FILE = "tokenizer.json"
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
MAX_ROWS = 1 << 24  # of an embedding; far beyond any vocabulary
# What is known of a larger tokenizer.json is kept in the user's cache: Gemma's 33 MB take 0.3 s.
_LARGE_FROM_BYTES = 8_000_000
_Id = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]


class AddedToken(msgspec.Struct):
    """An entry that is looked for in the text before anything else."""

    id: _Id
    content: str
    single_word: bool
    lstrip: bool
    rstrip: bool
    normalized: bool
    special: bool


class BpeModel(msgspec.Struct, omit_defaults=True):
    """The model of a tokenizer.json; its vocabulary and merges stay bytes."""

    type: str = "BPE"
    vocab: msgspec.Raw = msgspec.Raw(b"{}")
    merges: msgspec.Raw = msgspec.Raw(b"[]")
    byte_fallback: bool = False
    dropout: float | None = None
    ignore_merges: bool = False
    unk_token: str | None = None
    fuse_unk: bool = False
    continuing_subword_prefix: str | None = None
    end_of_word_suffix: str | None = None


class TokenizerJson(msgspec.Struct):
    """A tokenizer.json."""

    model: BpeModel
    added_tokens: list[AddedToken] = []
    normalizer: Any = None
    pre_tokenizer: dict[str, Any] | None = None
    post_processor: Any = None
    decoder: Any = None
    version: str = "1.0"


class _Known(msgspec.Struct):
    """What is known of a tokenizer.json that was once read as a whole.

    Attributes:
        pad_id, eos_id, bos_id: of the control tokens.
        has_unk: whether there is an <unk>.
        num_rows: see `Tokenizer`.
    """

    pad_id: int
    eos_id: int
    bos_id: int
    has_unk: bool
    num_rows: int


@dataclass(frozen=True)
class Tokenizer:
    """A loaded tokenizer.

    Attributes:
        json_bytes: the exact content of tokenizer.json.
        sha256: its hash, by which chunk directories and models pin the tokenizer.
        origin: where it came from, for the manifest.
        pad_id, eos_id, bos_id: of the control tokens.
        has_unk: whether there is an <unk>.
        num_rows: rows that an embedding needs for every id that text can become. Gemma's
            <image_soft_token> = 262144 is a special added token beyond the vocabulary: text never
            becomes it, and the 1B model has no row for it.
        client: of a process that encodes and decodes in place of this one, if there is one.
    """

    json_bytes: bytes = field(repr=False)
    sha256: str
    origin: str
    pad_id: int
    eos_id: int
    bos_id: int
    has_unk: bool
    num_rows: int
    client: TokenizerClient | None = None

    @cached_property
    def description(self) -> TokenizerJson:
        """What tokenizer.json says."""
        return msgspec.json.decode(self.json_bytes, type=TokenizerJson)

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """The ids of the model's entries; added tokens need not be among them."""
        return _read_vocabulary(self.description)

    @cached_property
    def added_tokens(self) -> dict[str, AddedToken]:
        """The added tokens by their text."""
        return {token.content: token for token in self.description.added_tokens}

    def keep(self, what: str, make: Callable[[], bytes]) -> bytes:
        """Returns what `make` makes of a tokenizer, kept in the user's cache if that saves time."""
        return _keep(self.json_bytes, self.sha256, what, make)

    @property
    def loads_slowly(self) -> bool:
        """Whether `implementation` takes more than a moment to make."""
        return len(self.json_bytes) >= _LARGE_FROM_BYTES

    @property
    def is_gemma_style(self) -> bool:
        """Whether it is a byte-fallback BPE over text with its spaces replaced by U+2581."""
        replaces_spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        is_plain = self.description.model.byte_fallback and not self.description.model.ignore_merges
        return is_plain and bool(self.description.normalizer == replaces_spaces)

    @cached_property
    def implementation(self) -> TokenizersTokenizer:
        """The `tokenizers` object; encodes control strings in text as text.

        It is made when it is first needed, since Gemma's takes a second.
        """
        try:
            implementation = TokenizersTokenizer.from_buffer(self.json_bytes)
        except BaseException as error:  # a panic of its Rust code is no Exception
            if isinstance(error, KeyboardInterrupt):
                raise
            raise _bad_tokenizer(self.origin, f"not a tokenizer.json ({error})") from error
        implementation.encode_special_tokens = True
        implementation.post_processor = None  # one without a place for the text leaves it out
        implementation.no_padding()
        implementation.no_truncation()
        return implementation

    @property
    def special_ids(self) -> dict[str, int]:
        """The ids of the control tokens, under "pad", "eos" and "bos"."""
        return {"pad": self.pad_id, "eos": self.eos_id, "bos": self.bos_id}

    def token_id(self, token: str) -> int | None:
        """Returns the id of an added token or an entry of the vocabulary, if there is one."""
        added = self.added_tokens.get(token)
        return self.vocabulary.get(token) if added is None else added.id

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text, without control tokens."""
        if self.client is not None:
            return self.client.encode_batch(texts)
        encodings = self.implementation.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode(self, text: str) -> list[int]:
        """Returns the ids of one text, without control tokens."""
        return self.encode_batch([text])[0]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids; control tokens are left out."""
        if self.client is not None:
            return self.client.decode(ids)
        text: str = self.implementation.decode(list(ids), skip_special_tokens=True)
        return text


def load_tokenizer(name: str) -> Tokenizer:
    """Loads a tokenizer from a folder, a tokenizer.json or the Hub.

    Args:
        name: an existing path, or else a Hub id such as google/gemma-3-1b-pt.

    Raises:
        UserError: it is not there, or as `parse_tokenizer`.
    """
    path = Path(name)
    if path.is_dir():
        path = path / TOKENIZER_FILE
    elif not path.exists() and looks_like_hub_id(name):
        files = download_tokenizer(name)
        return parse_tokenizer(files.paths[0].read_bytes(), f"{name}@{files.revision}")
    try:
        json_bytes = path.read_bytes()
    except OSError as error:
        what = f"no readable tokenizer here ({error.strerror})"
        fix = "Give a Hub id, a folder that holds tokenizer.json, or a tokenizer.json."
        raise not_found(str(path), what, fix) from error
    return parse_tokenizer(json_bytes, str(path))


def parse_tokenizer(json_bytes: bytes, origin: str) -> Tokenizer:
    """Makes a Tokenizer from the content of a tokenizer.json.

    Raises:
        UserError: it is not that of a BPE, lacks <pad>, <eos> or <bos>, or has huge ids.
    """
    sha256 = hashlib.sha256(json_bytes).hexdigest()
    known = _keep(json_bytes, sha256, "facts", lambda: _examine(json_bytes, origin))
    return Tokenizer(json_bytes, sha256, origin, **msgspec.json.decode(known))


def _keep(json_bytes: bytes, sha256: str, what: str, make: Callable[[], bytes]) -> bytes:
    if len(json_bytes) < _LARGE_FROM_BYTES:
        return make()
    return kept(f"tokenizer-{sha256[:16]}-{what}", f"{sha256}-{_code_sha256()}-".encode(), make)


@cache
def _code_sha256() -> str:
    """Returns a hash of the code of this room, so that what older code made is made again."""
    digest = hashlib.sha256(version("tokenizers").encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _examine(json_bytes: bytes, origin: str) -> bytes:
    """Returns what is known of a tokenizer.json, as JSON; raises as `parse_tokenizer`."""
    try:
        description = msgspec.json.decode(json_bytes, type=TokenizerJson)
        if description.model.type != "BPE":
            raise _bad_tokenizer(origin, f"it is a {description.model.type}, not a BPE")
        vocabulary = _read_vocabulary(description)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _bad_tokenizer(origin, f"not the tokenizer.json of a BPE ({error})") from error
    added = {token.content: token for token in description.added_tokens}
    ids = vocabulary | {text: token.id for text, token in added.items()}
    for control in ("<pad>", "<eos>", "<bos>"):
        if control not in ids:
            raise _bad_tokenizer(origin, f"it has no {control}")
    control_ids = (ids["<pad>"], ids["<eos>"], ids["<bos>"])
    text_ids = [token.id for token in added.values() if not token.special]
    num_rows = max([*control_ids, *vocabulary.values(), *text_ids]) + 1
    if num_rows > MAX_ROWS:
        what = f"its ids go up to {num_rows - 1}; supported are {MAX_ROWS} rows"
        raise _bad_tokenizer(origin, what)
    return msgspec.json.encode(_Known(*control_ids, "<unk>" in ids, num_rows))


def _read_vocabulary(description: TokenizerJson) -> dict[str, int]:
    return msgspec.json.decode(description.model.vocab, type=dict[str, _Id])


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes tokenizer.json, byte for byte, and the configuration files that transformers reads."""
    write_bytes(folder / TOKENIZER_FILE, tokenizer.json_bytes)
    tokens = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    if tokenizer.has_unk:
        tokens["unk_token"] = "<unk>"
    config = {
        **tokens,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
    }
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", tokens)


def _bad_tokenizer(where: str, what: str) -> UserError:
    fix = "Use a tokenizer.json with <pad>, <eos> and <bos>, such as Gemma's, or train:16384."
    return UserError(what, where=where, fix=fix, exit_code=ExitCode.TOKENIZER_MISMATCH)
