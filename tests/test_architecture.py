"""The layers of the package: who may import whom, read from the sources."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "python" / "gradpress"


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_only_ops_imports_the_native_core() -> None:
    users = {p for p in PACKAGE.rglob("*.py") if any("_core" in n for n in imported(p))}
    users = {p for p in users if "gradpress._core" in " ".join(imported(p))}
    assert users
    assert {p.parent.name for p in users} == {"ops"}


def test_rooms_do_not_import_each_other() -> None:
    allowed = {
        "ops": set(),
        "quant": {"ops"},
        "lowrank": {"ops"},
        "prune": {"ops", "engine"},
        "engine": {"ops", "nn"},
        "nn": {"ops", "quant", "lowrank"},
        "optim": {"ops", "nn"},
    }
    for room, may in allowed.items():
        for path in (PACKAGE / room).rglob("*.py"):
            used = {n.split(".")[1] for n in imported(path) if n.startswith("gradpress.")}
            assert used - {name for name in used if name.startswith("_")} <= may | {room}, path


def test_rust_families_do_not_import_each_other() -> None:
    allowed = {
        "quant": set(),
        "prune": set(),
        "lowrank": {"quant"},
        "optim": {"quant", "lowrank"},
    }
    for family, may in allowed.items():
        for path in (ROOT / "src" / family).rglob("*.rs"):
            text = path.read_text()
            used = {other for other in allowed if f"crate::{other}" in text}
            assert used <= may | {family}, path


def test_sources_stay_small() -> None:
    sources = [*(ROOT / "src").rglob("*.rs"), *PACKAGE.rglob("*.py")]
    assert sources
    large = {p.name: n for p in sources if (n := len(p.read_text().splitlines())) > 500}
    assert not large
