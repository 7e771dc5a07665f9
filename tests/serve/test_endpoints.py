"""The endpoints answer what the model says, and every refusal is a documented problem."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient
from torchvision.transforms import Compose, Resize, ToTensor

import ltmp
from helpers import attach_reducing, random_images, tiny_vit
from ltmp.data import class_names
from ltmp.errors import LTMPError, UsageError
from ltmp.hosts.attach import thresholds_of
from ltmp.serve import Deployment, Limits, batching, read_names
from ltmp.serve.endpoints import create_app

from .conftest import picture

PNG = {"content-type": "image/png"}


def post(client: TestClient, body: bytes = b"", **kwargs):
    return client.post("/v1/predict", content=body or picture(), headers=PNG, **kwargs)


def problem(answer, status: int, code: str) -> str:
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
    values = answer.json()
    assert (values["status"], values["code"]) == (status, code)
    assert values["detail"].count("\n") == 0
    return values["detail"]


def directly(deployment: Deployment, body: bytes) -> tuple[torch.Tensor, float]:
    """Scores and share of an image, from the model itself."""
    image = deployment.transform(Image.open(BytesIO(body)).convert("RGB"))[None]
    with torch.inference_mode(), ltmp.record() as calls:
        return deployment.model(image).softmax(-1)[0], calls.share().item()


def test_answer_is_the_models(client, deployment):
    answer = post(client, picture(3), params={"top_k": 3})
    assert answer.status_code == 200
    values = answer.json()
    scores, share = directly(deployment, picture(3))
    top = scores.topk(3)
    assert [p["index"] for p in values["predictions"]] == top.indices.tolist()
    assert [p["score"] for p in values["predictions"]] == pytest.approx(top.values.tolist(), abs=1e-5)
    assert [p["label"] for p in values["predictions"]] == [deployment.names[i] for i in top.indices]
    assert values["share"] == pytest.approx(share)
    assert 1 <= values["tokens"] < 17


def test_many_at_once_get_their_own_answers(client, deployment):
    bodies = [picture(seed) for seed in range(32)]
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda body: post(client, body, params={"top_k": 5}), bodies))
    assert {answer.status_code for answer in answers} == {200}
    for body, answer in zip(bodies, answers, strict=True):
        given = {p["index"]: p["score"] for p in answer.json()["predictions"]}
        assert [given[i] for i in range(5)] == pytest.approx(directly(deployment, body)[0].tolist(), abs=1e-5)


def test_five_classes_by_default(client):
    assert len(post(client).json()["predictions"]) == 5


@pytest.mark.parametrize("top_k", ["0", "6", "-1", "two", "", "1e3", "99999999999999999999"])
def test_top_k_out_of_range(client, top_k):
    assert "top_k" in problem(post(client, params={"top_k": top_k}), 422, "invalid-parameter")


def test_wrong_type_empty_and_broken(client):
    page = client.post("/v1/predict", content=b"<p>", headers={"content-type": "text/html"})
    assert "text/html" in problem(page, 415, "unsupported-media-type")
    problem(client.post("/v1/predict", content=b"", headers=PNG), 400, "empty-body")
    problem(post(client, b"no image"), 422, "unreadable-image")
    problem(post(client, picture()[:-200]), 422, "unreadable-image")
    for files in ([], [("a", picture()), ("b", picture())]):
        answer = client.post("/v1/predict", files=files or {"x": (None, "no file")})
        assert f"{len(files)} files" in problem(answer, 400, "bad-request")
    form = {"content-type": "multipart/form-data"}
    assert "no boundary" in problem(client.post("/v1/predict", content=b"x", headers=form), 400, "bad-request")


def test_a_form_is_taken_and_so_is_whatever_clients_call_an_image(client):
    wanted = post(client, picture(3)).json()
    assert client.post("/v1/predict", files={"file": ("cat.jpg", picture(3))}).json() == wanted
    assert (
        client.post("/v1/predict", files={"x": (None, "1"), "file": ("c", picture(3), "text/plain")}).json() == wanted
    )
    for name in ("image/jpg", "application/x-www-form-urlencoded", "application/octet-stream", "image/webp"):
        assert client.post("/v1/predict", content=picture(3), headers={"content-type": name}).json() == wanted
    assert client.post("/v1/predict", content=picture(3)).json() == wanted


def test_forms_of_any_bytes_are_answered(client):
    noise = bytes(range(256)) * 40
    for body in (noise, b"--x\r\n" + noise, b"--x\r\n\r\n\r\n--x--", b"\r\n--x" * 100_000, b""):
        answer = client.post("/v1/predict", content=body, headers={"content-type": "multipart/form-data; boundary=x"})
        assert answer.status_code == 400


def test_the_start_page_points_to_the_docs(client):
    assert client.get("/").json()["docs"] == "/docs"


def test_too_many_headers_and_two_lengths_end_the_connection(client):
    answer = client.get("/healthz", headers={f"x-{number}": "1" for number in range(200)})
    problem(answer, 431, "too-many-headers")
    assert answer.headers["connection"] == "close"
    both = client.get("/none", headers={"content-length": "0", "transfer-encoding": "chunked"})
    problem(both, 400, "bad-request")
    assert both.headers["connection"] == "close"


def test_a_name_or_url_is_bytes_like_any_other(client):
    for body in (b"/etc/passwd", b"file:///etc/passwd", b"http://127.0.0.1:1/cat.jpg"):
        problem(post(client, body), 422, "unreadable-image")


def test_unknown_paths_and_methods(client):
    problem(client.get("/v1/models"), 404, "not-found")
    answer = client.put("/healthz")
    problem(answer, 405, "method-not-allowed")
    assert answer.headers["allow"] == "GET"


def test_bodies_have_a_limit(deployment):
    with TestClient(create_app(deployment, Limits(max_body=2000))) as client:
        problem(client.post("/v1/predict", content=bytes(2001), headers=PNG), 413, "body-too-large")
        problem(
            client.post("/v1/predict", content=b"", headers={**PNG, "content-length": "2001"}), 413, "body-too-large"
        )


def test_pixels_have_a_limit(deployment):
    with TestClient(create_app(deployment, Limits(max_pixels=100))) as client:
        assert "20 x 18" in problem(post(client), 413, "too-many-pixels")


class Held(Deployment):
    """Answers when it is allowed to."""

    def __init__(self, other: Deployment) -> None:
        vars(self).update(vars(other))
        self.go, self.began = threading.Event(), threading.Event()
        self.answered = 0

    def __call__(self, images, forward=None):
        if not images.equal(self.blank.expand_as(images)):
            self.began.set()
            assert self.go.wait(10)
            self.answered += len(images)
        return super().__call__(images, forward)


def test_a_full_queue_says_when_to_come_back(deployment):
    held = Held(deployment)
    with TestClient(create_app(held, Limits(max_queue=2, max_batch=1))) as client, ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(post, client) for _ in range(2)]
        assert held.began.wait(5)
        while client.app.state.service.in_flight < 2:
            pass
        answer = post(client)
        problem(answer, 429, "queue-full")
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert client.get("/readyz").status_code == 200
        held.go.set()
        assert [w.result(5).status_code for w in waiting] == [200, 200]
        assert post(client).status_code == 200


def test_an_answer_that_takes_too_long(deployment):
    held = Held(deployment)
    with TestClient(create_app(held, Limits(timeout=0.3, max_batch=1))) as client, ThreadPoolExecutor(2) as pool:
        both = [pool.submit(post, client) for _ in range(2)]
        for answer in both:
            problem(answer.result(5), 504, "timeout")
        assert client.app.state.service.in_flight == 0
        held.go.set()
        assert post(client).status_code == 200
    # of the two, the one that had begun went on; the other was never run
    assert held.answered == 2


def test_a_failing_model_is_a_500_and_nothing_worse(deployment, caplog, monkeypatch):
    # other tests in this process configure logging as servers do, so this one listens where the service writes
    logger = logging.Logger("service")
    logger.addHandler(caplog.handler)
    monkeypatch.setattr(batching, "log", logger)

    class Failing(Held):
        def __call__(self, images, forward=None):
            if not images.equal(self.blank.expand_as(images)) and not self.go.is_set():
                raise RuntimeError("out of memory")
            return Deployment.__call__(self, images, forward)

    failing = Failing(deployment)
    with TestClient(create_app(failing)) as client:
        problem(post(client), 500, "model-failed")
        assert "out of memory" in caplog.text
        failing.go.set()
        assert post(client).status_code == 200


def test_health_follows_the_model_thread(client):
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {"status": "ok"}
    client.app.state.service.batcher.stop()
    problem(client.get("/readyz"), 503, "not-ready")
    problem(post(client), 503, "not-ready")
    assert client.get("/healthz").status_code == 200


def test_metrics_count_what_happened(client, deployment):
    post(client), post(client), post(client, b"no image"), client.get("/a/path/with?a=secret")
    text = client.get("/metrics")
    assert text.headers["content-type"].startswith("text/plain; version=")
    lines = dict(line.rsplit(" ", 1) for line in text.text.splitlines() if not line.startswith("#"))
    assert lines['ltmp_requests_total{path="/v1/predict",status="200"}'] == "2.0"
    assert lines['ltmp_requests_total{path="/v1/predict",status="422"}'] == "1.0"
    assert lines['ltmp_requests_total{path="other",status="404"}'] == "1.0"
    assert lines['ltmp_request_seconds_count{path="/v1/predict"}'] == "3.0"
    assert lines['ltmp_problems_total{code="unreadable-image"}'] == "1.0"
    assert lines["ltmp_batch_size_sum"] == lines["ltmp_tokens_kept_count"] == "2.0"
    assert float(lines["ltmp_flops_share_sum"]) == pytest.approx(2 * directly(deployment, picture())[1], rel=1e-5)
    assert (lines["ltmp_queue_length"], lines["ltmp_requests_in_flight"]) == ("0.0", "0.0")
    assert "secret" not in text.text


def test_info(client, deployment):
    values = client.get("/v1/info").json()
    assert (values["classes"], values["input_size"], values["variant"]) == (5, [3, 16, 16], "ltmp")
    assert values["about"] == {"target": 0.6}
    assert values["limits"]["max_queue"] == 128
    assert values["units"].keys() == values["limits"].keys()
    assert values["units"]["max_body"] == "bytes"


def test_openapi_documents_every_answer(client):
    paths = client.get("/openapi.json").json()["paths"]
    assert set(paths) == {"/v1/predict", "/v1/info", "/healthz", "/readyz", "/metrics"}
    predict = paths["/v1/predict"]["post"]
    assert {"200", "400", "408", "413", "415", "422", "429", "431", "500", "503", "504"} == set(predict["responses"])
    assert "image/jpeg" in predict["requestBody"]["content"]
    assert predict["parameters"][0]["schema"]["maximum"] == 5
    for status, answer in predict["responses"].items():
        assert status == "200" or "application/problem+json" in answer["content"]


def test_what_cannot_be_served_is_said(tmp_path):
    with pytest.raises(LTMPError, match="attach thresholds first"):
        create_app(Deployment(tiny_vit()))
    with pytest.raises(UsageError, match="2 class names for a model with 5 classes"):
        create_app(Deployment(ltmp.attach(tiny_vit()), names=["ant", "bee"]))
    with pytest.raises(UsageError, match="one class name per line"):
        read_names(tmp_path / "none.txt")
    (tmp_path / "names.txt").write_text("ant\nbee\n")
    assert read_names(tmp_path / "names.txt") == ["ant", "bee"]
    for empty in ("", "\n \n", "ant\n\nbee\n"):
        (tmp_path / "names.txt").write_text(empty)
        with pytest.raises(UsageError, match=r"names.txt: line [12] is empty"):
            read_names(tmp_path / "names.txt")


def test_the_old_name_of_a_deployment_still_works():
    import ltmp.serve

    with pytest.warns(DeprecationWarning, match=r"ltmp.serve.Deployment"):
        assert ltmp.serve.Predictor is Deployment


def test_a_model_that_gives_nan_is_not_served():
    model = attach_reducing(tiny_vit(), random_images(4))
    deployment = Deployment(model)
    model.head.bias.data.fill_(float("nan"))
    with pytest.raises(LTMPError, match="NaN"), TestClient(create_app(deployment)):
        pass
    assert thresholds_of(model).depth == 3


def test_a_classifier_of_hugging_face_is_served_with_its_own_names():
    transformers = pytest.importorskip("transformers", reason="the extra transformers is not installed")
    shape = {"image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    labels = {0: "cat", 1: "dog", 2: "elk"}
    config = transformers.ViTConfig(
        intermediate_size=32, id2label=labels, label2id={v: k for k, v in labels.items()}, **shape
    )
    model = ltmp.attach(transformers.ViTForImageClassification(config).eval())
    transform = Compose([Resize((16, 16)), ToTensor()])
    with TestClient(create_app(Deployment(model, transform=transform, names=class_names(model)))) as client:
        found = post(client).json()["predictions"]
    assert {one["label"] for one in found} == {"cat", "dog", "elk"}


def test_fixed_rates_are_served():
    model = ltmp.attach(tiny_vit(), ltmp.LTMPConfig(variant="m", r=2))
    with TestClient(create_app(Deployment(model))) as client:
        assert client.get("/v1/info").json()["variant"] == "m"
        assert post(client).json()["share"] < 1
