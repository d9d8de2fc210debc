"""The shape of the code: small files, a core that stands without its wings, READMEs whose commands exist."""
import ast
import contextlib
import importlib
import inspect
import io
import re
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

from tests.tiny import run_here

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [path for pattern in ("*.py", "gto/**/*.py", "kernels/*.py") for path in sorted(ROOT.glob(pattern))]
READMES = [ROOT / "README.md", ROOT / "kernels/README.md", *sorted(ROOT.glob("gto/*/README.md"))]
WINGS = "gto.ltd", "gto.bench", "gto.released"


def imports(tree):
    """Names of the modules that a syntax tree imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_small_enough_to_read():
    assert sum(path.is_file() for path in (ROOT / "gto").iterdir()) <= 16
    lines = {path: path.read_text(encoding="utf-8").splitlines() for path in SOURCES}
    assert sum(map(len, lines.values())) <= 4800
    for path, text in lines.items():
        assert len(text) <= 300 and max(map(len, text), default=0) <= 120, path
        for node in ast.walk(ast.parse("\n".join(text))):
            if isinstance(node, ast.FunctionDef):
                arguments = [a.arg for a in node.args.posonlyargs + node.args.args + node.args.kwonlyargs]
                is_kernel = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
                assert is_kernel or len(set(arguments) - {"self"}) <= 8, (path, node.name)
                assert is_kernel or node.end_lineno - node.lineno < 60, (path, node.name)
    path = ["train.py", "decode.py", *(f"gto/{name}.py" for name in (
        "model", "head", "tree", "verify", "engine", "loss", "rollout", "training"))]
    assert sum(len(lines[ROOT / name]) for name in path) <= 1500
    page = (ROOT / "gto/page/page.html").read_text(encoding="utf-8").splitlines()
    assert len(page) <= 250 and max(map(len, page)) <= 120
    readme = READMES[0].read_bytes()
    assert readme.count(b"\n") <= 130 and len(readme) <= 8192


def test_kernels_know_nothing_of_gto():
    for path in (ROOT / "kernels").glob("*.py"):
        assert not [name for name in imports(ast.parse(path.read_text())) if name.split(".")[0] == "gto"], path


def test_the_core_stands_without_its_wings():
    core = [f"gto.{path.stem}" for path in (ROOT / "gto").glob("*.py")]
    core += ["gto.page", "train", "decode", "prepare_data"]
    code = f"import sys, {', '.join(core)}; print([m for m in sys.modules if m.startswith({WINGS})])"
    result = subprocess.run([sys.executable, "-c", code.replace("gto.__init__", "gto")], cwd=ROOT, capture_output=True,
                            text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_no_module_imports_itself_by_way_of_others():
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in SOURCES}
    top = {}
    for name, path in names.items():                               # what is imported when the module is
        tree = ast.parse(path.read_text())
        statements = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        modules = list(imports(ast.Module(statements, [])))
        top[name] = {found for module in modules for found in (module, module.rpartition(".")[0]) if found in names}
    while leaves := [name for name, needs in top.items() if not needs - {name, "gto", "kernels"}]:
        top = {name: needs - set(leaves) for name, needs in top.items() if name not in leaves}
    assert not top


@lru_cache
def flags_of(program):
    name, printed = program.removeprefix("-m ").removesuffix(".py"), io.StringIO()
    module = importlib.import_module(name + ".__main__" * (ROOT / name.replace(".", "/")).is_dir())
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit, match="^0$"):
        run_here(module, "--help", cwd=ROOT, device=())
    assert re.search(r'\nif __name__ == "__main__":\n    (main_guard\(main\)|main\(\))\n$', inspect.getsource(module))
    return set(re.findall(r"--[a-z][a-z-]*", printed.getvalue()))


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_in_readmes_exist(readme):
    text = readme.read_text(encoding="utf-8").replace("\\\n", " ")
    programs = r"((?:-m )?(?:train\.py|decode\.py|prepare_data\.py|gto\.[\w.]+|kernels\.bench))"
    commands = re.findall(r"(?:python|torchrun \S+) " + programs + r"([^\n`#]*)", text)
    assert commands
    for program, arguments in commands:
        assert set(re.findall(r"--[a-z][a-z-]*", arguments)) <= flags_of(program), (program, arguments)
