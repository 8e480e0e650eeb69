"""The budgets of the code: sizes, and who may do what. What import-linter can't see."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

PACKAGE = Path(__file__).parents[1] / "drctl"
MODULES = {
    path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text("utf-8")) for path in sorted(PACKAGE.rglob("*.py"))
}
MODULE_LINES = 400
FUNCTION_LINES = 60
CLASS_LINES = 320
PARAMETERS = 6
#: Handlers of everything that do not pass it on: where whatever comes must be told once and something has to go on.
EDGES = {
    "cli/app.py": "the program's edge: a bug becomes exit code 1 and a traceback in the log",
    "appliance/control.py": "one request must not end the service",
    "appliance/daemon.py": "one thing that is supervised must not end the supervisor",
    "appliance/source/reign_guard.py": "one group's boot must not end with a bug, and its guests stay down",
    "appliance/source/protection.py": "one group's bug must not end the protection of others",
    "appliance/esx/protection.py": "the same, on an ESX host",
    "cli/bisect_run.py": "what a try's thread raises is raised again by the one that waits for it",
    "plan/execute.py": "what a step's thread raises is raised again by the one that waits for it",
    "replication/control.py": "one request must not end the process",
    "replication/link.py": "one connection must not end the others",
}
#: Names that say nothing about what is inside.
DRAWERS = {"utils", "util", "common", "helpers", "helper", "misc", "manager"}

Node = TypeVar("Node", bound=ast.AST)


def every(kind: type[Node]) -> Iterator[tuple[str, Node]]:
    for name, module in MODULES.items():
        yield from ((name, node) for node in ast.walk(module) if isinstance(node, kind))


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    yield from every(ast.FunctionDef)
    yield from every(ast.AsyncFunctionDef)


def lines(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def test_modules_are_small() -> None:
    lengths = {name: len((PACKAGE / name).read_text("utf-8").splitlines()) for name in MODULES}
    assert {name: length for name, length in lengths.items() if length > MODULE_LINES} == {}


def test_functions_are_small() -> None:
    assert [f"{name}:{node.lineno} {node.name}" for name, node in functions() if lines(node) > FUNCTION_LINES] == []


def test_classes_are_small() -> None:
    assert [
        f"{name}:{node.lineno} {node.name}" for name, node in every(ast.ClassDef) if lines(node) > CLASS_LINES
    ] == []


def test_functions_take_few_parameters() -> None:
    """In cli/ the parameters of a command are its options."""
    found = []
    for name, node in functions():
        taken = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args) if arg.arg not in ("self", "cls")]
        if len(taken) > PARAMETERS and not name.startswith("cli/"):
            found.append(f"{name}:{node.lineno} {node.name}")
    assert found == []


def test_every_module_says_what_it_is() -> None:
    assert [name for name, module in MODULES.items() if not ast.get_docstring(module)] == []


def test_no_module_is_a_drawer() -> None:
    assert not DRAWERS & {Path(name).stem for name in MODULES}


def is_broad(handler: ast.ExceptHandler) -> bool:
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(
        kind is None or (isinstance(kind, ast.Name) and kind.id in ("Exception", "BaseException")) for kind in kinds
    )


def test_what_is_not_foreseen_is_caught_at_the_edges_only() -> None:
    """Elsewhere a broad handler cleans up and raises again."""
    found = {
        f"{name}:{node.lineno}"
        for name, node in every(ast.ExceptHandler)
        if is_broad(node) and name not in EDGES
        if not (isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None)
    }
    assert found == set()


def test_third_parties_stay_where_they_belong() -> None:
    homes = {
        "libvirt": ("hypervisor/",),
        "libvirt_qemu": ("hypervisor/",),
        "paramiko": ("hypervisor/",),
        "typer": ("cli/",),
        "rich": ("cli/render.py",),
        "tomlkit": ("cli/", "lab/"),
    }
    imports = [(name, node.lineno, alias.name) for name, node in every(ast.Import) for alias in node.names]
    imports += [(name, node.lineno, node.module or "") for name, node in every(ast.ImportFrom) if not node.level]
    found = [
        f"{name}:{line} imports {what}"
        for name, line, what in imports
        if not name.startswith(homes.get(what.split(".")[0], ""))
    ]
    assert found == []


def test_errors_keep_their_cause() -> None:
    """In a handler, `raise` is bare or says `from`."""
    raises = [
        (name, node) for name, one in every(ast.ExceptHandler) for node in ast.walk(one) if isinstance(node, ast.Raise)
    ]
    assert [
        f"{name}:{node.lineno}" for name, node in raises if isinstance(node.exc, ast.Call) and node.cause is None
    ] == []


def test_the_process_ends_at_the_edges_only() -> None:
    """`sys.exit` stands where a process begins: the program, and the modules that run with `python -m`."""
    found = []
    for name, module in MODULES.items():
        began = any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in module.body)
        calls = [
            node
            for node in ast.walk(module)
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("sys.exit", "os._exit")
        ]
        found += [f"{name}:{call.lineno}" for call in calls if not began and name != "cli/app.py"]
    assert found == []
