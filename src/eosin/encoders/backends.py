"""Run a network fast on what the machine has: torch, torch.compile or OpenVINO, fp32 or bf16.

`resolve` turns "auto" into facts; `build` returns one function from tiles to vectors. Every backend sees tiles in
batches of one fixed size: more are cut, a rest is filled up with black tiles whose vectors are thrown away. One shape
is compiled only, and a vector does not depend on how many tiles came with its own: libraries choose other kernels,
with other rounding, for other shapes.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from eosin.errors import GeometryError, MissingDependencyError

Forward = Callable[[NDArray[np.uint8]], NDArray[np.float32]]

BACKENDS = ("auto", "torch", "openvino", "compile")
PRECISIONS = ("auto", "fp32", "bf16")
BATCH = {"cpu": 8, "cuda": 64}
"""Tiles a batch: on two CPU cores ViT-S gains nothing above 8, and one tile alone costs as much as a batch."""
PATIENCE = 2
"""OpenVINO requests in flight: one computes while the other's tiles are copied."""


def resolve(backend: str, precision: str, device: str) -> tuple[str, str, str]:
    """Return backend, precision and device with "auto" replaced by the best of this machine.

    Args:
        backend: "auto", "torch", "openvino" or "compile". "auto" is OpenVINO on a CPU where it is installed, else
            torch.
        precision: "auto", "fp32" or "bf16". "auto" is bf16 where the device computes in it: CUDA from compute
            capability 8.0, CPUs with AMX, AVX512-BF16 or Arm BF16.
        device: "auto", "cpu", "cuda" or "cuda:N".

    Raises:
        GeometryError: an unknown name, or names that exclude one another.
        MissingDependencyError: openvino, a CUDA device or a compiler is not there.
    """
    _one_of("backend", backend, BACKENDS)
    _one_of("precision", precision, PRECISIONS)
    device = _device(device)
    if backend == "auto":
        backend = "openvino" if device == "cpu" and _installed("openvino") else "torch"
    if backend == "openvino":
        if device != "cpu":
            raise GeometryError(f"backend 'openvino' runs on the CPU, not on {device}; use backend='torch'")
        if not _installed("openvino"):
            raise MissingDependencyError.for_extra("openvino", "openvino")
    if backend == "compile":
        _check_compiler(device)
    native = has_bf16(device)
    if precision == "auto":
        precision = "bf16" if native else "fp32"
    if precision == "bf16" and not native and (backend == "openvino" or device != "cpu"):
        raise GeometryError(f"{device} does not compute in bf16 with backend {backend!r}; use precision='fp32'")
    return backend, precision, device


def build(
    network: nn.Module,
    *,
    backend: str,
    precision: str,
    device: str,
    mean: Sequence[float],
    std: Sequence[float],
    input_px: int,
    batch: int | None = None,
) -> Forward:
    """Return a function from tiles to vectors that runs `network` on a resolved backend.

    Args:
        network: normalised float (B, 3, H, W) to pooled (B, D); it is put into evaluation mode and on `device`.
        backend: "torch", "openvino" or "compile".
        precision: "fp32" or "bf16". Weights stay fp32; bf16 is autocast, or OpenVINO's inference precision.
        device: "cpu", "cuda" or "cuda:N".
        mean: per-channel mean on a 0-1 scale.
        std: per-channel standard deviation on a 0-1 scale.
        input_px: side of the tiles, pixels.
        batch: tiles that are computed at once; None takes `BATCH`.

    Returns:
        uint8 (B, H, W, 3) to float32 (B, D), any B. Equal tiles give equal vectors, bit for bit, whatever B is.
    """
    batch = batch or BATCH[torch.device(device).type]
    whole = Normalised(network, mean, std).eval().to(device)
    shape = (batch, input_px, input_px, 3)
    if backend == "openvino":
        run = _openvino_runner(whole, precision, shape)
    elif backend in ("torch", "compile"):
        run = _torch_runner(whole, precision, device, shape, compiled=backend == "compile")
    else:
        raise GeometryError(f"backend {backend!r} is not resolved; call resolve first")

    def forward(tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        if tiles.dtype != np.uint8 or tiles.shape[1:] != shape[1:] or not len(tiles):
            raise GeometryError(f"tiles are {tiles.dtype} {tiles.shape}; needed: uint8 (B, {input_px}, {input_px}, 3)")
        return run([_filled(tiles[start : start + batch], batch) for start in range(0, len(tiles), batch)])[
            : len(tiles)
        ]

    return forward


def runtime_info(*, backend: str, precision: str, device: str) -> dict[str, Any]:
    """Return what `build` runs on, for the record: names, versions, threads, batch."""
    kind = torch.device(device).type
    info = {
        "backend": backend,
        "precision": precision,
        "device": device,
        "device_name": torch.cuda.get_device_name(device) if kind == "cuda" else cpu_name(),
        "batch": BATCH[kind],
        "threads": threads(),
        "torch": torch.__version__,
    }
    if backend == "openvino":
        info["openvino"] = importlib.metadata.version("openvino")
    if kind == "cuda":
        info["cuda"] = torch.version.cuda
    return info


class Normalised(nn.Module):
    """A network behind its normalisation: bytes (B, H, W, 3) to pooled float32 (B, D).

    Normalisation is (x / 255 - mean) / std in fp32.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        """Put the normalisation in front of `network`."""
        super().__init__()
        self.network = network
        spread = torch.tensor(std, dtype=torch.float64)
        self.register_buffer("scale", (1.0 / (255.0 * spread)).float(), persistent=False)
        self.register_buffer("shift", (-torch.tensor(mean, dtype=torch.float64) / spread).float(), persistent=False)

    def forward(self, tiles: Tensor) -> Tensor:
        """Return the vectors of tiles."""
        images = tiles.to(torch.float32) * self.scale + self.shift
        return self.network(images.permute(0, 3, 1, 2).contiguous()).to(torch.float32)


def has_bf16(device: str) -> bool:
    """Say whether the device multiplies bf16 matrices in hardware."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return bool({"amx_bf16", "avx512_bf16", "bf16"} & set(_cpuinfo("flags", "Features").split()))


def cpu_name() -> str:
    """Return the processor's name, "" where the system does not tell."""
    return _cpuinfo("model name")


def threads() -> int:
    """Return how many CPU threads to compute with: torch's setting, at most the cores this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(torch.get_num_threads(), allowed))


@lru_cache(maxsize=8)
def _cpuinfo(*names: str) -> str:
    """Return the first value of one of the fields `names` of /proc/cpuinfo, "" without one."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    pairs = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in pairs if name.strip() in names), "")


def _one_of(what: str, name: str, known: Sequence[str]) -> None:
    """Raise `GeometryError` unless `name` is known."""
    if name not in known:
        raise GeometryError(f"{what} {name!r} does not exist; choose one of {', '.join(known)}")


def _installed(package: str) -> bool:
    """Say whether a package can be imported, without importing it."""
    return package in sys.modules or importlib.util.find_spec(package) is not None


def _device(device: str) -> str:
    """Return a device that is there, as "cpu", "cuda" or "cuda:N"."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = device.partition(":")
    if (kind, index) != ("cpu", "") and (kind != "cuda" or not (index or "0").isdigit() or device.endswith(":")):
        raise GeometryError(f"device {device!r} does not exist; choose one of auto, cpu, cuda, cuda:N")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise MissingDependencyError(
            f"device {device!r} was asked for and torch {torch.__version__} sees {torch.cuda.device_count()} CUDA "
            "devices; use device='cpu', or install torch for CUDA and check nvidia-smi"
        )
    return device


def _check_compiler(device: str) -> None:
    """Raise `MissingDependencyError` when torch.compile would find no compiler."""
    if device == "cpu":
        if not any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++", "c++") if name):
            raise MissingDependencyError("backend 'compile' needs a C++ compiler (g++); use backend='torch'")
    elif not _installed("triton"):
        raise MissingDependencyError("backend 'compile' needs triton on CUDA; use backend='torch'")


def _filled(tiles: NDArray[np.uint8], batch: int) -> NDArray[np.uint8]:
    """Return exactly `batch` tiles: the given ones, then black ones."""
    if len(tiles) == batch:
        return np.ascontiguousarray(tiles)
    full = np.zeros((batch, *tiles.shape[1:]), np.uint8)
    full[: len(tiles)] = tiles
    return full


Runner = Callable[[list[NDArray[np.uint8]]], NDArray[np.float32]]


def _torch_runner(
    whole: nn.Module, precision: str, device: str, shape: tuple[int, int, int, int], *, compiled: bool
) -> Runner:
    """Return a function from full batches to vectors, in torch; bytes travel, floats are made on the device."""
    kind = torch.device(device).type
    network = torch.compile(whole, dynamic=False) if compiled else whole

    def run(pieces: list[NDArray[np.uint8]]) -> NDArray[np.float32]:
        vectors: list[Tensor] = []
        with torch.inference_mode(), torch.autocast(kind, torch.bfloat16, enabled=precision == "bf16"):
            for piece in pieces:
                tiles = torch.from_numpy(piece)
                if kind == "cuda":  # page-locked memory: the copy runs while the device still computes
                    tiles = tiles.pin_memory().to(device, non_blocking=True)
                vectors.append(network(tiles))
            return torch.cat(vectors).cpu().numpy()

    if compiled:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Inductor says about itself while it compiles
            run([np.zeros(shape, np.uint8)])
    return run


def _openvino_runner(whole: nn.Module, precision: str, shape: tuple[int, int, int, int]) -> Runner:
    """Return a function from full batches to vectors, compiled by OpenVINO for one shape."""
    openvino = _openvino()
    example = torch.zeros((2, *shape[1:]), dtype=torch.uint8)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit's deprecation and what tracing says about Python numbers
        model = openvino.convert_model(whole, example_input=example, input=[openvino.PartialShape(list(shape))])
    compiled = openvino.Core().compile_model(
        model,
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision],
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads(),
            "ENABLE_CPU_PINNING": False,  # readers of slides share the cores
        },
    )
    dim = compiled.output(0).partial_shape[1].get_length()
    queue = openvino.AsyncInferQueue(compiled, PATIENCE)

    def run(pieces: list[NDArray[np.uint8]]) -> NDArray[np.float32]:
        vectors = np.empty((len(pieces), shape[0], dim), np.float32)

        def keep(request: Any, index: int) -> None:
            vectors[index] = request.get_output_tensor(0).data

        queue.set_callback(keep)
        for index, piece in enumerate(pieces):
            queue.start_async({0: piece}, index, share_inputs=True)
        queue.wait_all()
        return vectors.reshape(-1, dim)

    return run


def _openvino() -> Any:
    """Return the openvino module, imported without the part that reports its use over the network."""
    if "openvino" not in sys.modules:
        sys.modules.setdefault("openvino_telemetry", None)  # pyright: ignore[reportArgumentType]
    import openvino

    return openvino
