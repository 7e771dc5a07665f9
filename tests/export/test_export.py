"""Exports reproduce the model in every runtime, or no file is written."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import ltmp
from helpers import assert_close, attach_reducing, make_probe, random_images, run_recorded, tiny_vit
from ltmp.config import SCORES, LTMPConfig
from ltmp.engines.body import running
from ltmp.errors import LTMPError, MissingExtraError, UsageError
from ltmp.evaluate import evaluate
from ltmp.export import ExportedModel, Plan, export, in_runtime, job, program
from ltmp.export.layouts import FORMS
from ltmp.export.onnx import read_metadata
from ltmp.export.runtimes import OPENERS, Session
from ltmp.export.verify import NOISES, Verification, check_share, expect, smooth_images, synthetic_images, verify
from ltmp.hosts.attach import attachment, thresholds_of
from ltmp.method.thresholds import Thresholds

pytest.importorskip("onnx", reason="needs the extra 'export'")
pytest.importorskip("onnxruntime", reason="needs the extra 'export'")

IMAGES = random_images(6, seed=3)
ABOUT = {"model": "tiny", "preprocessing": {"interpolation": "bicubic"}}


def reduced_model(**kwargs: Any) -> Any:
    return attach_reducing(tiny_vit(depth=2, **kwargs), IMAGES)


@pytest.fixture(scope="module")
def model() -> Any:
    return reduced_model()


@pytest.fixture(scope="module")
def files(model, tmp_path_factory) -> dict[str, Path]:
    """An ONNX file of each form."""
    folder = tmp_path_factory.mktemp("onnx")
    for form in FORMS:
        found = export(model, folder / f"{form}.onnx", Plan(form=form), images=IMAGES, metadata=ABOUT)
        assert (found.images, found.undecided) == (6, 0)
        assert found.counts > 2
    return {form: folder / f"{form}.onnx" for form in FORMS}


@pytest.mark.parametrize("runtime", OPENERS)
@pytest.mark.parametrize("form", FORMS)
def test_onnx_is_the_model_in_every_runtime(form, runtime, model, files):
    pytest.importorskip("onnxruntime" if runtime == "onnx" else runtime, reason="needs the extra 'export'")
    images = random_images(5, seed=8)
    session = OPENERS[runtime](files[form], threads=1)
    with torch.no_grad():
        expected, kept = run_recorded(model, images)
    logits, counts = session(images)
    assert counts.dtype == torch.int64
    assert torch.equal(counts.float(), kept)
    assert_close(logits, expected, 1e-5, "logits")
    assert session.batch == (None if form == "batch" else 1)


@pytest.mark.parametrize("form", FORMS)
def test_scores_beyond_the_paper_are_exported_too(form, tmp_path):
    """The probe becomes weights of the graph."""
    pytest.importorskip("openvino", reason="needs the extra 'export'")
    model = reduced_model()
    thresholds = thresholds_of(model)
    thresholds.config = LTMPConfig(scores=replace(SCORES["best"], class_power=0.4))
    thresholds.set_probe(make_probe(2))
    thresholds.set([0.2, 0.3], [0.02, 0.03])
    export(model, tmp_path / "best.onnx", Plan(form=form), images=IMAGES)
    images = random_images(5, seed=8)
    with torch.no_grad():
        expected, kept = run_recorded(model, images)
    assert kept[:, -1].max() < 17
    for opened in OPENERS.values():
        logits, counts = opened(tmp_path / "best.onnx", threads=1)(images)
        assert torch.equal(counts.float(), kept)
        assert_close(logits, expected, 1e-5, "logits")


def test_graphs_scatter_nothing_and_static_ones_depend_on_no_data(files):
    import onnx

    for form, path in files.items():
        used = {node.op_type for node in onnx.load(path).graph.node}
        assert not any("Scatter" in name for name in used)
        assert ("NonZero" in used) == (form != "static")


def test_file_has_metadata(files):
    import onnx

    about = read_metadata(files["batch"])
    assert about["ltmp.version"] == ltmp.__version__
    assert (about["ltmp.model"], about["ltmp.form"], about["ltmp.precision"]) == ("tiny", "batch", "float32")
    assert 0 < float(about["ltmp.share"]) < 1
    assert '"interpolation"' in about["ltmp.preprocessing"]
    saved = onnx.load(files["batch"])
    assert [entry.version for entry in saved.opset_import if entry.domain == ""] == [20]
    assert saved.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_int8_decides_nearly_the_same_in_a_smaller_file(model, files, tmp_path):
    path = tmp_path / "small.onnx"
    found = export(model, path, Plan(form="static", int8=True), images=IMAGES)
    assert 0 < found.difference < 1
    assert path.stat().st_size < files["static"].stat().st_size
    assert job.plan_of(path) == Plan(form="static", int8=True)
    assert os.listdir(tmp_path) == ["small.onnx"]


def test_torch_program_takes_any_batch(model, tmp_path):
    path = tmp_path / "model.pt2"
    export(model, path, Plan("program"), images=IMAGES)
    images = random_images(3, seed=8)
    with torch.no_grad():
        logits, counts = torch.export.load(path).module()(images)
        expected, kept = run_recorded(model, images)
    assert torch.equal(counts.float(), kept)
    assert_close(logits, expected, 1e-5, "logits")


@pytest.mark.slow
@pytest.mark.skipif(not program.has_compiler(), reason="AOTInductor needs a C++ compiler")
def test_compiled_package(model, tmp_path):
    """The form of a dynamic batch: a compiler takes a minute for each, and programs are tested in all of them."""
    found = export(model, tmp_path / "model.pt2", Plan("aoti", "batch"), images=IMAGES)
    assert found.undecided == 0


def test_evaluate_takes_an_exported_model(model, files):
    exported = in_runtime(model, "onnx", files["static"], threads=1)
    result = evaluate(exported, [(IMAGES, torch.zeros(6, dtype=torch.long))])
    expected = evaluate(model, [(IMAGES, torch.zeros(6, dtype=torch.long))])
    same = ("top1", "dense_top1", "agreement", "tokens", "kept", "images")
    assert [getattr(result, name) for name in same] == [getattr(expected, name) for name in same]
    assert result.share == pytest.approx(expected.share)
    assert result.throughput is not None


def wrong(session: Session, what: str) -> Session:
    def call(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits, counts = session.call(images)
        return (logits + 0.01, counts) if what == "logits" else (logits, counts - 1)

    return replace(session, call=call)


@pytest.mark.parametrize(("what", "expected"), [("logits", "logits differ"), ("counts", "other tokens")])
def test_export_that_differs_leaves_no_file(what, expected, model, monkeypatch, tmp_path):
    path = tmp_path / "model.pt2"
    path.write_text("old")
    opened = job._open
    monkeypatch.setattr(job, "_open", lambda *args: wrong(opened(*args), what))
    with pytest.raises(LTMPError, match=expected):
        export(model, path, Plan("program", "static"), images=IMAGES)
    assert os.listdir(tmp_path) == ["model.pt2"]
    assert path.read_text() == "old"


def test_undecided_images_are_left_out():
    model = reduced_model()
    watching = Watching(2, thresholds_of(model).config).eval()
    watching.set(thresholds_of(model).merge, thresholds_of(model).prune)
    with running(body=replace(attachment(model).body, policy=watching)), torch.no_grad():
        model(IMAGES[:1])
    # a threshold that is one image's own score, to the last bit
    thresholds_of(model).set(merge=[watching.scores[0][0, 1:].median().item(), 1.0])
    expected = expect(model, IMAGES)
    assert expected.steady.tolist() == [False, *[True] * 5]
    counts = expected.kept - (~expected.steady)[:, None].long()
    session = Session(lambda images: (expected.logits, counts), None, (3, 16, 16))
    assert verify(session, expected).undecided == 1


class Watching(Thresholds):
    """Thresholds that record the scores they decide on."""

    def decide(self, step, block, score, free):
        vars(self).setdefault("scores", []).append(score)
        return super().decide(step, block, score, free)


def test_fixed_batch_is_padded_and_cut():
    sizes = []

    def call(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sizes.append(len(images))
        return images.flatten(1)[:, :2], torch.ones(len(images), 3)

    images = random_images(5)
    logits, counts = Session(call, 2, (3, 16, 16))(images)
    assert sizes == [2, 2, 2]
    assert torch.equal(logits, images.flatten(1)[:, :2])
    assert counts.shape == (5, 3)


def test_images_of_another_size_are_refused(model):
    session = Session(lambda images: (images, images), None, (3, 16, 16))
    with pytest.raises(LTMPError, match=r"\[3, 20, 20\].*\[3, 16, 16\]"):
        session(random_images(1, size=20))


def test_synthetic_images_differ_in_tokens(model):
    images = smooth_images(model, 8)
    assert images.shape == (8, 3, 16, 16)
    _, kept = run_recorded(model, images)
    assert len(kept.unique(dim=0)) > 1


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"format": "tflite"}, "onnx, program, aoti"),
        ({"form": "ragged"}, "single, batch, static"),
        ({"opset": 11}, "18 to 23"),
        ({"format": "aoti", "int8": True}, "format onnx"),
        ({"form": "batch", "batch_size": 4}, "static form"),
        ({"form": "static", "batch_size": 0}, "1 or more"),
    ],
)
def test_settings_are_checked(settings, expected):
    with pytest.raises(UsageError, match=expected):
        Plan(**settings)


def test_invalid_exports_are_refused(model, tmp_path):
    path = tmp_path / "model.onnx"
    with pytest.raises(LTMPError, match="nothing to export"):
        export(tiny_vit(), path)
    with pytest.raises(LTMPError, match="float32 models on the CPU"):
        export(reduced_model().half(), path)
    fixed = ltmp.attach(tiny_vit(), ltmp.LTMPConfig(variant="m", r=2))
    with pytest.raises(LTMPError, match="only learned thresholds"):
        export(fixed, path)
    with pytest.raises(LTMPError, match="floor or a ceiling"):
        export(ltmp.attach(tiny_vit(), ltmp.LTMPConfig(floor=4)), path)
    with pytest.raises(UsageError, match=r"\.pt2"):
        export(model, path, Plan("program"))
    with pytest.raises(UsageError, match="onnx, openvino"):
        in_runtime(model, "tensorrt")
    with pytest.raises(LTMPError, match="no exported model"):
        in_runtime(model, "onnx", tmp_path / "gone.onnx")
    path.write_bytes(b"not a model")
    with pytest.raises(LTMPError, match="not a whole ONNX file"):
        in_runtime(model, "onnx", path)
    assert os.listdir(tmp_path) == ["model.onnx"]


def test_another_models_file_is_refused(files):
    with pytest.raises(LTMPError, match="2 blocks, but the model gives 5 after 3"):
        in_runtime(attach_reducing(tiny_vit(), IMAGES), "onnx", files["static"])


@pytest.mark.parametrize(
    ("package", "plan"), [("onnxscript", Plan(form="static")), ("onnxruntime", Plan(form="static", int8=True))]
)
def test_missing_extra_is_named(package, plan, model, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=r"pip install 'ltmp\[export\]'"):
        export(model, tmp_path / "model.onnx", plan, images=IMAGES)
    assert os.listdir(tmp_path) == []


def test_missing_compiler_is_reported(model, monkeypatch, tmp_path):
    monkeypatch.setattr(program.shutil, "which", lambda name: None)
    with pytest.raises(LTMPError, match=r"C\+\+ compiler"):
        export(model, tmp_path / "model.pt2", Plan("aoti", "static"), images=IMAGES)
    assert os.listdir(tmp_path) == []


def test_model_is_left_as_it_was(tmp_path):
    model = reduced_model()
    model.train()
    model.blocks.training = False
    modes = [module.training for module in model.modules()]
    export(model, tmp_path / "model.pt2", Plan("program", "static"), images=IMAGES)
    assert [module.training for module in model.modules()] == modes


def test_dense_export_ignores_the_thresholds(model, tmp_path):
    path = tmp_path / "dense.pt2"
    found = export(model, path, Plan("program", "static", dense=True), images=IMAGES)
    assert (found.counts, found.share) == (1, 1.0)


def test_exported_model_counts_as_attached(model):
    session = Session(lambda images: (images[:, 0, 0, :5], torch.ones(len(images), 2)), None, (3, 16, 16))
    exported = ExportedModel(model, session, session)
    with ltmp.record() as calls:
        exported(IMAGES)
    assert calls.kept[0].tolist() == [[1.0, 1.0]] * 6


def test_the_share_in_a_file_is_the_thresholds_own(model, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(job, "trace", lambda *_, **__: None)
    monkeypatch.setattr(job, "write_onnx", lambda _program, path, text, **_: (path.touch(), written.append(text)))
    monkeypatch.setattr(job, "_open", lambda *_: None)
    monkeypatch.setattr(
        job, "verify", lambda _session, expected: Verification(8, 0, 1, 0.0, expected.share.mean().item())
    )
    path = tmp_path / "a.onnx"
    assert export(model, path, share=0.55).share != 0.55
    export(model, path, Plan(dense=True), share=0.55)
    export(model, path, images=IMAGES)
    export(model, path)
    shares = [text.get("ltmp.share") for text in written]
    assert shares[:2] + shares[3:] == ["0.55", "1.0", None]
    assert 0 < float(shares[2]) < 1


def test_synthetic_images_are_reduced_about_as_much_as_the_thresholds_say():
    model = reduced_model()
    first = expect(model, synthetic_images(model, 8)).share.mean().item()
    for share in (0.5, 0.9):
        found = expect(model, synthetic_images(model, 8, share)).share.mean().item()
        assert abs(found - share) <= abs(first - share)
    assert len({expect(model, smooth_images(model, 8, noise=noise)).share.mean().item() for noise in NOISES}) > 2


def test_images_with_another_share_are_noted():
    found = Verification(8, 0, 3, 0.0, share=0.8)
    assert check_share(found, 0.75, synthetic=True) == check_share(found, None, synthetic=True) == found
    note = check_share(found, 0.5, synthetic=True).note
    assert "synthetic images keep a share of 0.80, but these thresholds are for 0.50" in note
