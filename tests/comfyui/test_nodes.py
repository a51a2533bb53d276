"""The nodes draw what the pipeline draws, beside whatever else ComfyUI has in a workflow."""

from pathlib import Path

import pytest
import torch
from agreement import outputs_agree
from comfy_sampler import GUIDANCE, STEPS, Sampling, batched, draw, make_model, make_scheduler
from tiny import make_branch, make_unet

from bdm import NativeTextEncoder
from bdm.errors import UserError
from bdm.text.english import encode_english
from bdm.text.rules import OFFICIAL

POSITIVE, NEGATIVE = "红灯笼", "灰色的天空"


@pytest.fixture
def models(pack, pipe, tmp_path):
    """The tiny models in the pack's folders, and a second branch."""
    pipe.branch.save_pretrained(tmp_path / "models/bdm_branches/tiny")
    pipe.native_text_encoder.save_pretrained(tmp_path / "models/bdm_text/tiny")
    torch.manual_seed(11)
    make_branch(pipe.unet).save_pretrained(tmp_path / "models/bdm_branches/others/second")
    return pack


@pytest.fixture
def loaded(models):
    nodes = models.NODE_CLASS_MAPPINGS
    (branch,) = nodes["BDMLoadBranch"]().load("tiny", "auto")
    (text,) = nodes["BDMLoadNativeText"]().load("tiny", "fp32")
    return branch, text


@pytest.fixture
def english(pipe):
    """Both sides' English features as a stock node gives them."""
    told = [encode_english([text], pipe.text_encoder, pipe.tokenizer) for text in ("a lantern", "blurry")]
    return [[[features, {"pooled_output": None}]] for features in told]


@pytest.fixture
def tell(models, loaded, english):
    """Applies the node: ``tell(positive text, scale=..., to=(positive, negative))``."""

    def apply(native=POSITIVE, negative=NEGATIVE, to=None, branch=None, **settings):
        said = dict(scale=1.0, start_percent=0.0, end_percent=1.0) | settings
        node = models.NODE_CLASS_MAPPINGS["BDMBilingualPrompts"]()
        return node.tell(*(to or english), branch or loaded[0], loaded[1], native, negative, **said)

    return apply


@pytest.fixture
def drawn(pipe):
    """Latents of the nodes, and of the pipeline at the same noise."""
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(4))

    def by_nodes(conditionings):
        return draw(make_model(pipe.unet), *conditionings, noise)

    def by_pipeline(native=POSITIVE, negative=NEGATIVE, **settings):
        pipe.scheduler = make_scheduler()
        return pipe(
            native, negative_prompt=negative, prompt_en="a lantern", negative_prompt_en="blurry",
            num_inference_steps=STEPS, guidance_scale=GUIDANCE, latents=noise.clone(), output_type="latent",
            **settings,
        ).images  # fmt: skip

    return by_nodes, by_pipeline


class Other:
    """Another control in the chain; keeps what it is told and adds one number everywhere."""

    def __init__(self, channels=(16,) * 7 + (32,) * 5, sizes=(8, 8, 8, 4, 4, 4, 2, 2, 2, 1, 1, 1), by=0.3):
        self.shapes, self.by, self.told, self.earlier = list(zip(channels, sizes)), by, [], None
        self.previous_controlnet = None

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        self.told.append(cond)
        add = [torch.full((len(x_noisy), width, size, size), self.by) for width, size in self.shapes]
        ours = {"input": [], "middle": [add[-1].clone()], "output": add}
        if self.previous_controlnet is None:
            return ours
        theirs = self.previous_controlnet.get_control(x_noisy, t, cond, batched_number, transformer_options)
        return {key: [a + b for a, b in zip(ours[key], theirs[key])] for key in ours}

    def pre_run(self, model, percent_to_timestep_function):
        if self.previous_controlnet is not None:
            self.previous_controlnet.pre_run(model, percent_to_timestep_function)

    def get_models(self):
        return ["other"]

    def cleanup(self):
        pass


def with_control(conditionings, control):
    return [[[text, {**said, "control": control}] for text, said in side] for side in conditionings]


@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_latents_are_the_pipelines(tell, drawn, scale):
    by_nodes, by_pipeline = drawn
    ours = by_pipeline(branch_scale=scale)
    assert not torch.allclose(ours, by_pipeline(branch_scale=0.0), atol=1e-2)
    outputs_agree(by_nodes(tell(scale=scale)), ours)


def test_prompts_of_other_lengths_are_padded_as_the_pipelines(tell, drawn):
    by_nodes, by_pipeline = drawn
    long = "很长的一句话，" * 12
    outputs_agree(by_nodes(tell(long, "")), by_pipeline(long, ""))
    outputs_agree(
        by_nodes(tell("（红）灯笼", "", rules="official")),
        by_pipeline("（红）灯笼", "", prompt_rules=OFFICIAL),
    )


def test_without_strength_nothing_changes(tell, english):
    positive, negative = tell(scale=0.0)
    assert positive is english[0]
    assert negative is english[1]


def test_what_was_given_is_left_as_it_was(tell, english):
    english[0].append([english[0][0][0], {"area": (1, 1, 0, 0), "model_conds": {"own": 1}}])
    before = [[(text, dict(said)) for text, said in side] for side in english]
    positive, negative = tell()
    assert [[(text, said) for text, said in side] for side in english] == before
    assert positive[1][1]["area"] == (1, 1, 0, 0)
    assert positive[1][1]["model_conds"]["own"] == 1
    controls = [said["control"] for side in (positive, negative) for _, said in side]
    assert len(set(map(id, controls))) == 1  # so that ComfyUI draws them in one batch


def test_a_control_before_is_told_nothing_new_and_both_add_up(tell, drawn, english):
    before = Other()
    positive, negative = tell(to=with_control(english, before))
    both = drawn[0]((positive, negative))
    assert all("crossattn_controlnet" not in cond for cond in before.told)
    assert positive[0][1]["control"].get_models()[0] == "other"
    after = Other()
    after.previous_controlnet = tell()[0][0][1]["control"]
    outputs_agree(drawn[0](with_control(tell(), after)), both)
    assert not torch.allclose(both, drawn[0](tell()), atol=1e-3)


def test_two_branches_are_each_told_their_own(models, tell, drawn, pipe):
    (second,) = models.NODE_CLASS_MAPPINGS["BDMLoadBranch"]().load("others/second", "fp32")
    pipe.add_branch("second", second.model.model, pipe.native_text_encoder)
    ours = drawn[1](beside={"second": {"prompt": "龙", "negative_prompt": "", "scale": 0.7}})
    outputs_agree(drawn[0](tell("龙", "", to=tell(), branch=second, scale=0.7)), ours)


def test_the_window_is_in_shares_of_the_noise(tell, pipe):
    positive, negative = tell(start_percent=0.25, end_percent=0.75)
    control, model = positive[0][1]["control"], make_model(pipe.unet)
    control.pre_run(model, Sampling().percent_to_sigma)
    x, cond = torch.zeros(2, 4, 8, 8), batched([positive[0], negative[0]], 1)
    acts = [
        control.get_control(x, Sampling().sigmas[place].expand(2), cond, 2, {}) is not None
        for place in (900, 740, 500, 260, 100)
    ]
    assert acts == [False, True, True, True, False]
    control.cleanup()
    assert control.sampling is None


def test_a_copy_is_of_the_same_branch_and_strength(tell):
    control = tell(scale=0.5)[0][0][1]["control"]
    again = control.copy()
    assert again.patcher is control.patcher
    assert (again.strength, again.name) == (0.5, control.name)


def test_a_conditioning_without_native_text_is_refused(tell, drawn, english):
    positive, _ = tell()
    bare = with_control(english, positive[0][1]["control"])
    with pytest.raises(UserError, match="connect both outputs"):
        drawn[0](bare)


@pytest.mark.parametrize(
    ("text", "told"),
    [("[红:绿:0.5]灯笼", "changes over the steps"), ("龙 AND 月饼", "AND"), ("龙<lora:ink:1>", "LoRA")],
)
def test_what_one_conditioning_cannot_say_is_refused(tell, text, told):
    with pytest.raises(UserError, match=told):
        tell(text)
    tell(text, rules="official")


def test_a_branch_of_another_text_encoder_or_model_is_refused(models, tell, pipe, tmp_path):
    make_branch(pipe.unet, 40).save_pretrained(tmp_path / "models/bdm_branches/narrow")
    (narrow,) = models.NODE_CLASS_MAPPINGS["BDMLoadBranch"]().load("narrow", "auto")
    with pytest.raises(UserError, match="48 wide and the branch reads 40"):
        tell(branch=narrow)
    control = tell()[0][0][1]["control"]
    other = make_model(make_unet(block_out_channels=(8, 16, 32, 32)))
    with pytest.raises(UserError, match=r"\(16, 16, 32, 32\) channels and the model has \(8, 16, 32, 32\)"):
        control.pre_run(other, Sampling().percent_to_sigma)


def test_folders_list_what_they_hold_and_no_name_leads_out(models, tmp_path):
    (tmp_path / "models/bdm_text/clip.pt").write_bytes(b"")
    pipe_part = tmp_path / "models/bdm_branches/unet"
    make_unet().save_pretrained(pipe_part)
    (tmp_path / "models/bdm_branches/broken").mkdir()
    (tmp_path / "models/bdm_branches/broken/config.json").write_text("[" * 100_000)
    required = {name: node.INPUT_TYPES()["required"] for name, node in models.NODE_CLASS_MAPPINGS.items()}
    assert required["BDMLoadBranch"]["branch"][0] == ["others/second", "tiny"]
    assert {"clip.pt", "tiny"} <= set(required["BDMLoadNativeText"]["native_text"][0])
    outside = tmp_path / "outside"
    (tmp_path / "models/bdm_branches/tiny").rename(outside)
    for name in ("../../outside", str(outside), "tiny", "unet", ""):
        with pytest.raises(UserError, match="models/bdm_branches has no"):
            models.NODE_CLASS_MAPPINGS["BDMLoadBranch"]().load(name, "auto")
    with pytest.raises(UserError, match="allowed are auto, fp32"):
        models.NODE_CLASS_MAPPINGS["BDMLoadBranch"]().load("others/second", "fp8")


def test_models_are_held_whole_and_moved_by_comfyui(loaded):
    for patcher in loaded:
        patcher.load(torch.device("cpu"), 1000)
        assert patcher.whole
        patcher.load("cpu", lowvram_model_memory=1, full_load=False)
        assert patcher.whole
        assert patcher.partially_unload("cpu", 10**6) == 0
        assert not any(p.requires_grad for p in patcher.model.parameters())
    assert isinstance(loaded[1].model.model, NativeTextEncoder)


def test_the_pack_holds_no_copy_of_the_method():
    root = Path(__file__).parents[2] / "comfyui"
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in root.glob("*.py")) < 600
