"""How one step is shared by processes: replicas (DDP), shards (FSDP2) or DeepSpeed's ZeRO.

Whatever the strategy, states are those of a single process (see ``bdm.parallel.whole``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from ..errors import UserError
from .processes import launched_with
from .whole import Collect, collected, scattered

#: Names of AdamW's moments.
MOMENTS = ("exp_avg", "exp_avg_sq")

MakeOptimizer = Callable[[Mapping[str, nn.Module]], torch.optim.Optimizer]


def choose_strategy(
    accelerator: Accelerator, mixed_precision: str, micro_batch: int, max_grad_norm: float
) -> Strategy:
    """The one that the launcher's configuration asks for."""
    if launched_with("DEEPSPEED"):
        return DeepSpeedStrategy(accelerator, mixed_precision, micro_batch, max_grad_norm)
    # A single process has nobody to share shards with.
    split = launched_with("FSDP") and accelerator.num_processes > 1
    return (ShardedStrategy if split else ReplicatedStrategy)(accelerator, mixed_precision)


class Strategy(ABC):
    """What processes do together in a step, and with the states of what they train."""

    #: Whether tensors of its states are split; whether a process can tell what it has of them.
    splits, has_pieces = False, True

    def __init__(self, accelerator: Accelerator, mixed_precision: str) -> None:
        self.accelerator, self.mixed_precision = accelerator, mixed_precision
        self._group: Any = None

    def background_group(self) -> Any:
        """All processes, joined apart from a step's; made when first asked for, which is joint work."""
        if self._group is None:
            self._group = torch.distributed.new_group(backend="gloo")
        return self._group

    @abstractmethod
    def distribute(
        self, model: nn.Module, parts: Mapping[str, nn.Module], make: MakeOptimizer
    ) -> tuple[nn.Module, Any]:
        """Share a model whose ``parts`` are trained, and make their optimizer: (what to call, optimizer)."""

    def accumulate(self, model: nn.Module) -> AbstractContextManager[None]:
        """Around the work on one batch; gradients are shared in the last batch of a step only."""
        return self.accelerator.accumulate(model)

    def clip(self, parameters: Sequence[nn.Parameter], most: float) -> Tensor:
        """Scale gradients down to a norm of ``most``; the norm before, over all processes."""
        norm: Any = self.accelerator.clip_grad_norm_(parameters, most)
        return norm.full_tensor() if isinstance(norm, DTensor) else torch.as_tensor(norm)

    def optimizer_state(
        self, optimizer: Any, parameters: Sequence[nn.Parameter], collect: Collect
    ) -> dict[str, Any]:
        """The optimizer's state as ``collect`` makes it, numbered as in a single process; joint work."""
        return collected(optimizer.state_dict(), collect)

    def steady(self, optimizer: Any, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """Parameters, and tensors of this optimizer, that are known to change in its steps alone."""
        own = getattr(optimizer, "optimizer", optimizer)  # accelerate may have put its own around it
        states = own.state.values() if type(own) is torch.optim.AdamW else ()
        moments = [value for state in states for value in state.values() if isinstance(value, Tensor)]
        return [*parameters, *moments]

    def before_steps(self, optimizer: Any, call: Callable[..., None]) -> None:
        """Have something called before each step of an optimizer that has steady tensors."""
        getattr(optimizer, "optimizer", optimizer).register_step_pre_hook(call)

    def load_optimizer_state(
        self, optimizer: Any, parameters: Sequence[nn.Parameter], state: dict[str, Any]
    ) -> None:
        """Take up a state that ``optimizer_state`` gave, here or elsewhere."""
        own = {
            i: {k: scattered(v, parameters[i]) if isinstance(v, Tensor) else v for k, v in values.items()}
            for i, values in state["state"].items()
        }
        optimizer.load_state_dict({"state": own, "param_groups": state["param_groups"]})

    def begin_with(
        self,
        optimizer: Any,
        parameters: Sequence[nn.Parameter],
        moments: Mapping[int, Mapping[str, Any]],
    ) -> None:
        """Let a fresh optimizer begin with whole moments of some parameters, by their numbers."""
        groups = optimizer.state_dict()["param_groups"]
        self.load_optimizer_state(optimizer, parameters, {"state": moments, "param_groups": groups})

    def weights_changed(self, optimizer: Any) -> None:
        """Weights were given other values behind the optimizer's back; for one that keeps its own."""
        return

    def whole_weights(self, parts: Mapping[str, nn.Module]) -> AbstractContextManager[None]:
        """Inside the ``with`` block the parts hold whole tensors and can be saved (not run); joint work."""
        return nullcontext()


class ReplicatedStrategy(Strategy):
    """One process, or several that each hold all weights and share their gradients (DDP)."""

    def distribute(
        self, model: nn.Module, parts: Mapping[str, nn.Module], make: MakeOptimizer
    ) -> tuple[nn.Module, Any]:
        return self.accelerator.prepare(model, make(parts))


class ShardedStrategy(Strategy):
    """Weights, gradients, moments and average of the trained parts are split over the processes (FSDP2, arXiv
    2304.11277).

    The frozen models stay whole in every process: they are used outside the training step too, for validation
    and grids, and have neither gradients nor moments. Parts are gathered block by block where they are used.
    ``fully_shard`` is called here and not through accelerate, which shards whole models, frozen weights
    included, and on GPUs only.
    """

    splits = True

    def __init__(self, accelerator: Accelerator, mixed_precision: str) -> None:
        super().__init__(accelerator, mixed_precision)
        self._classes: dict[nn.Module, type[nn.Module]] = {}

    def distribute(
        self, model: nn.Module, parts: Mapping[str, nn.Module], make: MakeOptimizer
    ) -> tuple[nn.Module, Any]:
        if self.mixed_precision == "fp16":
            raise UserError(
                "optimizer.mixed_precision is fp16, whose loss scaling does not work on shards; use bf16"
                " or no"
            )
        for name, part in parts.items():
            if type(part).forward is nn.Module.forward:
                raise UserError(
                    f"{name} is no network of its own and cannot be split by FSDP; use DDP for this recipe"
                )
            _contiguous(part)
            for module in (*_blocks(part), part):
                self._split(module)
            for entrance in ("encode", "decode"):  # an autoencoder's, which are not its forward
                if hasattr(part, entrance):
                    register_fsdp_forward_method(part, entrance)
        return model, _element_wise(make(parts))

    def _split(self, module: nn.Module) -> None:
        # fully_shard puts a class of its own over the module's, whose name would be saved with the weights.
        self._classes[module] = type(module)
        # Also the outermost weights go back after a forward pass: evaluating with averaged weights changes
        # them in between.
        fully_shard(module, reshard_after_forward=True)

    @contextmanager
    def whole_weights(self, parts: Mapping[str, nn.Module]) -> Iterator[None]:
        modules = [module for part in parts.values() for module in part.modules()]
        splits = [(module, type(module), dict(module._parameters)) for module in modules]
        try:
            for module, kind, split in splits:
                whole = {k: p.full_tensor() for k, p in split.items() if isinstance(p, DTensor)}
                module._parameters.update({k: nn.Parameter(tensor) for k, tensor in whole.items()})
                module.__class__ = self._classes.get(module, kind)
            yield
        finally:
            for module, kind, split in splits:
                module._parameters.update(split)
                module.__class__ = kind

    @contextmanager
    def accumulate(self, model: nn.Module) -> Iterator[None]:
        # Each batch's gradients are split at once: keeping them whole until the last one would take the
        # memory that is saved.
        with self.accelerator.accumulate(), self.accelerator.autocast():
            yield


class DeepSpeedStrategy(Strategy):
    """DeepSpeed's ZeRO, stage 1 or 2 (arXiv 1910.02054).

    Gradients and moments are split, weights are whole.
    """

    has_pieces = False

    def __init__(
        self, accelerator: Accelerator, mixed_precision: str, micro_batch: int, max_grad_norm: float
    ) -> None:
        super().__init__(accelerator, mixed_precision)
        if mixed_precision == "fp16":
            raise UserError("optimizer.mixed_precision is fp16; under DeepSpeed use bf16 or no")
        plugin: Any = accelerator.deepspeed_plugin
        config = plugin.deepspeed_config
        if config["zero_optimization"]["stage"] > 2:
            raise UserError(
                f"zero_stage is {config['zero_optimization']['stage']}; allowed are 1 and 2: FSDP2 splits"
                " weights too"
            )
        config |= {"train_micro_batch_size_per_gpu": micro_batch, "gradient_clipping": max_grad_norm}
        if mixed_precision == "bf16":
            config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}

    def distribute(
        self, model: nn.Module, parts: Mapping[str, nn.Module], make: MakeOptimizer
    ) -> tuple[nn.Module, Any]:
        _contiguous(model)
        own = _element_wise(make(parts))
        if len(own.param_groups) > 1:
            raise UserError(
                "optimizer.rate_factors is set; under DeepSpeed all parameters have one rate: leave it out,"
                " or use DDP"
            )
        engine, optimizer = self.accelerator.prepare(model, own)
        # The engine steps by itself: it must leave out steps that are not finite, which for fp32 weights it
        # does on request.
        self._zero: Any = optimizer.optimizer
        self._zero.check_grad_overflow = True
        return engine, optimizer

    def clip(self, parameters: Sequence[nn.Parameter], most: float) -> Tensor:
        """The engine has clipped and stepped; the norm of a step that it left out is infinite."""
        return torch.tensor(torch.inf) if self._zero.overflow else super().clip(parameters, most)

    def optimizer_state(
        self, optimizer: Any, parameters: Sequence[nn.Parameter], collect: Collect
    ) -> dict[str, Any]:
        from deepspeed.utils import safe_get_full_optimizer_state  # pyright: ignore[reportMissingImports]

        base = optimizer.optimizer.optimizer
        steps = [values["step"] for values in base.state.values()]
        state = {}
        for i, parameter in enumerate(parameters if steps else ()):
            moments = {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
            # A step of its own for each: whoever takes one tensor up for all would count it up once for each.
            state[i] = collected({"step": steps[0].clone(), **moments}, collect)
        (group,) = base.state_dict()["param_groups"]
        return {"state": state, "param_groups": [{**group, "params": list(range(len(parameters)))}]}

    def load_optimizer_state(
        self, optimizer: Any, parameters: Sequence[nn.Parameter], state: dict[str, Any]
    ) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state  # pyright: ignore[reportMissingImports]

        zero = optimizer.optimizer
        zero.refresh_fp32_params()  # the weights were loaded before
        if not state["state"]:
            return
        # This process's piece of all parameters, laid end to end.
        for flat in zero.single_partition_of_fp32_groups:
            step = state["state"][0]["step"].to(flat.device, copy=True)
            moments = {key: torch.zeros_like(flat) for key in MOMENTS}
            zero.optimizer.state[flat] = {"step": step, **moments}
        zero._lazy_init_hp_params_optimizer_state()
        for i, parameter in enumerate(parameters):
            for key in MOMENTS:
                safe_set_full_optimizer_state(parameter, state["state"][i][key].to(parameter.device), key)

    def steady(self, optimizer: Any, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        return []  # the engine steps by itself, in the backward pass

    def before_steps(self, optimizer: Any, call: Callable[..., None]) -> None:
        return

    def weights_changed(self, optimizer: Any) -> None:
        optimizer.optimizer.refresh_fp32_params()

    def begin_with(
        self,
        optimizer: Any,
        parameters: Sequence[nn.Parameter],
        moments: Mapping[int, Mapping[str, Any]],
    ) -> None:
        raise UserError(
            "start.moments, init.moments: under DeepSpeed all parameters count their steps together, and"
            " those of an earlier run have more behind them; set moments: false, or use DDP or FSDP"
        )


def _element_wise(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Refuse optimizers that look at whole tensors, or at all of them: a process has only pieces."""
    if not isinstance(optimizer, torch.optim.AdamW):
        raise UserError(
            f"{type(optimizer).__name__} needs whole tensors; under FSDP and DeepSpeed use optimizer.name:"
            " adamw"
        )
    return optimizer


def _contiguous(module: nn.Module) -> None:
    """Undo channels_last, which neither FSDP nor DeepSpeed takes."""
    module.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]


def _blocks(part: nn.Module) -> list[nn.Module]:
    """The UNet blocks of a part: large enough to be worth a communication of their own."""
    stages = (block for name in ("down_blocks", "up_blocks") for block in getattr(part, name, ()))
    middle = getattr(part, "mid_block", None)
    return [*stages, *([middle] if middle is not None else [])]
