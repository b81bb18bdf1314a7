"""How the code hangs together: who imports whom, and what must not be imported at all."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from conftest import ROOT, run_script

PACKAGE = ROOT / "kiem"
# A room imports only from itself and from those before it: docs/architecture.md has the reasons.
ROOMS = (
    "core",
    "config",
    "hub",
    "tokenizer",
    "data",
    "compute",
    "model",
    "parallel",
    "inference",
    "evaluation",
    "optim",
    "planning",
    "report",
    "look",
    "audit",
    "training",
    "ladder",
    "export",
    "cli",
    "commands",
    "reference",
)
WITHOUT_TORCH = (
    *("core", "config", "hub", "tokenizer", "data", "report", "look", "audit", "cli"),
    "commands",
)
MOST_LINES = {"kiem": 350, "tests": 420}
MOST_FILES_IN_A_ROOM = 12  # __init__.py apart
MOST_FUNCTION_LINES = 60


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            yield node.module


def test_rooms_import_only_what_comes_before_them() -> None:
    found = {p.stem for p in PACKAGE.iterdir() if p.name[0] != "_"}
    assert found == set(ROOMS)
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        allowed = ROOMS[: ROOMS.index(room) + 1] if room in ROOMS else ROOMS
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "kiem" and len(parts) > 1:
                assert parts[1] in allowed, f"{path.relative_to(ROOT)} imports {name}"
            assert parts[0] != "datasets", path
            assert parts[0] != "transformers" or path.name == "foreign.py", path
            assert parts[0] != "torch" or room not in WITHOUT_TORCH, path
            assert parts[0] != "wandb" or path.name == "trackers.py", path
            # The card makes its metadata with the library, and sends nothing.
            is_hub = room == "hub" or path.name == "card.py"
            assert parts[0] != "huggingface_hub" or is_hub, path
            assert parts[:2] != ["torch", "distributed"] or room == "parallel", path
            assert parts[0] not in ("pickle", "marshal", "shelve"), path


def test_only_one_module_writes() -> None:
    """Writes go through kiem/core/files.py, which feeds libraries' own writers too."""
    writers = {"write_bytes", "write_text", "mkdir", "unlink", "symlink_to", "rename", "replace"}
    exceptions = {
        "core/disk.py": {"unlink", "rename"},  # what files.py leaves when it is killed
        "compute/native.py": {"mkdir"},  # the user's cache folder
        "data/chunks.py": {"mkdir", "rename"},  # inside a folder that files.new_folder made
        "data/documents.py": {"mkdir"},  # likewise
    }
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).as_posix()
        if name == "core/files.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_method = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            if is_method and node.func.attr in writers - exceptions.get(name, set()):
                is_text = node.func.attr == "replace" and len(node.args) == 2
                assert is_text, f"{name}:{node.lineno} writes by itself"


def test_files_functions_and_rooms_are_small() -> None:
    for folder, most in MOST_LINES.items():
        for path in (ROOT / folder).rglob("*.py"):
            num_lines = len(path.read_text(encoding="utf-8").splitlines())
            assert num_lines <= most, f"{path.name}: {num_lines} lines"
    for folder in {path.parent for path in PACKAGE.rglob("*.py")}:
        names = sorted(path.name for path in folder.glob("[!_]*.py"))
        assert len(names) <= MOST_FILES_IN_A_ROOM, f"{folder.name}: {names}"
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                num_lines = (node.end_lineno or 0) - node.lineno + 1
                assert num_lines <= MOST_FUNCTION_LINES, f"{path.name}: {node.name}"


def test_help_is_there_before_torch() -> None:
    for script in sorted(path.name for path in ROOT.glob("*.py")):
        code = (
            "import runpy, sys\n"
            f"sys.argv = ['{script}', '--help']\n"
            "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
            "except SystemExit: print('torch' in sys.modules)"
        )
        assert run_script("-c", code).stdout.splitlines()[-1] == "False"


def test_nothing_read_from_files_is_run() -> None:
    """No pickle, no eval, no code of others: neither by name nor through torch."""
    forbidden = {"eval", "exec", "compile", "__import__"}
    unsafe_of_torch = {"load", "all_gather_object", "broadcast_object_list", "gather_object"}
    num_calls = 0
    for path in [*PACKAGE.rglob("*.py"), *ROOT.glob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        where = path.relative_to(ROOT)
        assert not {"pickle", "dill", "cloudpickle", "joblib", "torch.serialization"} & {
            *imports(path)
        }, where
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            num_calls += 1
            place, function = f"{where}:{node.lineno}", node.func
            if isinstance(function, ast.Name):
                assert function.id not in forbidden, place
            elif isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
                is_torch = function.value.id in ("torch", "dist")
                assert not (is_torch and function.attr in unsafe_of_torch), place
            for keyword in node.keywords:
                if keyword.arg in ("trust_remote_code", "allow_pickle"):
                    assert isinstance(keyword.value, ast.Constant), place
                    assert keyword.value.value is False, place
                assert keyword.arg != "weights_only", place
    assert num_calls > 1000
