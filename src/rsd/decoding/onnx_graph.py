"""A call on CPU tensors as one ONNX graph, run by ONNX Runtime.

A light draft is several hundred operations of a few microseconds each; PyTorch takes longer to get from one to the next
than to compute them, and where two threads meet after each, and one of them has to wait for a core, a hundred times
longer. Exporting takes seconds, so a graph is kept (`graph_folder`) under a name made of everything that it depends on.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rsd
from rsd.decoding.steps import Decoder
from rsd.locks import first_or_after
from rsd.nested import tensors_of, with_tensors
from rsd.types import RsdError

PACKAGES = ("onnxruntime", "onnx", "onnxscript")
CODE = ("models/*.py", "decoding/*.py", "tokenizer/*.py", "nested.py")  # what an exported graph is made of
KEPT = 12  # graphs; those used longest ago give way
TOLERANCE = 1e-2  # of the largest number of an output, or of its symbols; rounding is 1e-5
LOG = logging.getLogger(__name__)


def missing_packages() -> list[str]:
    """What has to be installed before a graph can be exported and run."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


class OnnxGraph:
    """A call as a session of ONNX Runtime with as many threads as PyTorch has when it is made, and with the weights of
    then: what changes in the models later does not reach it.

    The light draft on one observation gets one thread: its operations are too small for two to meet after each of them.
    """

    def __init__(
        self, key: str, decoder: Decoder, call: Callable[[Sequence[Tensor]], Any], inputs: Sequence[Tensor]
    ) -> None:
        """`RsdError` if what is exported does not give what the call gives on these inputs."""
        with torch.inference_mode(False), torch.no_grad():
            given = [tensor.clone().contiguous() for tensor in inputs]
            self.template = call(given)
            path = graph_folder() / f"{_name(key, decoder, given)}.onnx"
            with contextlib.suppress(OSError):
                os.utime(path)  # used last now
            if not path.exists():
                with first_or_after(path.parent):
                    if not path.exists():
                        LOG.info("exporting the graph %s for ONNX Runtime: once, some seconds", key)
                        _export(path, decoder, call, given)
        light = key.startswith("scout") and len(given[0]) == 1
        threads = 1 if light else torch.get_num_threads()
        try:
            self.session = _session(path, threads)
        except RsdError as error:  # cut off by a full disk, say, or of another version of the runtime
            LOG.warning("ONNX graph %s: cannot be loaded (%s); made anew", path, error.__cause__)
            with torch.inference_mode(False), torch.no_grad():
                _export(path, decoder, call, given)
            self.session = _session(path, threads)
        self.names = [argument.name for argument in self.session.get_inputs()]
        self._compare(key, given)

    def __call__(self, inputs: Sequence[Tensor]) -> Any:
        feed = {name: tensor.contiguous().numpy() for name, tensor in zip(self.names, inputs, strict=True)}
        return with_tensors(self.template, map(torch.from_numpy, self.session.run(None, feed)))

    def _compare(self, key: str, inputs: Sequence[Tensor]) -> None:
        pairs = zip(tensors_of(self.template), tensors_of(self(inputs)), strict=True)
        for index, (expected, found) in enumerate(pairs):
            if expected.numel() == 0 or not expected.isfinite().all():
                continue
            if expected.is_floating_point():
                apart, most = float((expected - found).abs().max()), max(1.0, float(expected.abs().max()))
            else:  # symbols and what is accepted of them: the share that differs
                apart, most = float((expected != found).float().mean()), 1.0
            if not apart <= TOLERANCE * most:
                raise RsdError(
                    f"ONNX graph of {key}: output {index} is {apart:.3g} away from PyTorch's; decode with the engine "
                    "'eager', and report this with the versions of torch, onnxscript and onnxruntime"
                )


class _Call(nn.Module):
    """The call as a module, so that the exporter knows which tensors are weights."""

    def __init__(self, decoder: Decoder, call: Callable[[Sequence[Tensor]], Any]) -> None:
        super().__init__()
        self.models = nn.ModuleList(_models(decoder))
        self.call = call

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensors_of(self.call(inputs)))


def graph_folder() -> Path:
    """Where exported graphs are kept: $XDG_CACHE_HOME/rsd-vla/graphs, by default in ~/.cache. Safe to delete."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "rsd-vla" / "graphs"


def _models(decoder: Decoder) -> list[nn.Module]:
    return [model for model in (decoder.main, decoder.draft, decoder.light) if model is not None]


def _name(key: str, decoder: Decoder, inputs: Sequence[Tensor]) -> str:
    """A file's name that changes with everything that the graph depends on."""
    digest = hashlib.sha256(_code_and_versions().encode())
    for part in (key, decoder.rule.name, decoder.fine, decoder.foresees, *((tuple(x.shape), x.dtype) for x in inputs)):
        digest.update(repr(part).encode())
    for model in _models(decoder):
        digest.update(repr(model).encode())
        for name, tensor in model.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        digest.update(repr([getattr(model, name, None) for name in ("config", "code", "horizon")]).encode())
    return f"{key.replace(' ', '-')}-{digest.hexdigest()[:32]}"


@cache
def _code_and_versions() -> str:
    root = Path(rsd.__file__).parent
    files = sorted(file for part in CODE for file in root.glob(part))
    code = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return " ".join([code, *(f"{name} {metadata.version(name)}" for name in ("torch", *PACKAGES))])


def _export(
    path: Path, decoder: Decoder, call: Callable[[Sequence[Tensor]], Any], inputs: Sequence[Tensor]
) -> None:
    pending, decoder.checks = decoder.checks, []
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder, _quiet():
            file = Path(folder) / path.name
            module = _Call(decoder, call).eval()
            torch.onnx.export(module, tuple(inputs), file, dynamo=True, external_data=False, verbose=False)
            file.replace(path)  # whole or not at all, whoever else exports the same
    except RuntimeError as error:  # the exporter's own are of this kind
        raise RsdError(f"ONNX graph {path.stem}: not exported ({error}); take the engine 'eager'") from error
    except OSError as error:
        remedy = "set XDG_CACHE_HOME to a folder with room that may be written to, or take the engine 'eager'"
        raise RsdError(f"ONNX graph {path}: not written ({error}); {remedy}") from error
    finally:
        decoder.checks = pending
    with contextlib.suppress(FileNotFoundError):  # another process makes room as well
        graphs = sorted(path.parent.glob("*.onnx"), key=lambda graph: graph.stat().st_mtime)
        for graph in graphs[:-KEPT]:
            graph.unlink()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter speaks of its own future; a failure is an exception."""
    levels = {name: logging.getLogger(name).level for name in ("torch.onnx", "onnxscript", "onnx_ir")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for name in levels:
                logging.getLogger(name).setLevel(logging.ERROR)
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


def _session(path: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # else its threads go on spinning for a tenth of a second, on cores that the simulator and other graphs need
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime has a class of its own for every kind of damage
        raise RsdError(f"ONNX graph {path}: cannot be loaded ({error}); decode with the engine 'eager'") from error
