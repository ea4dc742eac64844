"""Copies of a model that run fast on a CPU; times every exit, backend by backend; writes one exit as a file to ship.

    python benchmark_edge.py --backbone base                      # latency needs no trained weights
    python benchmark_edge.py out --budget-ms 80                   # the deepest exit of a trained model that fits
    python benchmark_edge.py out --export model.onnx --exit 3     # one exit in one file: .pt2, .onnx or a folder

Read top to bottom: the flags; `optimize_for_cpu` and what it packs; the model and its clips, one file to ship, the
runners, measuring, the report, the plot.
"""

import argparse
import contextlib
import copy
import functools
import inspect
import io
import json
import logging
import math
import multiprocessing
import os
import platform
import re
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
from tqdm import tqdm

import evaluate
import sdser
import train

COPIES = ("fp32", "onednn", "bf16", "int8", "compile")  # what `optimize_for_cpu` makes
ONNXRUNTIME = {"onnxruntime": "fp32", "onnxruntime-int8": "int8"}  # backend -> precision of its file
BACKENDS = (*COPIES, *ONNXRUNTIME, "auto")
PRECISION = {"bf16": "bf16", "int8": "int8", "onnxruntime-int8": "int8"}  # of the products; the others are fp32
INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_bf16", "amx_int8", "asimddp", "bf16")


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("checkpoint", nargs="?", help="folder written by train.py, or a Hub name")
    add("--backbone", choices=sdser.SIZES, help="instead of a checkpoint: a built-in shape with random weights")
    add("--head", choices=sdser.HEADS, help="with --backbone: of the shallow exits (default gru)")
    add("--exits", type=train.positive_int, nargs="+", metavar="K", help="default: all of the model's")
    add("--seconds", type=seconds, nargs="+", default=[1.0, 3.0, 6.0], metavar="S", help="clip lengths (default 1 3 6)")
    add("--threads", type=train.positive_int, nargs="+", metavar="N", help="default: 1, and as many as there are cores")
    add("--backends", nargs="+", choices=BACKENDS, help="default: all of torch's but compile")
    add("--rounds", type=train.positive_int, default=20, metavar="N", help="timed runs of each, in turn (default 20)")
    add("--budget-ms", type=train.positive, metavar="MS", help="name the deepest exit that meets it in 95 %% of runs")
    add("--json", metavar="FILE", help="write the results as JSON; - for standard output")
    add("--plot", metavar="FILE", help="write a plot of the latencies (needs matplotlib)")
    add("--export", metavar="FILE", help="write one exit as FILE.pt2, FILE.onnx or a folder, and measure nothing")
    add("--exit", type=int, metavar="K", help="with --export (default: the deepest)")
    add("--backend", metavar="B", help="with --export: fp32 (default), bf16 (.pt2) or int8 (.onnx)")
    args = parser.parse_args(argv)
    if (args.checkpoint is None) == (args.backbone is None):
        parser.error("give either a checkpoint or --backbone")
    if args.head and not args.backbone:
        parser.error("--head goes with --backbone; a checkpoint has its own")
    if (args.exit is not None or args.backend) and not args.export:
        parser.error("--exit and --backend go with --export; to measure, there are --exits and --backends")
    args.threads = args.threads or sorted({1, cores()})
    return args


seconds = train.number(float, lambda x: 0.025 <= x <= sdser.MAX_SECONDS, f"from 0.025 to {sdser.MAX_SECONDS}")


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


# ---------------------------------------------------------------------------------------------------------------------
# Fast inference on a CPU
# ---------------------------------------------------------------------------------------------------------------------


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
            compile  torch.compile: minutes before the first answer, and a C++ compiler
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
    if backend == "compile":
        fast.forward = torch.compile(fast.forward, dynamic=True)
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
            best[i] = min(best[i], fast.classify(noise)[0].milliseconds)
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


# ---------------------------------------------------------------------------------------------------------------------
# The benchmark
# ---------------------------------------------------------------------------------------------------------------------


# -- the model and its clips ------------------------------------------------------------------------------------------


def load_model(args) -> sdser.MultiExitSER:
    if args.checkpoint:
        model = sdser.MultiExitSER.from_pretrained(args.checkpoint)
    else:
        labels = ["anger", "disgust", "fear", "guilt", "happiness", "sadness", "surprise"]  # the paper's
        torch.manual_seed(0)
        model = sdser.MultiExitSER(labels, args.backbone, args.exits, args.head or "gru").eval()
    for exit in args.exits or []:
        model.check_exit(exit)
    return model


def load_clips(args) -> list[Tensor]:
    """Eight waveforms (T,): the checkpoint's own test clips where they are at hand, else synthetic voices."""
    split = Path(args.checkpoint or "", "split.csv")
    if args.checkpoint and split.is_file():
        with contextlib.suppress(OSError, ValueError):
            test = [clip.path for clip in train.load_corpus(split) if clip.split == "test"]
            return [sdser.load_audio(path, sdser.MAX_SECONDS) for path in test[:: math.ceil(len(test) / 8)]]
    rng = np.random.default_rng(0)
    voices = [train.synthesize(prosody, pitch, 1.0, rng) for prosody in train.PROSODY.values() for pitch in (110, 200)]
    return [torch.from_numpy(voice) for voice in voices]


# -- one file to ship -------------------------------------------------------------------------------------------------


SHIPPED = {".pt2": ("fp32", "bf16"), ".onnx": ("fp32", "int8"), "folder": ("fp32",)}  # what can be written as what


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


def export(model: sdser.MultiExitSER, exit: int, backend: str, path: str):
    """Writes one exit as a file of its own, whole or not at all.

    Args:
        backend: fp32; bf16 for a .pt2; int8 for an .onnx.
        path: ending in .pt2 (torch.export.load), .onnx (onnxruntime), or the folder of a checkpoint (from_pretrained).
    Returns:
        a function from a waveform (1, T) to probabilities (1, C), that runs what was written.
    Raises:
        ValueError: for a pair that cannot be written, or a package that is missing, saying what is possible.
    """
    ending = kind_of_file(path)
    if backend not in SHIPPED[ending]:
        raise ValueError(f"{path}: {backend} cannot be written so; .pt2 holds fp32 or bf16, .onnx fp32 or int8, "
                         "a folder fp32")  # fmt: skip
    small = model.truncate(exit)
    if ending == "folder":
        small.save_pretrained(path)
        return Shipped(sdser.MultiExitSER.from_pretrained(path))
    small = optimize_for_cpu(small, "fp32")
    if backend == "bf16":
        small.backbone.bfloat16()
    with sdser.file_errors(path, "cannot be written", "make room, or name another place"), beside(path) as fresh:
        if ending == ".pt2":
            write_pt2(small, fresh)
        else:
            write_onnx(small, fresh)
            if backend == "int8":
                quantize_onnx(fresh, fresh)
    return torch.export.load(path).module() if ending == ".pt2" else onnxruntime_runner(path)


def kind_of_file(path: str) -> str:
    """One of SHIPPED, by the ending; a folder has none, so that nobody gets a folder named model.pt."""
    ending = Path(path).suffix.lower()
    if ending and ending not in SHIPPED:
        raise ValueError(f"--export {path}: give a name ending in .pt2 or .onnx, or a folder's, without an ending")
    return ending or "folder"


@contextlib.contextmanager
def beside(path: str):
    """A path beside that one, for what needs a path to write to; it takes its place at the end."""
    with tempfile.TemporaryDirectory(dir=Path(path).absolute().parent, prefix=".export-") as folder:
        fresh = os.path.join(folder, Path(path).name)
        yield fresh
        os.replace(fresh, path)


def trace(model: sdser.MultiExitSER) -> torch.export.ExportedProgram:
    waveform = torch.randn(1, 3 * sdser.SAMPLE_RATE)
    return torch.export.export(Shipped(model), (waveform,), dynamic_shapes=({1: torch.export.Dim.DYNAMIC},))


def write_pt2(model: sdser.MultiExitSER, path: str) -> None:
    with exporting():
        memory = io.BytesIO()  # first, since torch's zip writer hides why a file cannot be written
        torch.export.save(trace(model), memory, extra_files={"labels.json": json.dumps(model.labels)})
        Path(path).write_bytes(memory.getbuffer())


def write_onnx(model: sdser.MultiExitSER, path: str) -> None:
    onnxruntime()
    with exporting():
        names = dict(input_names=["waveform"], output_names=["probabilities"])
        program = torch.onnx.export(trace(model), dynamo=True, verbose=False, **names)
        program.model.metadata_props["labels"] = json.dumps(model.labels)
        program.save(path)


def quantize_onnx(source: str, target: str) -> None:
    """To int8, of the matrix products alone: onnxruntime's int8 convolutions are slower than those in float32."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with exporting():
        # 7-bit weights: on processors with AVX2 and no VNNI, products of 8-bit signed numbers saturate.
        types = dict(op_types_to_quantize=["MatMul", "Gemm"], weight_type=QuantType.QInt8, reduce_range=True)
        quantize_dynamic(source, target, **types)


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


def onnxruntime_runner(path: str, threads: int | None = None):
    """A function from a waveform (1, T) to probabilities (1, C) that runs an .onnx file."""
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or cores()
    options.log_severity_level = 3  # errors
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda waveform: torch.from_numpy(session.run(None, {"waveform": waveform.numpy()})[0])


@torch.inference_mode()
def largest_change(reference, run, clips: list[Tensor]) -> float:
    """Of any class probability, over the clips (T,)."""
    return max((run(clip[None]) - reference(clip[None])).abs().max().item() for clip in clips)


def ship(model: sdser.MultiExitSER, args) -> None:
    exit, backend = args.exit if args.exit is not None else model.exits[-1], args.backend or "fp32"
    model.check_exit(exit)
    run = export(model, exit, backend, args.export)
    clips = load_clips(args)
    change = largest_change(Shipped(model.truncate(exit)), run, clips)
    path = Path(args.export)
    size = sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir()))
    print(f"{path}: exit {exit}, {backend}, {size / 1e6:.1f} MB, labels {', '.join(model.labels)}")
    print(f"loaded back and run on {len(clips)} clips: no probability differs by more than {change:.1e}")
    if path.suffix == ".pt2":
        print(
            "use: torch.export.load(path).module()(waveform), waveform (1, T) float32 at 16 kHz, at least 720 samples"
        )
    elif path.suffix == ".onnx":
        print('use: onnxruntime.InferenceSession(path).run(None, {"waveform": waveform}), (1, T) float32 at 16 kHz')
    else:
        print("use: sdser.MultiExitSER.from_pretrained(path).classify(clips)")


# -- the runners ------------------------------------------------------------------------------------------------------


def choose_backends(args) -> list[str]:
    """Those asked for, which must work, or those of torch that this machine has."""
    if args.backends:
        if set(args.backends) & set(ONNXRUNTIME):
            onnxruntime()
        return list(dict.fromkeys(args.backends))
    if not torch.backends.mkldnn.is_available():
        return ["fp32"]
    return ["fp32", "onednn", *(["bf16"] if torch.ops.mkldnn._is_mkldnn_bf16_supported() else []), "int8"]


def make_runners(model, exits: list[int], backends: list[str], threads: list[int], folder: Path) -> dict:
    """(exit, backend, threads) -> a function from a waveform (1, T) to probabilities (1, C)."""
    runners = {}
    for backend in progress([backend for backend in backends if backend not in ONNXRUNTIME], "packing"):
        fast = optimize_for_cpu(model, backend)
        for exit in exits:
            run = lambda waveform, fast=fast, exit=exit: fast(waveform, exit=exit)[0].logits.softmax(-1)  # noqa: E731
            runners |= {(exit, fast.backend, count): run for count in threads}
    for exit in progress(exits if set(backends) & set(ONNXRUNTIME) else [], "exporting to ONNX"):
        exact = str(weights_file(folder, exit, "onnxruntime"))
        export(model, exit, "fp32", exact)
        for backend in ONNXRUNTIME:
            if backend in backends:
                path = str(weights_file(folder, exit, backend))
                if path != exact:
                    quantize_onnx(exact, path)
                runners |= {(exit, backend, count): onnxruntime_runner(path, count) for count in threads}
    return runners


def progress(steps, title: str, **options) -> tqdm:
    return tqdm(steps, title, leave=False, disable=None, **options)


# -- measuring --------------------------------------------------------------------------------------------------------


def describe_machine() -> dict:
    try:
        lines = dict(
            line.split(":", 1)
            for line in Path("/proc/cpuinfo").read_text().replace("\t", "").splitlines()
            if ":" in line
        )
    except OSError:
        lines = {}
    flags = set(lines.get("flags", lines.get("Features", "")).split())
    return {
        "cpu": lines.get("model name", platform.processor() or platform.machine()).strip(),
        "cores": cores(),
        "instructions": [name for name in INSTRUCTIONS if name in flags],
        "torch": torch.__version__,
    }


def matrix_products(precision: str) -> list:
    """Pairs of a function that multiplies matrices and its floating-point operations; none if it cannot be had."""
    products = []
    for rows, inner, columns in ((1024, 1024, 1024), (2048, 2048, 2048), (4800, 1536, 512)):
        x, weight, flops = torch.randn(rows, inner), torch.randn(columns, inner), 2 * rows * inner * columns
        kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.qint8}[precision]
        if torch.backends.mkldnn.is_available():
            packed = PackedLinear(linear(weight, None), kind)
            products.append((lambda x=x, packed=packed: packed(x), flops))
        if precision != "int8":
            x, weight = x.to(kind), weight.to(kind)
            products.append((lambda x=x, weight=weight: F.linear(x, weight), flops))  # MKL for float32
    return products


@torch.inference_mode()
def measure(runners: dict, waveforms: dict, args) -> tuple[dict, dict]:
    """Times all configurations in turn, round by round, so that a drift of the machine hits all alike.

    Returns:
        milliseconds {(exit, backend, threads, seconds): [one a round]}, and the best GFLOP/s of matrix products
        {(threads, precision): value}.
    """
    precisions = sorted({PRECISION.get(backend, "fp32") for _, backend, _ in runners} | {"fp32"})
    products = {precision: matrix_products(precision) for precision in precisions}
    times, peaks = defaultdict(list), defaultdict(float)
    bar = progress(None, "timing", total=(2 + args.rounds) * len(runners) * len(waveforms))
    for round in range(-2, args.rounds):  # the first two warm up
        for threads in args.threads:
            torch.set_num_threads(threads)
            some = [
                (p, *product) for p in precisions for product in products[p] if round % 5 == 0
            ]  # a few tries will do
            for precision, function, flops in some:
                start = time.perf_counter()
                function()
                rate = flops / (time.perf_counter() - start) / 1e9
                peaks[threads, precision] = max(peaks[threads, precision], rate)
            for seconds, waveform in waveforms.items():
                for (exit, backend, count), run in runners.items():
                    if count != threads:
                        continue
                    start = time.perf_counter()
                    run(waveform)
                    if round >= 0:
                        times[exit, backend, threads, seconds].append(1000 * (time.perf_counter() - start))
                    if backend in ONNXRUNTIME:
                        time.sleep(0.1)  # its threads go on spinning for a while, at the cost of whatever comes next
                    bar.update()
    bar.close()
    return times, peaks


def memory_megabytes(name: str) -> float:
    """What Linux says of this process: VmHWM, its peak; VmRSS, what it takes now; RssFile, files that it has mapped."""
    return int(re.search(rf"{name}:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


# In a process that has imported nothing of torch.
RUN_ONNXRUNTIME = f"""
import re, sys, numpy, onnxruntime
from pathlib import Path
path, seconds, threads = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.log_severity_level = threads, 3
session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
session.run(None, {{"waveform": 0.1 * numpy.random.randn(1, round(seconds * 16000)).astype("float32")}})
{inspect.getsource(memory_megabytes)}
print(memory_megabytes("VmHWM"))
"""


def answer_once(folder: str, backend: str, seconds: float, threads: int) -> None:
    """Loads a checkpoint, answers for a clip, and prints by how much memory has grown at most."""
    before = {name: memory_megabytes(name) for name in ("VmRSS", "RssFile")}
    torch.set_num_threads(threads)
    model = optimize_for_cpu(sdser.MultiExitSER.from_pretrained(folder), backend)
    model.classify(0.1 * torch.randn(round(seconds * sdser.SAMPLE_RATE)))
    # A forked process maps the libraries that its parent has imported anew, page by page: they are counted there.
    again = memory_megabytes("RssFile") - before["RssFile"]
    print(memory_megabytes("VmHWM") - before["VmRSS"] - again, flush=True)


def answer_each_alone() -> None:
    """Prints what imports take, then what each job that it reads adds to them, in a process forked for it."""
    print(memory_megabytes("VmHWM"), flush=True)
    for job in json.load(sys.stdin):
        process = multiprocessing.get_context("fork").Process(target=answer_once, args=job)
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(process.exitcode)


def measure_memory(pairs: list[tuple[int, str]], folder: Path, args) -> tuple[float | None, dict]:
    """MB that Python with torch takes, and that a process takes which loads one exit and runs the longest clip.

    Torch is imported once, by a process that forks for every pair. Not on Linux, all is None.
    """
    if sys.platform != "linux":
        return None, dict.fromkeys(pairs)
    limits, torchs = (max(args.seconds), max(args.threads)), [pair for pair in pairs if pair[1] not in ONNXRUNTIME]
    jobs = [(str(folder / str(exit)), backend, *limits) for exit, backend in torchs]
    memory, steps = {}, progress(None, "memory", total=len(pairs))
    imports, *added = run_python("import benchmark_edge; benchmark_edge.answer_each_alone()", input=json.dumps(jobs))
    memory |= {pair: imports + megabytes for pair, megabytes in zip(torchs, added)}
    steps.update(len(memory))
    for exit, backend in pairs:
        if backend in ONNXRUNTIME:
            [memory[exit, backend]] = run_python(RUN_ONNXRUNTIME, weights_file(folder, exit, backend), *limits)
            steps.update()
    steps.close()
    return imports, memory


def run_python(code: str, *arguments, input: str = "") -> list[float]:
    """The numbers that a process of its own prints."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(command, env=environment, input=input, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"a process that measures memory failed ({done.stderr.strip()[-300:]})")
    return [float(line) for line in done.stdout.split()]


@torch.inference_mode()
def measure_change(model, pairs, runners, read: dict, args) -> dict:
    """{(exit, backend, seconds): the largest change of any class probability against the model itself}."""
    change = {}
    for seconds, waveforms in progress(read.items(), "comparing"):
        for waveform in waveforms:
            exact = {output.exit: output.logits.softmax(-1) for output in model(waveform[None])}
            for exit, backend in pairs:
                found = runners[exit, backend, args.threads[-1]](waveform[None])
                largest = (found - exact[exit]).abs().max().item()
                change[exit, backend, seconds] = max(largest, change.get((exit, backend, seconds), 0.0))
    return change


def weights_file(folder: Path, exit: int, backend: str) -> Path:
    return folder / (f"{exit}-{backend}.onnx" if backend in ONNXRUNTIME else f"{exit}/model.safetensors")


def benchmark(model: sdser.MultiExitSER, args) -> dict:
    """Everything that is measured, as it goes into the JSON."""
    backends, exits = choose_backends(args), args.exits or model.exits
    clips, machine = load_clips(args), describe_machine()
    lengths = {seconds: round(seconds * sdser.SAMPLE_RATE) for seconds in args.seconds}
    read = {s: [sdser.prepare(sdser.tile(clip, n), model.tile_seconds) for clip in clips] for s, n in lengths.items()}
    kept = {exit: model.truncate(exit) for exit in exits}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runners = make_runners(model, exits, backends, args.threads, folder)
        times, peaks = measure(runners, {s: waveforms[0][None] for s, waveforms in read.items()}, args)
        for exit, small in kept.items():
            small.save_pretrained(folder / str(exit))
        pairs = sorted({(exit, backend) for exit, backend, _ in runners}, key=lambda pair: pair[0])
        machine["import_rss_mb"], memory = measure_memory(pairs, folder, args)
        size = {pair: weights_file(folder, *pair).stat().st_size for pair in pairs}
        change = measure_change(model, pairs, runners, read, args)
    machine["peak_gflops"] = {p: value for (threads, p), value in peaks.items() if threads == max(args.threads)}
    machine["peak_gflops_by_threads"] = {
        str(threads): {p: value for (count, p), value in peaks.items() if count == threads} for threads in args.threads
    }
    rows = []
    for (exit, backend, threads, seconds), milliseconds in times.items():
        p50, p95 = np.percentile(milliseconds, [50, 95])
        macs = int(evaluate.count_macs(model, lengths[seconds], exit))
        gflops = 2 * macs / p50 / 1e6
        rows.append({
            "exit": exit, "backend": backend, "seconds": seconds, "threads": threads,
            "p50_ms": p50, "p95_ms": p95, "real_time_factor": p50 / 1000 / seconds, "macs": macs, "gflops": gflops,
            "peak_fraction": gflops / peaks[threads, PRECISION.get(backend, "fp32")],
            "peak_rss_mb": memory[exit, backend], "parameters": sum(p.numel() for p in kept[exit].parameters()),
            "size_mb": size[exit, backend] / 1e6, "max_probability_change": change[exit, backend, seconds],
        })  # fmt: skip
    return {"machine": machine, "rows": rows}


# -- the report -------------------------------------------------------------------------------------------------------


def report(results: dict, args) -> None:
    """A table for each clip length and number of threads, and what to take from it."""
    machine, rows = results["machine"], results["rows"]
    print(f"{args.checkpoint or args.backbone} on {machine['cpu']}, {machine['cores']} cores "
          f"({' '.join(machine['instructions'])}), torch {machine['torch']}")  # fmt: skip
    for threads, peaks in machine["peak_gflops_by_threads"].items():
        best = ", ".join(f"{precision} {value:.0f}" for precision, value in sorted(peaks.items()))
        print(f"best matrix product with {threads} thread(s), GFLOP/s: {best}")
    for threads in args.threads:
        for seconds in args.seconds:
            print(f"\n{seconds:g} s of audio, one clip at a time, {threads} thread(s), {args.rounds} runs")
            print("exit  backend           median ms  95 % ms  real time  GFLOP/s  of peak  peak MB  params M  "
                  "file MB  change")  # fmt: skip
            for row in sorted(select(rows, threads, seconds), key=lambda row: row["exit"]):
                print(f"{row['exit']:4}  {row['backend']:16}  {row['p50_ms']:9.1f}  {row['p95_ms']:7.1f}  "
                      f"{row['real_time_factor']:9.3f}  {row['gflops']:7.0f}  {100 * row['peak_fraction']:5.0f} %  "
                      f"{row['peak_rss_mb'] or math.nan:7.0f}  {row['parameters'] / 1e6:8.1f}  {row['size_mb']:7.1f}  "
                      f"{row['max_probability_change']:.0e}")  # fmt: skip
    print("\nreal time: time / length of the clip. change: the largest of any class probability, against fp32.")
    print("peak MB: of a process that loads this exit alone and runs the longest clip.")
    if imports := machine["import_rss_mb"]:
        print(f"Python with torch and transformers takes {imports:.0f} of them; onnxruntime needs neither.")
    print("file MB: of the weights, or of the .onnx file.")
    if args.budget_ms:
        for threads in args.threads:
            for seconds in args.seconds:
                print(f"\n{seconds:g} s, {threads} thread(s): {fit_budget(select(rows, threads, seconds), args)}")
    print(f"\n{verdict(rows, args)}")


def select(rows: list[dict], threads: int, seconds: float) -> list[dict]:
    return [row for row in rows if row["threads"] == threads and row["seconds"] == seconds]


def fit_budget(rows: list[dict], args) -> str:
    """The deepest exit that answers in time, by the backend that changes its probabilities least."""
    fits = [row for row in rows if row["p95_ms"] <= args.budget_ms]
    if not fits:
        best = min(rows, key=lambda row: row["p95_ms"])
        return (f"nothing fits {args.budget_ms:g} ms; nearest is exit {best['exit']} by {best['backend']}, "
                f"{best['p95_ms']:.1f} ms")  # fmt: skip
    best = min(fits, key=lambda row: (-row["exit"], row["max_probability_change"]))
    worth = ""
    with contextlib.suppress(OSError, ValueError, KeyError):
        test = json.loads(Path(args.checkpoint or "", "results.json").read_text())["test"]["exits"]
        worth = "".join(f", test UAR {row['uar']:.3f}" for row in test if row["exit"] == best["exit"])
    return (f"exit {best['exit']} is the deepest within {args.budget_ms:g} ms, by {best['backend']} "
            f"({best['p95_ms']:.1f} ms in 95 % of runs{worth})")  # fmt: skip


def verdict(rows: list[dict], args) -> str:
    """The fastest exact backend and the fastest of all, at the deepest exit, on most threads and the longest clip."""
    rows = select(rows, max(args.threads), max(args.seconds))
    deepest = max(row["exit"] for row in rows)
    rows = sorted((row for row in rows if row["exit"] == deepest), key=lambda row: row["p50_ms"])
    exact = next((row for row in rows if row["max_probability_change"] < 1e-4), rows[0])
    text = f"At exit {deepest}, the fastest exact backend is {exact['backend']} ({exact['p50_ms']:.1f} ms)"
    if rows[0] is exact:
        return text + ", and nothing is faster."
    return (f"{text}; the fastest of all is {rows[0]['backend']} ({rows[0]['p50_ms']:.1f} ms), which changes no "
            f"probability by more than {rows[0]['max_probability_change']:.1e}.")  # fmt: skip


# -- the plot ---------------------------------------------------------------------------------------------------------


def plot(results: dict, args) -> None:
    """Latency against exit, a line per backend and a panel per clip length, on most threads."""
    from matplotlib import pyplot as plt

    rows, threads = results["rows"], max(args.threads)
    figure, panels = plt.subplots(1, len(args.seconds), figsize=(1.5 + 3 * len(args.seconds), 3.5), sharey=False,
                                  squeeze=False, layout="constrained")  # fmt: skip
    for axes, seconds in zip(panels[0], args.seconds):
        shown = select(rows, threads, seconds)
        backends = list(dict.fromkeys(row["backend"] for row in shown))
        for i, backend in enumerate(backends):
            points = sorted((row["exit"], row["p50_ms"]) for row in shown if row["backend"] == backend)
            style = dict(marker="osD^vP*X"[i % 8], linestyle=["-", "--", ":", "-."][i % 4], color=str(0.1 * (i % 6)))
            axes.plot(*zip(*points), **style, label=backend)
        axes.set(title=f"{seconds:g} s of audio", xlabel="exit (layers)", ylim=(0, None))
        axes.set_xticks(sorted({row["exit"] for row in shown}))
    panels[0][0].set_ylabel(f"median ms, {threads} thread(s)")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    with sdser.replacing(args.plot) as file:
        figure.savefig(file, dpi=120, format=Path(args.plot).suffix[1:] or "png")


def main(argv=None) -> None:
    args = parse_args(argv)
    with train.script():
        evaluate.check_outputs(args.json, args.plot, folder=False)
        if args.export:
            train.check_writable(args.export, folder=kind_of_file(args.export) == "folder")
            if Path(args.export, "config.json").exists():
                raise ValueError(f"--export {args.export}: holds a model already; name another folder")
        model = load_model(args)
        if args.export:
            return ship(model, args)
        results = benchmark(model, args)
        evaluate.tell(results, args, report)
        if args.plot:
            plot(results, args)


if __name__ == "__main__":
    main()
