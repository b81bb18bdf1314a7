"""kiem.hub against a local Hub, through the real huggingface_hub in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hub_client import (
    ACCEPTED,
    DATASET,
    DATASET_FILES,
    INVALID,
    MODEL,
    MODEL_FILES,
    NOT_ACCEPTED,
    OPEN_MODEL,
    SHARDS,
    Call,
    Client,
    Outcome,
    new_hub,
    paths_of,
)
from hub_server import HubServer

from kiem.core.errors import ExitCode


def test_importing_hub_does_not_import_huggingface_hub() -> None:
    check = "import sys, kiem.hub.transfer; sys.exit('huggingface_hub' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], cwd=Path(__file__).parents[1], check=True)


def test_dataset_files_come_in_order_from_one_commit(hub: HubServer, client: Client) -> None:
    files = client.get("download_dataset_files", DATASET, "10k")
    assert files["names"] == list(SHARDS)
    assert [Path(path).read_bytes() for path in files["paths"]] == [
        DATASET_FILES[name] for name in SHARDS
    ]
    first, *others = paths_of(hub, "/api/")
    assert "/revision/" not in first
    assert all(files["revision"] in path for path in others)
    assert all(f"/resolve/{files['revision']}/" in path for path in paths_of(hub, "/resolve/"))
    assert not any(had_token for _, _, had_token in hub.log)

    hub.log.clear()
    assert client.get("download_dataset_files", DATASET, "10k") == files
    assert not paths_of(hub, "/resolve/")


def test_tokenizer_with_accepted_licence(hub: HubServer, client: Client) -> None:
    tokenizer = client.get("download_tokenizer", MODEL, token=ACCEPTED)
    assert Path(tokenizer["paths"][0]).read_bytes() == MODEL_FILES["tokenizer.json"]
    assert all(had_token for _, _, had_token in hub.log)


def test_tokenizer_of_an_older_commit(hub: HubServer, client: Client) -> None:
    old = client.get("download_tokenizer", OPEN_MODEL)
    hub.commit(OPEN_MODEL, {"tokenizer.json": b"new", "tokenizer_config.json": b"new"})
    new = client.get("download_tokenizer", OPEN_MODEL)
    assert Path(new["paths"][0]).read_bytes() == b"new"
    assert client.get("download_tokenizer", OPEN_MODEL, old["revision"]) == old


def test_model_folder_holds_the_model_alone(hub: HubServer, client: Client) -> None:
    folder = Path(client.get("download_model", MODEL, token=ACCEPTED))
    unwanted = {"optimizer.bin", "onnx/model.safetensors"}
    assert {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    } == {name: content for name, content in MODEL_FILES.items() if name not in unwanted}
    to_cdn = [had_token for _, path, had_token in hub.log if path.startswith("/cdn/")]
    assert to_cdn
    assert not any(to_cdn), "a token must not leave the Hub"


GEMMA_PAGE = f"https://huggingface.co/{MODEL}"
DATASET_PAGE = f"https://huggingface.co/datasets/{DATASET}x"


REFUSALS = [
    (
        Call("download_tokenizer", (MODEL,)),
        ExitCode.HUB_LOGIN,
        [GEMMA_PAGE, "not logged in", "hf auth login", "HF_TOKEN"],
    ),
    (
        Call("download_model", (MODEL,), NOT_ACCEPTED),
        ExitCode.HUB_LICENCE,
        [GEMMA_PAGE, "your account has not accepted"],
    ),
    (
        Call("download_dataset_files", (DATASET, "10k"), INVALID),
        ExitCode.HUB_LOGIN,
        ["refuses your login token", "hf auth login"],
    ),
    (
        Call("download_tokenizer", (OPEN_MODEL,), "hf_ŁostSecret"),
        ExitCode.HUB_LOGIN,
        ["token is damaged"],
    ),
    (
        Call("download_tokenizer", ("someone/secret",)),
        ExitCode.HUB_LOGIN,
        ["private", "hf auth login", "HF_TOKEN"],
    ),
    (
        Call("download_dataset_files", (DATASET + "x", "10k")),
        ExitCode.HUB_LOGIN,
        ["does not exist", DATASET_PAGE],
    ),
    (
        Call("download_dataset_files", (DATASET + "x", "10k"), ACCEPTED),
        ExitCode.NOT_FOUND,
        ["no such dataset", DATASET_PAGE],
    ),
    (
        Call("download_dataset_files", (DATASET, "11k")),
        ExitCode.NOT_FOUND,
        ["no 11k/train-*.parquet", "There is: 10k/test-"],
    ),
    (
        Call("download_dataset_files", ("someone/incomplete", "a")),
        ExitCode.NOT_FOUND,
        ["only 1 of 3 parts"],
    ),
    (
        Call("download_tokenizer", (OPEN_MODEL, "v9")),
        ExitCode.NOT_FOUND,
        [f"{OPEN_MODEL} at v9", "no such revision"],
    ),
    (
        Call("download_tokenizer", ("someone/secret",), ACCEPTED),
        ExitCode.NOT_FOUND,
        ["no tokenizer.json", "There is: config.json."],
    ),
    (
        Call("download_model", (OPEN_MODEL,)),
        ExitCode.NOT_A_MODEL,
        ["safetensors", "There is: config.json, tokenizer.json."],
    ),
    (Call("download_model", ("a/b/c",)), ExitCode.BAD_OPTION, ["OWNER/NAME"]),
]


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    with new_hub() as server:
        client = Client(server, tmp_path_factory.mktemp("refusals"))
        return client.run([call for call, _, _ in REFUSALS])


@pytest.mark.parametrize("number", range(len(REFUSALS)))
def test_refusals_are_explained(refusals: list[Outcome], number: int) -> None:
    (_, arguments, _), exit_code, says = REFUSALS[number]
    outcome = refusals[number]
    assert outcome.exit_code == exit_code, outcome.message
    for part in [arguments[0], *says]:
        assert outcome.message is not None
        assert part in outcome.message


def test_no_network(client: Client) -> None:
    exit_code, message = client.fail("download_tokenizer", MODEL, HF_ENDPOINT="http://127.0.0.1:9")
    assert exit_code == ExitCode.NETWORK
    for part in ("no connection", "HF_HUB_OFFLINE=1", "local folder"):
        assert part in message


def test_offline(hub: HubServer, client: Client) -> None:
    calls = [
        Call("download_dataset_files", (DATASET, "10k"), ACCEPTED),
        Call("download_tokenizer", (MODEL,), ACCEPTED),
        Call("download_model", (MODEL,), ACCEPTED),
    ]
    for exit_code, _, message in client.run(calls, HF_HUB_OFFLINE="1"):
        assert exit_code == ExitCode.NETWORK
        assert message is not None
        assert "HF_HUB_OFFLINE" in message
        assert "local folder" in message

    online = client.run(calls)
    assert all(outcome.exit_code == 0 for outcome in online)
    hub.log.clear()
    assert client.run(calls, HF_HUB_OFFLINE="1") == online
    assert not hub.log


def test_offline_takes_the_newest_commit_that_has_the_files(hub: HubServer, client: Client) -> None:
    old = client.get("download_dataset_files", DATASET, "10k")
    hub.commit(f"datasets/{DATASET}", {**DATASET_FILES, "new.txt": b""})
    new = client.get("download_dataset_files", DATASET, "1M")
    assert old["revision"] != new["revision"]
    assert client.get("download_dataset_files", DATASET, "10k", HF_HUB_OFFLINE="1") == old
    assert client.get("download_dataset_files", DATASET, "1M", HF_HUB_OFFLINE="1") == new


def test_offline_with_half_of_the_files(client: Client) -> None:
    files = client.get("download_dataset_files", DATASET, "10k")
    Path(files["paths"][1]).unlink()
    exit_code, message = client.fail("download_dataset_files", DATASET, "10k", HF_HUB_OFFLINE="1")
    assert exit_code == ExitCode.NETWORK
    assert "only 1 of 2 parts" in message


def test_cache_that_cannot_be_written(client: Client, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    place = str(tmp_path / "file" / "hub")
    exit_code, message = client.fail("download_tokenizer", OPEN_MODEL, HF_HUB_CACHE=place)
    assert exit_code == ExitCode.NOT_WRITABLE
    assert place in message
