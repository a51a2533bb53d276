"""What people and other programs call the parts of a request, and what they are called here."""

from __future__ import annotations

import re

#: Names of others -> ours. Dashes, blanks and capitals make no difference.
_OURS = {
    "negative_prompt": "negative",
    "uc": "negative",
    "english_prompt": "prompt_en",
    "en": "prompt_en",
    "negative_prompt_en": "negative_en",
    "english_negative_prompt": "negative_en",
    "cfg_scale": "guidance",
    "cfg": "guidance",
    "guidance_scale": "guidance",
    "sampler_name": "sampler",
    "sampling_method": "sampler",
    "scheduler": "schedule",
    "schedule_type": "schedule",
    "num_inference_steps": "steps",
    "sampling_steps": "steps",
    "noise_seed": "seed",
    "clipskip": "clip_skip",
    "filename": "file",
    "提示词": "prompt",
    "正向提示词": "prompt",
    "负面提示词": "negative",
    "反向提示词": "negative",
    "英文提示词": "prompt_en",
    "种子": "seed",
    "步数": "steps",
    "宽": "width",
    "高": "height",
    "采样器": "sampler",
    "文件名": "file",
}
#: Options of the command that are no fields of a row.
_OPTIONS = {
    "init_image": "image",
    "init_img": "image",
    "input_image": "image",
    "mask_image": "mask",
    "denoising_strength": "strength",
    "denoise": "strength",
    "hr_scale": "hires",
    "hires_upscale": "hires",
    "upscale_by": "hires",
    "hr_upscaler": "upscaler",
    "hires_upscaler": "upscaler",
    "hr_second_pass_steps": "hires_steps",
    "n_iter": "count",
    "batch_count": "count",
    "n_samples": "count",
    "num_images_per_prompt": "count",
    "ckpt": "checkpoint",
    "ckpt_name": "checkpoint",
    "lora_name": "lora",
    "vae_name": "vae",
    "control_net": "controlnet",
    "control_net_name": "controlnet",
    "preprocessor": "annotator",
    "prompts_file": "prompts",
    "from_file": "prompts",
    "output": "out",
    "outdir": "out",
}


def our_name(name: str) -> str:
    """A name of a row's field as it is called here, if it is known."""
    plain = _plain(name)
    return _OURS.get(plain, plain)


def our_option(option: str) -> str:
    """An option of a command line as it is called here, if it is known: "--cfg_scale" is "--guidance"."""
    plain = _plain(option)
    return f"--{(_OURS | _OPTIONS).get(plain, plain).replace('_', '-')}"


def _plain(name: str) -> str:
    return re.sub(r"[\s\-]+", "_", str(name).strip().lstrip("-").lower())
