"""The bridge: one hook on the backbone's UNet that runs the branch and hands over its residuals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from ..errors import UserError
from ..models.backbone import check_backbone
from ..speed.approximate import EXACT, Approximation, ReusedWork
from ..speed.folding import prepared_layers
from ..speed.sharing import SharedWork, each_tensor
from .branch import BranchModel

HOOK_NAME = "bdm.method.bridge"


def in_window(step: int, start: float, end: float, steps: Callable[[], int] | None) -> bool:
    """Whether a side network is on in step ``step`` of T.

    Off where i/T < start or (i+1)/T > end, as in the official inference.

    ``steps`` gives T and is only asked if the window restricts.
    """
    if start <= 0.0 and end >= 1.0:
        return True
    if steps is None:
        raise UserError("a window needs the number of steps; give steps= with the condition")
    total = steps()
    return not (step / total < start or (step + 1) / total > end)


def check_window(start: float, end: float, what: str) -> None:
    """Refuse a window that is not 0 <= start <= end <= 1.

    Raises:
        UserError: names ``what`` it is the window of.
    """
    if not 0.0 <= start <= end <= 1.0:
        raise UserError(f"{what} window {start} to {end}: both must lie in [0, 1], start before end")


def check_fit(side: Any, unet: Any, keys: Sequence[str], what: str) -> None:
    """Refuse a side network that is not built as its UNet's encoder is.

    Args:
        side: the branch or a ControlNet.
        unet: the backbone's.
        keys: settings that must be equal; one number stands for as many as there are blocks.
        what: what the side network is called in the message.

    Raises:
        UserError: names the first setting that differs.
    """
    blocks = len(unet.config["block_out_channels"])
    for key in keys:
        ours, theirs = side.config[key], unet.config[key]
        each = [(value,) * blocks if isinstance(value, int) else tuple(value) for value in (ours, theirs)]
        if each[0] != each[1]:
            raise UserError(
                f"the {what}'s {key} {ours} does not fit the backbone's {theirs}; use a {what} made for this"
                " backbone"
            )


def add_residuals(kwargs: dict[str, Any], down: Sequence[Tensor], middle: Tensor, dtype: torch.dtype) -> None:
    """Put a side network's residuals among the arguments of a UNet's forward pass, added to those of others.

    Args:
        kwargs: the arguments.
        down: one tensor for each skip connection, of its shape.
        middle: of the middle block's shape.
        dtype: what the UNet computes in.
    """
    given_down, given_middle = (
        kwargs.get("down_block_additional_residuals"),
        kwargs.get("mid_block_additional_residual"),
    )
    if given_down is not None and given_middle is not None:
        down = [ours + theirs for ours, theirs in zip(down, given_down, strict=True)]
        middle = middle + given_middle
    kwargs["down_block_additional_residuals"] = tuple(residual.to(dtype) for residual in down)
    kwargs["mid_block_additional_residual"] = middle.to(dtype)


@dataclass(frozen=True)
class NativeCondition:
    """What the branch is told during one call of a pipeline.

    Attributes:
        positive: (P, L, D) features of the native prompts.
        negative: (P or 1, L, D) features of the native negative prompts; needed where the pipeline uses
            guidance.
        scale: factor of the residuals.
        start: share of the steps before which the branch is off.
        end: share of the steps after which it is off.
        steps: gives the number of steps T once the pipeline knows it; only asked if start or end restrict.
        images_per_prompt: consecutive samples that share a prompt.
        approximation: work that is left out although the picture changes.
    """

    positive: Tensor
    negative: Tensor | None = None
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    steps: Callable[[], int] | None = None
    images_per_prompt: int = 1
    approximation: Approximation = EXACT

    @property
    def samples(self) -> int:
        """Samples of one guidance part."""
        return len(self.positive) * self.images_per_prompt

    def features(self, batch: int) -> Tensor:
        """Features for a UNet batch of ``batch`` samples.

        Pipelines stack guidance parts of P x images_per_prompt samples each: [positive] without guidance,
            [negative, positive]
        with it, [negative, positive, positive] with perturbed attention (PAG).

        Raises:
            UserError: the batch is not one of these.
        """
        positive = self.positive.repeat_interleave(self.images_per_prompt, dim=0)
        parts, rest = divmod(batch, positive.shape[0])
        if rest or parts not in (1, 2, 3):
            raise UserError(
                f"the UNet got {batch} samples for {len(self.positive)} native prompts x"
                f" {self.images_per_prompt} images; allowed are 1, 2 or 3 times as many: give one native"
                " prompt for each English one"
            )
        if parts == 1:
            return positive
        if self.negative is None:
            raise UserError(
                "the pipeline uses guidance and the native condition has no negative features; give them"
            )
        negative = self.negative.expand(self.positive.shape[0], -1, -1).repeat_interleave(
            self.images_per_prompt, dim=0
        )
        return torch.cat([negative] + [positive] * (parts - 1))


class Bridge(ModelHook):
    """Runs the branch before every forward pass of the UNet it is attached to and adds its residuals.

    Residuals that the caller passes (ControlNets) are kept and added to. Without a condition the hook does
    nothing.

    Args:
        branch: the branch.
        share: do once what both halves of a guided step would do twice (see ``bdm.speed.sharing``), with
            enlargements folded (see ``bdm.speed.folding``) and weights packed (see ``bdm.speed.packing``);
            the picture is the same.

    Example:
        >>> bridge = Bridge(branch).attach(pipe.unet)
        >>> with bridge.condition(NativeCondition(native.encode(["红灯笼"]), native.encode([""]))):
        ...     picture = pipe("").images[0]
        >>> bridge.detach()
    """

    def __init__(self, branch: BranchModel, share: bool = True) -> None:
        super().__init__()
        self.branch = branch
        self.share = share
        self._work = SharedWork()
        self._reuse = ReusedWork(EXACT)
        self.unet: nn.Module | None = None
        self._condition: NativeCondition | None = None
        self._calls = 0
        self._features: dict[int, Tensor] = {}

    def attach(self, unet: Any) -> Bridge:
        """Put the hook on a UNet (``UNet2DConditionModel`` or AnimateDiff's ``UNetMotionModel``).

        Raises:
            UserError: a bridge is attached already, or branch and UNet do not fit.
        """
        self.check(unet)
        registry = HookRegistry.check_if_exists_or_initialize(unet)
        if registry.get_hook(HOOK_NAME) is not None:
            raise UserError("this UNet has a bridge already; detach it first")
        registry.register_hook(self, HOOK_NAME)
        self.unet = unet
        return self

    def check(self, unet: Any) -> None:
        """Refuse a UNet that the branch cannot bridge.

        Raises:
            UserError: not an SD1.5 UNet, or blocks of other sizes than the branch's.
        """
        check_backbone(unet)
        check_fit(self.branch, unet, ("block_out_channels", "layers_per_block"), "branch")

    def detach(self) -> None:
        """Take the hook off; the UNet's outputs are bit for bit what they were before."""
        if self.unet is not None:
            HookRegistry.check_if_exists_or_initialize(self.unet).remove_hook(HOOK_NAME, recurse=False)
            self.unet = None

    @contextmanager
    def condition(self, condition: NativeCondition) -> Iterator[None]:
        """Everything the UNet computes inside the ``with`` block is conditioned on ``condition``."""
        for features in (condition.positive, condition.negative):
            width = self.branch.config["cross_attention_dim"]
            if features is not None and (features.ndim != 3 or features.shape[-1] != width):
                raise UserError(
                    f"native text features have shape {tuple(features.shape)} and the branch reads (prompts,"
                    f" length, {width}); use the text encoder that the branch was trained with"
                )
        outer, self._condition, self._calls, self._features = self._condition, condition, 0, {}
        unet = self.unet if outer is None else None
        with ExitStack() as stack:
            stack.callback(self._restore, outer)
            # For the time of the condition only: what is kept is right as long as nobody changes weights.
            if unet is not None and self.share:
                self._work.attach(unet, self.branch)
                stack.callback(self._work.detach)
                stack.enter_context(prepared_layers(unet, self.branch))
            if unet is not None:
                self._reuse = ReusedWork(condition.approximation)
                self._reuse.attach(unet, self.branch)
                stack.callback(self._reuse.detach)
            yield

    def _restore(self, condition: NativeCondition | None) -> None:
        """What was the condition before, with nothing kept."""
        self._condition, self._features = condition, {}

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Both halves get the result where one was computed; forget which rows were equal."""
        half = self._reuse.half
        output = output if half.rows is None else each_tensor(half.spread, output)
        self._forget_rows()
        return output

    def _forget_rows(self) -> None:
        for plan in (self._work.encoder, self._work.prefix, self._reuse.half):
            plan.clear()

    def _leave_out_guidance(self, condition: NativeCondition, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Only the positive half of a guided step's inputs."""
        sample, _, text = _inputs(args, kwargs)
        if _is_guided(condition, kwargs, sample, text):
            self._reuse.half.positive_half(sample, text)
        return each_tensor(self._reuse.half.select, (args, kwargs))

    def _plan(self, condition: NativeCondition, args: Any, kwargs: Any) -> None:
        """Find the work that both halves of a guided step share."""
        sample, _, text = _inputs(args, kwargs)
        if _is_guided(condition, kwargs, sample, text):
            self._work.encoder.find(sample, text)
            self._work.prefix.find(sample)

    def pre_forward(
        self, module: nn.Module, *args: Any, **kwargs: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Add the branch's residuals to the arguments of the UNet's forward pass."""
        condition = self._condition
        if condition is None:
            return args, kwargs
        self._forget_rows()  # a pass that failed has not come to post_forward
        step, self._calls = self._calls, self._calls + 1
        on = condition.scale != 0.0 and in_window(step, condition.start, condition.end, condition.steps)
        limits = condition.approximation
        if not in_window(step, limits.guidance_start, limits.guidance_end, condition.steps):
            args, kwargs = self._leave_out_guidance(condition, args, kwargs)
        elif self.share:
            self._plan(condition, args, kwargs)
        sample, timestep, _ = _inputs(args, kwargs)
        self._reuse.begin(len(sample), on, id(condition))
        if not on:
            return args, kwargs
        batch = sample.shape[0]
        if batch not in self._features:  # one tensor for all steps, so that its projections can be kept
            self._features[batch] = condition.features(batch)
        features = self._features[batch]
        if sample.ndim == 5:  # AnimateDiff: (B, C, F, h, w); the UNet sees frames as samples
            features = features.repeat_interleave(sample.shape[2], dim=0)
            timestep = (
                timestep.repeat_interleave(sample.shape[2])
                if torch.is_tensor(timestep) and timestep.ndim
                else timestep
            )
            sample = sample.movedim(2, 1).flatten(0, 1)
        dtype = self.branch.dtype
        down, middle = self.branch(
            sample.to(dtype), timestep, features.to(sample.device, dtype), condition.scale, return_dict=False
        )
        add_residuals(kwargs, down, middle, sample.dtype)
        return args, kwargs


def _inputs(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """A UNet's sample, timestep and text, however they are passed."""
    names = ("sample", "timestep", "encoder_hidden_states")
    return tuple(args[i] if len(args) > i else kwargs.get(name) for i, name in enumerate(names))


def _is_guided(condition: NativeCondition, kwargs: dict[str, Any], sample: Tensor, text: Any) -> bool:
    """Whether a pass is a guided step's [negative, positive].

    Perturbed attention, frames, adapters and training are not.
    """
    other = any(
        kwargs.get(name) is not None
        for name in ("down_intrablock_additional_residuals", "encoder_attention_mask")
    )
    halves = sample.ndim == 4 and len(sample) == 2 * condition.samples
    return halves and not other and isinstance(text, Tensor) and not torch.is_grad_enabled()
