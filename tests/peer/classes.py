"""diffusers' test classes, filled in with our cases."""

from __future__ import annotations

import functools
import unittest
from collections.abc import Mapping
from typing import Any

import pytest
from peer.cases import Case
from peer.checkout import module

#: By test, or by "case.test": why it says nothing about us, or why it is bound to fail.
Reasons = Mapping[str, str]


def modern(case: Case) -> dict[str, type]:
    """diffusers' pytest classes on a case, by what they test; some skip all of their tests without a GPU."""
    testing, parameters = module("pipelines.testing_utils"), module("pipelines.pipeline_params")
    adapters = module("pipelines.stable_diffusion.ip_adapter_tester").IPAdapterTesterMixin
    optional = testing.BasePipelineTesterConfig.optional_input_params - case.missing
    shape = (3, 64, 64)

    class Modern(testing.BasePipelineTesterConfig):
        pipeline_class = case.kind
        required_input_params_in_call_signature = parameters.TEXT_TO_IMAGE_PARAMS - case.missing
        optional_input_params = optional
        batch_input_params = frozenset({"prompt", "negative_prompt", *case.images})
        callback_cfg_params = parameters.TEXT_TO_IMAGE_CALLBACK_CFG_PARAMS
        output_shape = (2, *shape) if case.moves else shape

        def get_dummy_components(self) -> dict[str, Any]:
            return case.components()

        def get_dummy_inputs(self) -> dict[str, Any]:
            return case.inputs() | {"output_type": "pt"}

    mixins = {"": testing.PipelineTesterMixin, "Memory": testing.MemoryTesterMixin, "Adapters": adapters}
    return {what: type(f"Modern{what}", (Modern, mixin), {}) for what, mixin in mixins.items()}


def classic(case: Case) -> type:
    """diffusers' unittest classes on a case."""
    common, parameters = module("pipelines.test_pipelines_common"), module("pipelines.pipeline_params")
    latent = (
        () if case.moves else (common.PipelineLatentTesterMixin, common.PipelineKarrasSchedulerTesterMixin)
    )

    class Classic(
        common.PipelineTesterMixin, common.IPAdapterTesterMixin, common.SDFunctionTesterMixin,
        common.PipelineFromPipeTesterMixin, *latent, unittest.TestCase,
    ):  # fmt: skip
        pipeline_class = case.kind
        params = parameters.TEXT_TO_IMAGE_PARAMS - case.missing
        batch_params = frozenset({"prompt", "negative_prompt", *case.images})
        image_params = frozenset(case.images)
        image_latents_params = (
            frozenset(case.images) & {"image"} if "strength" in case.options else frozenset()
        )
        callback_cfg_params = parameters.TEXT_TO_IMAGE_CALLBACK_CFG_PARAMS
        required_optional_params = common.PipelineTesterMixin.required_optional_params - case.missing
        test_layerwise_casting = test_group_offloading = True

        def get_dummy_components(self) -> dict[str, Any]:
            return case.components()

        def get_dummy_inputs(self, device: Any, seed: int = 0) -> dict[str, Any]:
            return case.inputs(seed) | {"output_type": "np"}

    return Classic


def classes(cases: Mapping[str, Case], skipped: Reasons, failing: Reasons) -> dict[str, type]:
    """All test classes of some cases, by name; tests that do not apply are marked as such.

    Args:
        cases: by name.
        skipped: tests that say nothing about us.
        failing: tests that are bound to fail.
    """
    marks = {test: pytest.mark.skip(reason=reason) for test, reason in skipped.items()}
    marks |= {test: pytest.mark.xfail(reason=reason, strict=True) for test, reason in failing.items()}
    made: dict[str, type] = {}
    for name, case in cases.items():
        own = {f"Test{name}{what}": kind for what, kind in modern(case).items()}
        own[f"TestClassic{name}"] = classic(case)
        for key, mark in marks.items():
            of_case, _, test = key.rpartition(".")
            for kind in own.values():
                if hasattr(kind, test) and of_case in ("", name):
                    setattr(kind, test, mark(_copied(getattr(kind, test))))
        made |= own
    return made


def _copied(test: Any) -> Any:
    @functools.wraps(test)
    def copy(*arguments: Any, **fixtures: Any) -> Any:
        return test(*arguments, **fixtures)

    return copy
