"""Imports point one way, along the data flow."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "bdm"


def names(text: str) -> list[str]:
    return text.split()


#: Rooms, from what everything may use to what nothing may use. A module imports from earlier ones or its own.
ROOMS = names("""
    errors extras files shipped config formats parallel text data emoji models method speed plugins pipeline
    convert assemble ship drawing training prepare evaluate plan serving bench cli
""")
#: The same inside of rooms.
INSIDE = {
    "method": names("""
        hooks clock schedule condition parts residuals branch step composed step_texts loss bridge
    """),
    "speed": names("""
        stand_in rows watched kernels recognise approximate packing folding sharing joined_texts joined
        lean_backward bridge optimize
    """),
    "plugins": names("""
        parameters stack words control_images controlnet_hook attachments kind vae checkpoint low_rank adapter
        embedding controlnet registry
    """),
    "pipeline": names("""
        exclusive onlooker inputs groups text_slot texts auto loading reuse parts beside prompts world
        pipelines canvas tiling siblings enlarging modes ip_adapter attention
    """),
    "drawing": names("""
        typed_json other_names request picture_names encodings row_words prompt_lines prompt_file
        picture_info picture_reading a1111_text a1111_values comfy_graph strip_file jobs samplers chosen
        row_jobs known_hashes model_folders library a1111_request modes complete trigger_words model_list
        axes grid sheets attached beside attention_strip painter draw
    """),
    "serving": names("""
        job waiting adapters deputies controls joining preview bound course drawing batch engine
        keys limits uploads names shipping replica replicas ray_replicas history metrics desk answers guard
        events sdapi_bodies sdapi_requests sdapi sdapi_lists openai_images job_routes shelf page app server
    """),
    "parallel": names("processes together whole pieces strategies ray"),
    "plan": names(
        "sizes operations fake_device meta_models meta_recipe fake_step plan drawing_memory report"
    ),
    "training": names("""
        copying averaging observing profiling metrics plots optimizers state_process places pruning
        state_reading states stopping recipes setup changes resuming
        beginning own_data evaluating publishing loop
    """),
}


def check(order: list[str], module: str, target: str, importer: str) -> None:
    assert module in order, f"{importer} has no place in the order; give it one"
    assert order.index(target) <= order.index(module), f"{importer} imports {target}"


def imported(path: Path) -> list[str]:
    """The package's own modules that a file imports, however it says so, as "data.emoji"."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [
                alias.name.removeprefix("bdm.") for alias in node.names if alias.name.startswith("bdm.")
            ]
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
            if node.level:
                here = [*parts[: len(parts) - node.level], *filter(None, [node.module])]
            elif (node.module or "").split(".")[0] == "bdm":
                here = (node.module or "").split(".")[1:]
            else:
                continue
            # Without a module, "from . import x" names modules itself.
            found += [".".join(here)] if here else names
    return found


def imports() -> list[tuple[str, str]]:
    """All (module, what it imports of the package)."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts != ("__init__",):
            found += [(".".join(parts).removesuffix(".__init__"), target) for target in imported(path)]
    return found


def test_rooms_import_one_way():
    for module, target in imports():
        check(ROOMS, module.split(".")[0], target.split(".")[0], module)
    assert len(imports()) > 300


def test_inside_of_rooms_too():
    for module, target in imports():
        room, _, inner = module.partition(".")
        other, _, name = target.partition(".")
        if room == other and room in INSIDE and inner and name:
            check(INSIDE[room], inner.split(".")[0], name.split(".")[0], module)


def test_the_method_knows_nothing_of_speed():
    assert not [pair for pair in imports() if pair[0].startswith("method") and pair[1].startswith("speed")]


def reached(room: str) -> set[str]:
    """All modules that a room's need, through whatever they import."""
    known = {module for module, _ in imports()}
    needs: dict[str, set[str]] = {}
    for module, target in imports():
        while target and target not in known:  # a name inside a module
            target = target.rpartition(".")[0]
        needs.setdefault(module, set()).add(target)
    found = {module for module in known if module.split(".")[0] == room}
    waiting = list(found)
    while waiting:
        more = needs.get(waiting.pop(), set()) - found - {""}
        found |= more
        waiting += more
    return found


def test_a_server_needs_nothing_that_trains():
    rooms = {module.split(".")[0] for module in reached("serving")}
    assert not rooms & {"training", "prepare", "evaluate", "bench", "cli"}
    assert {"drawing", "speed", "plan"} <= rooms


def test_every_way_to_import_is_seen(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.py").write_text(
        "from .. import training\nfrom ..recipes import base\nfrom . import b\nimport bdm.cli.draw\nfrom"
        " bdm.plan import report\n"
    )
    assert imported(tmp_path / "data" / "a.py") == ["training", "recipes", "data", "cli.draw", "plan"]
