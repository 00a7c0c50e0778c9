"""Primitives on CPU tensors as ONNX graphs, run by ONNX Runtime.

A drafter is several hundred operations of a few microseconds each; PyTorch takes longer to get from one to the next
than to compute them, and where two threads meet after each, and one of them has to wait for a core, a hundred times
longer. Exporting takes seconds, so graphs are kept: a folder for every policy, named by everything that they depend on,
with one small graph a primitive, for all decoders and rules, and the weights beside them, each once.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.onnx import register_custom_op_symbolic

import rsd
from rsd.cache import make_room
from rsd.checks import told
from rsd.decoding.primitives import Primitives, Step
from rsd.locks import first_or_after
from rsd.nested import tensors_of, with_tensors
from rsd.types import RsdError, WrongOption

PACKAGES = ("onnxruntime", "onnx")
CODE = ("models/*.py", "decoding/*.py", "runtime/*.py", "tokenizer/*.py", "nested.py")  # of an exported graph
LIMIT_BYTES = 2_000_000_000  # of all policies' graphs together; the policy used longest ago gives way
LARGE = 1024  # bytes of a weight from which on it lies beside its graph
WEIGHTS = "weights"  # the folder of them, each a file named by the SHA-256 of its bytes
OPSET = 20
INPUT = "input"  # the name of each, before its number
TOLERANCE = 1e-2  # of the largest number of an output, or of its symbols; rounding is 1e-5
INT8_TOLERANCE = 0.1  # rounding is 5e-3
INT8 = ("prefill", "prefill_with", "verify", "extend")  # primitives that are matrix products of the target's trunk
NUMPY_TYPES = {
    dtype: torch.zeros(0, dtype=dtype).numpy().dtype.type
    for dtype in (torch.float32, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool)
}
Call = Callable[[Sequence[Tensor]], Any]
LOG = logging.getLogger(__name__)


def missing_packages() -> list[str]:
    """What has to be installed before a graph can be exported and run."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


class OnnxGraphs:
    """A `Recorder` for the models of one policy: the folder that its graphs are kept in is found once. int8: those of
    the target's trunk multiply its weights, row by row rounded to 8 bits, as a checkpoint keeps them, with
    activations that are rounded to 8 bits as they come, by the range of each tensor."""

    def __init__(self, int8: bool = False) -> None:
        self._folder: Path | None = None
        self._int8 = int8

    def __call__(self, step: Step, ops: Primitives, call: Call, inputs: Sequence[Tensor]) -> OnnxGraph:
        if self._folder is None:
            self._folder = graph_folder() / policy_name(ops)
        return OnnxGraph(self._folder, step, ops, call, inputs, self._int8 and step.name in INT8)


class OnnxGraph:
    """A call as a session of ONNX Runtime with as many threads as PyTorch has when it is made, and with the weights of
    then: what changes in the models later does not reach it. As with a CUDA graph, what it returns are the SAME tensors
    every time, overwritten by the next call: keys and values go from one graph to the next without a copy.

    A `small` primitive on one observation gets one thread: its operations are too small for two to meet after each."""

    def __init__(
        self, folder: Path, step: Step, ops: Primitives, call: Call, inputs: Sequence[Tensor], int8: bool = False
    ) -> None:
        """`RsdError` if what is exported does not give what the call gives on these inputs."""
        with torch.inference_mode(False), torch.no_grad():
            given = [tensor.clone().contiguous() for tensor in inputs]
            expected = call(given)
            path = folder / f"{graph_name(step, ops, given, tensors_of(expected))}{'-int8' * int8}.onnx"
            with contextlib.suppress(OSError):
                os.utime(folder)  # used last now
            if not path.exists():
                with first_or_after(folder):
                    if not path.exists():
                        export(path, step, ops, call, given, int8)
            threads = 1 if step.small and len(given[0]) == 1 else torch.get_num_threads()
            try:
                self.session = _session(path, threads)
            except RsdError as error:  # cut off by a full disk, say, or of another version of the runtime
                LOG.warning("ONNX graph %s: cannot be loaded (%s); made anew", path, error.__cause__)
                shutil.rmtree(folder / WEIGHTS, ignore_errors=True)
                export(path, step, ops, call, given, int8)
                self.session = _session(path, threads)
            outputs = [torch.zeros_like(each, memory_format=torch.contiguous_format) for each in tensors_of(expected)]
        self.result = with_tensors(expected, iter(outputs))
        # an input that the outputs do not depend on is none of the graph's
        self.inputs = [(each.name, int(each.name.removeprefix(INPUT))) for each in self.session.get_inputs()]
        self.binding = self.session.io_binding()
        for argument, tensor in zip(self.session.get_outputs(), outputs, strict=True):
            if tensor.numel():
                self.binding.bind_output(argument.name, *_memory(tensor))
        self(given)
        _compare(step.name, tensors_of(expected), outputs, INT8_TOLERANCE if int8 else TOLERANCE)

    def __call__(self, inputs: Sequence[Tensor]) -> Any:
        given = [(name, inputs[index].contiguous()) for name, index in self.inputs]  # to live until the session has run
        for name, tensor in given:
            self.binding.bind_input(name, *_memory(tensor))
        self.session.run_with_iobinding(self.binding)
        return self.result


def _memory(tensor: Tensor) -> tuple[str, int, Any, list[int], int]:
    """Where a contiguous tensor lies, as ONNX Runtime wants to know it: device and its number, type, shape, address."""
    return "cpu", 0, NUMPY_TYPES[tensor.dtype], list(tensor.shape), tensor.data_ptr()


def _compare(name: str, expected: Iterable[Tensor], found: Iterable[Tensor], tolerance: float) -> None:
    for index, (one, other) in enumerate(zip(expected, found, strict=True)):
        if one.numel() == 0 or not one.isfinite().all():
            continue
        if one.is_floating_point():
            apart, most = float((one - other).abs().max()), max(1.0, float(one.abs().max()))
        else:  # symbols and what is accepted of them: the share that differs
            apart, most = float((one != other).float().mean()), 1.0
        if not apart <= tolerance * most:
            raise RsdError(
                f"ONNX graph of {name}: output {index} is {apart:.3g} away from PyTorch's; decode with the engine "
                "'eager', and report this with the versions of torch and onnxruntime"
            )


class _Call(nn.Module):
    """The call as a module, so that the exporter knows which tensors are weights."""

    def __init__(self, ops: Primitives, call: Call) -> None:
        super().__init__()
        self.models = nn.ModuleList(_models(ops))
        self.call = call

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensors_of(self.call(inputs)))


def graph_folder() -> Path:
    """Where exported graphs are kept: $XDG_CACHE_HOME/rsd-vla/graphs, by default in ~/.cache. Safe to delete."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "rsd-vla" / "graphs"


def _models(ops: Primitives) -> list[nn.Module]:
    return [model for model in (ops.target, ops.feature_drafter, ops.visual_drafter) if model is not None]


def policy_name(ops: Primitives) -> str:
    """A folder's name that changes with the weights, the code and the versions that make the graphs."""
    digest = hashlib.sha256(_code_and_versions().encode())
    for model in _models(ops):
        digest.update(repr(model).encode())
        for name, tensor in model.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy())
        digest.update(repr([getattr(model, name, None) for name in ("config", "code", "horizon")]).encode())
    return digest.hexdigest()[:32]


def graph_name(step: Step, ops: Primitives, inputs: Sequence[Tensor], outputs: Iterable[Tensor]) -> str:
    """A file's name that changes with everything else that the graph depends on: what goes in, what comes out (a
    prefill with and without its cache), and what the primitive reads of the rule."""
    kind: list[object] = [[(tuple(x.shape), x.dtype) for x in tensors] for tensors in (inputs, outputs)]
    kind += {"rule": [ops.rule.name], "telling": [ops.fine, ops.telling]}.get(step.by, [])
    return f"{step.name}-{hashlib.sha256(repr(kind).encode()).hexdigest()[:16]}"


@cache
def _code_and_versions() -> str:
    root = Path(rsd.__file__).parent
    files = sorted(file for part in CODE for file in root.glob(part))
    code = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return " ".join([code, *(f"{name} {metadata.version(name)}" for name in ("torch", *PACKAGES))])


def export(
    path: Path, step: Step, ops: Primitives, call: Call, inputs: Sequence[Tensor], int8: bool = False
) -> None:
    """Write the call's graph, with its weights beside it; says so, since it takes a while."""
    begun = time.monotonic()
    import onnx  # may not be installed: then the engine is `eager`

    say(f"exporting {step.name} for ONNX Runtime, once for this policy ...")
    earlier, ops.checks = ops.checks, []
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        names = [f"{INPUT}{index}" for index in range(len(inputs))]
        with warnings.catch_warnings(), tempfile.TemporaryDirectory(dir=path.parent) as folder:
            warnings.simplefilter("ignore")  # that a shape is taken for a constant: it is one
            graph = Path(folder) / path.name
            register_custom_op_symbolic("aten::expm1", _expm1, OPSET)
            # by tracing: the newer exporter takes ten times as long for the same graph
            options: dict[str, Any] = {"dynamo": False, "opset_version": OPSET, "input_names": names}
            torch.onnx.export(_Call(ops, call).eval(), tuple(inputs), graph, **options)
            if int8:
                quantise(graph)
            proto = onnx.load(graph)
            write_weights(proto, path.parent / WEIGHTS)
            graph.write_bytes(proto.SerializeToString())
            graph.replace(path)  # whole or not at all, whoever else exports the same
        make_room(path.parent, LIMIT_BYTES)
    except RuntimeError as error:  # the exporter's own are of this kind
        raise RsdError(f"ONNX graph {path.stem}: not exported ({told(error)}); take the engine 'eager'") from error
    except OSError as error:
        remedy = "set XDG_CACHE_HOME to a folder with room that may be written to, or take the engine 'eager'"
        raise WrongOption(f"ONNX graph {path}: not written ({told(error)}); {remedy}") from error
    finally:
        ops.checks = earlier
    say(f"exporting {step.name} for ONNX Runtime, once for this policy: {time.monotonic() - begun:.0f} s")


def quantise(graph: Path) -> None:
    """In place: products of an activation with a weight become those of 8-bit integers."""
    from onnxruntime.quantization import QuantType, quantize_dynamic  # start-up time: a second, for an export alone

    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))  # it advises to infer shapes first, which changes nothing here
    try:
        quantize_dynamic(graph, graph, ["MatMul"], per_channel=True, weight_type=QuantType.QInt8)
    finally:
        logging.disable(before)


def say(line: str) -> None:
    """A line of progress, which gives way to the next where somebody watches."""
    begins = line.endswith("...")
    if sys.stderr.isatty():
        print(f"\r{line}\033[K", end="" if begins else "\n", file=sys.stderr, flush=True)
    elif not begins:
        print(line, file=sys.stderr, flush=True)
    LOG.info(line)


def _expm1(graph: Any, x: Any) -> Any:
    """ONNX has no such operator."""
    return graph.op("Sub", graph.op("Exp", x), graph.op("Constant", value_t=torch.ones(())))


def write_weights(proto: Any, folder: Path) -> None:
    """Move every large weight of a model to a file of its own, which graphs with the same weight share."""
    folder.mkdir(parents=True, exist_ok=True)
    for initialiser in proto.graph.initializer:
        content = initialiser.raw_data
        if len(content) < LARGE:
            continue
        beside = folder / hashlib.sha256(content).hexdigest()
        if not beside.exists():
            partial = beside.with_name(f"{beside.name}.{os.getpid()}")
            partial.write_bytes(content)
            partial.replace(beside)
        initialiser.ClearField("raw_data")
        initialiser.data_location = type(initialiser).EXTERNAL
        for key, value in (("location", f"{WEIGHTS}/{beside.name}"), ("offset", "0"), ("length", str(len(content)))):
            initialiser.external_data.add(key=key, value=value)


def _session(path: Path, threads: int) -> Any:
    import onnxruntime  # may not be installed: then the engine is `eager`

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Its threads wait for each other by spinning, by default much longer than an operation takes, and for a tenth of a
    # second after the last one: where other programs want the cores, a chunk of `l1` took 330 ms in the place of 95.
    options.add_session_config_entry("session.intra_op.spin_duration_us", "20")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime has a class of its own for every kind of damage
        raise RsdError(f"ONNX graph {path}: cannot be loaded ({told(error)}); take the engine 'eager'") from error
