"""The tests that all models of transformers share, for the supported hosts; run by `host_tests.py --transformers`.

The source distribution of transformers has `tests/test_modeling_common.py`, but neither the test modules of its models
nor two mixins that it imports, which are replaced by empty classes. Requires the package `parameterized`.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
import unittest
from typing import Any

import torch
import transformers

FOLDER = os.environ["LTMP_HOST_TESTS_TRANSFORMERS"]
"""The unpacked source distribution."""

sys.path.insert(0, FOLDER)
for missing, name in (
    ("exporters.test_export", "ExportTesterMixin"),
    ("generation.test_utils", "GenerationTesterMixin"),
):
    package, _, module = missing.rpartition(".")
    sys.modules[f"tests.{package}"] = types.ModuleType(f"tests.{package}")
    sys.modules[f"tests.{missing}"] = stub = types.ModuleType(f"tests.{missing}")
    setattr(stub, name, type(name, (), {}))
common = importlib.import_module("tests.test_modeling_common")

SIZES: dict[str, Any] = {
    "image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 37, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip

FAMILIES = {
    "ViT": (17, ("Model", "ForImageClassification")),
    "DeiT": (18, ("Model", "ForImageClassification")),
    "Dinov2": (17, ("Model", "ForImageClassification")),
    "Dinov2WithRegisters": (21, ("Model", "ForImageClassification")),
    "DINOv3ViT": (17, ("Model",)),
    "CLIPVision": (17, ("Model",)),
    "SiglipVision": (16, ("Model",)),
    "ViTMAE": (5, ("Model",)),
}
"""From prefix of the class names to the number of tokens per image, and the models to test."""


class Tester:
    """What the shared tests require of a model: its configuration and inputs."""

    is_training = True
    batch_size, num_channels = 3, 3
    image_size, patch_size = SIZES["image_size"], SIZES["patch_size"]
    hidden_size, num_hidden_layers = SIZES["hidden_size"], SIZES["num_hidden_layers"]
    num_attention_heads = SIZES["num_attention_heads"]
    mask_length = (image_size // patch_size) ** 2
    num_masks = mask_length // 2

    def __init__(self, family: str, tokens: int) -> None:
        self.config_class = getattr(transformers, f"{family}Config")
        self.seq_length = tokens

    def get_config(self) -> Any:
        return self.config_class(**SIZES)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        images = torch.rand(self.batch_size, self.num_channels, self.image_size, self.image_size)
        return self.get_config(), {"pixel_values": images}


def _tests(family: str, tokens: int, kinds: tuple[str, ...]) -> type:
    """The test case with the shared tests for one family."""

    def prepare(self: Any) -> None:
        self.model_tester = Tester(family, tokens)

    settings = {
        "all_model_classes": tuple(getattr(transformers, family + kind) for kind in kinds),
        "test_resize_embeddings": False,
        "setUp": prepare,
    }
    return type(f"{family}Test", (common.ModelTesterMixin, unittest.TestCase), settings)


for family, (tokens, kinds) in FAMILIES.items():
    globals()[f"{family}Test"] = _tests(family, tokens, kinds)
