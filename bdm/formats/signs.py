"""Signs in and beside a single file that change what its weights mean.

Other programs heed the same ones: tensors that are only there to be found, texts in the header, a yaml of the
same name, values of the noise schedule. Where two signs contradict each other the file is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError, first_line, printable
from .header import WeightFile
from .noise import SD15_NOISE, Noise

if TYPE_CHECKING:
    from torch import Tensor

#: Tensors that say something by being there, and what.
MARKERS: dict[str, tuple[str, Any]] = {
    "v_pred": ("prediction_type", "v_prediction"),
    "ztsnr": ("rescale_betas_zero_snr", True),
}
#: Last parts of the names of header texts that name what is predicted, or say yes or no to one of ours.
_PREDICTIONS = ("prediction_type", "predict_type", "predict_key", "prediction", "parameterization")
_YES_OR_NO = {
    "v_parameterization": "prediction_type",
    "v_prediction": "prediction_type",
    "v_pred": "prediction_type",
    "zero_terminal_snr": "rescale_betas_zero_snr",
    "rescale_betas_zero_snr": "rescale_betas_zero_snr",
    "zsnr": "rescale_betas_zero_snr",
    "ztsnr": "rescale_betas_zero_snr",
}
_EPSILON = ("epsilon", "eps", "noise")
_VELOCITY = ("v", "v_prediction", "v-prediction", "vpred", "v_pred", "velocity")
#: What trainers note of the base of an adapter, and how other families' names begin; None where it is yes or
#: no. Convolutions of SD2 have SD1.5's shapes.
_OTHER_BASES: dict[str, tuple[str, ...] | None] = {
    "ss_v2": None,
    "ss_base_model_version": ("sd_v2", "sdxl", "sd_xl", "sd3", "flux"),
    "modelspec.architecture": ("stable-diffusion-v2", "stable-diffusion-xl", "stable-diffusion-3", "flux"),
}
#: How a yaml of the original program names what is ours, and its SD1.5 value where ours has none.
_YAML = {"linear_start": "beta_start", "linear_end": "beta_end", "timesteps": "num_train_timesteps"}
_LATENT_SCALE = 0.18215
#: A yaml of a model has about 2 kB.
_LARGEST_YAML = 1 << 18


@dataclass(frozen=True)
class Claim:
    """What one sign says.

    Attributes:
        name: setting of ``Noise``.
        value: of the setting.
        where: the sign, for messages.
    """

    name: str
    value: Any
    where: str


def file_noise(file: WeightFile, kept: Mapping[str, Any] | None = None) -> Noise:
    """What the signs in and beside a file say of its denoiser's noise; SD1.5's where there are none.

    Args:
        file: a checkpoint's; with its values, unless the schedule's are not to be looked at.
        kept: settings that this library keeps in headers.

    Raises:
        UserError: two signs contradict each other, or one says what this library cannot do.
    """
    claims = [
        *_of_tensors(file),
        *metadata_claims(file),
        *_of_yaml(file.path),
        *(Claim(name, value, "its own header") for name, value in (kept or {}).items()),
    ]
    return Noise.of({claim.name: claim.value for claim in _settled(claims, file.path).values()}, file.path)


def _settled(claims: Iterable[Claim], path: Path) -> dict[str, Claim]:
    """The claims by the setting that they are on, the first of each.

    Raises:
        UserError: two contradict each other.
    """
    said: dict[str, Claim] = {}
    for claim in claims:
        other = said.setdefault(claim.name, claim)
        if other.value != claim.value:
            raise UserError(
                f"{path}: {other.where} says {claim.name} {printable(other.value, 40)}, and {claim.where}"
                f" says {printable(claim.value, 40)}; remove the one that is wrong"
            )
    return said


def refuse_other_base(file: WeightFile) -> None:
    """Refuse an adapter that its trainer notes to be another model family's, though its shapes may fit.

    Raises:
        UserError: names the sign.
    """
    for key, starts in _OTHER_BASES.items():
        text = str(file.metadata.get(key, "")).strip()
        where = f"{key} in its header"
        other = says_yes(text, file.path, where) if starts is None else text.lower().startswith(starts)
        if other:
            raise UserError(
                f"{file.path}: {where} says {printable(text, 60)!r}, which is another model family than"
                " SD1.5; use an adapter made for SD1.5"
            )


def refuse_other_noise(file: WeightFile, ours: Noise) -> None:
    """Refuse an adapter that was trained on a denoiser which predicts something else, if its header says so.

    Args:
        file: the adapter's.
        ours: what the denoiser expects that it is to change.

    Raises:
        UserError: names the sign and both values; two signs contradict each other.
    """
    for name, claim in _settled(metadata_claims(file), file.path).items():
        # Trainers note that there was no noise alone whether or not anybody thought of it, and nothing that
        # was learnt on the other steps is wrong for a backbone that has one step more.
        if claim.value is not False and claim.value != ours.settings[name]:
            raise UserError(
                f"{file.path}: {claim.where} says that it is made for {name} {claim.value}, not"
                f" {ours.settings[name]}, which this pipeline's scheduler is set to; use one made for"
                " that, or a backbone and a scheduler of its kind"
            )


def is_of_trainer(key: str) -> bool:
    """Whether a header's text is a trainer's note on its file, or says what the weights mean."""
    return key.startswith(("ss_", "modelspec.")) or _last(key) in (*_PREDICTIONS, *_YES_OR_NO)


def _last(key: str) -> str:
    return key.rpartition(".")[2].removeprefix("ss_").lower()


def metadata_claims(file: WeightFile) -> Iterator[Claim]:
    """What the texts in a file's header say of the noise.

    Raises:
        UserError: a value that has no meaning here.
    """
    for key, text in file.metadata.items():
        name = _last(key)
        where = f"{printable(key, 80)} in its header"
        if name in _PREDICTIONS:
            yield Claim("prediction_type", _prediction(text, file.path, where), where)
        elif name in _YES_OR_NO:
            yes = says_yes(text, file.path, where)
            if _YES_OR_NO[name] == "prediction_type":
                yield Claim("prediction_type", "v_prediction" if yes else "epsilon", where)
            else:
                yield Claim(_YES_OR_NO[name], yes, where)


def _prediction(text: Any, path: Path, where: str) -> str:
    word = str(text).strip().strip("\"'").lower()
    if word in _EPSILON:
        return "epsilon"
    if word in _VELOCITY:
        return "v_prediction"
    raise UserError(
        f"{path}: {where} says {printable(text, 40)!r} is predicted; this library draws with epsilon and v"
    )


def says_yes(text: Any, path: Path, where: str) -> bool:
    """Whether a setting says yes, in any spelling.

    Raises:
        UserError: it says neither yes nor no.
    """
    word = str(text).strip().lower()
    if word in ("true", "yes", "1", "on"):
        return True
    if word in ("false", "no", "0", "off", "none", ""):
        return False
    raise UserError(
        f"{path}: {where} says {printable(text, 40)!r}, neither true nor false; get the file again"
    )


def _of_tensors(file: WeightFile) -> Iterator[Claim]:
    for key in MARKERS:
        if key in file.tensors or key in file.others:  # beside a pickle's weights
            yield Claim(*MARKERS[key], f"its tensor {key}")
    _check_scale(file)
    for name in ("alphas_cumprod", "betas"):
        # That it is SD1.5's own contradicts no marker: other programs rescale it when they find one.
        if name in file.tensors and _ends_in_noise(file, name):
            yield Claim("rescale_betas_zero_snr", True, f"its tensor {name}")


def _check_scale(file: WeightFile) -> None:
    """Refuse a checkpoint whose latents have another scale than SD1.5's."""
    scale = file.tensors.get("scale_factor")
    if scale is None or scale.is_meta:
        return
    if scale.numel() != 1 or not abs(scale.item() - _LATENT_SCALE) < 1e-3:
        raise UserError(
            f"{file.path}: its scale_factor is {printable(scale.tolist(), 40)}, SD1.5's is {_LATENT_SCALE};"
            " models of that kind cannot be used"
        )


def _ends_in_noise(file: WeightFile, name: str) -> bool:
    """Whether a schedule kept beside the weights ends in noise alone; False where its values were not read.

    Raises:
        UserError: it is neither SD1.5's nor that one rescaled.
    """
    given = file.tensors[name]
    if given.is_meta or _near(given, _schedule(zero_snr=False)[name]):
        return False
    if _near(given, _schedule(zero_snr=True)[name]):
        return True
    raise UserError(
        f"{file.path}: its {name} are another noise schedule than SD1.5's; models of that kind cannot be used"
    )


def _near(given: Tensor, known: Tensor) -> bool:
    """Equal but for rounding to half precision."""
    import torch

    if given.shape != known.shape or not given.is_floating_point():
        return False
    return torch.allclose(given.double(), known, rtol=0.01, atol=2e-4)


def _schedule(zero_snr: bool) -> dict[str, Tensor]:
    """SD1.5's betas and the products of what they leave, or both rescaled (arXiv 2305.08891, algorithm 1)."""
    import torch

    start, end = math.sqrt(SD15_NOISE.beta_start), math.sqrt(SD15_NOISE.beta_end)
    betas = torch.linspace(start, end, SD15_NOISE.num_train_timesteps, dtype=torch.float64) ** 2
    products = (1 - betas).cumprod(0)
    if zero_snr:
        roots = products.sqrt()
        roots = (roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))
        products = roots**2
        betas = 1 - products / torch.cat([torch.ones(1, dtype=torch.float64), products[:-1]])
    return {"betas": betas, "alphas_cumprod": products}


def yaml_beside(path: Path) -> tuple[Path, dict[str, Any]] | None:
    """The yaml of a file's name that describes its model, and the parameters that it gives the model.

    None where there is none, or one that describes no model.

    Raises:
        UserError: it cannot be read.
    """
    import yaml

    endings = (".yaml", ".yml", ".YAML", ".YML")
    beside = next((p for p in map(path.with_suffix, endings) if p.is_file()), None)
    if beside is None or beside == path:
        return None
    try:
        if beside.stat().st_size > _LARGEST_YAML:
            raise UserError(f"{beside} is too large to describe {path.name}; move one of them")
        content = yaml.safe_load(beside.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{beside}, which lies beside {path.name} and may describe it, cannot be read"
            f" ({first_line(error)}); mend it or move it away"
        ) from None
    model = content.get("model") if isinstance(content, dict) else None
    parameters = model.get("params") if isinstance(model, dict) else None
    return (beside, parameters) if isinstance(parameters, dict) else None


def _of_yaml(path: Path) -> Iterator[Claim]:
    found = yaml_beside(path)
    if found is None:
        return
    beside, parameters = found
    where = f"{beside.name} beside it"
    for name, value in parameters.items():
        if name in _PREDICTIONS:
            yield Claim("prediction_type", _prediction(value, path, where), where)
        elif name in _YES_OR_NO and _YES_OR_NO[name] != "prediction_type":
            yield Claim(_YES_OR_NO[name], says_yes(value, path, where), where)
        elif name in _YAML:
            yield Claim(_YAML[name], value, where)
        elif name == "beta_schedule" and value != "linear":  # what diffusers calls scaled_linear
            raise UserError(f"{path}: {where} says beta_schedule {printable(value, 40)}; SD1.5's is linear")
        elif name == "scale_factor" and value != _LATENT_SCALE:
            raise UserError(
                f"{path}: {where} says scale_factor {printable(value, 40)}; SD1.5's is {_LATENT_SCALE}"
            )
