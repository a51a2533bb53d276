"""The bridge: one hook on the backbone's UNet that runs the branch and hands over its residuals."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..errors import UserError
from ..models.backbone import check_backbone
from .branch import BranchModel
from .clock import StepClock
from .condition import NativeCondition, Part
from .hooks import Hook, hang_after, hang_before, hooks_of
from .parts import PartReader
from .residuals import add_residuals, check_fit
from .step import StepHelper, UNetCall, named_arguments

#: Held while a bridge is attached, so that two threads do not find the same UNet free.
_ATTACHING = threading.Lock()


@dataclass
class _Session:
    """A condition in force, and what is known of the call it was set for.

    Attributes:
        conditions: what each branch is told.
        reader: tells the parts of the UNet's batches.
        clock: tells the denoising steps.
        thread: whose calls of the UNet it is for.
        features: each branch's text by its number, its stage and the parts; one tensor for all steps.
    """

    conditions: tuple[NativeCondition, ...]
    reader: PartReader
    clock: StepClock
    thread: int = field(default_factory=threading.get_ident)
    features: dict[tuple[int, int, tuple[Part, ...]], Tensor] = field(default_factory=dict)


class Bridge:
    """Runs the branch before every forward pass of the UNet it is attached to and adds its residuals.

    Residuals that the caller passes (ControlNets) are kept and added to. Without a condition nothing is done.
    A bridge without helpers is the paper's method and nothing else (arXiv 2309.00952, section 3).

    Args:
        branch: the branch; bridges of several UNets may share one.
        helpers: what saves or leaves out work (see ``bdm.speed``).
        beside: further branches on the same backbone, each of which is told its own text; all add their
            residuals.

    Example:
        >>> bridge = Bridge(branch).attach(pipe.unet)
        >>> with bridge.condition(NativeCondition(native.encode(["红灯笼"]), native.encode([""]))):
        ...     picture = pipe("").images[0]
        >>> bridge.detach()
    """

    def __init__(
        self,
        branch: BranchModel,
        helpers: Sequence[StepHelper] = (),
        beside: Sequence[BranchModel] = (),
    ) -> None:
        self.branch = branch
        self.branches = (branch, *beside)
        self.helpers = tuple(helpers)
        self.unet: Any = None
        self._hung = ExitStack()
        self._session: _Session | None = None

    def attach(self, unet: Any) -> Bridge:
        """Put the hook on a UNet (``UNet2DConditionModel`` or AnimateDiff's ``UNetMotionModel``).

        Raises:
            UserError: this or another bridge is attached already, or branch and UNet do not fit.
        """
        self.check(unet)
        with _ATTACHING:
            if self.unet is not None:
                raise UserError("this bridge is attached already; detach it first, or make another one")
            if bridges_of(unet):
                raise UserError(
                    "this UNet has a bridge already (of a pipeline that is drawing with it, perhaps);"
                    " detach it first"
                )
            try:
                hang_before(self._hung, unet, self._before)
                hang_after(self._hung, unet, self._after)
                self.unet = unet
            except BaseException:
                self._hung.close()
                raise
        return self

    def check(self, unet: Any) -> None:
        """Refuse a UNet that the branch cannot bridge.

        Raises:
            UserError: not an SD1.5 UNet, or blocks of other sizes than the branch's.
        """
        check_backbone(unet)
        for branch in self.branches:
            check_fit(branch, unet, ("block_out_channels", "layers_per_block"), "branch")

    def detach(self) -> None:
        """Take the hook off; the UNet's outputs are bit for bit what they were before."""
        self._hung.close()
        self.unet = None

    @contextmanager
    def condition(self, condition: NativeCondition, *beside: NativeCondition) -> Iterator[None]:
        """Everything the UNet computes inside the ``with`` block is conditioned on ``condition``.

        Args:
            condition: what the branch is told; it also says what is known of the call.
            beside: what the branches beside it are told, in their order.

        Raises:
            UserError: features that a branch does not read, another number of conditions than branches, other
                numbers of samples in them, or a condition of another thread is in force.
        """
        conditions = (condition, *beside)
        if len(conditions) != len(self.branches):
            raise UserError(
                f"the bridge has {len(self.branches)} branches and is given {len(conditions)} conditions;"
                " give one for each"
            )
        for branch, each in zip(self.branches, conditions, strict=True):
            _check_features(branch, each)
            if each.samples != condition.samples:
                raise UserError(
                    f"the conditions of the bridge's branches are of {condition.samples} and {each.samples}"
                    " samples (prompts x images); give each branch as many"
                )
        outer = self._session
        session = _Session(conditions, PartReader(condition), StepClock(condition.steps))
        if outer is not None and outer.thread != session.thread:
            raise UserError(
                "this bridge is drawing in another thread; give each thread a pipeline of its own"
            )
        with ExitStack() as stack:
            stack.callback(setattr, self, "_session", outer)
            self._session = session
            # An inner condition works with what the outer one has hung.
            if outer is None and self.unet is not None:
                for helper in self.helpers:
                    helper.hang(stack, self.unet, self.branch)
            yield

    @property
    def told(self) -> NativeCondition | None:
        """The condition in force of the first branch; None without one."""
        return None if self._session is None else self._session.conditions[0]

    def _before(self, unet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Add the branch's residuals to the arguments of the UNet's forward pass."""
        session = self._session
        if session is None:
            return None
        if session.thread != threading.get_ident():
            raise UserError(
                "the UNet was called in another thread than the one that draws with it; give each thread a"
                " UNet of its own"
            )
        call = self._read(session, unet, args, kwargs)
        for helper in self.helpers:
            helper.before(call)
        for number, scale in enumerate(call.scales):
            if scale != 0.0:
                down, middle = self._residuals(session, call, number, scale)
                add_residuals(call.values, down, middle, call.sample.dtype)
        return call.arguments()

    def _after(self, unet: Any, args: Any, kwargs: Any, output: Any) -> Any:
        if self._session is not None:
            for helper in reversed(self.helpers):
                output = helper.after(output)
        return output

    def _read(self, session: _Session, unet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> UNetCall:
        values = named_arguments(unet, args, kwargs)
        parts = session.reader.parts(len(values["sample"]), values.get("encoder_hidden_states"), unet)
        return UNetCall(values, len(args), session.conditions, parts, session.clock, unet)

    def _residuals(
        self, session: _Session, call: UNetCall, number: int, scale: float
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        branch, condition = self.branches[number], session.conditions[number]
        sample, timestep, dtype = call.sample, call.values["timestep"], branch.dtype
        told = (number, condition.stage(lambda: call.step), call.parts)
        if told not in session.features:
            features = condition.features(call.parts, told[1])
            session.features[told] = features.to(sample.device, dtype)
        features = session.features[told]
        if sample.ndim == 5:  # AnimateDiff: (B, C, F, h, w); the UNet sees frames as samples
            frames = sample.shape[2]
            features = features.repeat_interleave(frames, dim=0)
            if isinstance(timestep, Tensor) and timestep.ndim:
                timestep = timestep.expand(len(sample)).repeat_interleave(frames)
            sample = sample.movedim(2, 1).flatten(0, 1)
        return branch(sample.to(dtype), timestep, features, scale, return_dict=False)


def _check_features(branch: BranchModel, condition: NativeCondition) -> None:
    width = branch.config["cross_attention_dim"]
    for features in (condition.positive, condition.negative):
        if features is not None and (features.ndim != 3 or features.shape[-1] != width):
            raise UserError(
                f"native text features have shape {tuple(features.shape)} and the branch reads (prompts,"
                f" length, {width}); use the text encoder that the branch was trained with"
            )


def bridges_of(unet: Any) -> list[Bridge]:
    """The bridges on a UNet: none, or one."""
    owners = (getattr(hook.function, "__self__", None) for hook in hooks_of(unet) if isinstance(hook, Hook))
    return list(dict.fromkeys(owner for owner in owners if isinstance(owner, Bridge)))
