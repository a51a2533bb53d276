"""Signs that change what a checkpoint's weights mean are heeded or refused, wherever they stand."""

import json
from pathlib import Path

import pytest
import torch
from community_files import same, write_original
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from bdm.convert import convert
from bdm.errors import UserError
from bdm.extras import is_installed
from bdm.formats.checkpoint import CONFIG_KEY, read_parts
from bdm.formats.noise import OWN_DEFAULTS, SCHEDULERS, SD15_NOISE, Noise, folder_noise, read_scheduler
from bdm.formats.signs import file_noise
from bdm.formats.weights import WeightFile, read_tensors, read_weights
from bdm.models.backbone import load_backbone
from bdm.models.noise_schedule import SD15_SCHEDULE
from bdm.models.samplers import SAMPLERS, make_scheduler, other_sampler, scheduler_noise

VELOCITY = Noise("v_prediction")
ZERO = Noise("v_prediction", rescale_betas_zero_snr=True)


@pytest.fixture
def original(pipe, tmp_path):
    """An original-layout file's tensors and texts."""
    return write_original(pipe, tmp_path / "plain.safetensors")


def written(original, path, tensors=None, texts=None):
    weights, metadata = original
    everything = {key: t.contiguous() for key, t in (weights | (tensors or {})).items()}
    if path.suffix == ".safetensors":
        save_file(everything, path, metadata | (texts or {}))
    else:
        torch.save({"state_dict": everything} | metadata | (texts or {}), path)
    return path


EMPTY = torch.empty(0)
SIGNS = [
    ({"v_pred": EMPTY}, {}, VELOCITY),
    ({"v_pred": EMPTY, "ztsnr": EMPTY}, {}, ZERO),
    ({"v_pred": torch.tensor(1.0), "ztsnr": torch.tensor([True])}, {}, ZERO),
    ({}, {"modelspec.prediction_type": "v"}, VELOCITY),
    ({}, {"modelspec.predict_key": "v"}, VELOCITY),
    ({}, {"prediction_type": "v_prediction"}, VELOCITY),
    ({}, {"ss_v_parameterization": "True"}, VELOCITY),
    ({}, {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"}, ZERO),
    ({"v_pred": EMPTY}, {"modelspec.prediction_type": "v"}, VELOCITY),
    ({}, {"modelspec.prediction_type": "epsilon", "ss_v_parameterization": "False"}, Noise()),
    ({}, {"ss_v_parameterization": "None", "title": "v"}, Noise()),
    ({}, {}, Noise()),
]


@pytest.mark.parametrize("ending", [".safetensors", ".ckpt"])
@pytest.mark.parametrize(("tensors", "texts", "noise"), SIGNS)
def test_signs_in_a_file(original, tmp_path, tensors, texts, noise, ending):
    path = written(original, tmp_path / f"a{ending}", tensors, texts)
    assert read_parts(path).noise == noise
    if ending == ".safetensors":
        assert scheduler_noise(load_backbone(path).scheduler) == noise


@pytest.mark.parametrize("ending", [".yaml", ".yml", ".YAML"])
@pytest.mark.parametrize(
    ("parameters", "noise"),
    [
        ('{parameterization: "v"}', VELOCITY),
        ("{parameterization: v, linear_start: 0.00085, linear_end: 0.0120, timesteps: 1000}", VELOCITY),
        ("{parameterization: eps, scale_factor: 0.18215}", Noise()),
        ("{linear_end: 0.02}", Noise(beta_end=0.02)),
        ("{}", Noise()),
    ],
)
def test_a_yaml_beside_a_file(original, tmp_path, ending, parameters, noise):
    path = written(original, tmp_path / "some.model.safetensors")
    path.with_suffix(ending).write_text(f"model:\n  target: x\n  params: {parameters}\n")
    assert scheduler_noise(load_backbone(path).scheduler) == noise


@pytest.mark.parametrize("text", ["model: [1]", "train: {parameterization: v}", "just a text", "", "model:"])
def test_a_yaml_that_describes_no_model_is_no_sign(original, tmp_path, text):
    path = written(original, tmp_path / "a.safetensors")
    (tmp_path / "a.yaml").write_text(text)
    assert read_parts(path).noise == Noise()


@pytest.mark.parametrize(
    ("tensors", "texts", "yaml", "message"),
    [
        ({"v_pred": EMPTY}, {"modelspec.prediction_type": "epsilon"}, None, "remove the one that is wrong"),
        ({"v_pred": EMPTY}, {}, "parameterization: eps", r"v_pred says .*a\.yaml beside it says"),
        ({}, {"modelspec.prediction_type": "x0"}, None, "'x0' is predicted"),
        ({}, {"ss_v_parameterization": "perhaps"}, None, "neither true nor false"),
        ({}, {}, "parameterization: x0", "'x0' is predicted"),
        ({}, {}, "scale_factor: 0.13025", "says scale_factor 0.13025"),
        ({}, {}, "beta_schedule: cosine", "beta_schedule cosine"),
        ({}, {}, "linear_end: many", "beta_end 'many'"),
        ({}, {}, "{", "cannot be read"),
        ({"scale_factor": torch.tensor(0.13025)}, {}, None, "scale_factor is 0.13025"),
        ({"alphas_cumprod": torch.linspace(1, 0, 1000)}, {}, None, "another noise schedule"),
        ({"betas": torch.full((500,), 0.001)}, {}, None, "another noise schedule"),
        ({"edm_mean": torch.zeros(1)}, {}, None, "'edm_mean', and what that means is not known"),
        ({"edm_vpred.sigma_max": torch.zeros(1)}, {}, None, "edm_vpred.sigma_max"),
        ({"difference": torch.ones(())}, {}, None, "'difference'"),
        ({"lora_unet_x.lora_up.weight": torch.zeros(2, 2)}, {}, None, "lora_unet_x"),
        ({"cond_stage_model.transformer.text_model.soft_prompt": torch.zeros(1)}, {}, None, "soft_prompt"),
        ({"model.diffusion_model.gate": torch.zeros(1)}, {}, None, "unknown names, such as gate"),
    ],
)
def test_what_cannot_be_heeded_is_refused_by_name(original, tmp_path, tensors, texts, yaml, message):
    path = written(original, tmp_path / "a.safetensors", tensors, texts)
    if yaml:
        (tmp_path / "a.yaml").write_text(f"model:\n  params:\n    {yaml}\n")
    with pytest.raises(UserError, match=message):
        read_parts(path)


def test_what_trainers_left_does_no_harm(original, tmp_path):
    betas = DDIMScheduler(**SD15_SCHEDULE).betas
    left = {
        "alphas_cumprod": (1 - betas).cumprod(0).half(),
        "betas": betas.bfloat16(),
        "posterior_variance": torch.zeros(1000),
        "model_ema.decay": torch.tensor(0.9),
        "model_ema.diffusion_modelinput_blocks00weight": torch.zeros(3),
        "scale_factor": torch.tensor(0.18215).half(),
        "cond_stage_model.logit_scale": torch.tensor(4.6),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "cond_stage_model.transformer.text_projection.weight": torch.zeros(4, 4),
    }
    parts = read_parts(written(original, tmp_path / "a.safetensors", left))
    assert parts.noise == Noise()
    same(parts.weights["unet"], read_parts(tmp_path / "plain.safetensors").weights["unet"])


def test_a_schedule_that_was_rescaled_is_a_sign():
    """As diffusers rescales it."""
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    betas = rescale_zero_terminal_snr(DDIMScheduler(**SD15_SCHEDULE).betas)
    for tensors in ({"betas": betas}, {"alphas_cumprod": (1 - betas).cumprod(0).half()}):
        noise = file_noise(WeightFile(Path("/no/file"), tensors, {}))
        assert noise == Noise(rescale_betas_zero_snr=True)


@pytest.mark.parametrize("prefix", ["text_encoders.clip_l.transformer.", "clip_l.transformer.", "clip_l."])
def test_text_encoders_under_the_names_of_other_programs(original, tmp_path, prefix):
    weights, metadata = original
    ours = "cond_stage_model.transformer."
    renamed = {key.replace(ours, prefix): t.contiguous() for key, t in weights.items()}
    save_file(renamed, tmp_path / "a.safetensors", metadata)
    expected = read_parts(tmp_path / "plain.safetensors").weights["text_encoder"]
    assert expected
    same(read_parts(tmp_path / "a.safetensors").weights["text_encoder"], expected)


@pytest.mark.parametrize("noise", [VELOCITY, ZERO, Noise(beta_end=0.02)])
def test_conversion_keeps_them_both_ways(pipe, tmp_path, noise):
    scheduler = make_scheduler("DDIM", noise=noise)
    parts = {name: getattr(pipe, name) for name in ("vae", "text_encoder", "tokenizer", "unet")}
    stock = StableDiffusionPipeline(
        **parts, scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    stock.save_pretrained(tmp_path / "folder")
    assert read_parts(tmp_path / "folder").noise == noise
    convert(tmp_path / "folder", tmp_path / "file.safetensors", "original")
    assert scheduler_noise(load_backbone(tmp_path / "file.safetensors").scheduler) == noise
    convert(tmp_path / "file.safetensors", tmp_path / "again", "diffusers")
    assert scheduler_noise(load_backbone(tmp_path / "again").scheduler) == noise
    convert(tmp_path / "again", tmp_path / "back.safetensors", "original")
    same(read_tensors(tmp_path / "back.safetensors"), read_tensors(tmp_path / "file.safetensors"))


def test_converted_files_are_known_to_other_programs(original, tmp_path):
    path = written(original, tmp_path / "a.safetensors", {"v_pred": EMPTY, "ztsnr": EMPTY})
    convert(path, tmp_path / "b.safetensors", "original", torch.float16)
    assert {"v_pred", "ztsnr"} <= load_file(tmp_path / "b.safetensors").keys()
    assert read_weights(tmp_path / "b.safetensors").metadata["modelspec.prediction_type"] == "v"
    plain = read_weights(convert(tmp_path / "plain.safetensors", tmp_path / "c.safetensors", "original"))
    assert not {"v_pred", "ztsnr"} & plain.tensors.keys()
    assert "modelspec.prediction_type" not in plain.metadata


def test_another_sampler_is_for_the_same_model():
    for title in SAMPLERS:
        if title == "LMS" and not is_installed("scipy"):  # its absence is tested with the other extras
            continue
        scheduler = make_scheduler(title, noise=Noise("v_prediction", beta_end=0.02))
        assert scheduler_noise(other_sampler("DDIM", scheduler)) == Noise("v_prediction", beta_end=0.02)
    assert make_scheduler("Euler", "v_prediction").config["prediction_type"] == "v_prediction"


def test_samplers_for_models_that_end_in_noise_alone_begin_there():
    for title in ("DDIM", "Euler", "Euler a", "DPM++ 2M", "DDPM", "UniPC"):
        scheduler = make_scheduler(title, noise=ZERO)
        scheduler.set_timesteps(7)
        assert scheduler.timesteps[0] == 999, title
        assert scheduler.alphas_cumprod[-1] < 1e-6
    with pytest.raises(UserError, match="sampler Heun cannot draw with a model whose last step is noise"):
        make_scheduler("Heun", noise=ZERO)


@pytest.fixture
def folder(tmp_path):
    """Writes a folder that has a scheduler alone."""

    def write(**settings):
        (tmp_path / "scheduler").mkdir(exist_ok=True)
        (tmp_path / "scheduler/scheduler_config.json").write_text(json.dumps(settings))
        return tmp_path

    return write


@pytest.mark.parametrize(
    "name",
    [
        "DiffusionPipeline", "StableDiffusionPipeline", "FlowMatchEulerDiscreteScheduler", "os", "__doc__",
        "EDMEulerScheduler", "SchedulerMixin", "AutoencoderKL", None, 5, ["my_module", "MyScheduler"], "",
    ],
)  # fmt: skip
def test_folders_name_no_class_but_a_known_scheduler(folder, name):
    with pytest.raises(UserError, match="names the scheduler"):
        read_scheduler(folder(_class_name=name, prediction_type="epsilon"))


def here():
    """The schedulers whose packages are installed."""
    return [name for name in SCHEDULERS if name != "LMSDiscreteScheduler" or is_installed("scipy")]


def test_known_schedulers_are_diffusers_own(folder):
    for name in here():
        made = read_scheduler(folder(_class_name=name, prediction_type="v_prediction", auto_map={"x": "y"}))
        assert (type(made).__name__, made.config["prediction_type"]) == (name, "v_prediction")
        assert type(made).__module__.startswith("diffusers.schedulers.")


def test_settings_that_are_left_out_mean_the_same_whether_the_class_is_asked(folder):
    said = {name: SD15_NOISE.settings[name] for name in OWN_DEFAULTS}
    for name in here():
        for more in ({}, {"prediction_type": "v_prediction"}, {"beta_end": 0.02}):
            path = folder(_class_name=name, **said | more)
            assert folder_noise(path) == Noise.of(read_scheduler(path).config, path)
    for left_out in OWN_DEFAULTS:
        rest = {key: value for key, value in said.items() if key != left_out}
        path = folder(_class_name="DDIMScheduler", **rest)
        assert folder_noise(path) == Noise.of(read_scheduler(path).config, path) != SD15_NOISE


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prediction_type": "sample"}, "prediction_type 'sample'; this library draws with"),
        ({"prediction_type": "flow_prediction"}, "prediction_type"),
        ({"prediction_type": None}, "prediction_type 'None'"),
        ({"rescale_betas_zero_snr": "yes"}, "rescale_betas_zero_snr"),
        ({"beta_end": float("nan")}, "beta_end"),
        ({"beta_start": True}, "beta_start"),
        ({"num_train_timesteps": 10**9}, "num_train_timesteps"),
        ({"trained_betas": "x"}, "trained_betas"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas"),
        ({"solver_order": "x", "solver_type": [], "algorithm_type": "?"}, "cannot be used"),
        ({"_class_name": "PNDMScheduler", "rescale_betas_zero_snr": True}, "which a PNDMScheduler cannot do"),
    ],
)
def test_settings_of_schedulers_that_cannot_be(folder, settings, message):
    with pytest.raises(UserError, match=message):
        read_scheduler(folder(**{"_class_name": "DPMSolverMultistepScheduler"} | settings))


def test_signs_of_a_damaged_header(original, tmp_path):
    weights, metadata = original
    kept = json.loads(metadata[CONFIG_KEY])
    for noise, message in (({"prediction_type": 3}, "prediction_type '3'"), ("v", "damaged")):
        text = json.dumps(kept | {"noise": noise})
        save_file(
            {key: t.contiguous() for key, t in weights.items()},
            tmp_path / "a.safetensors",
            {CONFIG_KEY: text},
        )
        with pytest.raises(UserError, match=message):
            read_parts(tmp_path / "a.safetensors")
