"""Other frameworks' trainers log what a reduced model costs, and leave its thresholds alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import ltmp
from helpers import attach_reducing, make_dial, random_images, tiny_vit
from ltmp.callbacks.reduction import Reduction
from ltmp.calls import recording
from ltmp.hosts.attach import thresholds_of


def reduced() -> Any:
    """A tiny attached model with a dial."""
    model = attach_reducing(tiny_vit(), random_images(4))
    thresholds_of(model).set_dial(make_dial(model.ltmp.depth))
    return model


def test_the_mean_share_is_that_of_all_images_apart_in_training() -> None:
    model, images = reduced(), random_images(6)
    model.ltmp.requires_grad_(True)
    with ltmp.record() as calls:
        model(images)
    shares = calls.share()
    meter = Reduction(model)
    with torch.no_grad():
        model(images[:4])
        model(images[4:])
    model.train()
    with ltmp.record() as outer:
        model(images[:2])
    assert not model.ltmp.masks
    assert torch.equal(outer.share(), shares[:2])
    assert meter.means(training=False)["share"] == pytest.approx(shares.mean().item())
    assert meter.means(training=True)["share"] == pytest.approx(shares[:2].mean().item())
    assert meter.means(training=True) == {}
    meter.close()
    assert model.ltmp.masks
    model(images)
    assert meter.means(training=True) == {}


def test_a_record_of_ones_own_gets_everything() -> None:
    model = reduced()
    # as hosts do whose language model receives fewer tokens
    model.patch_embed.register_forward_hook(lambda *_: recording().texts.append(torch.ones(2)))
    meter = Reduction(model)
    with ltmp.record() as calls:
        model(random_images(2))
    assert (len(calls.kept), len(calls.geometry), len(calls.texts)) == (1, 1, 1)
    meter.close()


def test_a_failed_call_leaves_no_record_behind() -> None:
    model = reduced()
    meter = Reduction(model)
    with pytest.raises((RuntimeError, AssertionError)):
        model(torch.zeros(1, 3, 5, 5))
    with ltmp.record() as calls:
        model(random_images(2))
    assert len(calls.share()) == 2
    assert meter.means(training=True)["share"] == pytest.approx(calls.share().mean().item())


def test_thresholds_that_moved_are_an_error_and_unattached_models_too() -> None:
    model = reduced()
    meter = Reduction(model, budget=0.6)
    assert meter.budget == 0.6
    model.ltmp.set_budget(0.5)
    with pytest.raises(ltmp.LTMPError, match="thresholds changed"):
        meter.close()
    with pytest.raises(ltmp.LTMPError, match="nothing is attached"):
        Reduction(tiny_vit())


def test_the_trainer_of_hugging_face_logs_share_and_budget(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from ltmp.callbacks.transformers import TrainerReduction

    config = transformers.ViTConfig(
        image_size=16, patch_size=4, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32
    )
    model = ltmp.attach(transformers.ViTForImageClassification(config))
    thresholds_of(model).set_dial(make_dial(3))
    rows = [{"pixel_values": image, "labels": i % 2} for i, image in enumerate(random_images(8))]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, logging_steps=1, eval_strategy="steps", eval_steps=2, report_to=[],
        per_device_train_batch_size=4, use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    weight = next(model.vit.parameters()).detach().clone()
    trainer = transformers.Trainer(
        model, arguments, train_dataset=rows, eval_dataset=rows, callbacks=[TrainerReduction(budget=0.6)]
    )
    trainer.train()
    steps = [line for line in trainer.state.log_history if "loss" in line]
    (evaluated,) = (line for line in trainer.state.log_history if "eval_loss" in line)
    assert [line["budget"] for line in steps] == [0.6, 0.6]
    assert all(0 < line["share"] < 1 for line in [*steps])
    assert 0 < evaluated["eval_share"] < 1
    assert model.ltmp.budget == 0.6
    assert not torch.equal(weight, next(model.vit.parameters()))


def test_lightning_logs_share_and_budget() -> None:
    lightning = pytest.importorskip("lightning")
    from ltmp.callbacks.lightning import LightningReduction

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = reduced()

        def training_step(self, batch: Any, index: int) -> Any:
            return torch.nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def validation_step(self, batch: Any, index: int) -> None:
            self.model(batch[0])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    module = Module()
    loader = DataLoader(TensorDataset(random_images(8), torch.arange(8) % 5), batch_size=4)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[LightningReduction(budget=0.6, every=1)],
    )  # fmt: skip
    trainer.fit(module, loader, loader)
    assert trainer.logged_metrics["budget"] == pytest.approx(0.6)
    assert 0 < trainer.logged_metrics["share"] < 1
    assert 0 < trainer.logged_metrics["val_share"] < 1
    assert module.model.ltmp.budget == 0.6
