"""The same predictor on a Ray cluster: an actor pool of Ray Data, a task for each shard."""

from __future__ import annotations

import logging
import os
import pickle
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..errors import LTMPError, MissingExtraError
from .predictor import Predictor, Scoring
from .shards import Shard
from .writer import Written

OBJECT_STORE = 200 * 2**20
"""Bytes for a cluster of our own: only names of shards and counts pass through it."""


@dataclass(frozen=True)
class RayOptions:
    """How to run on Ray.

    Args:
        actors: models that work at once; None is one a GPU, or one a CPU where there is no GPU.
        address: of a running cluster, "auto" for the one of this machine; None starts a local one for this run.
    """

    actors: int | None = None
    address: str | None = None


def score_on_ray(scoring: Scoring, out: Path, shards: Sequence[Shard], options: RayOptions) -> Iterator[Written]:
    """Score shards on Ray; gives each when it is written, in any order.

    A lost worker is started anew and its shard scored again: a shard's file is there whole or not at all.

    Raises:
        MissingExtraError: Ray is not installed.
        LTMPError: no such cluster, or one without the GPUs asked for, or what went wrong in an actor.
    """
    ray = _import()
    cuda = scoring.device.startswith("cuda")
    # as many actors as processors: decoding ahead would only take its time from another actor's model
    workers = scoring.workers if scoring.workers is not None else (4 if cuda else 0)
    cpus = max(1, workers)
    with _cluster(ray, options, cpus) as resources:
        slots = int(resources.get("GPU", 0) if cuda else resources.get("CPU", 0) // cpus)
        if not slots:
            wanted = "GPU: use --device cpu" if cuda else f"machine with {cpus} processors: use fewer --workers"
            raise LTMPError(f"the cluster has no {wanted}, or another cluster")
        there = replace(scoring, workers=workers, device="cuda" if cuda else "cpu")
        tasks = ray.data.from_items(
            [{"shard": pickle.dumps(shard)} for shard in shards], override_num_blocks=len(shards)
        )
        written = tasks.map_batches(
            Predictor,
            fn_constructor_args=[there, out],
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(options.actors or slots, len(shards))),
            num_cpus=cpus,
            num_gpus=1 if cuda else None,
        )
        names = [field.name for field in fields(Written)]
        try:
            for row in written.iter_rows():
                yield Written(**{name: row[name] for name in names})
        except Exception as error:
            raise LTMPError(_explain(str(error))) from error


def _explain(text: str) -> str:
    """Our own sentence out of the traceback of an actor, or else the error at its end."""
    found = re.findall(r"^([\w.]*(?:Error|Exception)): (.+)$", text, re.MULTILINE)
    name, said = found[-1] if found else ("error", (text.strip() or "no reason given").splitlines()[0])
    if name.startswith("ltmp."):
        return said
    return f"scoring on Ray failed ({name}: {said}); what is finished is kept, the same command goes on"


def _import() -> Any:
    # nothing is reported to anyone, and what its C++ parts warn of stays in its log files
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingExtraError("ray", "ray", "Scoring on Ray") from error
    ray.data.DataContext.get_current().enable_progress_bars = False
    # its log files keep everything; on the screen there is our own bar. Handlers that others put there stay as they are
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler) and type(handler).__module__.split(".")[0] == "ray":
            handler.setLevel(logging.CRITICAL + 1)
    return ray


@contextmanager
def _cluster(ray: Any, options: RayOptions, cpus: int) -> Iterator[dict[str, float]]:
    """Connected to a running cluster, or to one of our own that ends with the run; gives its resources."""
    if ray.is_initialized():  # by whoever called us, in Python
        yield ray.cluster_resources()
        return
    address = options.address or os.environ.get("RAY_ADDRESS")
    cores = os.cpu_count() or 1
    own = {
        "address": "local",
        "num_cpus": max(cores, cpus * (options.actors or 1)),
        "object_store_memory": OBJECT_STORE,
        "include_dashboard": False,
    }
    if address:
        _check_there(address)
    # the code that runs here, where it is not installed
    variables = {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
    try:
        ray.init(
            **({"address": address} if address else own),
            runtime_env={"env_vars": variables},
            log_to_driver=False,
            logging_level="ERROR",
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise LTMPError(f"cannot connect to Ray ({error}): check --ray-address, or leave it out") from error
    try:
        yield ray.cluster_resources()
    finally:
        ray.shutdown()


def _check_there(address: str) -> None:
    """Ray itself would wait for minutes."""
    url = urlsplit(address if "://" in address else f"ray://{address}")
    if url.port is None:  # "auto", or a name that Ray looks up
        return
    try:
        socket.create_connection((url.hostname or "", url.port), timeout=10).close()
    except OSError as error:
        raise LTMPError(f"no Ray cluster at {address} ({error}): check --ray-address, or leave it out") from error
