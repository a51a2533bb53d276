"""Python on the pages compiles, and every name, call and keyword of bdm in it is a real one."""

import ast
import importlib
import inspect
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest
from pages import PAGES, ROOT, blocks


@dataclass(frozen=True)
class Instance:
    """An object of a class, as far as reading code tells."""

    of: type


class Reader:
    """Follows a page's code as far as names of bdm and diffusers go.

    What it does not know is None, and nothing is said of it.
    """

    def __init__(self):
        self.names: dict[str, Any] = {}

    def read(self, tree):
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    self.names[alias.asname or alias.name] = importlib.import_module(alias.name)
            elif isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    self.names[alias.asname or alias.name] = getattr(module, alias.name)
            elif isinstance(node, ast.Assign):
                value = self.value(node.value)
                for target in node.targets:
                    if isinstance(target, ast.Name):
                        self.names[target.id] = value
            elif isinstance(node, ast.expr):
                self.value(node)

    def value(self, node):
        if isinstance(node, ast.Name):
            return self.names.get(node.id)
        if isinstance(node, ast.Attribute):
            return self.attribute(self.value(node.value), node.attr)
        return self.call(node) if isinstance(node, ast.Call) else None

    def attribute(self, owner, name):
        if owner is None:
            return None
        if not isinstance(owner, Instance):
            return getattr(owner, name)
        member = inspect.getattr_static(owner.of, name, None)
        if member is None:
            assert not ours(owner.of) or is_set(owner.of, name), f"{owner.of.__name__} has no {name}"
            return None
        if isinstance(member, property):
            return instance(returned(member.fget))
        if isinstance(member, classmethod):
            return getattr(owner.of, name)
        return Bound(member, owner.of)

    def call(self, node):
        called = self.value(node.func)
        if called is None:
            return None
        if isinstance(called, Instance):
            called = Bound(called.of.__call__, called.of)
        if not (ours(called)):
            return None
        given = [None] * len(node.args), {word.arg: None for word in node.keywords if word.arg}
        if any(isinstance(arg, ast.Starred) for arg in node.args) or None in (w.arg for w in node.keywords):
            return None
        bind(called, *given)
        if isinstance(called, type):
            return Instance(called)
        if getattr(called, "__name__", "") == "from_pretrained":
            return Instance(called.__self__)
        return instance(returned(called.function if isinstance(called, Bound) else called))


@dataclass(frozen=True)
class Bound:
    """A method of an object."""

    function: Any
    of: type


def is_set(kind, name):
    """Whether objects of a class get an attribute when they are made, as a pipeline gets its parts."""
    bases = [base for base in kind.__mro__ if base is not object]
    annotated = any(name in vars(base).get("__annotations__", {}) for base in bases)
    taken = any(name in inspect.signature(base.__init__).parameters for base in bases)
    return annotated or taken or any(f"self.{name} = " in inspect.getsource(base) for base in bases)


def ours(called):
    function = called.function if isinstance(called, Bound) else called
    return (getattr(function, "__module__", None) or "").split(".")[0] == "bdm"


def returned(function):
    """The class that a function says it returns, or None."""
    try:
        return inspect.get_annotations(function, eval_str=True).get("return")
    except NameError:
        return None


def instance(kind):
    return Instance(kind) if isinstance(kind, type) else None


def bind(called, args, words):
    """Refuse arguments that a function does not take; what goes on to diffusers must be taken there."""
    function, first = (called.function, [None]) if isinstance(called, Bound) else (called, [])
    signature = inspect.signature(function)
    signature.bind(*first, *args, **words)
    if isinstance(called, Bound) and "stock" in signature.parameters:
        stock = next(kind for kind in called.of.__mro__ if kind.__module__.startswith("diffusers"))
        known = signature.parameters.keys() | inspect.signature(stock.__call__).parameters.keys()
        assert words.keys() <= known, words.keys() - known


def check(source, reader):
    reader.read(ast.parse(source))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_on_the_pages(page):
    reader = Reader()
    for block in blocks(page, "python"):
        compile(block.text, str(block), "exec")
        check(block.text, reader)


def test_the_examples_pass_the_same_reading():
    for example in (ROOT / "examples").glob("*.py"):
        check(example.read_text(encoding="utf-8"), Reader())


@pytest.mark.parametrize(
    "line",
    [
        "bdm.BridgePipelin",
        "from bdm.training.loop import no_such_name",
        "bdm.Bridge()",
        "bdm.Approximation(branch_evry=2)",
        'pipe("龙", prompt_english="")',
        'pipe("龙", guidance=2.0)',
        'pipe.plugins.atach("x.pt")',
        'pipe.plugins.detach("x", strength=1.0)',
        "pipe.optimize(size=3)",
        "bdm.Bridge(pipe.branch).atach(pipe.unet)",
    ],
)
def test_a_wrong_line_is_found(line):
    reader = Reader()
    check('import bdm\npipe = bdm.BridgePipeline.from_pretrained("assets/emoji")', reader)
    with pytest.raises((AttributeError, TypeError, AssertionError)):
        check(line, reader)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["drawing.md", "modes.md", "speed.md"])
def test_a_page_runs_from_its_first_block_to_its_last(name, tmp_path):
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    program = "\n".join(block.text for block in blocks(ROOT / "docs" / name, "python"))
    picture = "from PIL import Image\nImage.new('RGB', (64, 64)).save('lantern.png')\n"
    command = [sys.executable, "-c", f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{picture}{program}"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
