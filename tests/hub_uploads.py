"""The uploading half of tests/hub_server.py: what huggingface_hub sends to publish files."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hub_server import HubServer

_PREUPLOAD = re.compile(r"/api/models/([^/]+/[^/]+)/preupload/main")
_COMMIT = re.compile(r"/api/models/([^/]+/[^/]+)/commit/main")
_LFS_BATCH = re.compile(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch")
_LFS_SUFFIXES = (".safetensors", ".gguf")


def answer_upload(hub: HubServer, path: str, token: str, body: bytes) -> tuple[int, dict[str, Any]]:
    """Returns status and JSON for a POST or PUT.

    Large files go to another origin without the login token, as on the real Hub; everything else
    needs a token in `hub.writers`.
    """
    if match := re.fullmatch(r"/upload/([0-9a-f]{64})", path):
        assert not token, "the login token must not follow to another origin"
        assert hashlib.sha256(body).hexdigest() == match[1]
        hub.uploaded[match[1]] = body
        return 200, {}
    if token not in hub.tokens:
        return 401, {"error": "Invalid username or password."}
    if token not in hub.writers:
        return 403, {"error": "You don't have the rights to create a model under this namespace"}
    if path == "/api/validate-yaml":
        return 200, {"warnings": [], "errors": []}
    if path == "/api/repos/create":
        return _create(hub, json.loads(body))
    if _PREUPLOAD.fullmatch(path):
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(_LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        return 200, {"files": modes}
    if _LFS_BATCH.fullmatch(path):
        objects = [
            {**item, "actions": {"upload": {"href": f"{hub.cdn_url}/upload/{item['oid']}"}}}
            for item in json.loads(body)["objects"]
        ]
        return 200, {"transfer": "basic", "objects": objects}
    if match := _COMMIT.fullmatch(path):
        return _commit(hub, match[1], [json.loads(line) for line in body.splitlines()])
    return 404, {"error": "Not found"}


def _create(hub: HubServer, asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    name = f"{asked['organization']}/{asked['name']}"
    if hub.find_repo(name) is not None:
        return 409, {"error": "You already created this model repo", "url": f"{hub.url}/{name}"}
    if asked.get("visibility") == "private" or asked.get("private"):
        hub.private.add(name)
    hub.commit(name, {".gitattributes": b""})
    return 200, {"url": f"{hub.url}/{name}"}


def _commit(hub: HubServer, name: str, lines: list[dict[str, Any]]) -> tuple[int, dict[str, Any]]:
    files = dict(hub.contents(name))
    for line in lines:
        value = line["value"]
        if line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            files[value["path"]] = hub.uploaded[value["oid"]]
    commit = hub.commit(name, files)
    return 200, {
        "success": True,
        "commitOid": commit,
        "commitUrl": f"{hub.url}/{name}/commit/{commit}",
        "hookOutput": "",
    }
