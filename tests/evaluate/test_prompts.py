"""Any model on one's own texts."""

import json

import pytest
import torch
from PIL import Image

from bdm.config import PromptsConfig, read_evaluation
from bdm.errors import UserError
from bdm.evaluate import prompts
from bdm.evaluate.prompts import evaluate_prompts


class Cosines:
    """Says of picture i that it fits its text by i tenths; of distances how many pictures there were."""

    def __init__(self, scorer, features):
        self.features = features

    def cosines(self, drawn, texts):
        return torch.arange(len(texts)) / 10

    def __call__(self, drawn, texts, real):
        assert drawn.dtype == torch.uint8
        assert all(picture.shape == drawn.shape[1:] for picture in real)
        figures = {"clip_score": self.cosines(drawn, texts).mean().item()}
        return figures | ({"fid": float(len(real))} if self.features else {})


@pytest.fixture
def model(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_a_prompt_file_of_any_kind_is_drawn_scored_and_reported(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prompts, "PictureScores", Cosines)
    rows = [{"prompt": "龙"}, {"nothing": 1}, ["a.png", "月饼", "mooncake", "长", "long", "t", "c"]]
    (tmp_path / "rows.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    (tmp_path / "real").mkdir()
    for i, side in enumerate((40, 90)):
        Image.new("RGB", (side, 50), "red").save(tmp_path / "real" / f"{i}.png")
    (tmp_path / "real" / "bad.png").write_bytes(b"no picture")
    config = PromptsConfig(
        kind="prompts",
        out=tmp_path / "out",
        model=model,
        prompts=str(tmp_path / "rows.json"),
        steps=1,
        scorer="clip",
        features="inception",
        real=str(tmp_path / "real"),
    )
    figures = evaluate_prompts(config)
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1]) == figures
    assert (figures["prompts"], figures["left_out"], figures["fid"]) == (2, 1, 2.0)
    assert figures["clip_score"] == pytest.approx(0.05)
    written = [json.loads(line) for line in (tmp_path / "out/rows.jsonl").read_text().splitlines()]
    assert [(row["prompt"], row["clip_score"]) for row in written] == [("龙", 0.0), ("月饼", 0.1)]
    assert all((tmp_path / "out" / row["file"]).is_file() for row in written)
    report = (tmp_path / "out/report.md").read_text(encoding="utf-8")
    assert "item 2" in report
    assert (tmp_path / "out/grid.png").is_file()


def test_kinds_of_evaluations_are_told_apart(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("kind: prompts\nmodel: m\nout: o\nprompts: [x]\n", encoding="utf-8")
    assert isinstance(read_evaluation(path, []), PromptsConfig)
    with pytest.raises(UserError, match="kind is 'pictures'; allowed are routes, prompts"):
        read_evaluation(path, ["kind=pictures"])
    with pytest.raises(UserError, match="features and real belong together"):
        read_evaluation(path, ["features=x"])
