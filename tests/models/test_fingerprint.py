"""A branch is used on the latents that it learned; what its card does not say is not held against it."""

import json
from pathlib import Path

import pytest
import torch
from tiny import make_vae

from bdm.errors import UserError
from bdm.models.backbone import load_vae
from bdm.models.fingerprint import refuse_other_vae, same_latents, vae_sketch
from bdm.pipeline import BridgePipeline

ASSETS = Path(__file__).parents[2] / "assets"


def scaled(factor):
    torch.manual_seed(0)
    vae = make_vae()
    vae.load_state_dict({name: factor * weight for name, weight in vae.state_dict().items()})
    return vae


def test_half_precision_and_further_training_leave_the_latents_and_others_do_not():
    own = vae_sketch(scaled(1.0))
    assert same_latents(own, vae_sketch(scaled(1.0).half()))
    assert same_latents(own, vae_sketch(scaled(1.02)))
    assert not same_latents(own, vae_sketch(scaled(2.0)))
    assert not same_latents(own | {"scaling_factor": 2 * own["scaling_factor"]}, own)
    assert not same_latents(own | {"norms": own["norms"][1:]}, own)
    decoder = scaled(1.0)
    decoder.decoder.conv_in.weight.mul_(2)
    assert vae_sketch(decoder) == own


@pytest.mark.parametrize(
    "said", [None, {}, {"vae": "x"}, {"vae": {"norms": ["a"]}}, {"vae": {"norms": [1.0]}}]
)
def test_a_card_that_says_nothing_passes(tmp_path, said):
    if said is not None:
        (tmp_path / "card.json").write_text(json.dumps(said))
    refuse_other_vae(tmp_path, scaled(1.0), "the model")


def test_the_shipped_branch_says_which_latents_it_learned():
    card = json.loads((ASSETS / "emoji/branch/card.json").read_text())
    own = vae_sketch(load_vae(str(ASSETS / "emoji/vae")))
    assert card["vae"]["norms"] == pytest.approx(own["norms"], abs=2e-4)
    refuse_other_vae(ASSETS / "emoji/branch", load_vae(str(ASSETS / "emoji/vae")), "assets/emoji")
    with pytest.raises(UserError, match="latents of another VAE than the large world's"):
        refuse_other_vae(ASSETS / "emoji/branch", load_vae(str(ASSETS / "emoji_64/vae")), "the large world")


def test_a_pipeline_refuses_a_branch_of_other_latents_unless_its_vae_is_given(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    sketch = vae_sketch(pipe.vae)
    other = sketch | {"norms": [2 * norm for norm in sketch["norms"]]}
    (tmp_path / "branch/card.json").write_text(json.dumps({"vae": other}))
    with pytest.raises(UserError, match="latents of another VAE"):
        BridgePipeline.from_pretrained(tmp_path)
    BridgePipeline.from_pretrained(tmp_path, vae=pipe.vae)
    (tmp_path / "branch/card.json").write_text(json.dumps({"vae": sketch}))
    BridgePipeline.from_pretrained(tmp_path)
