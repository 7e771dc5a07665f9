"""Files of others: whatever is wrong with them is said in one sentence, without code run and without much memory."""

from __future__ import annotations

import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file

import ltmp
from helpers import make_dial, tiny_vit
from ltmp import LTMPConfig, LTMPError
from ltmp.checkpoint import FORMAT, read
from ltmp.checkpoint.contents import split_thresholds
from ltmp.checkpoint.metadata import Metadata, Preprocessing
from ltmp.files.tensors import read_state_dict
from ltmp.files.text import strict_json
from ltmp.hosts.attach import is_attached
from ltmp.zoo.build import load_weights

GOOD = {"merge": torch.full((3,), 0.5), "prune": torch.full((3,), 0.01)}
CONFIG = LTMPConfig().to_dict()
Write = Callable[[Path], Any]


def tensors(**changed: Any) -> Write:
    """A thresholds file with other tensors; None leaves one out."""
    found = {name.replace("__", "."): value for name, value in {**GOOD, **changed}.items() if value is not None}
    about = {"format": FORMAT, "ltmp": json.dumps({"config": CONFIG})}
    return lambda path: save_file(found, path, metadata=about)


def says(text: str | None = None, **about: Any) -> Write:
    """A thresholds file that says this of itself."""
    text = json.dumps({"config": CONFIG, **about}) if text is None else text
    return lambda path: save_file(GOOD, path, metadata={"format": FORMAT, "ltmp": text})


def settings(**config: Any) -> Write:
    return says(config={**CONFIG, **config})


def raw(header: bytes | None = None, *, length: int | None = None, body: bytes = b"") -> Write:
    """A safetensors file byte for byte."""
    header = b"{}" if header is None else header
    return lambda path: path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + body)


def entries(about: str = "", **described: Any) -> Write:
    """A thresholds file whose header describes its tensors so, with 1,000 bytes for them."""
    ltmp_text = json.dumps(json.dumps({"config": CONFIG}))
    parts = [f'"__metadata__": {{"format": "{FORMAT}", "ltmp": {ltmp_text}{about}}}']
    parts += [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in described.items()]
    return raw(("{" + ", ".join(parts) + "}").encode(), body=bytes(1000))


def entry(dtype: Any = "F32", shape: Any = (3,), offsets: Any = (0, 12)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def torched(value: Any, **how: Any) -> Write:
    return lambda path: torch.save(value, path, **how)


def whole(**parts: Any) -> Write:
    """The state dict of an attached model with these thresholds."""
    return torched({f"ltmp.{name.replace('__', '.')}": value for name, value in {**GOOD, **parts}.items()})


class Code:
    """What unpickling would run."""

    def __reduce__(self) -> Any:
        return os.mkdir, (MARKER,)


MARKER = "unpickled"
NESTED = "[" * 100_000 + "]" * 100_000

SAFETENSORS: dict[str, Write] = {
    "empty": raw(b"", length=0),
    "seven bytes": lambda path: path.write_bytes(b"1234567"),
    "header longer than the file": raw(length=1 << 20),
    "header of 2^63 bytes": raw(length=1 << 63),
    "header of 2^64 - 1 bytes": raw(length=(1 << 64) - 1),
    "header cut off": raw(save(GOOD, {"format": FORMAT})[8:40]),
    "header is a list": raw(b"[]"),
    "header is a number": raw(b"1"),
    "header is not UTF-8": raw(b'{"\xff": 1}'),
    "header nested 100,000 deep": raw(NESTED.encode()),
    "a tensor twice": raw(b'{"merge": %b, "merge": %b}' % ((json.dumps(entry()).encode(),) * 2), body=bytes(12)),
    "metadata twice": raw(b'{"__metadata__": {}, "__metadata__": {"format": "%b"}}' % FORMAT.encode()),
    "metadata of numbers": raw(b'{"__metadata__": {"format": 1}}'),
    "metadata is a list": raw(b'{"__metadata__": []}'),
    "offsets past the end": entries(merge=entry(offsets=(0, 12)), prune=entry(shape=(400,), offsets=(12, 1612))),
    "offsets the wrong way": entries(merge=entry(offsets=(12, 0)), prune=entry()),
    "negative offsets": entries(merge=entry(offsets=(-12, 0)), prune=entry()),
    "offsets that overlap": entries(merge=entry(offsets=(0, 12)), prune=entry(offsets=(4, 16))),
    "huge shape": entries(merge=entry(shape=(1 << 62, 1 << 62)), prune=entry()),
    "shape that wraps to nothing": entries(merge=entry(shape=(1 << 32, 1 << 32), offsets=(0, 0)), prune=entry()),
    "negative shape": entries(merge=entry(shape=(-3, -1)), prune=entry()),
    "shape of fractions": entries(merge=entry(shape=(3.0,)), prune=entry()),
    "1,000 dimensions": entries(merge=entry(shape=(1,) * 1000, offsets=(0, 4)), prune=entry()),
    "unknown type": entries(merge=entry(dtype="F33"), prune=entry()),
    "type is a list": entries(merge=entry(dtype=[]), prune=entry()),
    "tensor described by a number": entries(merge=3, prune=entry()),
    "tensor without a shape": entries(merge={"dtype": "F32"}, prune=entry()),
    "no tensors": tensors(merge=None, prune=None),
    "no prune": tensors(prune=None),
    "no blocks": tensors(merge=torch.empty(0), prune=torch.empty(0)),
    "a number for a vector": tensors(merge=torch.tensor(0.5)),
    "a matrix for a vector": tensors(merge=torch.full((3, 3), 0.5)),
    "vectors of two lengths": tensors(merge=torch.full((4,), 0.5)),
    "integers": tensors(merge=torch.ones(3, dtype=torch.int64)),
    "booleans": tensors(prune=torch.ones(3, dtype=torch.bool)),
    "complex numbers": tensors(merge=torch.ones(3, dtype=torch.complex64)),
    "NaN": tensors(merge=torch.full((3,), float("nan"))),
    "infinity": tensors(prune=torch.full((3,), float("inf"))),
    "too large for float32": tensors(prune=torch.full((3,), 1e300, dtype=torch.float64)),
    "5,000 blocks": tensors(merge=torch.full((5000,), 0.5), prune=torch.zeros(5000)),
    "probe is a vector": tensors(probe=torch.ones(3)),
    "probe of another depth": tensors(probe=torch.ones(4, 17, 66)),
    "probe of integers": tensors(probe=torch.ones(3, 17, 66, dtype=torch.int8)),
    "probe with NaN": tensors(probe=torch.full((3, 17, 66), float("nan"))),
    "no probe where the scores ask for one": settings(similarity="probe"),
    "a part of a dial": tensors(dial__share=torch.tensor([0.3, 0.9])),
    "dial of matrices": tensors(**{f"dial__{name}": torch.ones(2, 3) for name in ("share", "merge", "prune", "kept")}),
    "dial of another depth": tensors(**{k.replace(".", "__"): v for k, v in make_dial(4).tensors().items()}),
    "dial with NaN": tensors(**{k.replace(".", "__"): v * float("nan") for k, v in make_dial(3).tensors().items()}),
}

SAID: dict[str, Write] = {
    "nothing": says(""),
    "no JSON": says("{config: 1}"),
    "JSON nested 100,000 deep": says(NESTED),
    "settings nested 100,000 deep": says('{"config": ' + NESTED + "}"),
    "a value nested 20 deep": says(config=CONFIG, note=json.loads("[" * 20 + "]" * 20)),
    "a list for a mapping": says("[1, 2]"),
    "a text for a mapping": says('"hello"'),
    "null": says("null"),
    "settings missing": says("{}"),
    "settings are a list": says(config=[1]),
    "settings are null": says(config=None),
    "a name twice": says('{"config": {}, "config": {}}'),
    "NaN in it": says('{"config": {"tau": NaN}}'),
    "infinity in it": says('{"config": {"tau": -Infinity}}'),
    "a number of 10,000 digits": says('{"config": {"tau": ' + "9" * 10_000 + "}}"),
    "tau is a text": settings(tau="warm"),
    "tau is null": settings(tau=None),
    "tau is negative": settings(tau=-1),
    "tau is a mapping": settings(tau={}),
    "variant is a list": settings(variant=["ltmp"]),
    "variant is a mapping": settings(variant={}),
    "variant is unknown": settings(variant="ltmq"),
    "engine is a number": settings(engine=3),
    "a setting of tomorrow": settings(colour="red"),
    "floor is a text": settings(floor="4"),
    "floor is half a token": settings(floor=0.5),
    "floor is true": settings(floor=True),
    "ceiling is 10^12": settings(ceiling=10**12),
    "seed is a text": settings(variant="random", r=2, seed="x"),
    "rates of text": settings(variant="m", r="8"),
    "rates are nested": settings(variant="m", r=[[8]]),
    "rates without a depth": settings(variant="m", r=8),
    "size_power is a text": settings(size_power="1"),
    "depth -3": says(depth=-3, config={**CONFIG, "variant": "m", "r": 2}),
    "depth null": says(depth=None, config={**CONFIG, "variant": "m", "r": 2}),
    "depth 10^12": says(depth=10**12, config={**CONFIG, "variant": "m", "r": 2}),
    "depth true": says(depth=True, config={**CONFIG, "variant": "m", "r": 2}),
    "depth of another model": says(depth=4),
    "depth is a text": says(depth="3"),
    "input size of one number": says(input_size=224),
    "input size of 10^9": says(input_size=[10**9, 10**9]),
    "input size of texts": says(input_size=["a", "b"]),
    "target is a text": says(target="half"),
    "target is 7": says(target=7),
    "share is a list": says(share=[0.5]),
    "budget is a text": says(budget="half"),
    "dial is a number": says(dial=0.5),
    "model name is a list": says(model_name=["deit"]),
    "model name with a terminal's controls": says(model_name="\x1b[2Jdeit"),
    "device with a line end": says(device="a\nb"),
    "writing turned round": says(dataset="a\u202eb"),
    "half a letter": says(dataset="\ud800"),
    "200,000 letters": says(dataset="x" * 200_000),
    "a name of 200,000 letters": says(**{"x" * 200_000: 1}),
    "5 million letters": says(notes=["x" * 900] * 6000),
    "class names are a text": says(class_names="cat"),
    "class names are numbers": says(class_names=[1, 2]),
    "a class name with an escape": says(class_names=["\x1b]0;title\x07"]),
    "means are a text": says(preprocessing={"mean": "0.5"}),
    "std of zero": says(preprocessing={"std": [0, 0, 0]}),
    "unknown crop": says(preprocessing={"crop_mode": "spiral"}),
    "unknown interpolation": says(preprocessing={"interpolation": ["bicubic"]}),
    "arguments of 10^9": says(model_kwargs={"depth": 10**9}),
    "arguments are a list": says(model_kwargs=["depth=3"]),
    "certificate is a text": says(certificate="certified"),
    "classes below zero": says(num_classes=-1),
}

CHECKPOINTS: dict[str, Write] = {
    "empty": lambda path: path.touch(),
    "text": lambda path: path.write_text("hello"),
    "a pickle": lambda path: path.write_bytes(pickle.dumps({"a": 1}, protocol=2)),
    "code": torched({"state_dict": Code()}),
    "code of old torch": torched({"state_dict": Code()}, _use_new_zipfile_serialization=False),
    "code in a tensor's place": torched({"ltmp.merge": Code()}),
    "a plain zip file": lambda path: zipfile.ZipFile(path, "w").writestr("a.txt", "hello"),
    "a zip file cut off": lambda path: (torch.save(GOOD, path), path.write_bytes(path.read_bytes()[:-30])),
    "a list": torched([torch.ones(1)]),
    "a tensor": torched(torch.ones(3)),
    "a number": torched(3),
    "no tensors": torched({"ltmp.merge": [0.5] * 3}),
    "keys that are numbers": torched({1: torch.ones(3), 2: torch.ones(3)}),
    "keys that are tuples": torched({("ltmp", "merge"): torch.ones(3)}),
    "a matrix for a vector": whole(merge=torch.ones(3, 3)),
    "vectors of two lengths": whole(merge=torch.ones(4)),
    "integers": whole(merge=torch.ones(3, dtype=torch.int64)),
    "complex numbers": whole(merge=torch.ones(3, dtype=torch.complex64)),
    "infinity": whole(prune=torch.full((3,), float("inf"))),
    "probe is a vector": whole(probe=torch.ones(3)),
    "a part of a dial": whole(dial__share=torch.tensor([0.3, 0.9])),
    "complex dial": whole(**{k.replace(".", "__"): v + 0j for k, v in make_dial(3).tensors().items()}),
    "sparse": whole(merge=torch.eye(3).to_sparse()),
    "nested": lambda path: whole(merge=torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]))(path),
    "quantised": lambda path: whole(merge=torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8))(path),
    "on no device": whole(merge=torch.ones(3, device="meta")),
    "2^27 numbers of one": whole(merge=torch.ones(1).expand(1 << 27)),
    "2^60 numbers of one": whole(merge=torch.ones(1).expand(1 << 60)),
    "memory that it does not fill": torched({**{f"ltmp.{k}": v for k, v in GOOD.items()}, "x": bytearray(8)}),
    "the seed's, a vector a block": torched({"blocks.0.merge_masker.threshold": torch.ones(3)}),
    "the seed's, NaN": torched({"blocks.0.merge_masker.threshold": torch.tensor(float("nan"))}),
    "the seed's, block 10^12": torched({f"blocks.{10**12}.merge_masker.threshold": torch.tensor(0.5)}),
    "a state dict in a list": torched({"state_dict": [torch.ones(3)]}),
    "nested state dicts": torched({"model": {"model": {"ltmp.merge": torch.ones(3)}}}),
    "numpy": torched({"ltmp.merge": np.ones(3), "ltmp.prune": np.ones(3)}),
}

FILES = {
    **{f"file: {name}": (".safetensors", write) for name, write in SAFETENSORS.items()},
    **{f"says: {name}": (".safetensors", write) for name, write in SAID.items()},
    **{f"checkpoint: {name}": (".pt", write) for name, write in CHECKPOINTS.items()},
}


@pytest.fixture
def model() -> Any:
    return tiny_vit()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("name", FILES)
def test_malformed_files_are_refused_in_a_sentence(
    tmp_path: Path, model: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    suffix, write = FILES[name]
    path = tmp_path / f"t{suffix}"
    write(path)
    with pytest.raises(LTMPError) as refusal:
        ltmp.load(model, path)
    message = str(refusal.value)
    assert message.isprintable()
    assert len(message) < 500
    assert str(path) in message
    assert not is_attached(model)
    assert not (tmp_path / MARKER).exists()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("name", [name for name in CHECKPOINTS if not name.startswith("the seed's")])
def test_malformed_weights_are_refused_in_a_sentence(tmp_path: Path, model: Any, name: str) -> None:
    path = tmp_path / "weights.pt"
    CHECKPOINTS[name](path)
    with pytest.raises(LTMPError) as refusal:
        load_weights(model, path)
    assert "\n" not in str(refusal.value)
    assert str(path) in str(refusal.value)


def test_pipes_and_devices_are_not_read(tmp_path: Path, model: Any) -> None:
    for name in ("t.safetensors", "t.pt"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(LTMPError):
            ltmp.load(model, tmp_path / name)
    (tmp_path / "zero.safetensors").symlink_to("/dev/zero")
    with pytest.raises(LTMPError, match="not a regular file"):
        ltmp.load(model, tmp_path / "zero.safetensors")


BOMBS = """
import resource, sys, torch, ltmp
from ltmp.checkpoint import read
from ltmp.zoo.build import load_weights
folder = sys.argv[1]
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (512 << 20),) * 2)
model = torch.nn.Linear(2, 2)
for name in sys.argv[2:]:
    for act in (lambda: read(f"{folder}/{name}"), lambda: load_weights(model, f"{folder}/{name}")):
        try:
            act()
            print("read", name)
        except ltmp.LTMPError as error:
            print("refused", len(str(error).splitlines()))
# `ru_maxrss` would begin at what the parent had when it forked
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print("peak", int(peak.split()[1]) >> 10)
"""


def test_small_files_cannot_ask_for_much_memory(tmp_path: Path) -> None:
    state = {f"ltmp.{name}": value for name, value in GOOD.items()}
    # 5 MB that unpack to 1 GB
    torch.save(state, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as bomb,
    ):
        for part in plain.infolist():
            bomb.writestr(part, plain.read(part), zipfile.ZIP_DEFLATED, 1)
        with bomb.open("plain/data/9", "w", force_zip64=True) as zeros:
            for _ in range(1 << 6):
                zeros.write(bytes(1 << 24))
    assert (tmp_path / "bomb.pt").stat().st_size < 6 << 20
    # a part that says it is larger than the file
    content = bytearray((tmp_path / "plain.pt").read_bytes())
    at = content.rindex(b"PK\x01\x02")
    content[at + 24 : at + 28] = struct.pack("<I", 1 << 31)
    (tmp_path / "lies.pt").write_bytes(content)
    torch.save({**state, "ltmp.merge": torch.ones(1).expand(1 << 33)}, tmp_path / "strides.pt")
    torch.save({"x": bytearray(8), **state}, tmp_path / "array.pt")
    # a file of 8 GB that takes no room on the disk
    said = json.dumps({"__metadata__": {"format": FORMAT}, "merge": entry(shape=(1 << 31,), offsets=(0, 1 << 33))})
    raw(said.encode())(tmp_path / "large.safetensors")
    os.truncate(tmp_path / "large.safetensors", 8 + len(said) + (1 << 33))
    names = ["bomb.pt", "lies.pt", "strides.pt", "array.pt", "large.safetensors"]
    done = subprocess.run(
        [sys.executable, "-c", BOMBS, str(tmp_path), *names], capture_output=True, text=True, timeout=200
    )
    lines = done.stdout.splitlines()
    assert lines[:-1] == ["refused 1"] * (2 * len(names)), done.stdout + done.stderr
    assert int(lines[-1].split()[1]) < 2048


def test_what_is_not_thresholds_is_not_read(tmp_path: Path) -> None:
    """Of a whole checkpoint in safetensors only what is looked for is read, however large the rest is."""
    state = {f"ltmp.{name}": value for name, value in GOOD.items()}
    content = bytearray(save(state))
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    end = max(value["data_offsets"][1] for value in header.values())
    header["x"] = entry(shape=(1 << 31,), offsets=(end, end + (1 << 33)))
    text = json.dumps(header).encode()
    path = tmp_path / "whole.safetensors"
    raw(text, body=bytes(content[8 + length :]))(path)
    os.truncate(path, 8 + len(text) + end + (1 << 33))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert torch.equal(read(path).merge, GOOD["merge"])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


def test_checkpoints_that_people_have_are_read(tmp_path: Path) -> None:
    """Bounds leave alone what is usual: tied weights, views, old torch, half precision, a command line, buffers."""
    weight = torch.randn(8, 4)
    state = OrderedDict(
        a=weight, tied=weight, view=weight[2:4], turned=weight.t(), half=weight.half(), brain=weight.bfloat16(),
        count=torch.tensor(3), flag=torch.tensor(True), none=torch.empty(0), parameter=torch.nn.Parameter(weight),
    )  # fmt: skip
    for i, how in enumerate(({}, {"_use_new_zipfile_serialization": False})):
        path = tmp_path / f"{i}.pt"
        torch.save({"state_dict": state, "args": __import__("argparse").Namespace(lr=1), "epoch": 3}, path, **how)
        found = read_state_dict(path)
        assert all(torch.equal(found[name], value) for name, value in state.items())
        assert split_thresholds(found)[0] is None


def test_what_is_said_comes_back() -> None:
    about = Metadata(
        model_name="deit_small_patch16_224", library="timm", model_kwargs={"depth": 3}, depth=3, num_classes=2,
        input_size=(32, 32), class_names=("katze", "hund \N{DOG FACE}"), target=0.6, dial=(0.3, 0.9),
        preprocessing=Preprocessing(mean=(0.5,) * 3, crop_pct=0.9, crop_mode="squash", interpolation="bicubic"),
        certificate={"risk": "disagree", "budget": None}, other={"top1": 71.5, "speed": {"batch_size": 64}},
    )  # fmt: skip
    assert Metadata.from_dict(strict_json(json.dumps(about.to_dict()))) == about
    assert Metadata.from_dict({}).to_dict() == {}


def test_names_are_shown_in_refusals_as_every_terminal_can() -> None:
    with pytest.raises(ValueError, match=r"^model_name is 'a\\x1b', expected text"):
        Metadata.from_dict({"model_name": "a\x1b"})
    with pytest.raises(ValueError, match=r"^a name is '\\x1b"):
        Metadata.from_dict({"\x1b[31mred": 1})
