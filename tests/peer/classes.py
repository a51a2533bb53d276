"""diffusers' test classes, filled in with our cases."""

from __future__ import annotations

import functools
import unittest
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any
from unittest import mock

import pytest
from diffusers import StableDiffusionPipeline
from peer.cases import Case
from peer.checkout import module

#: By test, or by "case.test": why it says nothing about us, or why it is bound to fail.
Reasons = Mapping[str, str]


class Adapted:
    """A test that needs more than a case's parts and inputs, and gets it here."""

    case: Case

    #: Inputs of one test beside the case's.
    further: Mapping[str, Any] = {}


class Encoding(Adapted):
    def test_encode_prompt_works_in_isolation(self) -> None:
        """What ``encode_prompt`` asks for; the other language of ours comes from elsewhere."""
        self.further = self.case.english_features()
        asked = {"device": "cpu", "do_classifier_free_guidance": True, "num_images_per_prompt": 1}
        super().test_encode_prompt_works_in_isolation(asked)


class Saving(Adapted):
    def test_save_load_optional_components(self, *arguments: Any, **fixtures: Any) -> None:
        """Our native text encoder is optional; without it features are drawn.

        The branch is where the UNet itself reads them, which no case's does.
        """
        self.further = self.case.native_features()
        optional = [name for name in self.case.kind._optional_components if name != "branch"]
        with mock.patch.object(self.case.kind, "_optional_components", optional):
            super().test_save_load_optional_components(*arguments, **fixtures)


class SavingWithFiles(Saving):
    def test_save_load_optional_components(self, tmp_path: Any) -> None:
        super().test_save_load_optional_components(tmp_path)


class Reusing(Adapted):
    def test_from_pipe_consistent_config(self) -> None:
        """The stock pipeline that the way begins and ends with lies on no hub here."""

        def made(_: str, **settings: Any) -> Any:
            return StableDiffusionPipeline(**Case(StableDiffusionPipeline).components(), **settings)

        with mock.patch.object(StableDiffusionPipeline, "from_pretrained", made):
            super().test_from_pipe_consistent_config()


class Scheduling(Adapted):
    def test_karras_schedulers_shape(self) -> None:
        """Two of the schedulers need packages that may not be there."""
        common = module("pipelines.test_pipelines_common")
        needs = {"DPMSolverSDEScheduler": "torchsde", "LMSDiscreteScheduler": "scipy"}
        kinds = [k for k in common.KarrasDiffusionSchedulers if find_spec(needs.get(k.name, "torch"))]
        with mock.patch.object(common, "KarrasDiffusionSchedulers", kinds):
            super().test_karras_schedulers_shape()


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
        further: Mapping[str, Any] = {}

        def get_dummy_components(self) -> dict[str, Any]:
            return case.components()

        def get_dummy_inputs(self) -> dict[str, Any]:
            return case.inputs() | {"output_type": "pt"} | dict(self.further)

    mixins = {
        "": (Encoding, SavingWithFiles, testing.PipelineTesterMixin),
        "Memory": (testing.MemoryTesterMixin,),
        "Adapters": (adapters,),
    }
    return {what: type(f"Modern{what}", (Modern, *bases), {"case": case}) for what, bases in mixins.items()}


def classic(case: Case) -> type:
    """diffusers' unittest classes on a case."""
    common, parameters = module("pipelines.test_pipelines_common"), module("pipelines.pipeline_params")
    mixins = [Reusing, common.SDFunctionTesterMixin, common.PipelineFromPipeTesterMixin]
    if case.old_tests:
        mixins += [Encoding, Saving, common.PipelineTesterMixin, common.IPAdapterTesterMixin]
    if not case.moves:
        schedulers = (Scheduling, common.PipelineKarrasSchedulerTesterMixin)
        mixins += [common.PipelineLatentTesterMixin, *schedulers]

    class Classic:
        pipeline_class = case.kind
        params = parameters.TEXT_TO_IMAGE_PARAMS - case.missing
        batch_params = frozenset({"prompt", "negative_prompt", *case.images})
        image_params = frozenset(case.images)
        image_latents_params = frozenset({"image"} if case.reads_latents else ())
        callback_cfg_params = parameters.TEXT_TO_IMAGE_CALLBACK_CFG_PARAMS
        required_optional_params = common.PipelineTesterMixin.required_optional_params - case.missing
        test_layerwise_casting = test_group_offloading = True
        further: Mapping[str, Any] = {}

        def get_dummy_components(self) -> dict[str, Any]:
            return case.components()

        def get_dummy_inputs(self, device: Any, seed: int = 0) -> dict[str, Any]:
            return case.inputs(seed) | {"output_type": "np"} | dict(self.further)

    return type("Classic", (Classic, *mixins, unittest.TestCase), {"case": case})


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
