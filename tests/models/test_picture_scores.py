"""What other models say of pictures."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import Dataset
from transformers import ChineseCLIPConfig, ChineseCLIPModel

from bdm import extras
from bdm.errors import UserError
from bdm.models.caption_score import CaptionScorer
from bdm.models.picture_scores import PictureScores


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A tiny whole Chinese CLIP."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = ChineseCLIPConfig(
        text_config=dict(vocab_size=21128, **sizes),
        vision_config=dict(image_size=32, patch_size=16, **sizes),
        projection_dim=8,
    )
    path = tmp_path_factory.mktemp("clip")
    ChineseCLIPModel(config).save_pretrained(path)
    return str(path)


def pictures(count):
    return torch.randint(256, (count, 3, 16, 16), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def test_the_clip_score_is_the_mean_cosine_however_many_at_once(clip, monkeypatch):
    texts = ["龙", "月饼", "红灯笼", "猫", "狗"]
    expected = CaptionScorer(clip)(pictures(5), texts).mean().item()
    monkeypatch.setattr("bdm.models.picture_scores.AT_ONCE", 2)
    scores = PictureScores(clip, None)
    assert scores(pictures(5), texts) == {"clip_score": pytest.approx(expected, abs=1e-5)}
    assert PictureScores(None, None).cosines(pictures(2), ["a", "b"]).isnan().all()


def test_distances_are_asked_of_torch_fidelity_with_the_given_file(tmp_path, monkeypatch):
    asked = {}

    def calculate(**options):
        asked.update(options)
        return {"frechet_inception_distance": 3.0, "kernel_inception_distance_mean": 0.5, "other": 1}

    monkeypatch.setitem(sys.modules, "torch_fidelity", SimpleNamespace(calculate_metrics=calculate))
    monkeypatch.setattr(extras, "is_installed", lambda module: True)
    file = tmp_path / "inception.pth"
    file.write_bytes(b"")
    real = list(pictures(3))
    figures = PictureScores(None, str(file))(pictures(4), ["x"] * 4, real)
    assert figures == {"fid": 3.0, "kid": 0.5}
    assert asked["feature_extractor_weights_path"] == str(file)
    assert asked["kid_subset_size"] == 3
    assert (asked["fid"], asked["kid"], asked["cuda"], asked["cache"]) == (True, True, False, False)
    for name, expected in (("input1", pictures(4)), ("input2", real)):
        given = asked[name]
        assert isinstance(given, Dataset)
        assert all(torch.equal(given[i], expected[i]) for i in range(len(given)))
    assert PictureScores(None, str(file))(pictures(4), ["x"] * 4, real[:1]) == {}
    with pytest.raises(UserError, match="is no file"):
        PictureScores(None, str(tmp_path / "none.pth"))
