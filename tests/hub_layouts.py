"""Datasets as they are laid out on the Hub, with files that hold a line or two of text.

The first five are the layouts of well-known sources of Dutch, with fewer and smaller files.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq


def parquet(name: str) -> bytes:
    file = io.BytesIO()
    texts = [f"Tekst {n} van {name} over de dijken langs de rivier." for n in range(4)]
    # A column `source` is usual on the Hub, with the address of each text.
    table = pa.table({"text": texts, "source": [f"https://{name}/{n}" for n in range(4)]})
    pq.write_table(table, file, row_group_size=2)
    return file.getvalue()


def json_lines(name: str) -> bytes:
    texts = [f"Regel {n} van {name} over de molens langs de vaart." for n in range(4)]
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def csv(name: str) -> bytes:
    return f'text,url\n"Rij van {name}, met een komma.",x\n'.encode()


MAKERS: dict[str, Callable[[str], bytes]] = {
    ".parquet": parquet,
    ".json": json_lines,
    ".jsonl": json_lines,
    ".json.gz": lambda name: gzip.compress(json_lines(name), mtime=0),
    ".jsonl.zst": lambda name: pa.compress(json_lines(name), "zstd", asbytes=True),
    ".csv": csv,
    ".txt": lambda name: f"Tekst van {name}.\n".encode(),
}


@dataclass(frozen=True)
class Layout:
    """A dataset, and what is to be found in it.

    Attributes:
        names: of its files.
        configs: the card's `configs`, with what is beside it; "" if there is no card.
        wanted: the config that is asked for; None: none.
        split: the split that is asked for.
        found: the names of the files that are read.
        as_config: the name under which `datasets` knows the config; None: it has no such rule.
    """

    names: tuple[str, ...]
    configs: str
    wanted: str | None
    found: tuple[str, ...]
    split: str = "train"
    as_config: str | None = "default"

    def files(self) -> dict[str, bytes]:
        """Returns the files with content."""
        card = (
            {"README.md": f"---\n{self.configs}\n---\n# Tekst\n".encode()} if self.configs else {}
        )
        made = {}
        for name in self.names:
            base = name.rsplit("/", 1)[-1]
            # Of the suffixes after each dot, the longest that is known.
            endings = [base[n:] for n, sign in enumerate(base) if sign == "."]
            made[name] = next((MAKERS[e](name) for e in endings if e in MAKERS), b"{}")
        return {**card, ".gitattributes": b"*.parquet filter=lfs", **made}


def entry(config: str, *splits: str, more: str = "") -> str:
    """An entry of `configs`; each split is written as name=pattern."""
    lines = [f"- config_name: {config}"] + ([f"  {more}"] if more else []) + ["  data_files:"]
    for split in splits:
        name, _, pattern = split.partition("=")
        lines += [f"  - split: {name}", f"    path: {pattern}"]
    return "\n".join(lines)


CONFIGS = "license: odc-by\nconfigs:\n"

LAYOUTS = {
    "uonlp/CulturaX": Layout(
        ("nl/nl_part_00000.parquet", "nl/nl_part_00001.parquet", "fy/fy_part_00000.parquet"),
        CONFIGS
        + '- config_name: fy\n  data_files: "fy/*.parquet"\n'
        + '- config_name: nl\n  data_files: "nl/*.parquet"',
        "nl",
        ("nl/nl_part_00000.parquet", "nl/nl_part_00001.parquet"),
        as_config="nl",
    ),
    "HuggingFaceFW/fineweb-2": Layout(
        (
            "data/nld_Latn/train/000_00000.parquet",
            "data/nld_Latn/train/001_00000.parquet",
            "data/nld_Latn/test/000_00000.parquet",
            "data/nld_Latn_removed/train/000_00000.parquet",
            "data/fry_Latn/train/000_00000.parquet",
        ),
        CONFIGS
        + "\n".join(
            entry(name, f"train=data/{name}/train/*", f"test=data/{name}/test/*")
            for name in ("fry_Latn", "nld_Latn", "nld_Latn_removed")
        ),
        "nld_Latn",
        ("data/nld_Latn/train/000_00000.parquet", "data/nld_Latn/train/001_00000.parquet"),
        as_config=None,  # `datasets` wants the files of every split of every config
    ),
    "HPLT/HPLT2.0_cleaned": Layout(
        (
            "nld_Latn_1/train-00000-of-00002.parquet",
            "nld_Latn_1/train-00001-of-00002.parquet",
            "nld_Latn_2/train-00000-of-00001.parquet",
            "fry_Latn_1/train-00000-of-00001.parquet",
        ),
        CONFIGS + "\n".join(entry(c, f"train={c}*/train-*") for c in ("fry_Latn", "nld_Latn")),
        "nld_Latn",
        (
            "nld_Latn_1/train-00000-of-00002.parquet",
            "nld_Latn_1/train-00001-of-00002.parquet",
            "nld_Latn_2/train-00000-of-00001.parquet",
        ),
        as_config="nld_Latn",
    ),
    "allenai/c4": Layout(
        (
            "multilingual/c4-nl.tfrecord-00000-of-00002.json.gz",
            "multilingual/c4-nl.tfrecord-00001-of-00002.json.gz",
            "multilingual/c4-nl-validation.tfrecord-00000-of-00001.json.gz",
            "multilingual/c4-fy.tfrecord-00000-of-00001.json.gz",
            "multilingual/c4-fy-validation.tfrecord-00000-of-00001.json.gz",
            "en/c4-train.00000-of-01024.json.gz",
        ),
        "license:\n- odc-by\nconfigs:\n"
        + "\n".join(
            entry(
                name,
                f"train=multilingual/c4-{name}.*.json.gz",
                f"validation=multilingual/c4-{name}-validation.*.json.gz",
            )
            for name in ("nl", "fy")
        ),
        "nl",
        (
            "multilingual/c4-nl.tfrecord-00000-of-00002.json.gz",
            "multilingual/c4-nl.tfrecord-00001-of-00002.json.gz",
        ),
        as_config="nl",
    ),
    "wikimedia/wikipedia": Layout(
        (
            "20231101.nl/train-00000-of-00002.parquet",
            "20231101.nl/train-00001-of-00002.parquet",
            "20231101.fy/train-00000-of-00001.parquet",
        ),
        "license:\n- cc-by-sa-3.0\n- gfdl\nconfigs:\n"
        + entry("20231101.fy", "train=20231101.fy/train-*")
        + "\n"
        + entry("20231101.nl", "train=20231101.nl/train-*"),
        "20231101.nl",
        (
            "20231101.nl/train-00000-of-00002.parquet",
            "20231101.nl/train-00001-of-00002.parquet",
        ),
        as_config="20231101.nl",
    ),
    "names/numbered": Layout(
        (
            "data/train-00000-of-00002.parquet",
            "data/train-00001-of-00002.parquet",
            "data/test-00000-of-00001.parquet",
            "data/extra-00000-of-00001.parquet",
        ),
        "",
        None,
        ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"),
    ),
    "names/numbered-split": Layout(
        ("data/train-00000-of-00001.parquet", "data/brieven-00000-of-00001.parquet"),
        "",
        None,
        ("data/brieven-00000-of-00001.parquet",),
        split="brieven",
    ),
    "names/zst": Layout(
        ("train.jsonl.zst", "valid_1.jsonl.zst", "testing-2.jsonl.zst", ".verborgen/train.jsonl"),
        "license: other\nlicense_name: eigen",
        None,
        ("train.jsonl.zst",),
    ),
    "names/in-folders": Layout(
        ("archief/train/1.csv", "archief/train/2.csv", "archief/eval/1.csv", "archief/uit/1.csv"),
        "license: mit",
        None,
        ("archief/train/1.csv", "archief/train/2.csv"),
    ),
    "names/one-file": Layout(("brieven.json",), "", None, ("brieven.json",)),
    "names/mixed": Layout(
        ("a.parquet", "b.parquet", "talen.txt", "__oud__/c.parquet"),
        "",
        None,
        ("a.parquet", "b.parquet"),
    ),
    "names/folder-as-config": Layout(
        ("nl/train-00000-of-00001.parquet", "nl/test-00000-of-00001.parquet", "fy/train.parquet"),
        "",
        "nl",
        ("nl/train-00000-of-00001.parquet",),
        as_config=None,
    ),
    "names/all-folders": Layout(
        ("jaren/2019/1.jsonl", "jaren/2020/1.jsonl", "jaren/2020/2.jsonl"),
        "",
        "jaren",
        ("jaren/2019/1.jsonl", "jaren/2020/1.jsonl", "jaren/2020/2.jsonl"),
    ),
    "names/everything": Layout(("a/1.jsonl", "b/1.jsonl"), "", ".", ("a/1.jsonl", "b/1.jsonl")),
    "card/default": Layout(
        ("a/1.parquet", "b/1.parquet"),
        CONFIGS + entry("a", "train=a/*", more="default: true") + "\n" + entry("b", "train=b/*"),
        None,
        ("a/1.parquet",),
        as_config="a",
    ),
    "card/lists": Layout(
        ("a/1.jsonl", "a/x/2.jsonl", "b/x/3.jsonl", "b/4.jsonl", "c.jsonl"),
        "configs:\n- config_name: default\n  data_files:\n  - a/**\n  - b/*/*.jsonl",
        None,
        ("a/1.jsonl", "a/x/2.jsonl", "b/x/3.jsonl"),
    ),
    "card/folder": Layout(
        ("tekst/train/1.jsonl", "tekst/test/1.jsonl", "anders/train/1.jsonl"),
        "configs:\n- config_name: nee\n  data_dir: anders\n- config_name: no\n  data_dir: tekst",
        "no",
        ("tekst/test/1.jsonl",),
        split="test",
        as_config=None,  # `datasets` reads an unquoted no as false
    ),
    "card/folder-and-files": Layout(
        ("tekst/1.jsonl", "1.jsonl"),
        "configs:\n- config_name: default\n  data_dir: tekst\n  data_files: '*.jsonl'",
        None,
        ("tekst/1.jsonl",),
        as_config=None,
    ),
}
