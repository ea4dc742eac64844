"""Copies of a model that run fast on a CPU; times every exit, backend by backend; writes one exit as a file to ship.

    python benchmark_edge.py --backbone base                      # latency needs no trained weights
    python benchmark_edge.py out --budget-ms 80                   # the deepest exit of a trained model that fits
    python benchmark_edge.py out --export model.onnx --exit 3     # one exit in one file: .pt2, .onnx or a folder

Read top to bottom: the flags; `optimize_for_cpu` and what it packs; one file to ship; measuring; the report, the plot.
"""

import argparse
import contextlib
import copy
import functools
import json
import logging
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import evaluate
import sdser
import train

COPIES = ("fp32", "onednn", "bf16", "int8")  # what `optimize_for_cpu` makes
BACKENDS = (*COPIES, "onnxruntime", "onnxruntime-int8")


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add, positive = parser.add_argument, train.positive
    add("checkpoint", nargs="?", help="folder written by train.py, or a Hub name")
    add("--backbone", choices=sdser.SIZES, help="instead of a checkpoint: a built-in shape with random weights")
    add("--head", choices=sdser.HEADS, default="gru", help="with --backbone: of the shallow exits (default gru)")
    add("--exits", type=int, nargs="+", metavar="K", help="default: all of the model's")
    add("--seconds", type=positive(float), nargs="+", default=[1.0, 3.0, 6.0], metavar="S", help="default 1 3 6")
    add("--threads", type=positive(int), nargs="+", metavar="N", help="default: 1, and as many as there are cores")
    add("--backends", nargs="+", choices=BACKENDS, help="default: all that this machine has")
    add("--rounds", type=positive(int), default=20, metavar="N", help="timed runs of each, in turn (default 20)")
    add("--budget-ms", type=positive(float), metavar="MS", help="name the deepest exit that meets it in 95 %% of runs")
    add("--json", metavar="FILE", help="write the results as JSON")
    add("--plot", metavar="FILE", help="write a plot of the latencies (needs matplotlib)")
    add("--export", metavar="FILE", help="write one exit as FILE.pt2, FILE.onnx or a folder, and measure nothing")
    add("--exit", type=int, metavar="K", help="with --export (default: the deepest)")
    add("--backend", default="fp32", metavar="B", help="with --export: fp32 (default), bf16 (.pt2) or int8 (.onnx)")
    args = parser.parse_args(argv)
    if (args.checkpoint is None) == (args.backbone is None):
        parser.error("give either a checkpoint or --backbone")
    args.threads = args.threads or sorted({1, cores()})
    return args


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


# -- fast inference on a CPU ------------------------------------------------------------------------------------------


class CPUCopy(sdser.MultiExitSER):
    """What `optimize_for_cpu` returns: a model that answers, and can neither be truncated nor saved."""

    backend: str  # the one of COPIES that it is

    def truncate(self, exit: int):
        raise ValueError("a copy for the CPU cannot be truncated: truncate the model first, then make the copy")

    def save_pretrained(self, *_, **__):
        raise ValueError("a copy for the CPU cannot be saved: save the model that it was made from")


def optimize_for_cpu(model: sdser.MultiExitSER, backend: str = "auto") -> sdser.MultiExitSER:
    """A copy for inference on this CPU; the original stays as it is. The copy cannot be trained, truncated or saved.

    Args:
        backend:
            fp32     torch's own kernels
            onednn   weights packed for oneDNN, convolutions as matrix products, GELU fused; exact
            bf16     onednn in bfloat16, for processors that compute in it (AVX-512 BF16, AMX, Arm)
            int8     int8 linears, their inputs quantised as they come, and recurrence; the rest as bf16, or onednn
            auto     the faster of the exact ones, fp32 and onednn, timed here for a second
    Raises:
        ValueError: an unknown backend, or one that this machine lacks.
    """
    if isinstance(model, CPUCopy):
        raise ValueError("a copy for the CPU cannot be copied again: give the model it was made from")
    if backend == "auto":
        return fastest_exact(model)
    if backend not in COPIES:
        raise ValueError(f"backend {backend!r}: give one of {', '.join(COPIES)}, auto")
    if backend in ("onednn", "bf16", "int8") and not torch.backends.mkldnn.is_available():
        raise ValueError(f"backend {backend}: this build of torch lacks oneDNN; use fp32")
    if backend == "bf16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise ValueError("backend bf16: this processor does not compute in bfloat16; use onednn or int8")

    # The copy shares the matrices' memory until it packs them; those shared in the end get memory of their own.
    values = ((id(p), p.detach().cpu()) for p in model.parameters())
    shared = {key: nn.Parameter(p if p.ndim > 1 else p.clone(), requires_grad=False) for key, p in values}
    fast = copy.deepcopy(model, shared).eval()
    fast.__class__, fast.backend = CPUCopy, backend
    position = fast.backbone.encoder.pos_conv_embed
    position.conv = fold_weight_norm(position.conv)
    if backend in ("onednn", "bf16", "int8"):
        pack(fast, backend)
    for parameter in fast.parameters():
        parameter.data = parameter.data.clone()
    return fast


def fold_weight_norm(conv: nn.Conv1d) -> nn.Conv1d:
    """The position convolution with the weights that its weight norm works out anew at every call."""
    folded = nn.utils.skip_init(
        nn.Conv1d, conv.in_channels, conv.out_channels, conv.kernel_size, padding=conv.padding, groups=conv.groups
    ).requires_grad_(False)
    folded.weight.data, folded.bias.data = conv.weight.detach().clone(), conv.bias.detach()
    return folded


def pack(fast: sdser.MultiExitSER, backend: str) -> None:
    """Puts the packed parts below in the place of the model's own."""
    backbone, config = fast.backbone, fast.backbone.config
    # The residual stream adds up in float32. Convolutions stay out of int8, which their activations outrange: in a
    # trained model it changed every other label.
    precision = {"onednn": torch.float32, "bf16": torch.bfloat16, "int8": torch.qint8}[backend]
    half = backend != "onednn" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    dtype = torch.bfloat16 if half else torch.float32
    layers, position = backbone.feature_extractor.conv_layers, backbone.encoder.pos_conv_embed
    for i, layer in enumerate(layers):
        group_norm = i == 0 and config.feat_extract_norm == "group"
        layers[i] = (NormalizedConv if group_norm else MatrixConv)(layer, dtype)
    position.conv = FourierConv(position.conv)

    projection = backbone.feature_projection
    projection.projection = PackedLinear(projection.projection, precision)
    for layer in backbone.encoder.layers:
        feed_forward, gelu = layer.feed_forward, config.hidden_act == "gelu"
        feed_forward.intermediate_dense = PackedLinear(feed_forward.intermediate_dense, precision, gelu=gelu)
        feed_forward.intermediate_act_fn = nn.Identity() if gelu else feed_forward.intermediate_act_fn
        feed_forward.output_dense = PackedLinear(feed_forward.output_dense, precision)
        if config.model_type != "wavlm":
            layer.attention = PackedAttention(layer.attention, precision)
        elif half:
            layer.attention = HalfAttention(layer.attention)
    for head in fast.heads.values():
        if head.kind in ("gru", "lstm") and backend == "int8":
            with warnings.catch_warnings(category=DeprecationWarning, action="ignore"):
                torch.ao.quantization.quantize_dynamic(head, {nn.GRU, nn.LSTM}, torch.qint8, inplace=True)
        elif head.kind == "gru":
            head.rnn = PackedGRU(head.rnn, precision)
        elif head.kind == "lstm" and half:
            head.rnn = HalfLSTM(head.rnn)


def fastest_exact(model: sdser.MultiExitSER) -> sdser.MultiExitSER:
    """Of the exact backends, the copy that classifies 3 s of noise fastest."""
    if not torch.backends.mkldnn.is_available():
        return optimize_for_cpu(model, "fp32")
    copies = [optimize_for_cpu(model, backend) for backend in ("fp32", "onednn")]
    best, stop = [math.inf] * len(copies), time.perf_counter() + 1
    noise = torch.randn(1, 3 * sdser.SAMPLE_RATE)
    while time.perf_counter() < stop or math.isinf(best[0]):
        for i, fast in enumerate(copies):
            best[i] = min(best[i], fast.classify(noise[0])[0].milliseconds)
    return copies[best.index(min(best))]


class PackedLinear(nn.Module):
    """A linear layer, and GELU if asked, its weight laid out for the kernel of one precision.

    Its output is in float32, or bfloat16 if that is the precision. The operators are those that torch.compile calls.
    """

    def __init__(self, linear: nn.Linear, precision: torch.dtype, gelu: bool = False):
        super().__init__()
        self.precision, self.gelu, weight = precision, gelu, linear.weight  # (out, in)
        if precision == torch.qint8:
            scale = weight.abs().amax(1).clamp(min=1e-12).double() / 127  # one for each output
            zero = torch.zeros_like(scale, dtype=torch.int64)
            weight = torch.quantize_per_channel(weight, scale, zero, 0, torch.qint8)
            self.packed = torch.ops.quantized.linear_prepack(weight, linear.bias)
        else:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(precision).contiguous(), 150)  # rows
            self.bias = None if linear.bias is None else linear.bias.to(precision)

    def forward(self, x: Tensor) -> Tensor:
        if self.precision == torch.qint8:
            x = torch.ops.quantized.linear_dynamic(x.float(), self.packed, reduce_range=True)
            return torch.ops.aten.gelu_(x) if self.gelu else x
        kind = "gelu" if self.gelu else "none"
        return torch.ops.mkldnn._linear_pointwise(x.to(self.precision), self.packed, self.bias, kind, [], "none")


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """The layer of this weight (out, in) and bias."""
    layer = nn.utils.skip_init(nn.Linear, weight.shape[1], len(weight), bias=bias is not None, dtype=weight.dtype)
    layer.weight.data = weight.detach()
    if bias is not None:
        layer.bias.data = bias.detach()
    return layer.requires_grad_(False)


class MatrixConv(nn.Module):
    """A layer of the convolutional encoder as a matrix product: stored time by channel, each window is a row."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.kernel, self.stride, self.dtype = layer.conv.kernel_size[0], layer.conv.stride[0], dtype
        self.norm = getattr(layer, "layer_norm", None)
        weight = layer.conv.weight.transpose(1, 2).flatten(1)  # (out, kernel * channels)
        self.product = PackedLinear(linear(weight, layer.conv.bias), dtype, gelu=self.norm is None)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2).contiguous().to(self.dtype)  # (B, T, channels), as the layer before has left it
        batch, size, channels = x.shape
        shape = (batch, (size - self.kernel) // self.stride + 1, self.kernel * channels)
        x = self.product(x.as_strided(shape, (size * channels, self.stride * channels, 1)))  # (B, frames, out)
        return (x if self.norm is None else F.gelu(self.norm(x))).transpose(1, 2)  # (B, out, frames)


class NormalizedConv(nn.Module):
    """The first layer of "base" models, convolution, GroupNorm over time, GELU, in one pass over its large output.

    Convolution is linear: mean and covariance of its windows, a few samples wide, give mean and variance of its
    outputs, so that the norm becomes a scale and a shift of the weights.
    """

    def __init__(self, layer: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.conv, self.layer_norm, self.activation = layer.conv, layer.layer_norm, layer.activation
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 1:
            return self.activation(self.layer_norm(self.conv(x)))
        windows = x[0, 0].unfold(-1, self.conv.kernel_size[0], self.conv.stride[0])  # (frames, kernel)
        weight, norm = self.conv.weight[:, 0].double(), self.layer_norm  # (out, kernel)
        mean = windows.double().mean(0)
        covariance = torch.cov(windows.double().T, correction=0)
        variance = ((weight @ covariance) * weight).sum(1)  # (out,)
        weight = weight * (norm.weight * torch.rsqrt(variance + norm.eps))[:, None]
        bias = norm.bias - weight @ mean  # the convolution's own bias is in the mean, and cancels
        windows, weight, bias = (t.to(self.dtype).contiguous() for t in (windows, weight, bias))
        x = torch.ops.mkldnn._linear_pointwise(windows, weight, bias, "gelu", [], "none")
        return x.T[None]  # (1, out, frames)


class FourierConv(nn.Module):
    """The position convolution, with its long kernel, as products of spectra, in float32 and in overlapping blocks."""

    def __init__(self, conv: nn.Conv1d):
        super().__init__()
        self.kernel, self.padding, self.groups = conv.kernel_size[0], conv.padding[0], conv.groups
        self.n = 5 * self.kernel // 2  # samples of a block, of which kernel - 1 overlap the next
        weight = conv.weight.unflatten(0, (self.groups, -1)).flip(-1)  # (groups, out, in, kernel)
        self.spectrum = torch.fft.rfft(weight, self.n).permute(3, 0, 2, 1).contiguous()  # (F, groups, in, out)
        self.bias = conv.bias

    def forward(self, x: Tensor) -> Tensor:
        frames, step = x.shape[2] + 2 * self.padding - self.kernel + 1, self.n - self.kernel + 1  # x: (B, D, T)
        blocks = -(-frames // step)
        x = F.pad(x, (self.padding, blocks * step + self.kernel - 1 - self.padding - x.shape[2]))
        x = torch.fft.rfft(x.unfold(2, self.n, step))  # (B, D, blocks, F)
        x = x.unflatten(1, (self.groups, -1)).permute(4, 1, 0, 3, 2)  # (F, groups, B, blocks, in)
        y = (x.flatten(2, 3) @ self.spectrum).unflatten(2, (-1, blocks))  # (F, groups, B, blocks, out)
        y = torch.fft.irfft(y.permute(2, 1, 4, 3, 0), self.n)[..., self.kernel - 1 :]  # (B, groups, out, blocks, step)
        return y.flatten(3).flatten(1, 2)[..., :frames] + self.bias[:, None]


class PackedAttention(nn.Module):
    """Self-attention of wav2vec 2.0 and HuBERT, with one product for queries, keys and values."""

    def __init__(self, attention: nn.Module, precision: torch.dtype):
        super().__init__()
        query, key, value = attention.q_proj, attention.k_proj, attention.v_proj
        weight = torch.cat([query.weight * attention.scaling, key.weight, value.weight])
        bias = torch.cat([query.bias * attention.scaling, key.bias, value.bias])
        self.project, self.heads = PackedLinear(linear(weight, bias), precision), attention.num_heads
        self.out = PackedLinear(attention.out_proj, precision)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_) -> tuple[Tensor, None]:
        x = self.project(hidden_states).unflatten(-1, (3, self.heads, -1))  # (B, T, 3, heads, D / heads)
        query, key, value = x.transpose(1, 3).unbind(2)  # (B, heads, T, D / heads)
        if x.dtype == torch.bfloat16 and attention_mask is None and x.shape[1] < 1000:
            x = (query @ key.mT).softmax(-1) @ value  # faster than torch's fused kernel in bfloat16, but T² of memory
        else:
            x = F.scaled_dot_product_attention(query, key, value, attention_mask, scale=1.0)
        return self.out(x.transpose(1, 2).flatten(2)), None


class HalfAttention(nn.Module):
    """WavLM's attention, a function of torch's own, in bfloat16."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.attention = attention.bfloat16()

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> tuple:
        return self.attention(hidden_states.bfloat16(), *args, **kwargs)


class PackedGRU(nn.Module):
    """One layer of nn.GRU, batch first, from a zero state; its state adds up in float32."""

    def __init__(self, gru: nn.GRU, precision: torch.dtype):
        super().__init__()
        self.project = PackedLinear(linear(gru.weight_ih_l0, gru.bias_ih_l0), precision)
        self.recur = PackedLinear(linear(gru.weight_hh_l0, gru.bias_hh_l0), precision)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return scripted_gru()(self.project(x).float(), self.recur.packed, self.recur.bias), None


def run_gru(projected: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What each frame adds to the two gates and the new state, (B, T, 3 D), and the packed recurrence -> (B, T, D)."""
    width = projected.shape[2] // 3
    states = [projected.new_zeros(projected.shape[0], width)]
    for frame in projected.unbind(1):  # (B, 3 D)
        state = states[-1].to(bias.dtype)
        recurrent = torch.ops.mkldnn._linear_pointwise(state, weight, bias, "none", [], "none").float()
        reset, update = (frame[:, : 2 * width] + recurrent[:, : 2 * width]).sigmoid_().chunk(2, -1)
        new = torch.addcmul(frame[:, 2 * width :], reset, recurrent[:, 2 * width :]).tanh_()
        states.append(new.lerp_(states[-1], update))
    return torch.stack(states[1:], 1)


@functools.cache
def scripted_gru():
    """`run_gru` as TorchScript: 299 steps of a 6 s clip take 28 ms instead of 40, of which Python was the rest."""
    with warnings.catch_warnings(action="ignore"):  # deprecated, but no other loop runs without Python
        return torch.jit.script(run_gru)


class HalfLSTM(nn.Module):
    """nn.LSTM, batch first, in bfloat16."""

    def __init__(self, lstm: nn.LSTM):
        super().__init__()
        self.lstm = lstm.bfloat16()

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.lstm(x.bfloat16())[0].float(), None


# -- the model and its clips ------------------------------------------------------------------------------------------


def load_model(args) -> sdser.MultiExitSER:
    if args.checkpoint:
        model = sdser.MultiExitSER.from_pretrained(args.checkpoint)
    else:
        labels = ["anger", "disgust", "fear", "guilt", "happiness", "sadness", "surprise"]  # the paper's
        torch.manual_seed(0)
        model = sdser.MultiExitSER(labels, args.backbone, args.exits, args.head).eval()
    for exit in args.exits or []:
        model.check_exit(exit)
    return model


def load_clips(args) -> list[Tensor]:
    """Eight waveforms (T,): the checkpoint's own test clips where they are at hand, else synthetic voices."""
    split = Path(args.checkpoint or "", "split.csv")
    if args.checkpoint and split.is_file():
        with contextlib.suppress(OSError, ValueError):
            test = [clip.path for clip in train.load_corpus(split) if clip.split == "test"]
            return [sdser.read_clip(path) for path in test[:: math.ceil(len(test) / 8)]]
    rng = np.random.default_rng(0)
    voices = [train.synthesize(prosody, pitch, 1.0, rng) for prosody in train.PROSODY.values() for pitch in (110, 200)]
    return [torch.from_numpy(voice) for voice in voices]


# -- one file to ship -------------------------------------------------------------------------------------------------

SHIPPED = {".pt2": ("fp32", "bf16"), ".onnx": ("fp32", "int8"), "": ("fp32",)}  # ending -> precisions; "": a folder


class Shipped(nn.Module):
    """Raw waveform (1, T) at 16 kHz -> class probabilities (1, C)."""

    def __init__(self, model: sdser.MultiExitSER):
        super().__init__()
        self.model = model

    def forward(self, waveform: Tensor) -> Tensor:
        if self.model.tile_seconds:
            samples = round(self.model.tile_seconds * sdser.SAMPLE_RATE)
            waveform = waveform[:, torch.arange(samples) % waveform.shape[1]]  # tiled as in training
        return self.model(waveform)[0].logits.softmax(-1)


def export(model: sdser.MultiExitSER, exit: int, backend: str, path: str) -> None:
    """Writes one exit as a file of its own, whole or not at all.

    Args:
        backend: fp32; bf16 for a .pt2; int8 for an .onnx.
        path: ending in .pt2 (torch.export.load), .onnx (onnxruntime), or the folder of a checkpoint (from_pretrained).
    Raises:
        ValueError: for a pair that cannot be written, or a package that is missing, saying what is possible.
    """
    ending = Path(path).suffix.lower()
    if backend not in SHIPPED.get(ending, ()):
        raise ValueError(f"{path}: {backend} cannot be written so; a .pt2 holds fp32 or bf16, an .onnx fp32 or int8, "
                         "a folder, whose name has no ending, fp32")  # fmt: skip
    small = model.truncate(exit)
    if not ending:
        return small.save_pretrained(path)
    small.requires_grad_(False)
    position = small.backbone.encoder.pos_conv_embed
    position.conv = fold_weight_norm(position.conv)
    if backend == "bf16":
        small.backbone.bfloat16()
    with tempfile.TemporaryDirectory() as folder, exporting():
        fresh = Path(folder, f"model{ending}")
        program = torch.export.export(
            Shipped(small), (torch.randn(1, 3 * sdser.SAMPLE_RATE),), dynamic_shapes=({1: torch.export.Dim.DYNAMIC},)
        )
        if ending == ".pt2":
            torch.export.save(program, fresh, extra_files={"labels.json": json.dumps(model.labels)})
        else:
            write_onnx(program, model.labels, fresh, backend)
        with sdser.replacing(path) as file, open(fresh, "rb") as source:
            shutil.copyfileobj(source, file)


def write_onnx(program: torch.export.ExportedProgram, labels: list[str], path: Path, backend: str) -> None:
    onnxruntime()
    names = dict(input_names=["waveform"], output_names=["probabilities"])
    onnx_program = torch.onnx.export(program, dynamo=True, verbose=False, **names)
    onnx_program.model.metadata_props["labels"] = json.dumps(labels)
    onnx_program.save(path)
    if backend == "int8":  # the matrix products alone: onnxruntime's int8 convolutions are slower than float32
        from onnxruntime.quantization import QuantType, quantize_dynamic

        # 7-bit weights: on processors with AVX2 and no VNNI, products of 8-bit signed numbers saturate.
        types = dict(op_types_to_quantize=["MatMul", "Gemm"], weight_type=QuantType.QInt8, reduce_range=True)
        quantize_dynamic(path, path, **types)


@contextlib.contextmanager
def exporting():
    """For clips of any length, and without the exporters' remarks to their own developers."""
    # A recurrent network that is not made a loop would keep the length of the clip that it is traced with.
    from torch.export._patches import register_gru_while_loop_decomposition as gru_loop
    from torch.export._patches import register_lstm_while_loop_decomposition as lstm_loop

    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with torch.no_grad(), gru_loop(), lstm_loop(), warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(level)


def onnxruntime():
    """The package, if what an ONNX file needs is installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f"ONNX needs {error.name}: pip install onnx onnxscript onnxruntime") from None
    return onnxruntime


def runner(path: str, backend: str, threads: int):
    """A function from a waveform (1, T) to probabilities (1, C) that runs an exported file."""
    if path.endswith(".onnx"):
        options = onnxruntime().SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3  # errors
        session = onnxruntime().InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return lambda waveform: torch.from_numpy(session.run(None, {"waveform": waveform.numpy()})[0])
    if path.endswith(".pt2"):
        with warnings.catch_warnings(action="ignore"):  # about its own buffers
            return torch.export.load(path).module()
    return Shipped(optimize_for_cpu(sdser.MultiExitSER.from_pretrained(path), backend))


@torch.inference_mode()
def largest_change(exact, run, clips: list[Tensor]) -> float:
    """Of any class probability, over the clips (T,)."""
    return max((run(clip[None]) - exact(clip[None])).abs().max().item() for clip in clips)


def file_megabytes(path: str) -> float:
    path = Path(path, "model.safetensors") if os.path.isdir(path) else Path(path)
    return path.stat().st_size / 1e6


USE = {
    ".pt2": "torch.export.load(path).module()(waveform), waveform (1, T) float32 at 16 kHz, at least 720 samples",
    ".onnx": 'onnxruntime.InferenceSession(path).run(None, {"waveform": waveform}), (1, T) float32 at 16 kHz',
    "": "sdser.MultiExitSER.from_pretrained(path).classify(clips)",
}


def ship(model: sdser.MultiExitSER, args) -> None:
    """Writes the file, loads it back, and tells how far it is from the model."""
    exit, path = model.exits[-1] if args.exit is None else model.check_exit(args.exit), args.export
    export(model, exit, args.backend, path)
    clips = load_clips(args)
    change = largest_change(Shipped(model.truncate(exit)), runner(path, "fp32", cores()), clips)
    print(f"{path}: exit {exit}, {args.backend}, {file_megabytes(path):.1f} MB, labels {', '.join(model.labels)}")
    print(f"loaded back and run on {len(clips)} clips: no probability differs by more than {change:.1e}")
    print(f"use: {USE[Path(path).suffix.lower()]}")


# -- measuring --------------------------------------------------------------------------------------------------------

# What a process does whose memory is measured: it loads one file, and answers once.
ANSWER = {
    ".onnx": """
import sys, numpy, onnxruntime
path, backend, samples, threads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.log_severity_level = threads, 3
session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
session.run(None, {"waveform": 0.1 * numpy.random.randn(1, samples).astype("float32")})
""",
    "": """
import sys, torch, benchmark_edge
path, backend, samples, threads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(threads)
run = benchmark_edge.runner(path, backend, threads)
with torch.inference_mode():
    run(0.1 * torch.randn(1, samples))
""",
}
STATUS = 'print(open("/proc/self/status").read())'


def peak_megabytes(path: str, backend: str, samples: int, threads: int) -> float | None:
    """Peak memory of a process that runs that file and nothing else; None where Linux does not tell it.

    VmHWM rather than os.wait4's ru_maxrss, which is never less than what the process that starts it has taken.
    """
    if not os.path.exists("/proc/self/status"):
        return None
    program = ANSWER[Path(path).suffix] + STATUS
    command = [sys.executable, "-c", program, path, backend, str(samples), str(threads)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{path}: a process that measures its memory failed ({done.stderr.strip()[-300:]})")
    return int(re.search(r"VmHWM:\s*(\d+)", done.stdout)[1]) / 1024


@torch.inference_mode()
def measure(runners: dict, args) -> dict:
    """Milliseconds {(exit, backend, threads, seconds): [one a round]}.

    All are timed in turn, round by round, so that a drift of the machine hits all alike.
    """
    waveforms = {seconds: 0.1 * torch.randn(1, round(seconds * sdser.SAMPLE_RATE)) for seconds in args.seconds}
    times, ordered = defaultdict(list), sorted(runners, key=lambda key: key[2])  # by threads
    for round_ in train.progress(range(-2, args.rounds), "timing", args.rounds + 2):  # the first two warm up
        for exit, backend, threads in ordered:
            torch.set_num_threads(threads)
            for seconds, waveform in waveforms.items():
                start = time.perf_counter()
                runners[exit, backend, threads](waveform)
                if round_ >= 0:
                    times[exit, backend, threads, seconds].append(1000 * (time.perf_counter() - start))
            if backend.startswith("onnxruntime"):
                time.sleep(0.1)  # its threads go on spinning for a while, at the cost of whatever comes next
    return times


def available_backends() -> list[str]:
    found = ["fp32"]
    if torch.backends.mkldnn.is_available():
        found += ["onednn", *(["bf16"] if torch.ops.mkldnn._is_mkldnn_bf16_supported() else []), "int8"]
    with contextlib.suppress(ValueError):
        onnxruntime()
        found += ["onnxruntime", "onnxruntime-int8"]
    return found


def benchmark(model: sdser.MultiExitSER, args) -> dict:
    """Everything that is measured, as it goes into the JSON."""
    backends, exits, clips = args.backends or available_backends(), args.exits or model.exits, load_clips(args)
    samples = round(max(args.seconds) * sdser.SAMPLE_RATE)
    with tempfile.TemporaryDirectory() as folder:
        runners, facts = {}, {}
        pairs = [(exit, backend) for exit in exits for backend in backends]
        for exit, backend in train.progress(pairs, "exporting", len(pairs)):
            onnx, precision = backend.startswith("onnxruntime"), "int8" if backend == "onnxruntime-int8" else "fp32"
            path = os.path.join(folder, f"{exit}-{precision}.onnx" if onnx else str(exit))
            if not os.path.exists(path):
                export(model, exit, precision, path)
            for threads in args.threads:
                runners[exit, backend, threads] = runner(path, backend, threads)
            small = model.truncate(exit)
            facts[exit, backend] = {
                "peak_rss_mb": peak_megabytes(path, backend, samples, max(args.threads)),
                "parameters": sum(p.numel() for p in small.parameters()),
                "size_mb": file_megabytes(path),
                "max_probability_change": largest_change(Shipped(small), runners[exit, backend, threads], clips),
            }
        times = measure(runners, args)
    rows = []
    for (exit, backend, threads, seconds), milliseconds in times.items():
        p50, p95 = np.percentile(milliseconds, [50, 95])
        macs = evaluate.count_macs(model, round(seconds * sdser.SAMPLE_RATE), exit)
        rows.append({"exit": exit, "backend": backend, "seconds": seconds, "threads": threads, "p50_ms": p50,
                     "p95_ms": p95, "macs": macs, **facts[exit, backend]})  # fmt: skip
    return {"machine": describe_machine(), "rows": rows}


def describe_machine() -> dict:
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        name = found[1] if found else name
    return {"cpu": name, "cores": cores(), "torch": torch.__version__}


# -- the report -------------------------------------------------------------------------------------------------------


def report(results: dict, args) -> None:
    """A table for each clip length and number of threads, and what to take from it."""
    machine, rows = results["machine"], results["rows"]
    print(f"{args.checkpoint or args.backbone} on {machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}")
    for threads in args.threads:
        for seconds in args.seconds:
            print(f"\n{seconds:g} s of audio, one clip at a time, {threads} thread(s), {args.rounds} runs")
            print("exit  backend           median ms  95 % ms  peak MB  params M  file MB  change")
            shown = [row for row in rows if (row["threads"], row["seconds"]) == (threads, seconds)]
            for row in sorted(shown, key=lambda row: row["exit"]):
                print(f"{row['exit']:4}  {row['backend']:16}  {row['p50_ms']:9.1f}  {row['p95_ms']:7.1f}  "
                      f"{row['peak_rss_mb'] or math.nan:7.0f}  {row['parameters'] / 1e6:8.1f}  {row['size_mb']:7.1f}  "
                      f"{row['max_probability_change']:.0e}")  # fmt: skip
            if args.budget_ms:
                print(fit_budget(shown, args.budget_ms))
    print("\nchange: the largest of any class probability on real clips, against fp32")
    print("peak MB: of a process that loads this exit alone and runs the longest clip; file MB: of what it loads")


def fit_budget(rows: list[dict], milliseconds: float) -> str:
    """The deepest exit that answers in time, by the backend that changes its probabilities least."""
    fits = [row for row in rows if row["p95_ms"] <= milliseconds]
    if not fits:
        best = min(rows, key=lambda row: row["p95_ms"])
        return f"nothing fits {milliseconds:g} ms; nearest is exit {best['exit']} by {best['backend']}"
    best = min(fits, key=lambda row: (-row["exit"], row["max_probability_change"]))
    return f"the deepest exit within {milliseconds:g} ms in 95 % of runs: exit {best['exit']} by {best['backend']}"


# -- the plot ---------------------------------------------------------------------------------------------------------


def plot(results: dict, args) -> None:
    """Latency against exit, a line per backend and a panel per clip length, on most threads."""
    pyplot, panels = evaluate.import_pyplot(), len(args.seconds)
    figure, axes = pyplot.subplots(1, panels, figsize=(1.5 + 3 * panels, 3.5), squeeze=False, layout="constrained")
    rows = [row for row in results["rows"] if row["threads"] == max(args.threads)]
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    for panel, seconds in zip(axes[0], args.seconds):
        for i, backend in enumerate(backends):
            shown = [row for row in rows if (row["backend"], row["seconds"]) == (backend, seconds)]
            shown.sort(key=lambda row: row["exit"])
            style = dict(marker="osD^vP*X"[i % 8], linestyle=["-", "--", ":", "-."][i % 4], color=str(0.1 * (i % 6)))
            panel.plot([row["exit"] for row in shown], [row["p50_ms"] for row in shown], **style, label=backend)
        panel.set(title=f"{seconds:g} s of audio", xlabel="exit (layers)", ylim=(0, None))
        panel.set_xticks(sorted({row["exit"] for row in rows}))
    axes[0][0].set_ylabel(f"median ms, {max(args.threads)} thread(s)")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    evaluate.save_figure(figure, args.plot)


def main(argv=None) -> None:
    args = parse_args(argv)
    with train.script():
        for path in (args.json, args.plot):
            if path:
                train.check_writable(path)
        if args.plot:
            evaluate.import_pyplot()
        if args.export and Path(args.export).suffix:
            train.check_writable(args.export)
        elif args.export and os.path.isdir(args.export) and os.listdir(args.export):
            raise ValueError(f"--export {args.export}: holds files already; name a new folder")
        elif args.export:
            train.check_writable(args.export, folder=True)
        model = load_model(args)
        if args.export:
            return ship(model, args)
        results = benchmark(model, args)
        if args.json:
            train.write_text(args.json, json.dumps(results, indent=2))
        report(results, args)
        if args.plot:
            plot(results, args)


if __name__ == "__main__":
    main()
