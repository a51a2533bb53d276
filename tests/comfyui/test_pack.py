"""What lies beside the nodes: their Chinese labels, the example workflow, what the registry reads."""

import json
import tomllib
from pathlib import Path

import pytest

import bdm

PACK = Path(__file__).parents[2] / "comfyui"
WORKFLOWS = sorted((PACK / "example_workflows").glob("*.json"))
#: Inputs and outputs of ComfyUI's own nodes that workflows use, by their kinds.
STOCK = {
    "CheckpointLoaderSimple": ([], ["MODEL", "CLIP", "VAE"], 1),
    "CLIPTextEncode": (["CLIP"], ["CONDITIONING"], 1),
    "EmptyLatentImage": ([], ["LATENT"], 3),
    "KSampler": (["MODEL", "CONDITIONING", "CONDITIONING", "LATENT"], ["LATENT"], 7),
    "VAEDecode": (["LATENT", "VAE"], ["IMAGE"], 0),
    "SaveImage": (["IMAGE"], [], 1),
}
WIDGETS = ("STRING", "FLOAT")


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def links_and_widgets(node):
    """(names of inputs that are linked, with their kinds; names of the others)."""
    required = node.INPUT_TYPES()["required"]
    widgets = [name for name, (kind, *_) in required.items() if isinstance(kind, list) or kind in WIDGETS]
    return {name: kind for name, (kind, *_) in required.items() if name not in widgets}, widgets


def test_every_label_has_a_chinese_one(pack):
    labels, main = (read(PACK / f"locales/zh/{name}.json") for name in ("nodeDefs", "main"))
    assert labels.keys() == pack.NODE_CLASS_MAPPINGS.keys() == pack.NODE_DISPLAY_NAME_MAPPINGS.keys()
    for name, node in pack.NODE_CLASS_MAPPINGS.items():
        theirs, required = labels[name], node.INPUT_TYPES()["required"]
        assert theirs["inputs"].keys() == required.keys()
        for said, (_, *options) in zip(theirs["inputs"].values(), required.values()):
            assert ("tooltip" in said) == any("tooltip" in each for each in options)
        assert theirs["outputs"].keys() == {str(i) for i in range(len(node.RETURN_TYPES))}
        assert node.CATEGORY in main["nodeCategories"]
        assert len(node.RETURN_NAMES) == len(node.RETURN_TYPES)
        assert callable(getattr(node, node.FUNCTION))
    texts = json.dumps(labels, ensure_ascii=False)
    assert sum("\u4e00" <= letter <= "\u9fff" for letter in texts) > 200


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_are_of_known_nodes_and_their_links_fit(pack, path):
    workflow = read(path)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    used = {node["type"] for node in nodes.values()}
    assert used <= STOCK.keys() | pack.NODE_CLASS_MAPPINGS.keys()
    assert pack.NODE_CLASS_MAPPINGS.keys() <= used
    for node in nodes.values():
        inputs = [each["type"] for each in node["inputs"]]
        outputs = [each["type"] for each in node["outputs"]]
        if node["type"] in STOCK:
            assert (inputs, outputs, len(node["widgets_values"])) == STOCK[node["type"]]
            continue
        ours = pack.NODE_CLASS_MAPPINGS[node["type"]]
        links, widgets = links_and_widgets(ours)
        assert {each["name"]: each["type"] for each in node["inputs"]} == links
        assert outputs == list(ours.RETURN_TYPES)
        assert len(node["widgets_values"]) == len(widgets)
    for number, source, slot, target, into, kind in workflow["links"]:
        out, inward = nodes[source]["outputs"][slot], nodes[target]["inputs"][into]
        assert number in out["links"]
        assert inward["link"] == number
        assert out["type"] == inward["type"] == kind
    assert all(each["link"] is not None for node in nodes.values() for each in node["inputs"])


def test_the_registry_is_told_what_it_asks_for():
    said = tomllib.loads((PACK / "pyproject.toml").read_text(encoding="utf-8"))
    project = said["project"]
    assert {"PublisherId", "DisplayName"} <= said["tool"]["comfy"].keys()
    assert project["version"] == bdm.__version__
    needs = (PACK / "requirements.txt").read_text(encoding="utf-8").split()
    assert project["dependencies"] == needs == [f"bdm>={bdm.__version__}"]


def test_the_wheel_of_the_library_does_not_hold_the_pack():
    root = PACK.parent
    build = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]
    assert build["targets"]["wheel"]["packages"] == ["bdm"]
    assert not any("comfy" in name for name in build["targets"]["wheel"]["force-include"])
    assert "/comfyui" in build["targets"]["sdist"]["include"]


def test_the_readme_has_both_languages_and_names_every_node(pack):
    english, chinese = (PACK / "README.md").read_text(encoding="utf-8").split("\n## 中文\n")
    for name in pack.NODE_DISPLAY_NAME_MAPPINGS.values():
        assert name in english
    for each in read(PACK / "locales/zh/nodeDefs.json").values():
        assert each["display_name"] in chinese
