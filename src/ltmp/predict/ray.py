"""Scoring on a Ray cluster: the same predictor in an actor pool of Ray Data, with one task per shard."""

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
"""Bytes of the object store of a local cluster: only descriptions of shards and counts pass through it."""


@dataclass(frozen=True)
class RayOptions:
    """How to run on Ray.

    Args:
        actors: number of models that run in parallel; None runs one per GPU, or on CPUs as many as fit.
        address: address of a running cluster, or "auto" for the one on this machine; None uses RAY_ADDRESS if it is
            set, or else starts a local cluster for this run.
    """

    actors: int | None = None
    address: str | None = None


def score_on_ray(scoring: Scoring, out: Path, shards: Sequence[Shard], options: RayOptions) -> Iterator[Written]:
    """Score shards on Ray and yield each one when it is written, in any order.

    Lost actors are restarted and their shards scored again; a shard's file is either complete or missing.

    Raises:
        MissingExtraError: Ray is not installed.
        LTMPError: there is no such cluster, it lacks the required GPUs or CPUs, or an actor failed.
    """
    ray = _import_ray()
    cuda = scoring.device.startswith("cuda")
    # On CPUs there is one actor per processor, so that decoding ahead would only slow down another actor's model.
    workers = scoring.workers if scoring.workers is not None else (4 if cuda else 0)
    cpus = max(1, workers)
    with _cluster(ray, options, cpus) as resources:
        slots = int(resources.get("GPU", 0) if cuda else resources.get("CPU", 0) // cpus)
        if not slots:
            lacking = "GPU: use --device cpu" if cuda else f"machine with {cpus} processors: use fewer --workers"
            raise LTMPError(f"the cluster has no {lacking}, or another cluster")
        remote_scoring = replace(scoring, workers=workers, device="cuda" if cuda else "cpu")
        tasks = ray.data.from_items(
            [{"shard": pickle.dumps(shard)} for shard in shards], override_num_blocks=len(shards)
        )
        written = tasks.map_batches(
            Predictor,
            fn_constructor_args=[remote_scoring, out],
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
    """Return the message of ltmp's own error in an actor's traceback, or else one with the error at its end."""
    errors = re.findall(r"^([\w.]*(?:Error|Exception)): (.+)$", text, re.MULTILINE)
    name, message = errors[-1] if errors else ("error", (text.strip() or "no reason given").splitlines()[0])
    if name.startswith("ltmp."):
        return message
    return f"scoring on Ray failed ({name}: {message}); finished shards are kept: repeat the same command to continue"


def _import_ray() -> Any:
    # No usage statistics, and warnings of Ray's C++ parts stay in its log files.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingExtraError("ray", "ray", "Scoring on Ray") from error
    ray.data.DataContext.get_current().enable_progress_bars = False
    # Everything is in Ray's log files, and our own progress bar on the screen. Only Ray's own handlers are silenced.
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler) and type(handler).__module__.split(".")[0] == "ray":
            handler.setLevel(logging.CRITICAL + 1)
    return ray


@contextmanager
def _cluster(ray: Any, options: RayOptions, cpus: int) -> Iterator[dict[str, float]]:
    """Connect to a running cluster, or to a local one that ends with the run; yields its resources."""
    if ray.is_initialized():  # by the caller's Python code
        yield ray.cluster_resources()
        return
    address = options.address or os.environ.get("RAY_ADDRESS")
    cluster: dict[str, Any]
    if address:
        _check_reachable(address)
        cluster = {"address": address}
    else:
        cluster = {
            "address": "local",
            "num_cpus": max(os.cpu_count() or 1, cpus * (options.actors or 1)),
            "object_store_memory": OBJECT_STORE,
            "include_dashboard": False,
        }
    # Actors import the code that runs here, even if it is not installed.
    variables = {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
    try:
        ray.init(
            **cluster,
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


def _check_reachable(address: str) -> None:
    """Fail at once if a cluster is not reachable; Ray itself would wait for minutes."""
    url = urlsplit(address if "://" in address else f"ray://{address}")
    if url.port is None:  # "auto", or a name that Ray resolves
        return
    try:
        socket.create_connection((url.hostname or "", url.port), timeout=10).close()
    except OSError as error:
        raise LTMPError(f"no Ray cluster at {address} ({error}): check --ray-address, or leave it out") from error
