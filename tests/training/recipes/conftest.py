"""What the recipes' tests share."""

import pytest
from diffusers import DDIMScheduler, StableDiffusionPipeline
from tiny import make_unet, make_vae

from bdm.models.noise_schedule import SD15_SCHEDULE
from bdm.text.vocabulary import clip_tokenizer


@pytest.fixture
def folders(tmp_path, text_encoder, native):
    """Folders of a tiny backbone and a tiny native text encoder."""
    stock = StableDiffusionPipeline(
        make_vae(), text_encoder, clip_tokenizer(), make_unet(), DDIMScheduler(**SD15_SCHEDULE), None, None,
        requires_safety_checker=False,
    )  # fmt: skip
    stock.save_pretrained(tmp_path / "backbone")
    native.save_pretrained(tmp_path / "native")
    return str(tmp_path / "backbone"), str(tmp_path / "native")
