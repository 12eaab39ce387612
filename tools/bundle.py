"""A module of this repository, with what it needs of the others, as flat files that run where the repository is not.

transformers runs the code that lies beside a model's weights. So that there is no second implementation to keep equal, the
definitions that a model needs, and those that they need in turn, are taken out of the project's own files as they stand;
trainers, loaders and whatever else they import stay behind.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TypeGuard

ROOT = Path(__file__).resolve().parents[1]
PROJECT = {"ae", "configs", "student"}


def _uses(statement: ast.stmt) -> tuple[set[str], set[str]]:
    """Names that a statement needs when it runs, and names that stand in its annotations, which are never evaluated."""
    nodes = list(ast.walk(statement))
    hints = [h for node in nodes for h in (getattr(node, "annotation", None), getattr(node, "returns", None)) if h is not None]
    in_hints = {id(node) for hint in hints for node in ast.walk(hint)}
    names = [node for node in nodes if isinstance(node, ast.Name)]
    return {n.id for n in names if id(n) not in in_hints}, {n.id for n in names if id(n) in in_hints}


def _inside(node: ast.AST) -> TypeGuard[ast.ImportFrom]:
    """Whether a statement imports from this project."""
    return isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in PROJECT


def _bound(alias: ast.alias) -> str:
    """The name that an import defines."""
    return (alias.asname or alias.name).split(".")[0]


class _Module:
    """A source file: which statement defines or imports each of its names, and which of them are wanted."""

    def __init__(self, name: str) -> None:
        self.name, self.path = name, name.replace(".", "/") + ".py"
        source = (ROOT / self.path).read_text(encoding="utf-8")
        self.lines, self.tree = source.splitlines(), ast.parse(source)
        self.wanted: set[str] = set()
        self.imports: dict[str, tuple[str, str]] = {}  # a name -> (module, name there); ("", "") from outside the project
        self.definitions: dict[str, list[ast.stmt]] = {}
        for statement in self.tree.body:
            if isinstance(statement, ast.Import | ast.ImportFrom):
                for alias in statement.names:
                    self.imports[_bound(alias)] = (str(statement.module), alias.name) if _inside(statement) else ("", "")
            for name in self._defined(statement):
                self.definitions.setdefault(name, []).append(statement)

    @staticmethod
    def _defined(statement: ast.stmt) -> list[str]:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            return [statement.name]
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        if isinstance(statement, ast.AnnAssign | ast.AugAssign):
            targets = [statement.target]
        return [node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]

    def source(self, statement: ast.stmt) -> str:
        """A statement as it is written, decorators and the comment above it included."""
        first = min([statement.lineno, *(d.lineno for d in getattr(statement, "decorator_list", []))])
        while self.lines[first - 2].startswith("#"):
            first -= 1
        return "\n".join(self.lines[first - 1 : statement.end_lineno])

    def text(self, file_of: dict[str, str]) -> str:
        """The file to write: docstring, imports and definitions that are wanted, in their order."""
        parts = [self.source(self.tree.body[0]), f"\n# From LatentForge's {self.path}. MIT licence.\n"]
        parts.append("from __future__ import annotations\n")
        for statement in self.tree.body:
            if isinstance(statement, ast.Import | ast.ImportFrom):
                aliases = [a for a in statement.names if _bound(a) in self.wanted]
                if not aliases:
                    continue
                kept: ast.stmt = ast.Import(aliases)
                if isinstance(statement, ast.ImportFrom):
                    inside = file_of.get(statement.module or "")
                    kept = ast.ImportFrom(inside or statement.module, aliases, 1 if inside else 0)
                parts.append(ast.unparse(kept))
            elif self.wanted.intersection(self._defined(statement)):
                apart = "" if isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign) else "\n\n"
                parts.append(apart + self.source(statement))
        return "\n".join(parts) + "\n"


def bundle(files: dict[str, tuple[str, list[str]]]) -> dict[str, str]:
    """{file name without .py: (module, names wanted of it)} -> {file name: text}, the modules that those need included.

    Other modules keep their own name. Raises ValueError for what cannot be taken out of its module.
    """
    modules: dict[str, _Module] = {}

    def want(module_name: str, name: str) -> None:
        if module_name not in modules:
            modules[module_name] = _Module(module_name)
        module = modules[module_name]
        if name in module.wanted:
            return
        if name not in module.definitions:
            raise ValueError(f"{module.path} does not define {name}, which the bundle needs")
        module.wanted.add(name)
        for statement in module.definitions[name]:
            if any(map(_inside, ast.walk(statement))):
                raise ValueError(f"{module.path}: {name} imports from the project inside; a bundle needs such imports on top")
            run, hints = _uses(statement)
            for used in sorted(run | hints):
                origin, there = module.imports.get(used, ("", ""))
                if used in module.imports and not origin:
                    module.wanted.add(used)
                elif used in run and origin:
                    module.wanted.add(used)
                    want(origin, there)
                elif used in run and used in module.definitions:
                    want(module_name, used)

    for module, names in files.values():
        for name in names:
            want(module, name)
    named = {module: file for file, (module, _) in files.items()}
    file_of = {module: named.get(module, module.rsplit(".", 1)[-1]) for module in modules}
    if len(set(file_of.values())) < len(file_of):
        raise ValueError(f"two modules of one name cannot lie in one folder: {', '.join(sorted(file_of))}")
    return {f"{file_of[name]}.py": module.text(file_of) for name, module in modules.items()}
