"""The shape of the code: who imports whom, how long files and argument lists are. It is read, not run."""

import ast
import functools
import graphlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = (  # of lact_kernels, from the top; two folders on one floor know nothing of each other
    ("__init__.py",),
    ("asr", "compat"),
    ("distributed",),
    ("layers",),
    ("ops",),
    ("autograd",),
    ("eager", "triton"),
    ("core",),
)
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
LAZY = {("autograd", "triton"), ("__init__.py", "distributed")}  # imported in functions
WITH_TRANSFORMERS = ("lact_kernels/asr/", "lact_kernels/compat/transformers/")
MOST_LINES = 500
MOST_PARAMETERS = 8

READ = ("lact_kernels", "reference", "ptx_emulator")
OURS = {*READ, "benchmarks", "examples", "tests"}
COMPUTED = "a computed name"


class Import(NamedTuple):
    path: str
    line: int
    module: str  # the path of a file that is read here, otherwise a dotted name
    in_function: bool

    @property
    def package(self) -> str:
        return self.module.split("/")[0].split(".")[0]

    @property
    def folders(self) -> tuple[str, str] | None:
        """The folders of an import within lact_kernels; of its `__init__.py` the file itself."""
        if is_own(self.path) and is_own(self.module):
            return folder(self.path), folder(self.module)
        return None

    def __str__(self) -> str:
        return f"{self.path}:{self.line} imports {self.module}"


def is_own(path: str) -> bool:
    return path.startswith("lact_kernels/")


def folder(path: str) -> str:
    return path.split("/")[1]


class Sources:
    """Files by their paths from the root."""

    def __init__(self, files: dict[str, str]):
        self.files = files
        self.trees = {path: ast.parse(source) for path, source in files.items()}

    @functools.cached_property
    def imports(self) -> list[Import]:
        """Of every file, those inside functions and for type checkers included."""
        found = []
        for path, tree in self.trees.items():
            nodes = [(tree, False)]
            while nodes:
                node, inside = nodes.pop()
                modules = dict.fromkeys(
                    self._file(name) or name for name in self._names(path, node)
                )
                found += [Import(path, node.lineno, module, inside) for module in modules]
                inside |= isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
                nodes += [(child, inside) for child in ast.iter_child_nodes(node)]
        return sorted(found)

    def _names(self, path: str, node: ast.AST) -> list[str]:
        if isinstance(node, ast.Import):
            return [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            above = path.split("/")[: -node.level] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            names = [f"{base}.{alias.name}" for alias in node.names]
            return [name if self._file(name) else base for name in names]
        if isinstance(node, ast.Call):
            function = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if function in ("import_module", "__import__"):
                name = node.args[0] if node.args else None
                return [name.value if isinstance(name, ast.Constant) else COMPUTED]
        return []

    def _file(self, module: str) -> str | None:
        stem = module.replace(".", "/")
        return next((x for x in (f"{stem}.py", f"{stem}/__init__.py") if x in self.files), None)

    @functools.cached_property
    def public(self) -> set[tuple[str, str]]:
        """What users call: what an `__all__` names, as (the file that defines it, its name)."""
        found = set()
        for path, tree in self.trees.items():
            exported = [
                name
                for node in tree.body
                if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
                for name in ast.literal_eval(node.value)
            ]
            found |= {(path, name) for name in exported}
            for node in tree.body:
                if isinstance(node, ast.ImportFrom) and node.module:
                    names = {alias.name for alias in node.names}
                    found |= {(self._file(node.module), name) for name in names & {*exported}}
        return found


def imports_that_climb(sources: Sources) -> Iterator[str]:
    for path in filter(is_own, sources.files):
        if folder(path) not in FLOOR_OF:
            yield f"{path} stands on no floor: give its folder a place in FLOORS"
    for x in sources.imports:
        if x.folders and len({*x.folders}) == 2:
            above, below = (FLOOR_OF.get(name, -1) for name in x.folders)
            if below <= above:
                yield f"{x}, which is not below it: move what both need further down, or hand it in"


def circles_of_imports(sources: Sources) -> Iterator[str]:
    graph = {path: set() for path in sources.files if is_own(path)}
    for x in sources.imports:
        if x.folders:
            graph[x.path].add(x.module)
    while True:
        try:
            return graphlib.TopologicalSorter(graph).prepare()
        except graphlib.CycleError as error:
            circle = error.args[1]
            yield f"{' <- '.join(circle)}: move what closes the circle into a file below both"
            graph[circle[1]].remove(circle[0])  # and look for others


def imports_inside_functions(sources: Sources) -> Iterator[str]:
    """But for optional packages, the Triton backend in autograd, and `distributed` at the very top."""
    required = {*OURS, *sys.stdlib_module_names, "torch", "triton", COMPUTED}
    for x in sources.imports:
        if is_own(x.path) and x.in_function and x.package in required and x.folders not in LAZY:
            yield f"{x} inside a function: import it by its name, at the top of the file"


def imports_of_triton(sources: Sources) -> Iterator[str]:
    for x in sources.imports:
        if is_own(x.path) and folder(x.path) != "triton":
            if x.package == "triton":
                yield f"{x}: only lact_kernels/triton may, all else runs where it is not installed"
            if x.folders and x.folders[1] == "triton" and not (x.folders in LAZY and x.in_function):
                yield f"{x}: only autograd may, inside the function that launches"


def imports_from_outside(sources: Sources) -> Iterator[str]:
    for x in sources.imports:
        own, package = x.path.split("/")[0], x.package
        if package in (own, *sys.stdlib_module_names):
            continue
        if own == "reference" and package != "torch":
            yield f"{x}: the reference is of torch alone, to share nothing with what it is compared to"
        if own == "ptx_emulator" and package in OURS:
            yield f"{x}: the emulator runs anybody's kernels; benchmarks/emulation.py has ours run there"
        if own == "lact_kernels" and package in OURS:
            yield f"{x}, which is not installed with it: move what is needed into lact_kernels"
        if is_own(x.path) and folder(x.path) == "core" and package != "torch":
            yield f"{x}: core needs torch alone, so move what needs more to a floor above"
        may_be_missing = is_own(x.path) and not x.path.startswith(WITH_TRANSFORMERS)
        if may_be_missing and package == "transformers":
            yield f"{x}, an optional package: only {' and '.join(WITH_TRANSFORMERS)} may"


def long_files(sources: Sources) -> Iterator[str]:
    for path, source in sources.files.items():
        lines = source.count("\n")
        if is_own(path) and lines > MOST_LINES:
            yield f"{path} has {lines} lines, more than {MOST_LINES}: cut it in two by what it does"


def long_argument_lists(sources: Sources) -> Iterator[str]:
    """But for kernels, what launches them, registered ops, and what is public.

    A function is public if an `__all__` names it, and so are the methods of a class that one names, but for
    those with one underscore. `self`, `cls` and `ctx` are no arguments of the caller.
    """
    for path in filter(is_own, sources.files):
        nodes = [
            (node, (path, getattr(node, "name", "")) in sources.public)
            for node in sources.trees[path].body
        ]
        while nodes:
            node, is_public = nodes.pop()
            is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            inside = is_public and isinstance(node, ast.ClassDef)
            for child in ast.iter_child_nodes(node):
                name = getattr(child, "name", "_")
                nodes.append((child, inside and (name[0] != "_" or name[:2] == "__")))
            if is_function and not is_public and not _is_exempt(path, node):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                count = len([x for x in arguments if x.arg not in ("self", "cls", "ctx")])
                if count > MOST_PARAMETERS:
                    yield (
                        f"{path}:{node.lineno} {node.name} has {count} parameters, more than"
                        f" {MOST_PARAMETERS}: let those that travel together do so in a NamedTuple"
                    )


def _is_exempt(path: str, function: ast.FunctionDef) -> bool:
    """A registered op; in Triton a kernel, or what launches one or makes a launcher."""
    decorators = {ast.unparse(x).split("(")[0].split(".")[-1] for x in function.decorator_list}
    if "register_op" in decorators:
        return True
    calls = [x.func for x in ast.walk(function) if isinstance(x, ast.Call)]
    launches = any(
        isinstance(x, ast.Subscript) or getattr(x, "id", "").startswith("launch") for x in calls
    )
    return path.startswith("lact_kernels/triton/") and ("jit" in decorators or launches)


BREACHES = {  # of each rule, in a package of a file or two
    imports_that_climb: [
        {"core/a.py": "from lact_kernels import ops", "ops/__init__.py": ""},
        {"eager/a.py": "import lact_kernels.triton.a", "triton/a.py": ""},
        {
            "ops/a.py": "def f():\n  from lact_kernels import distributed",
            "distributed/__init__.py": "",
        },
        {"asr/a.py": "from .. import x", "__init__.py": ""},
        {"attic/a.py": ""},
    ],
    circles_of_imports: [
        {"ops/a.py": "import lact_kernels.ops.b", "ops/b.py": "if True:\n  from . import a"},
    ],
    imports_inside_functions: [
        {"asr/a.py": "def f():\n  import torch.distributed"},
        {"asr/a.py": "f = lambda name: importlib.import_module(name)"},
        {"__init__.py": "def f():\n  import lact_kernels.ops.a", "ops/a.py": ""},
        {"triton/a.py": "def f():\n  import triton"},
    ],
    imports_of_triton: [
        {"eager/a.py": "try:\n  import triton.language as tl\nexcept ImportError: ..."},
        {"autograd/a.py": "from lact_kernels.triton import a", "triton/a.py": ""},
        {"ops/a.py": "def f():\n  from lact_kernels.triton import a", "triton/a.py": ""},
    ],
    imports_from_outside: [
        {"/reference/a.py": "import numpy"},
        {"/reference/a.py": "from lact_kernels import ops"},
        {"/ptx_emulator/a.py": "from tests.cases import x"},
        {"ops/a.py": "import reference.a"},
        {"core/a.py": "import numpy as np"},
        {"layers/a.py": "import transformers"},
    ],
    long_files: [{"ops/a.py": "\n" * 501}],
    long_argument_lists: [
        {"ops/a.py": "def f(a, b, c, d, e, f, g, h, i): ..."},
        {
            "ops/a.py": "__all__ = ['C']\nclass C:\n  def _f(self, a, b, c, d, e, f, g, h, *, i): ..."
        },
        {"triton/a.py": "def f(a, b, c, d, e, f, g, h, i): return g(a)"},
        {"ops/a.py": "__all__ = ['f']\ndef f():\n  def g(a, b, c, d, e, f, g, h, i): ..."},
    ],
}
IN_ORDER = {
    "__init__.py": "from lact_kernels.ops.a import f\n__all__ = ['f']\ndef g():\n"
    "  import lact_kernels.distributed",
    "distributed/__init__.py": "from lact_kernels.core import a\nimport torch.distributed",
    "asr/a.py": "def f():\n  import tqdm\n  import transformers",
    "ops/a.py": "from lact_kernels.autograd.a import f as op\ndef f(a, b, c, d, e, f, g, h, i): ...",
    "autograd/a.py": "@register_op('f')\n"
    "def f(a, b, c, d, e, f, g, h, i):\n  from lact_kernels.triton import a",
    "triton/a.py": "import triton\ndef f(a, b, c, d, e, f, g, h, i): k[(1,)](a)",
    "core/a.py": "import torch, math",
    "/reference/a.py": "import math\nimport torch\nfrom reference import b",
    "/ptx_emulator/a.py": "import numpy, triton",
}


def sources_of(files: dict[str, str]) -> Sources:
    return Sources(
        {path[1:] if path[0] == "/" else f"lact_kernels/{path}": x for path, x in files.items()}
    )


@functools.cache
def this_code() -> Sources:
    paths = sorted(path for folder in READ for path in (ROOT / folder).rglob("*.py"))
    return Sources({path.relative_to(ROOT).as_posix(): path.read_text() for path in paths})


@pytest.mark.parametrize("rule", BREACHES, ids=lambda rule: rule.__name__)
def test_there_are_no(rule):
    breaches = list(rule(this_code()))
    if breaches:
        pytest.fail("\n".join(breaches), pytrace=False)


@pytest.mark.parametrize("rule", BREACHES, ids=lambda rule: rule.__name__)
def test_they_would_be_found(rule):
    assert [files for files in BREACHES[rule] if not list(rule(sources_of(files)))] == []
    assert list(rule(sources_of(IN_ORDER))) == []


def test_all_of_the_package_is_read():
    assert {path.split("/")[0] for path in this_code().files} == {*READ}
    assert {folder(path) for path in this_code().files if is_own(path)} == {*FLOOR_OF}
