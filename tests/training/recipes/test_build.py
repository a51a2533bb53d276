from pathlib import Path

from bdm.config import RunConfig, read_config
from bdm.training.recipes.build import check_model_arguments


def test_arguments_of_shipped_configurations_are_the_models():
    folder = Path(__file__).parents[3] / "configs" / "emoji"
    for name in ("autoencoder", "backbone", "english_clip", "chinese_clip"):
        check_model_arguments(read_config(folder / f"{name}.yaml", [], RunConfig).recipe)
