"""What drawing takes: figures from shapes alone, against an independent count."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bdm.cli import main
from bdm.errors import UserError
from bdm.plan.drawing_memory import draw_stages, drawing_memory
from bdm.plan.sizes import CUDA_CONTEXT


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from diffusers import DDIMScheduler
    from tiny import make_native, make_text_encoder, make_unet, make_vae

    from bdm.method.branch import BranchModel
    from bdm.models.noise_schedule import SD15_SCHEDULE
    from bdm.pipeline import BridgePipeline
    from bdm.text.vocabulary import clip_tokenizer

    unet, native = make_unet(), make_native()
    branch = BranchModel.from_backbone(unet, native.text_dim)
    pipe = BridgePipeline(
        make_vae(),
        make_text_encoder(),
        clip_tokenizer(),
        unet,
        DDIMScheduler(**SD15_SCHEDULE),
        branch,
        native,
    )
    path = tmp_path_factory.mktemp("memory") / "model"
    pipe.save_pretrained(path)
    return path, pipe


def settings(folder, count=2, size=128, dtype=torch.float32):
    found = drawing_memory(str(folder), str(folder / "native_text_encoder"), size, size, count, dtype)
    return {s.how: s.peak - CUDA_CONTEXT for s in found}


def bytes_of(module, size=4):
    return size * sum(p.numel() for p in module.parameters()) + sum(
        b.numel() * b.element_size() for b in module.buffers()
    )


def test_weights_are_those_of_the_models(folder):
    path, pipe = folder
    stages = draw_stages(str(path), str(path / "native_text_encoder"), (8, 8), 1, torch.float32)
    weights = {name: size for stage in stages.values() for name, size in stage.weights.items()}
    assert weights.keys() == {"native_text_encoder", "text_encoder", "unet", "branch", "vae"}
    for name, size in weights.items():
        assert size == pytest.approx(bytes_of(getattr(pipe, name)), rel=0.01), name
    half = draw_stages(str(path), str(path / "native_text_encoder"), (8, 8), 1, torch.float16)
    assert half["step"].weights["unet"] == pytest.approx(weights["unet"] / 2, rel=0.01)


class LiveBytes(TorchDispatchMode):
    """Counts what the results of real operations hold while they are alive, and the largest convolution's
    tensors.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = self.convolution = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            tensors = [t for t in (*args, result) if isinstance(t, torch.Tensor)]
            self.convolution = max(self.convolution, sum(t.numel() * t.element_size() for t in tensors))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage.data_ptr() not in self.known:
                self.known.add(storage.data_ptr())
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.forget, storage.data_ptr(), storage.nbytes())
        return result

    def forget(self, address, size):
        self.known.discard(address)
        self.live -= size


@torch.no_grad()
def test_decoding_takes_what_a_real_one_holds(folder):
    path, pipe = folder
    stages = draw_stages(str(path), str(path / "native_text_encoder"), (16, 16), 2, torch.float32)
    for mode, decoding in ((pipe.vae.disable_slicing, "whole"), (pipe.vae.enable_slicing, "sliced")):
        mode()
        latents = torch.randn(2, 4, 16, 16)
        with LiveBytes() as counted:
            pipe.vae.decode(latents)
        own = latents.numel() * 4
        assert stages[decoding].working == pytest.approx(
            counted.peak + own + counted.convolution, rel=0.05
        ), decoding
    pipe.vae.disable_slicing()


def test_settings_save_memory_in_their_order(folder):
    path, _ = folder
    peaks = settings(path)
    plain, sliced = peaks["pipe.to('cuda')"], peaks["pipe.vae.enable_slicing()"]
    model, layers = peaks["pipe.enable_model_cpu_offload()"], peaks["pipe.enable_sequential_cpu_offload()"]
    assert layers < model < plain
    assert sliced <= plain
    assert settings(path, count=4)["pipe.to('cuda')"] > plain
    assert settings(path, dtype=torch.float16)["pipe.to('cuda')"] == pytest.approx(plain / 2, rel=0.05)


@pytest.mark.parametrize("wrong", [dict(size=60), dict(size=32), dict(count=0)])
def test_impossible_sizes_are_refused(folder, wrong):
    with pytest.raises(UserError, match="multiples of 8"):
        settings(folder[0], **wrong)


def test_command_prints_a_line_for_each_setting(folder, capsys):
    path, _ = folder
    arguments = [
        "--backbone",
        str(path),
        "--native-text-encoder",
        str(path / "native_text_encoder"),
        "--width",
        "64",
        "--height",
        "64",
    ]
    assert main(["memory", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9
    assert "4 GB" in lines[1]


def test_a_controlnet_holds_its_residuals_until_the_decoder_has_read_them(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "m")
    folder = str(tmp_path / "m")
    steps = [
        draw_stages(folder, f"{folder}/native_text_encoder", (16, 16), 2, torch.float32, count)["step"]
        for count in range(3)
    ]
    assert set(steps[2].weights) == {"unet", "branch", "controlnet 1", "controlnet 2"}
    unet, held = pipe.unet.config, 0
    for i, width in enumerate(unet["block_out_channels"]):
        here = width * (16 >> i) ** 2
        last = i == len(unet["block_out_channels"]) - 1
        held += unet["layers_per_block"] * here + (here if last else here // 4)
    held += unet["block_out_channels"][0] * 16**2
    held *= 4 * 4  # four samples of single precision
    assert steps[1].working >= steps[0].working + held
    assert steps[1].working <= steps[2].working <= steps[1].working + 3 * held
