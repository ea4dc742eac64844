"""Multi-exit speech emotion recognition with self-distillation, in one file.

A pre-trained speech transformer (wav2vec 2.0, HuBERT or WavLM) gets a classifier, an *exit*, at several of its layers.
While it is fine-tuned, the shallow exits (students) also learn from the deepest (the teacher), so that one network
can run at several depths: Ren, Nguyen, Chang, Schuller, "Fast Yet Effective Speech Emotion Recognition with
Self-distillation", ICASSP 2023, arXiv 2210.14636.

In the order in which data meets it; what serves the model rather than being it comes after:

    audio       load_audio, prepare            file -> waveform
    backbone    load_backbone, standardize
    exits       ExitHead
    the model   MultiExitSER                   waveform -> one ExitOutput per exit; early exit; saving and loading
    the loss    self_distillation_loss         and fuse, which lets the exit with the largest margin decide
    cost        count_macs
    many files  predict                        files -> logits
    metrics     unweighted_average_recall, scores
    corpora     load_corpus, split_clips       folders, manifests, downloads, a synthetic voice -> clips
    fast on CPU optimize_for_cpu               a copy with packed weights, in float32, bfloat16 or int8

Shapes: B clips, T samples or frames, D features, C classes. Waveforms are float32 at 16 kHz.
"""

import contextlib
import copy
import csv
import hashlib
import http.client
import inspect
import json
import math
import os
import random
import re
import shutil
import socket
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import PyTorchModelHubMixin
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers.masking_utils import create_bidirectional_mask
from transformers.utils import cached_file

SAMPLE_RATE = 16_000
MAX_SECONDS = 60  # attention memory grows with the square of the length

# ---------------------------------------------------------------------------------------------------------------------
# Audio
# ---------------------------------------------------------------------------------------------------------------------


def load_audio(
    path, max_seconds: float | None = None, part_seconds: float | None = None, position: float = 0.0
) -> Tensor:
    """Reads a file, or a part of it, as a mono waveform at 16 kHz.

    Args:
        path: anything libsndfile reads (WAV, FLAC, OGG, MP3, ...), any rate, any number of channels.
        max_seconds: refuse longer files before decoding them.
        part_seconds: of a longer file, read this much alone, from `position`: 0 the file's start, 1 its end.
    Returns:
        (T,) float32, nominally in [-1, 1].
    Raises:
        FileNotFoundError: no such file.
        ValueError: not audio, cut short, empty, too short or too long, or with NaN or infinite samples.
    """
    with open_audio(path, max_seconds) as file:
        frames = min(file.frames, round(part_seconds * file.samplerate)) if part_seconds else file.frames
        try:
            file.seek(round(position * (file.frames - frames)))
            samples = file.read(frames, dtype="float32", always_2d=True)  # (T, channels)
        except (soundfile.LibsndfileError, MemoryError) as error:  # MemoryError: no file is as long as this one says
            raise ValueError(f"{path}: damaged or cut short ({error}); replace the file") from error
        if len(samples) < frames:
            raise ValueError(f"{path}: cut short, {len(samples)} of {frames} samples are there; replace the file")
        rate = file.samplerate
    waveform = torch.from_numpy(samples.mean(axis=1))  # (T,)
    if rate != SAMPLE_RATE:
        import torchaudio  # here, so that it is needed only to resample

        # The filter grows with rate / gcd(rate, 16000): odd rates, such as 11127 Hz, are rounded to 25 Hz.
        waveform = torchaudio.functional.resample(waveform, max(25, 25 * round(rate / 25)), SAMPLE_RATE)
    check_waveform(waveform, path)
    return waveform


def audio_seconds(path, max_seconds: float | None = None) -> float:
    """A file's length, from its header and a look at its end: finds cut files without decoding them whole.

    Arguments and errors are those of `load_audio`, but for samples that are NaN or infinite.
    """
    with open_audio(path, max_seconds) as file:
        try:
            file.seek(file.frames - 1)
            whole = len(file.read(1)) == 1
        except soundfile.LibsndfileError:
            whole = False
        if not whole:
            raise ValueError(f"{path}: damaged or cut short; replace the file")
        return file.frames / file.samplerate


def open_audio(path, max_seconds: float | None = None) -> soundfile.SoundFile:
    """Opens a file whose header can be believed; raises what `load_audio` raises."""
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file")
    if os.path.getsize(path) == 0:
        raise ValueError(f"{path}: the file is empty")
    try:
        file = soundfile.SoundFile(path)
    except (soundfile.LibsndfileError, TypeError) as error:  # TypeError: a headerless .raw
        raise ValueError(f"{path}: not an audio file that libsndfile can read ({str(error).rstrip('.')})") from error
    # libsndfile reads a cut WAV as if it were whole and says so in its log alone. Programs that write into a pipe
    # declare 2 GiB or more, for "unknown".
    cut = re.search(r"^\s*(?:data|SSND) : (\d+) \(should be (\d+)\)", file.extra_info, re.MULTILINE)
    seconds, problem = file.frames / file.samplerate, None
    if cut and int(cut[2]) < int(cut[1]) < 0x7FFFF000:
        problem = f"cut short, {cut[2]} of {cut[1]} bytes of audio are there; replace the file"
    elif not 1000 <= file.samplerate <= 1_000_000:  # resampling from what no device records takes gigabytes
        problem = f"a sample rate of {file.samplerate} Hz cannot be right; give one from 1 kHz to 1 MHz"
    elif seconds * SAMPLE_RATE < 400:
        samples = math.ceil(seconds * SAMPLE_RATE)
        problem = f"{samples} samples at 16 kHz are shorter than one frame (400 samples, 25 ms)"
    elif max_seconds and seconds > max_seconds:
        problem = f"{seconds:.1f} s is longer than the limit of {max_seconds} s; cut it into parts"
    if problem:
        file.close()
        raise ValueError(f"{path}: {problem}")
    return file


def check_waveform(waveform: Tensor, name) -> None:
    """Raises ValueError if the waveform, (T,) float at 16 kHz, cannot be classified; warns about digital silence."""
    if waveform.ndim != 1 or not waveform.is_floating_point():
        shape = tuple(waveform.shape)
        raise ValueError(f"{name}: a waveform is a 1-D float tensor at 16 kHz, not {waveform.dtype} of shape {shape}")
    if len(waveform) < 400:
        raise ValueError(f"{name}: {len(waveform)} samples at 16 kHz are shorter than one frame (400 samples, 25 ms)")
    if not waveform.isfinite().all():
        raise ValueError(f"{name}: holds NaN or infinite samples; write it anew from its source")
    if not waveform.any():
        warnings.warn(f"{name}: digital silence; its prediction means nothing", stacklevel=2)


def tile(waveform: Tensor, samples: int) -> Tensor:
    """Repeats or cuts a waveform (T,) to (samples,), as the paper does to reach 95,744 (5.984 s)."""
    return waveform.repeat(-(-samples // len(waveform)))[:samples]


def prepare(clip, tile_seconds: float | None = None) -> Tensor:
    """A path or a waveform, of at most 60 s -> the waveform (T,) float32 that the model reads; tiled if so trained."""
    if isinstance(clip, str | os.PathLike):
        waveform = load_audio(clip, MAX_SECONDS)
    else:
        waveform = torch.as_tensor(clip)
        check_waveform(waveform, "the waveform")
        if (seconds := len(waveform) / SAMPLE_RATE) > MAX_SECONDS:
            raise ValueError(f"the waveform: {seconds:.1f} s is longer than the limit of {MAX_SECONDS} s; cut it")
    return tile(waveform.float(), round(tile_seconds * SAMPLE_RATE)) if tile_seconds else waveform.float()


# ---------------------------------------------------------------------------------------------------------------------
# The backbone: convolutional encoder and transformer, from `transformers`
# ---------------------------------------------------------------------------------------------------------------------

# Built-in shapes with random weights, of about 1, 3, 95 and 315 million parameters. What is not named is as in
# facebook/wav2vec2-base, so "base" is exactly that model; "large" is facebook/wav2vec2-large-lv60, a pre-LN
# layout: each sublayer is normalised before it, not after it.
SIZES = {
    "tiny": dict(
        hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512,
        conv_dim=[32] * 7, activation_dropout=0.0, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
    ),
    "small": dict(
        hidden_size=192, num_hidden_layers=6, num_attention_heads=4, intermediate_size=768,
        conv_dim=[96] * 7, activation_dropout=0.0,
    ),
    "base": dict(activation_dropout=0.0),
    "large": dict(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, activation_dropout=0.0,
        feat_extract_norm="layer", conv_bias=True, do_stable_layer_norm=True,
    ),
}  # fmt: skip
MODEL_TYPES = ("wav2vec2", "hubert", "wavlm")


def backbone_config(backbone: str | dict) -> transformers.PretrainedConfig:
    """The `transformers` config of a built-in size, a local folder, a Hub name, or a saved dict.

    Its added attribute `do_normalize` tells whether the backbone was trained on zero-mean, unit-variance waveforms.
    """
    supported = f"give one of {', '.join(MODEL_TYPES)}"
    if isinstance(backbone, dict):
        if backbone.get("model_type") not in MODEL_TYPES:
            raise ValueError(f"model type {backbone.get('model_type')!r} is not supported; {supported}")
        return transformers.AutoConfig.for_model(**{"do_normalize": True} | backbone)
    if backbone in SIZES:
        return transformers.Wav2Vec2Config(**SIZES[backbone], do_normalize=True)
    local, known = os.path.isdir(backbone), f"a built-in size ({', '.join(SIZES)}), a folder saved by transformers"
    if not local and "/" not in str(backbone):
        raise FileNotFoundError(f"{backbone}: not {known}, or a Hub model")
    try:
        config = transformers.AutoConfig.from_pretrained(backbone)
        preprocessor = cached_file(backbone, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
        preprocessing = json.loads(Path(preprocessor).read_text()) if preprocessor else {}
    except Exception as error:
        if not local:
            raise FileNotFoundError(f"{backbone}: not {known}, or a Hub model in reach") from error
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{backbone}: its configuration cannot be read ({reason}); save it anew") from error
    if config.model_type not in MODEL_TYPES or getattr(config, "conv_pos_batch_norm", False):
        raise ValueError(f"{backbone}: {config.model_type} of this layout is not supported; {supported}")
    config.do_normalize = preprocessing.get("do_normalize", True)
    return config


def load_backbone(backbone: str | dict, config: transformers.PretrainedConfig) -> transformers.PreTrainedModel:
    """Builds the backbone with `config.num_hidden_layers` layers, in float32; pre-trained unless built-in or a dict."""
    # An exit needs its layer, so none may be dropped; the adapter of some models sits behind the last layer, unused.
    config.layerdrop, config.add_adapter = 0.0, False
    if isinstance(backbone, dict) or backbone in SIZES:
        return transformers.AutoModel.from_config(config, dtype=torch.float32)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # else it lists every layer and quantizer weight left out on purpose
    try:
        model, info = transformers.AutoModel.from_pretrained(
            backbone, config=config, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{backbone}: its weights cannot be loaded ({reason}); download or save it anew") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    if missing := set(info["missing_keys"]) - {"masked_spec_embed"}:
        raise ValueError(f"{backbone}: {len(missing)} weights are missing, {min(missing)} for one; save it anew")
    return model


def valid_mask(lengths: Tensor, size: int) -> Tensor:
    """(B,) lengths -> (B, size) bool, true where a position holds data rather than padding."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def standardize(waveforms: Tensor, valid: Tensor | None) -> Tensor:
    """Zero mean and unit variance over each clip's valid samples; zero elsewhere; as `Wav2Vec2FeatureExtractor` does.

    waveforms: (B, T); valid: (B, T) bool, or None where all is valid. Padding may hold anything, NaN included.
    """
    if valid is None:
        variance, mean = torch.var_mean(waveforms, -1, correction=0, keepdim=True)  # (B, 1)
        return (waveforms - mean) * torch.rsqrt(variance + 1e-7)
    count = valid.sum(-1, keepdim=True)  # (B, 1)
    mean = torch.where(valid, waveforms, 0).sum(-1, keepdim=True) / count
    centred = torch.where(valid, waveforms - mean, 0)
    return centred * torch.rsqrt(centred.square().sum(-1, keepdim=True) / count + 1e-7)


# ---------------------------------------------------------------------------------------------------------------------
# The exits
# ---------------------------------------------------------------------------------------------------------------------

HEADS = ("gru", "lstm", "attention", "mean")


class ExitHead(nn.Module):
    """Hidden states of one layer -> logits z_k and embedding f_k.

    No activation stands between the two linear layers, as in the paper.

    gru, lstm    one-layer recurrent network (zero initial state) -> LayerNorm -> SELU -> mean over frames; the paper's
    attention    weighted mean over frames, the weights learned
    mean         mean over frames; the paper's at the deepest exit
    """

    def __init__(self, kind: str, width: int, num_classes: int):
        super().__init__()
        self.kind = kind
        if kind in ("gru", "lstm"):
            recurrent = nn.GRU if kind == "gru" else nn.LSTM
            self.rnn = recurrent(width, width, batch_first=True)
            self.norm = nn.LayerNorm(width)
        elif kind == "attention":
            self.score = nn.Linear(width, 1)
        self.project = nn.Linear(width, 256)
        self.classify = nn.Linear(256, num_classes)

    def forward(self, hidden: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """hidden: (B, T, D); valid: (B, T) bool or None -> logits (B, C), embedding (B, D)."""
        if self.kind in ("gru", "lstm"):
            # padding comes after the clip, so what runs forward in time never sees it
            hidden = F.selu(self.norm(self.rnn(hidden)[0]))  # (B, T, D)
        if valid is None:
            valid = hidden.new_ones(hidden.shape[:2], dtype=torch.bool)
        score = self.score(hidden).squeeze(-1) if self.kind == "attention" else hidden.new_zeros(valid.shape)
        weights = score.masked_fill(~valid, -torch.inf).softmax(-1)  # (B, T), uniform for a plain mean
        embedding = torch.einsum("bt,btd->bd", weights, hidden)
        return self.classify(self.project(embedding)), embedding


class ExitOutput(NamedTuple):
    exit: int  # the layer it reads
    logits: Tensor  # (B, C)
    embedding: Tensor  # (B, D)


# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------


class Prediction(NamedTuple):
    label: str
    confidence: float  # the label's probability
    probabilities: dict[str, float]  # by label
    exit: int  # the exit that answered
    milliseconds: float  # from waveform to probabilities


class MultiExitSER(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="sdser",
    paper_url="https://arxiv.org/abs/2210.14636",
    pipeline_tag="audio-classification",
):
    """A speech transformer with a classifier at several depths.

    Args:
        labels: class names, in the order of the logits.
        backbone: a Hub name, a folder saved by `transformers`, a size in SIZES (random weights), or a config dict.
        exits: increasing layer numbers, from 1; the last is the teacher, and layers beyond it are not kept.
            Default: 1 2 4 for "tiny", 2 4 6 for "small", otherwise L/4, 2L/3, 5L/6, L of L layers.
        head: one of HEADS for the shallow exits, the deepest then getting "mean" (a single exit gets the one named);
            or a list of one per exit.
        tile_seconds: if set, the model was trained on clips repeated or cut to this length, and `classify` does so too.
        threshold: the calibrated confidence that `classify(threshold="auto")` stops at.
    Raises:
        ValueError, FileNotFoundError: for arguments that name no model, with what would be right.
    """

    backend: str | None = None  # of a copy that `optimize_for_cpu` made

    def __init__(
        self,
        labels: list[str],
        backbone: str | dict = "facebook/wav2vec2-base",
        exits: list[int] | None = None,
        head: str | list[str] = "gru",
        tile_seconds: float | None = None,
        threshold: float | None = None,
    ):
        super().__init__()
        config = backbone_config(backbone)
        if config.num_hidden_layers > 1000:
            raise ValueError(f"a backbone of {config.num_hidden_layers} layers cannot be right; 1000 are built at most")
        exits = default_exits(backbone, config.num_hidden_layers) if exits is None else [int(k) for k in exits]
        if not exits or any(a >= b for a, b in zip([0, *exits], exits)) or exits[-1] > config.num_hidden_layers:
            layers = config.num_hidden_layers
            raise ValueError(f"exits {exits}: they must increase, from 1 to the backbone's {layers} layers at most")
        if isinstance(head, str):
            head = [head] * (len(exits) - 1) + ["mean" if len(exits) > 1 else head]
        if len(head) != len(exits) or set(head) - set(HEADS):
            raise ValueError(f"head {head}: give one of {', '.join(HEADS)}, or one for each of {len(exits)} exits")
        if len(labels) < 2 or len(set(labels)) < len(labels):
            raise ValueError(f"labels {list(labels)}: give at least two, all different")
        config.num_hidden_layers = exits[-1]
        self.labels, self.exits, self.tile_seconds, self.threshold = list(labels), exits, tile_seconds, threshold
        self.head_kinds = list(head)
        self.backbone = load_backbone(backbone, config)
        self.heads = nn.ModuleDict({
            str(exit): ExitHead(kind, config.hidden_size, len(labels)) for exit, kind in zip(exits, head)
        })  # fmt: skip
        self.masks_time = config.apply_spec_augment and config.mask_time_prob > 0
        if not self.masks_time and hasattr(self.backbone, "masked_spec_embed"):
            # the learned vector that stands in for masked frames: no loss would reach it
            self.backbone.masked_spec_embed.requires_grad_(False)

    @property
    def config(self) -> dict:
        """Everything `MultiExitSER(**config)` needs for the same architecture, without the original backbone."""
        backbone = self.backbone.config.to_dict()
        return dict(labels=self.labels, backbone=backbone, exits=self.exits, head=self.head_kinds,
                    tile_seconds=self.tile_seconds, threshold=self.threshold)  # fmt: skip

    def forward(self, waveforms: Tensor, lengths: Tensor | None = None, exit: int | None = None) -> list[ExitOutput]:
        """Runs the layers that the exits asked for need, and no more.

        Each clip gets what it would get alone: padding takes no part in any computation.

        Args:
            waveforms: (B, T) float, raw 16 kHz; beyond a clip's length anything may stand.
            lengths: (B,) int64, valid samples of each clip; None if all T are.
            exit: one exit; None for all.
        Returns:
            One ExitOutput per exit, shallow to deep.
        Raises:
            ValueError: shapes that do not fit, clips shorter than one frame, an exit that the model lacks.
        """
        hidden, valid = self.embed_frames(waveforms, lengths)  # (B, T, D), (B, T) or None
        exits, outputs, bias = self.exits if exit is None else [self.check_exit(exit)], [], None
        for start, k in zip([0, *exits], exits):  # each exit goes on where the one before it stopped
            hidden, bias = self.run_layers(hidden, valid, bias, start, k)
            outputs.append(self.read_exit(k, hidden, valid))
        return outputs

    def embed_frames(self, waveforms: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """All that comes before the transformer layers: normalisation, CNN, projection, time mask, position.

        Returns what layer 1 reads, (B, frames, D), and which frames hold data, (B, frames) bool, or None if all do.
        """
        lengths = self.check_batch(waveforms, lengths)
        config, encoder = self.backbone.config, self.backbone.encoder
        valid = None if lengths is None else valid_mask(lengths, waveforms.shape[1])  # (B, samples)
        if config.do_normalize:
            waveforms = standardize(waveforms, valid)
        elif valid is not None:
            waveforms = torch.where(valid, waveforms, 0)

        x = waveforms[:, None].to(self.dtype)  # (B, 1, samples)
        for i, layer in enumerate(self.backbone.feature_extractor.conv_layers):
            if lengths is not None:  # samples become frames
                lengths = (lengths - config.conv_kernel[i]) // config.conv_stride[i] + 1
            if i == 0 and config.feat_extract_norm == "group" and lengths is not None:
                # The GroupNorm of "base" models normalises over time: each clip by itself, or padding would count.
                x, padded = layer.conv(x), []
                for clip, length in zip(x.split(1), lengths.tolist()):
                    padded.append(F.pad(layer.layer_norm(clip[..., :length]), (0, x.shape[-1] - length)))
                x = layer.activation(torch.cat(padded))
            else:
                x = layer(x)  # (B, channels, frames)

        hidden = self.backbone.feature_projection(x.transpose(1, 2))  # (B, frames, D), one frame per 20 ms
        hidden = (hidden[0] if isinstance(hidden, tuple) else hidden).to(self.dtype)  # HuBERT's returns no tuple
        valid = None if lengths is None else valid_mask(lengths, hidden.shape[1])  # (B, frames)
        if self.training and self.masks_time:
            mask = self.sample_time_mask(hidden, valid)
            hidden = torch.where(mask[..., None], self.backbone.masked_spec_embed.to(hidden.dtype), hidden)
        if valid is not None:
            hidden = torch.where(valid[..., None], hidden, 0)  # the position convolution must see zeros past the end
        hidden = hidden + encoder.pos_conv_embed(hidden)
        if not config.do_stable_layer_norm:  # post-LN: this norm stands before layer 1; pre-LN: see read_exit
            hidden = encoder.layer_norm(hidden)
        return encoder.dropout(hidden), valid

    def check_batch(self, waveforms: Tensor, lengths: Tensor | None) -> Tensor | None:
        """Raises ValueError unless the arguments of `forward` fit; returns lengths, or None where no clip is padded."""
        if waveforms.ndim != 2 or not waveforms.is_floating_point():
            raise ValueError(f"waveforms must be a (B, T) float tensor, not {waveforms.dtype} {tuple(waveforms.shape)}")
        size = shortest = longest = waveforms.shape[1]
        if lengths is not None:
            if lengths.shape != waveforms.shape[:1]:
                raise ValueError(f"lengths must have shape ({len(waveforms)},), not {tuple(lengths.shape)}")
            shortest, longest = lengths.min().item(), lengths.max().item()
        frame = 1  # samples that one frame of the CNN reads: 400 for all known backbones
        for kernel, stride in zip(self.backbone.config.conv_kernel[::-1], self.backbone.config.conv_stride[::-1]):
            frame = (frame - 1) * stride + kernel
        if shortest < frame or longest > size:
            raise ValueError(
                f"clips of {shortest} to {longest} samples in a batch of {size}: give at least {frame}, at most all"
            )
        return None if shortest == size else lengths

    def sample_time_mask(self, hidden: Tensor, valid: Tensor | None) -> Tensor:
        """SpecAugment's time mask (Park et al., 2019): (B, T) bool, true in spans of at most half a clip."""
        config, (batch, size, _), device = self.backbone.config, hidden.shape, hidden.device
        frames = valid.sum(1) if valid is not None else torch.full((batch,), size, device=device)  # (B,)
        length = (frames // 2).clamp(max=config.mask_time_length)  # of a span
        count = (config.mask_time_prob * frames / length.clamp(min=1) + torch.rand(batch, device=device)).floor()
        most = 1 + int(config.mask_time_prob * size)  # no clip has more spans, each a frame at least: S
        start = (torch.rand(batch, most, device=device) * (frames - length + 1)[:, None]).long()  # (B, S)
        t = torch.arange(size, device=device)
        masked = (t >= start[..., None]) & (t < (start + length[:, None])[..., None])  # (B, S, T)
        return (masked & (torch.arange(most, device=device) < count[:, None])[..., None]).any(1)

    def run_layers(self, hidden: Tensor, valid: Tensor | None, bias: Tensor | None, start: int, stop: int):
        """Transformer layers start+1 to stop. hidden: (B, T, D). bias: WavLM's position bias, which layer 1 makes."""
        encoder, config = self.backbone.encoder, self.backbone.config
        if config.model_type == "wavlm":
            with warnings.catch_warnings():  # torch dislikes that transformers hands it a bool mask and a float bias
                warnings.filterwarnings("ignore", "Support for mismatched key_padding_mask")
                for i in range(start, stop):
                    hidden, bias = encoder.layers[i](hidden, attention_mask=valid, position_bias=bias)
        else:
            mask = create_bidirectional_mask(config, hidden, valid)
            for i in range(start, stop):
                hidden = encoder.layers[i](hidden, attention_mask=mask)
        return hidden, bias

    def read_exit(self, exit: int, hidden: Tensor, valid: Tensor | None) -> ExitOutput:
        """The classifier at layer `exit` on that layer's hidden states (B, T, D)."""
        if self.backbone.config.do_stable_layer_norm:  # pre-LN: the encoder's last norm belongs to every exit
            hidden = self.backbone.encoder.layer_norm(hidden)
        head = self.heads[str(exit)]
        # its own precision also under autocast: half precision slows recurrence down, and the losses need float32
        with torch.autocast(hidden.device.type, enabled=False):
            return ExitOutput(exit, *head(hidden.to(head.project.weight.dtype), valid))

    @property
    def dtype(self) -> torch.dtype:
        return self.backbone.dtype

    def check_exit(self, exit: int) -> int:
        if exit not in self.exits:
            raise ValueError(f"exit {exit}: the model has exits {', '.join(map(str, self.exits))}")
        return exit

    # -- early exit ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def early_exit(self, waveforms: Tensor, lengths: Tensor | None, threshold: float) -> tuple[Tensor, Tensor]:
        """Runs layer by layer; a clip leaves at the first exit whose top probability reaches the threshold.

        Clips that have left are dropped from the batch: no layer runs that no answer needs.

        Args:
            waveforms, lengths: as in `forward`.
            threshold: from 0 (all leave at the first exit) to 1 (only a probability that rounds to 1 leaves early).
        Returns:
            logits (B, C) and the exit (B,) int64 that gave them.
        """
        hidden, valid = self.embed_frames(waveforms, lengths)
        logits = torch.empty(len(hidden), len(self.labels), device=hidden.device)
        active, bias = torch.arange(len(hidden), device=hidden.device), None
        exits = torch.empty_like(active)
        for start, k in zip([0, *self.exits], self.exits):
            hidden, bias = self.run_layers(hidden, valid, bias, start, k)
            output = self.read_exit(k, hidden, valid)
            logits[active] = output.logits.float()
            exits[active] = k
            stay = output.logits.softmax(-1).amax(-1) < threshold  # (B still active,)
            if not stay.any():
                break
            active, hidden = active[stay], hidden[stay]
            valid = valid if valid is None else valid[stay]
            # WavLM's is (B·heads, T, T)
            bias = bias if bias is None else bias.unflatten(0, (len(stay), -1))[stay].flatten(0, 1)
        return logits, exits

    @torch.no_grad()
    def classify(self, clips, exit: int | None = None, threshold: float | str | None = None) -> list[Prediction]:
        """Classifies files or waveforms, one at a time.

        Args:
            clips: paths, or waveforms (T,) float at 16 kHz, of at most 60 s.
            exit: run to this exit and no further. Default: the deepest.
            threshold: stop each clip at the first exit this certain (0 to 1); "auto": the calibrated value.
        Raises:
            ValueError, FileNotFoundError: naming the clip that cannot be read or is too short or long, or the argument.
        """
        if exit is not None and threshold is not None:
            raise ValueError("exit and threshold exclude each other: give one")
        if threshold == "auto":
            threshold = self.threshold
            if threshold is None:
                raise ValueError('threshold "auto": this model has not been calibrated; give a number from 0 to 1')
        if threshold is not None and not 0 <= threshold <= 1:
            raise ValueError(f"threshold {threshold}: give a probability from 0 to 1")
        exit = self.exits[-1] if exit is None else self.check_exit(exit)
        device, training = next(self.parameters()).device, self.training
        self.eval()
        predictions = []
        try:
            for clip in [clips] if isinstance(clips, str | os.PathLike) else clips:
                waveform = prepare(clip, self.tile_seconds).to(device)[None]  # (1, T)
                start = time.perf_counter()
                if threshold is None:
                    logits, used = self(waveform, exit=exit)[0].logits, exit
                else:
                    logits, used = self.early_exit(waveform, None, threshold)
                probabilities = logits[0].float().softmax(-1).tolist()
                milliseconds = 1000 * (time.perf_counter() - start)
                by_label = dict(zip(self.labels, probabilities))
                label = max(by_label, key=by_label.get)
                predictions.append(Prediction(label, by_label[label], by_label, int(used), milliseconds))
        finally:
            self.train(training)
        return predictions

    # -- smaller, saved, loaded ---------------------------------------------------------------------------------------

    def truncate(self, exit: int) -> "MultiExitSER":
        """A model of its own with `exit` layers and that one exit; weights are copied, logits are equal."""
        kind = self.head_kinds[self.exits.index(self.check_exit(exit))]
        if self.backend:
            raise ValueError("a copy for the CPU cannot be truncated: truncate the model first, then make the copy")
        config = self.config | dict(exits=[exit], head=[kind], threshold=None)
        small = MultiExitSER(**config).to(next(self.parameters()).device, self.dtype)
        weights = self.state_dict()
        small.load_state_dict({name: weights[name] for name in small.state_dict()})
        return small.train(self.training)

    def save_pretrained(self, folder, **kwargs):
        """Writes config.json and model.safetensors, the Hub's convention, so that a kill leaves the last ones whole.

        Keyword arguments are those of `huggingface_hub.PyTorchModelHubMixin.save_pretrained`.
        """
        if self.backend:
            raise ValueError("a copy for the CPU cannot be saved: save the model that it was made from")
        folder = Path(folder)
        fresh = folder / ".saving"
        shutil.rmtree(fresh, ignore_errors=True)  # what a killed save left
        result = super().save_pretrained(fresh, **({"repo_id": folder.name} | kwargs))
        config = folder / "config.json"
        if config.exists() and config.read_bytes() != (fresh / "config.json").read_bytes():
            config.unlink()  # of another model: it must not be found beside these weights
        for name in ("model.safetensors", "config.json"):
            os.replace(fresh / name, folder / name)
        if not (folder / "README.md").exists():  # the Hub's model card, which may have been edited since
            os.replace(fresh / "README.md", folder / "README.md")
        shutil.rmtree(fresh)
        return result

    def _save_pretrained(self, folder: Path) -> None:
        super()._save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(self.config, indent=2))  # not the arguments: what they led to
        shutil.copymode(folder / "config.json", folder / "model.safetensors")  # safetensors lets the owner alone read

    @classmethod
    def from_pretrained(cls, checkpoint, **kwargs) -> "MultiExitSER":
        """Loads what `save_pretrained` wrote, from a folder or the Hub, in evaluation mode; nothing is unpickled.

        Raises:
            FileNotFoundError: no such folder, nor a Hub model in reach.
            ValueError: a checkpoint that is cut short, not ours, or of other shapes than its config says.
        """
        checkpoint = os.fspath(checkpoint)
        if os.path.isdir(checkpoint):
            for name in ("config.json", "model.safetensors"):
                if not os.path.isfile(os.path.join(checkpoint, name)):
                    raise FileNotFoundError(f"{checkpoint}: holds no {name}; give a folder written by train.py")
        elif not re.fullmatch(r"[\w.-]+/[\w.-]+", checkpoint):
            raise FileNotFoundError(f"{checkpoint}: no such folder; give one written by train.py, or a Hub name")
        try:
            # The mixin prints, but standard output is the user's. On "meta" a config that the weights do not fit, which
            # may ask for terabytes, costs nothing.
            with contextlib.redirect_stdout(None), torch.device("meta"):
                return super().from_pretrained(checkpoint, **({"strict": True} | kwargs))
        except Exception as error:
            reason = str(error).strip().partition("\n")[0].rstrip(".:")
            if not os.path.isdir(checkpoint):
                raise FileNotFoundError(f"{checkpoint}: no folder, nor a Hub model in reach ({reason})") from error
            raise ValueError(f"{checkpoint}: not a whole sdser checkpoint ({reason}); train or copy it anew") from error

    @classmethod
    def _load_as_safetensor(cls, model, model_file, map_location, strict):
        with torch.device("cpu"):
            weights = load_file(model_file, device=map_location)
            # copied, since the file's alignment in memory would change how sums are rounded
            weights = {name: value.to(torch.float32, copy=True) for name, value in weights.items()}
        model.load_state_dict(weights, strict=strict, assign=True)
        return model.eval()

    @classmethod
    def _load_as_pickle(cls, model, model_file, map_location, strict):  # the mixin's way out where safetensors lack
        raise ValueError("it has no model.safetensors")


def default_exits(backbone: str | dict, layers: int) -> list[int]:
    if backbone in ("tiny", "small"):
        return [1, 2, 4] if backbone == "tiny" else [2, 4, 6]
    return sorted({max(1, round(layers * share)) for share in (1 / 4, 2 / 3, 5 / 6, 1)})


# ---------------------------------------------------------------------------------------------------------------------
# The loss, and fusion
# ---------------------------------------------------------------------------------------------------------------------


def self_distillation_loss(
    outputs: list[ExitOutput],
    targets: Tensor,
    kl_weight: float = 1.0,
    hint_weight: float = 1.0,
    temperature: float = 1.0,
    detach_teacher: bool = True,
) -> tuple[Tensor, dict[str, float]]:
    """The paper's loss: every exit learns the labels, and each shallow one what the deepest knows.

        L = CE(z_d, y) + 1/|S| Σ_{k in S} [ CE(z_k, y) + α T² KL(softmax(z_d/T) ‖ softmax(z_k/T)) + β ‖f_k − f_d‖² ]

    S are the shallow exits (students), d the deepest (teacher), z logits, f embeddings, ‖·‖² the mean over elements.

    Args:
        outputs: what the model returned, shallow to deep; one alone has no students and gives CE(z_d, y).
        targets: (B,) int64 class indices y.
        kl_weight: α, for the teacher's probabilities (Hinton et al., 2015); at 0 the term is not computed.
        hint_weight: β, for the teacher's embedding, the hint (FitNets, Romero et al., 2015); at 0 it is not computed.
        temperature: T softens both distributions; T² keeps the term's gradients about as large for any T.
        detach_teacher: no gradient of the KL and hint terms flows through the teacher's outputs (Zhang et al., 2019);
            they still shape the layers that it shares with the students.
    Returns:
        the loss, a scalar, and its parts by name, unweighted and averaged over students: ce (the teacher's),
        ce_students, kl, hint.
    """
    *students, teacher = outputs
    loss = F.cross_entropy(teacher.logits, targets)  # CE(z_d, y)
    parts = {"ce": loss.item(), "ce_students": 0.0, "kl": 0.0, "hint": 0.0}
    teacher_logits, teacher_embedding = teacher.logits, teacher.embedding
    if detach_teacher:
        teacher_logits, teacher_embedding = teacher_logits.detach(), teacher_embedding.detach()
    for student in students:
        terms = {"ce_students": (1.0, F.cross_entropy(student.logits, targets))}  # CE(z_k, y)
        if kl_weight:
            log_p_student = F.log_softmax(student.logits / temperature, -1)
            log_p_teacher = F.log_softmax(teacher_logits / temperature, -1)
            kl = F.kl_div(log_p_student, log_p_teacher, reduction="batchmean", log_target=True)
            terms["kl"] = (kl_weight, temperature**2 * kl)  # T² KL(softmax(z_d/T) ‖ softmax(z_k/T))
        if hint_weight:
            terms["hint"] = (hint_weight, F.mse_loss(student.embedding, teacher_embedding))  # ‖f_k − f_d‖²
        for name, (weight, term) in terms.items():
            loss = loss + weight * term / len(students)
            parts[name] += term.item() / len(students)
    return loss, parts


def fuse(outputs: list[ExitOutput] | Tensor) -> Tensor:
    """The logits (B, C) of each clip's exit with the largest margin, top-1 minus top-2.

    outputs: what the model returned, or the exits' logits (exits, B, C).
    """
    logits = outputs if isinstance(outputs, Tensor) else torch.stack([output.logits for output in outputs])
    first, second = logits.topk(2, dim=-1).values.unbind(-1)  # (exits, B) each
    return logits[(first - second).argmax(0), torch.arange(logits.shape[1], device=logits.device)]


# ---------------------------------------------------------------------------------------------------------------------
# Cost
# ---------------------------------------------------------------------------------------------------------------------


def count_macs(model: MultiExitSER, samples, exit: int, heads: list[int] | None = None):
    """Multiply-accumulates of the matrix products and convolutions that answer for one clip at an exit.

    Args:
        samples: the clip's length at 16 kHz, an int or an array of them (not tiled yet).
        heads: exits whose heads run; default: that exit's alone. Early exit runs all on its way.
    Returns:
        int64, as many as lengths were given.
    """
    config = model.backbone.config
    t = np.asarray(samples, dtype=np.int64)
    if model.tile_seconds:
        t = np.full_like(t, round(model.tile_seconds * SAMPLE_RATE))
    d, inner, channels = config.hidden_size, config.intermediate_size, 1
    total = np.zeros_like(t)
    for width, kernel, stride in zip(config.conv_dim, config.conv_kernel, config.conv_stride):
        t = (t - kernel) // stride + 1  # samples become frames
        total += t * width * channels * kernel
        channels = width
    total += t * channels * d  # feature projection
    # the position convolution pads both ends by half its kernel, and drops the frame that an even kernel adds
    kernel = config.num_conv_pos_embeddings
    total += (t + (kernel + 1) % 2) * d * (d // config.num_conv_pos_embedding_groups) * kernel
    layer = t * (4 * d * d + 2 * d * inner) + 2 * t * t * d  # projections and feed-forward; attention
    if config.model_type == "wavlm":
        layer += t * d * 8  # the gate of the position bias
    total += exit * layer
    for k in [exit] if heads is None else heads:
        kind = model.head_kinds[model.exits.index(k)]
        per_frame = {"gru": 6 * d * d, "lstm": 8 * d * d, "attention": d, "mean": 0}[kind] + d  # + the weighted mean
        total += t * per_frame + 256 * (d + len(model.labels))
    return total


# ---------------------------------------------------------------------------------------------------------------------
# Many files
# ---------------------------------------------------------------------------------------------------------------------


class AudioFiles(torch.utils.data.Dataset):
    """File i -> the waveform (T,) that `prepare` makes of it, or the error message if it cannot be read."""

    def __init__(self, paths: list[str], tile_seconds: float | None = None):
        self.paths, self.tile_seconds = paths, tile_seconds

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Tensor | str:
        try:
            return prepare(self.paths[i], self.tile_seconds)
        except (OSError, ValueError) as error:
            return str(error)


def pad(waveforms: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Waveforms (T,) -> one batch (B, T) with zeros behind the shorter ones, and lengths (B,).

    Unless all are of one length, T is a multiple of 4,000: oneDNN keeps buffers for every shape that it meets, which
    for 1,440 clips of as many lengths took as much memory again as all else.
    """
    lengths = torch.tensor([len(waveform) for waveform in waveforms])
    batch = nn.utils.rnn.pad_sequence(waveforms, batch_first=True)
    return F.pad(batch, (0, -batch.shape[1] % 4000 if lengths.unique().numel() > 1 else 0)), lengths


def progress(steps, title: str, **options) -> tqdm:
    """A bar on a terminal; of several processes (torchrun counts them in RANK) the first one's alone."""
    return tqdm(steps, title, leave=False, disable=True if int(os.environ.get("RANK", 0)) else None, **options)


def read_batches(files, batches: list[list[int]], workers: int = 0, skip_bad: bool = False):
    """Reads a dataset's items in batches, never more than a few at a time.

    Args:
        files: a Dataset whose item is what is wrong, a string, where a file cannot be read.
        workers: processes that load audio; 0: none beside this one.
        skip_bad: warn of a file that cannot be read, instead of raising ValueError.
    Yields:
        for each batch, (index, item) of what could be read.
    """
    loader = torch.utils.data.DataLoader(
        files, batch_sampler=batches, collate_fn=list, num_workers=workers, generator=torch.Generator()
    )
    for batch, items in zip(batches, loader):
        for problem in [item for item in items if isinstance(item, str)]:
            if not skip_bad:
                raise ValueError(problem)
            warnings.warn(f"left out: {problem}", stacklevel=3)
        yield [(i, item) for i, item in zip(batch, items) if not isinstance(item, str)]


def file_batches(paths, seconds, tile_seconds=None, batch_size=16, **reading):
    """Reads files in batches of similar length, with a progress bar.

    Args:
        paths, seconds: the files and their lengths, from `audio_seconds`.
        tile_seconds: of the model, see `MultiExitSER`.
        reading: workers and skip_bad, see `read_batches`.
    Yields:
        indices into paths, waveforms (B, T), lengths (B,).
    """
    order = np.argsort(seconds, kind="stable").tolist()
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    files = AudioFiles(paths, tile_seconds)
    for readable in progress(read_batches(files, batches, **reading), "evaluating", total=len(batches)):
        if readable:
            indices, waveforms = zip(*readable)
            yield list(indices), *pad(waveforms)


@torch.no_grad()
def predict(model: MultiExitSER, paths: list[str], seconds: list[float], **loading) -> tuple[Tensor, Tensor]:
    """Runs files through every exit; the arguments are those of `file_batches`.

    Returns:
        logits (exits, files, C) float32, and which files could be read, (files,) bool; on the CPU.
    """
    device = next(model.parameters()).device
    model.eval()
    logits, readable = torch.zeros(len(model.exits), len(paths), len(model.labels)), torch.zeros(len(paths), dtype=bool)
    for indices, waveforms, lengths in file_batches(paths, seconds, model.tile_seconds, **loading):
        outputs = model(waveforms.to(device), lengths.to(device))
        logits[:, indices] = torch.stack([output.logits for output in outputs]).float().cpu()
        readable[indices] = True
    return logits, readable


# ---------------------------------------------------------------------------------------------------------------------
# Metrics
# ---------------------------------------------------------------------------------------------------------------------


def confusion_matrix(targets, predictions, num_classes: int) -> np.ndarray:
    """Class indices (N,) and (N,) -> (C, C) counts, a row per true class, a column per prediction."""
    pairs = np.stack([np.asarray(targets, dtype=int), np.asarray(predictions, dtype=int)])
    if pairs.size == 0 or pairs.min() < 0 or pairs.max() >= num_classes:
        raise ValueError(f"class indices: there must be some, all from 0 to {num_classes - 1}")
    return np.bincount(pairs[0] * num_classes + pairs[1], minlength=num_classes**2).reshape(num_classes, num_classes)


def unweighted_average_recall(targets, predictions, num_classes: int) -> float:
    """UAR: recall of each class, averaged over the classes that occur in the targets. Chance is 1 / classes."""
    return scores(targets, predictions, num_classes)["uar"]


def scores(targets, predictions, num_classes: int) -> dict[str, float]:
    """UAR, accuracy and macro F1 of class indices (N,); UAR and F1 are means over the classes in the targets."""
    confusion = confusion_matrix(targets, predictions, num_classes)
    hits, true, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    present = true > 0
    recall = hits[present] / true[present]
    f1 = 2 * hits[present] / (true + predicted)[present]
    return {"uar": float(recall.mean()), "accuracy": float(hits.sum() / true.sum()), "macro_f1": float(f1.mean())}


# ---------------------------------------------------------------------------------------------------------------------
# Corpora
# ---------------------------------------------------------------------------------------------------------------------


class Clip(NamedTuple):
    path: str
    label: str
    speaker: str | None
    split: str | None = None  # train, dev or test


class Corpus(NamedTuple):
    title: str
    name: str  # regular expression for a file's path without ending
    labels: dict[str, str]  # what the name says -> label


CORPORA = {
    "ravdess": Corpus(
        "RAVDESS speech",  # 03: audio alone, 01: speech; the songs, 02, are left out
        r"03-01-(?P<label>\d\d)-\d\d-\d\d-\d\d-(?P<speaker>\d\d)",
        {"01": "neutral", "02": "calm", "03": "happiness", "04": "sadness", "05": "anger", "06": "fear",
         "07": "disgust", "08": "surprise"},
    ),
    "emodb": Corpus(
        "EMO-DB",
        r"(?P<speaker>\d\d)[ab]\d\d(?P<label>[A-Z])[a-z]?",
        {"W": "anger", "L": "boredom", "E": "disgust", "A": "fear", "F": "happiness", "T": "sadness", "N": "neutral"},
    ),
    "crema-d": Corpus(
        "CREMA-D",
        r"(?P<speaker>\d{4})_[A-Z]{3}_(?P<label>[A-Z]{3})_[A-Z]{2}",
        {"ANG": "anger", "DIS": "disgust", "FEA": "fear", "HAP": "happiness", "NEU": "neutral", "SAD": "sadness"},
    ),
    "savee": Corpus(
        "SAVEE",
        r"(?P<speaker>DC|JE|JK|KL)[_/](?P<label>[a-z]{1,2})\d\d",
        {"a": "anger", "d": "disgust", "f": "fear", "h": "happiness", "n": "neutral", "sa": "sadness",
         "su": "surprise"},
    ),
    "tess": Corpus(
        "TESS",
        r"(?P<speaker>OAF|YAF)_[^/]+_(?P<label>[a-z]+)",
        {"angry": "anger", "disgust": "disgust", "fear": "fear", "happy": "happiness", "neutral": "neutral",
         "ps": "surprise", "sad": "sadness"},
    ),
    "demos": Corpus(
        "DEMoS",
        r"(?:NP|PR)_(?P<speaker>[fm]_\d+)_(?P<label>[a-z]{3})\d+[a-z]?",
        {"rab": "anger", "dis": "disgust", "pau": "fear", "col": "guilt", "gio": "happiness", "tri": "sadness",
         "sor": "surprise", "neu": "neutral"},
    ),
    "urdu": Corpus(
        "URDU",
        r"(?P<speaker>S[MF]\d+)_F\d+_(?P<label>[A-Z])\d+",
        {"A": "anger", "H": "happiness", "N": "neutral", "S": "sadness"},
    ),
}  # fmt: skip
AUDIO_ENDINGS = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf")
MANIFEST_ENDINGS = (".csv", ".tsv", ".jsonl")
SPLITS = ("train", "dev", "test")


def load_corpus(source: str) -> list[Clip]:
    """Lists the clips of a corpus; no audio is read.

    Args:
        source: "synthetic"; "ravdess" or "emodb" (downloaded once into ~/.cache/sdser); a folder of one of CORPORA,
            found out by its file names; a CSV, TSV or JSONL manifest; or a folder with the manifests train, dev (or
            devel) and test.
    Returns:
        clips in a fixed order, with a split only where a manifest gives one.
    Raises:
        FileNotFoundError, ValueError: naming the file and line and what would be right.
    """
    source = os.fspath(source)
    if source == "synthetic":
        source = make_synthetic()
    elif source in DOWNLOADS:
        source = download(source)
    if os.path.isdir(source):
        manifests = [(split, path) for split in SPLITS for path in find_manifest(source, split)]
        if manifests:
            return [clip._replace(split=split) for split, path in manifests for clip in read_manifest(path)]
        return read_folder(source)
    if not os.path.isfile(source):
        names = ", ".join(["synthetic", *DOWNLOADS])
        raise FileNotFoundError(f"{source}: no such folder or manifest; give one, or a corpus known by name ({names})")
    if not source.lower().endswith(MANIFEST_ENDINGS):
        raise ValueError(f"{source}: give a folder, or a manifest ending in {', '.join(MANIFEST_ENDINGS)}")
    return read_manifest(source)


def read_folder(folder: str) -> list[Clip]:
    """Clips of a folder, by the file-name pattern of CORPORA that fits most of its audio files."""
    files = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in AUDIO_ENDINGS and p.name[0] != ".")
    if not files:
        raise ValueError(f"{folder}: holds no audio files ({', '.join(AUDIO_ENDINGS)}) and no train/dev/test manifests")

    def matches(corpus):
        pattern = re.compile(rf"(?:.*/)?{corpus.name}")
        return [(path, found) for path in files if (found := pattern.fullmatch(path.with_suffix("").as_posix()))]

    corpus, matched = max(((corpus, matches(corpus)) for corpus in CORPORA.values()), key=lambda pair: len(pair[1]))
    if not matched:
        known = ", ".join(corpus.title for corpus in CORPORA.values())
        raise ValueError(f"{folder}: {files[0].name} is no file name of a known corpus ({known}); give a manifest")
    if len(matched) < len(files):
        others = len(files) - len(matched)
        warnings.warn(f"{folder}: {others} of {len(files)} audio files are not {corpus.title}, left out", stacklevel=3)
    for path, found in matched:
        if found["label"] not in corpus.labels:
            known = ", ".join(corpus.labels)
            raise ValueError(f"{path}: unknown emotion {found['label']!r}; {corpus.title} has {known}")
    return [Clip(str(path), corpus.labels[found["label"]], found["speaker"]) for path, found in matched]


def find_manifest(folder: str, split: str) -> list[str]:
    """The manifest of that split in the folder, as a list of none or one."""
    names = ["dev", "devel"] if split == "dev" else [split]
    paths = [os.path.join(folder, name + ending) for name in names for ending in MANIFEST_ENDINGS]
    found = [path for path in paths if os.path.isfile(path)]
    if len(found) > 1:
        raise ValueError(f"{folder}: {found[0]} and {found[1]} both give the split {split}; keep one")
    return found


# What manifests call our columns: ours first, then EmoBox's and other common names.
COLUMNS = {
    "path": ("path", "wav", "file", "filename", "file_name", "audio"),
    "label": ("label", "emo", "emotion"),
    "speaker": ("speaker", "spk", "speaker_id"),
    "split": ("split",),
}


def read_manifest(manifest: str) -> list[Clip]:
    """Clips of a CSV or TSV with a header, or of a JSONL; paths are relative to the manifest.

    A TSV of two columns with other headings is read as file name and label, as in the authors' lists.
    """
    with open(manifest, encoding="utf-8-sig", newline="") as file:
        try:
            if manifest.lower().endswith(".jsonl"):
                rows = [(number, json.loads(line)) for number, line in enumerate(file, 1) if line.strip()]
                if odd := [number for number, row in rows if not isinstance(row, dict)]:
                    raise ValueError(f"line {odd[0]}: not an object")
                header = list(rows[0][1]) if rows else []
            else:
                tsv = manifest.lower().endswith(".tsv")
                reader = csv.DictReader(file, delimiter="\t" if tsv else ",")
                rows = [(reader.line_num, row) for row in reader]
                if odd := [number for number, row in rows if None in row]:
                    raise ValueError(f"line {odd[0]}: more fields than the first line names")
                header = reader.fieldnames or []
        except (ValueError, RecursionError, csv.Error) as error:
            raise ValueError(f"{manifest}: not readable as a manifest ({error})") from error
    if not rows:
        raise ValueError(f"{manifest}: lists no clips")
    columns = {ours: next((name for name in names if name in header), None) for ours, names in COLUMNS.items()}
    if manifest.lower().endswith(".tsv") and len(header) == 2 and not (columns["path"] and columns["label"]):
        first, second = header
        columns["path"] = columns["path"] or (second if columns["label"] == first else first)
        columns["label"] = second if columns["path"] == first else first
    missing = [ours for ours in ("path", "label") if columns[ours] is None]
    if missing or columns["path"].lower().endswith(AUDIO_ENDINGS):
        need = "the first line must name the columns path, label and, if known, speaker and split"
        raise ValueError(f"{manifest}: {need}; it reads {', '.join(map(str, header))}")
    clips = []
    for number, row in rows:
        values = (row.get(columns[ours]) if columns[ours] else None for ours in COLUMNS)
        path, label, speaker, split = ("" if value is None else str(value).strip() for value in values)
        split = {"devel": "dev", "validation": "dev"}.get(split, split)
        if not path or not label or split not in ("", *SPLITS):
            wrong = "no path" if not path else "no label" if not label else f"unknown split {split!r}"
            raise ValueError(f"{manifest}, line {number}: {wrong}; give a path, a label, and a split or nothing")
        path = os.path.normpath(os.path.join(os.path.dirname(manifest), path))
        clips.append(Clip(path, label, speaker or None, split or None))
    return clips


# -- splits: no speaker stands in two ---------------------------------------------------------------------------------


def split_clips(clips: list[Clip], fold: tuple[int, int] | None = None) -> list[Clip]:
    """Gives every clip a split, by speaker, every label in each split; depends on the clips and the fold alone.

    Args:
        clips: splits of their own are kept (all clips have one, or none).
        fold: (I, N), I from 1: of N groups of speakers, group I is test, the next one dev, the rest train.
            None: about 40 % of the clips train, 30 % dev, 30 % test, as in the paper.
    Raises:
        ValueError: too few speakers, a label that cannot be in each split, a speaker in two splits, a clip with
            neither speaker nor split.
    """
    if any(clip.split for clip in clips):
        if fold:
            warnings.warn("the manifest brings its own splits; --fold is ignored", stacklevel=2)
    else:
        clips = deal_speakers(clips, fold)
    check_splits(clips)
    return clips


def deal_speakers(clips: list[Clip], fold: tuple[int, int] | None) -> list[Clip]:
    """The dealing behind `split_clips`: the largest speaker first, to the group furthest below its share."""
    sizes, labels_of = Counter(), defaultdict(set)
    for clip in clips:
        if clip.speaker is None:
            raise ValueError(f"{clip.path}: has neither speaker nor split; the manifest must give one of them")
        sizes[clip.speaker] += 1
        labels_of[clip.speaker].add(clip.label)
    shares = [1 / fold[1]] * fold[1] if fold else [0.4, 0.3, 0.3]
    if len(sizes) < len(shares):
        raise ValueError(
            f"{len(sizes)} speakers are too few for {len(shares)} groups of different speakers; join corpora in a "
            "manifest, or score these clips with a model trained on others (evaluate.py --split all)"
        )
    labels = set().union(*labels_of.values())
    speakers = sorted(sizes, key=lambda speaker: (-sizes[speaker], speaker))
    for attempt in range(1000):
        groups, filled = [set() for _ in shares], [0] * len(shares)
        for speaker in speakers:
            group = min(range(len(shares)), key=lambda g: (filled[g] + sizes[speaker]) / shares[g])
            groups[group].add(speaker)
            filled[group] += sizes[speaker]
        if all(group and set().union(*(labels_of[s] for s in group)) == labels for group in groups):
            break
        random.Random(attempt).shuffle(speakers)
    else:
        raise ValueError(
            f"no way found to deal {len(sizes)} speakers into {len(shares)} groups with every label in each; "
            "leave out the labels that few speakers have, or give a manifest with splits"
        )
    if fold:
        test, dev = groups[fold[0] - 1], groups[fold[0] % fold[1]]
    else:
        _, dev, test = groups
    return [
        clip._replace(split="test" if clip.speaker in test else "dev" if clip.speaker in dev else "train")
        for clip in clips
    ]


def check_splits(clips: list[Clip]) -> None:
    """Raises ValueError unless each split has every label, and no speaker, nor file, stands in two splits."""
    home, labels_of = {}, defaultdict(set)
    for clip in clips:
        if clip.split is None:
            raise ValueError(f"{clip.path}: has no split while other clips have one; give all a split, or none")
        labels_of[clip.split].add(clip.label)
        for who in filter(None, (f"speaker {clip.speaker}" if clip.speaker else None, clip.path)):
            if home.setdefault(who, clip.split) != clip.split:
                raise ValueError(f"{who} stands in two splits, {home[who]} and {clip.split}; keep each in one")
    for split in SPLITS:
        if missing := set().union(*labels_of.values()) - labels_of[split]:
            raise ValueError(f"the {split} split has no {', '.join(sorted(missing))}; every label must be in each")


# -- downloads --------------------------------------------------------------------------------------------------------


class Download(NamedTuple):
    url: str
    md5: str | None  # None where none is published
    clips: int
    licence: str


DOWNLOADS = {
    "ravdess": Download(
        "https://zenodo.org/records/1188976/files/Audio_Speech_Actors_01-24.zip?download=1",
        "bc696df654c87fed845eb13823edef8a", 1440, "CC BY-NC-SA 4.0",
    ),
    "emodb": Download("http://emodb.bilderbar.info/download/download.zip", None, 535, "CC0 1.0"),
}  # fmt: skip
MAX_UNPACKED = 4 * 2**30  # bytes; more in an archive is a bomb


def cache_folder() -> Path:
    return Path.home() / ".cache" / "sdser"


def download(name: str) -> str:
    """Downloads, checks and unpacks a corpus of DOWNLOADS, once; returns its folder. A failure leaves nothing."""
    entry, folder = DOWNLOADS[name], cache_folder() / name
    if folder.is_dir():
        return str(folder)
    print(f"downloading {name} ({entry.licence}) from {entry.url}", file=sys.stderr)
    folder.parent.mkdir(parents=True, exist_ok=True)
    timeout = socket.getdefaulttimeout()
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{name}-") as temporary:
        archive, fresh = os.path.join(temporary, "archive.zip"), os.path.join(temporary, "unpacked")
        try:
            socket.setdefaulttimeout(60)
            torch.hub.download_url_to_file(entry.url, archive)  # with a progress bar
        except (OSError, http.client.HTTPException) as error:
            raise ValueError(f"{entry.url}: the download failed ({error}); try again, or unpack it by hand") from error
        finally:
            socket.setdefaulttimeout(timeout)
        if entry.md5:
            with open(archive, "rb") as file:
                md5 = hashlib.file_digest(file, "md5").hexdigest()
            if md5 != entry.md5:
                raise ValueError(f"{entry.url}: MD5 is {md5} instead of {entry.md5}, cut or changed; try again")
        unpack(archive, fresh, entry.url)
        if (clips := len(read_folder(fresh))) != entry.clips:
            raise ValueError(f"{entry.url}: {clips} clips are in the archive instead of {entry.clips}; try again")
        os.replace(fresh, folder)
    return str(folder)


def unpack(archive: str, folder: str, name: str) -> None:
    """Unpacks a zip, refusing one that reaches out of its folder, is too large, or is damaged."""
    try:
        with zipfile.ZipFile(archive) as file:
            for member in file.infolist():
                parts = re.split(r"[/\\]", member.filename)
                if ".." in parts or parts[0] == "" or ":" in parts[0]:
                    raise ValueError(f"{name}: the archive would write outside its folder ({member.filename})")
            if sum(member.file_size for member in file.infolist()) > MAX_UNPACKED:
                raise ValueError(f"{name}: the archive would unpack to more than {MAX_UNPACKED >> 30} GiB")
            file.extractall(folder)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{name}: not a whole zip archive ({error}); try again") from error


# -- synthetic speech -------------------------------------------------------------------------------------------------


class Prosody(NamedTuple):
    """How an emotion moves a voice, relative to the speaker's own."""

    pitch: float  # semitones above the speaker's
    accent: float  # semitones by which each syllable may stand out
    contour: float  # semitones from the clip's start to its end
    tempo: float  # syllables per second
    tilt: float  # dB per octave by which the source falls off
    fade: float  # dB by which energy falls over the clip
    tremor: float  # semitones of 6 Hz wavering
    breath: float  # noise beside the voice


PROSODY = {
    #                    pitch accent contour tempo tilt  fade tremor breath
    "anger":     Prosody(+2.0,   2.0,   -8.0,  5.0,  -5,   4,   0.1,  0.02),
    "fear":      Prosody(+5.0,   0.7,   +1.0,  6.5,  -9,   0,   1.2,  0.08),
    "happiness": Prosody(+3.0,   2.5,   +8.0,  4.0,  -8,   0,   0.1,  0.02),
    "sadness":   Prosody(-2.5,   0.7,   -2.0,  2.7, -12,   9,   0.2,  0.05),
}  # fmt: skip
CORPORA["synthetic"] = Corpus(
    "synthetic speech", r"(?P<speaker>voice\d\d)-(?P<label>[a-z]+)-\d\d", {label: label for label in PROSODY}
)
VOWELS = [(730, 1090, 2440), (270, 2290, 3010), (300, 870, 2240), (530, 1840, 2480), (570, 840, 2410)]  # formants, Hz


def synthesize(prosody: Prosody, pitch: float, size: float, rng: np.random.Generator) -> np.ndarray:
    """A source-filter voice: glottal pulses at a moving pitch, shaped by the formants of one vowel per syllable.

    Args:
        pitch: the speaker's mean, Hz.
        size: the speaker's formants relative to VOWELS.
    Returns:
        (T,) float32 at 16 kHz, 1.0 to 1.6 s.
    """
    seconds = rng.uniform(1.0, 1.6)
    syllables = max(2, round(seconds * prosody.tempo * rng.uniform(0.8, 1.2)))
    samples = int(seconds * SAMPLE_RATE)
    t = np.arange(samples) / samples  # 0 to 1 over the clip

    # source: a sawtooth's phase follows the pitch; breath is noise
    accents = np.repeat(rng.normal(0, prosody.accent / 2, syllables), -(-samples // syllables))[:samples]
    wave = prosody.tremor * np.sin(2 * np.pi * (6 * seconds * t + rng.uniform()))
    semitones = (
        prosody.pitch + rng.normal(0, 1.0) + prosody.contour * (t - 0.5) * rng.uniform(0.5, 1.5) + accents + wave
    )
    phase = np.cumsum(pitch * 2 ** (semitones / 12) / SAMPLE_RATE)
    source = 2 * (phase % 1) - 1 + rng.normal(0, prosody.breath, samples)

    # filter: each syllable in the frequency domain, then its loudness
    tilt, fade = prosody.tilt + rng.normal(0, 2), prosody.fade * rng.uniform(0.3, 1.7)
    clip = np.zeros(samples)
    for part in np.array_split(np.arange(samples), syllables):
        f = np.fft.rfftfreq(len(part), 1 / SAMPLE_RATE)
        response = (np.maximum(f, 50) / 500) ** ((tilt + 6) / 6.02)  # a sawtooth falls by 6 dB per octave itself
        for formant in np.array(VOWELS[rng.integers(len(VOWELS))]) * size:
            response = response / np.abs(1 - (f / formant) ** 2 + 1j * f * 90 / formant**2)
        loudness = 10 ** (-(fade * t[part[0]] + rng.uniform(0, 4)) / 20)
        clip[part] = loudness * np.hanning(len(part)) * np.fft.irfft(np.fft.rfft(source[part]) * response, len(part))
    return (0.5 * clip / np.abs(clip).max() + rng.normal(0, 0.003, samples)).astype(np.float32)


def make_synthetic(speakers: int = 12, clips: int = 24, seed: int = 0) -> str:
    """Writes the synthetic corpus into the cache, once; returns its folder. The same seed gives the same samples."""
    recipe = repr((speakers, clips, seed, PROSODY, VOWELS)) + inspect.getsource(synthesize)  # a change makes it anew
    folder = cache_folder() / f"synthetic-{hashlib.sha256(recipe.encode()).hexdigest()[:8]}"
    if folder.is_dir():
        return str(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="synthetic-") as temporary:
        fresh = Path(temporary) / "wav"
        fresh.mkdir()
        for speaker in range(speakers):
            rng = np.random.default_rng([seed, speaker])
            pitch = (105 if speaker % 2 else 190) * 2 ** (rng.normal(0, 2) / 12)  # low and high voices, Hz
            size = (0.95 if speaker % 2 else 1.1) * rng.uniform(0.94, 1.06)
            for label, prosody in PROSODY.items():
                for n in range(clips):
                    wave = synthesize(prosody, pitch, size, rng)
                    soundfile.write(fresh / f"voice{speaker + 1:02}-{label}-{n + 1:02}.wav", wave, SAMPLE_RATE)
        with contextlib.suppress(OSError):  # another process was first: the same files
            os.replace(fresh, folder)
    return str(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Fast inference on a CPU
# ---------------------------------------------------------------------------------------------------------------------

BACKENDS = ("fp32", "onednn", "bf16", "int8", "compile")


def optimize_for_cpu(model: MultiExitSER, backend: str = "auto") -> MultiExitSER:
    """A copy for inference on this CPU; the original stays as it is. The copy cannot be trained, truncated or saved.

    Args:
        backend:
            fp32     torch's own kernels
            onednn   weights packed for oneDNN, convolutions as matrix products, GELU fused; exact
            bf16     onednn in bfloat16, for processors that compute in it (AVX-512 BF16, AMX, Arm); int8 recurrence
            int8     int8 linears, their inputs quantised as they come, and recurrence; the rest as bf16, or onednn
            compile  torch.compile: minutes before the first answer, and a C++ compiler
            auto     the faster of the exact ones, fp32 and onednn, timed here for a second
    Raises:
        ValueError: an unknown backend, or one that this machine lacks.
    """
    if model.backend:
        raise ValueError(f"a {model.backend} copy for the CPU cannot be copied again: give the model it was made from")
    if backend == "auto":
        return fastest_exact(model)
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r}: give one of {', '.join(BACKENDS)}, auto")
    if backend in ("onednn", "bf16", "int8") and not torch.backends.mkldnn.is_available():
        raise ValueError(f"backend {backend}: this build of torch lacks oneDNN; use fp32")
    if backend == "bf16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise ValueError("backend bf16: this processor does not compute in bfloat16; use onednn or int8")

    # The copy shares the matrices' memory until it packs them; those shared in the end get memory of their own.
    values = ((id(p), p.detach().cpu()) for p in model.parameters())
    shared = {key: nn.Parameter(p if p.ndim > 1 else p.clone(), requires_grad=False) for key, p in values}
    fast = copy.deepcopy(model, shared).eval()
    fast.backend = backend
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


def pack(fast: MultiExitSER, backend: str) -> None:
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
    position.conv = PackedPositionConv(position.conv, dtype)

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
        if head.kind in ("gru", "lstm") and backend != "onednn":
            with warnings.catch_warnings(category=DeprecationWarning, action="ignore"):
                torch.ao.quantization.quantize_dynamic(head, {nn.GRU, nn.LSTM}, torch.qint8, inplace=True)
        elif head.kind == "gru":
            head.rnn = PackedGRU(head.rnn)


def fastest_exact(model: MultiExitSER) -> MultiExitSER:
    """Of the exact backends, the copy that classifies 3 s of noise fastest."""
    if not torch.backends.mkldnn.is_available():
        return optimize_for_cpu(model, "fp32")
    copies = [optimize_for_cpu(model, backend) for backend in ("fp32", "onednn")]
    best, stop = [math.inf] * len(copies), time.perf_counter() + 1
    noise = torch.randn(1, 3 * SAMPLE_RATE)
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


class PackedPositionConv(nn.Module):
    """The position convolution, its weight laid out for clips of 3 s and more."""

    FRAMES = 150  # for fewer, oneDNN would take another layout, or with this one in bfloat16 a hundred times as long

    def __init__(self, conv: nn.Conv1d, dtype: torch.dtype):
        super().__init__()
        self.bias, self.dtype = nn.Parameter(conv.bias.to(dtype), requires_grad=False), dtype
        self.kernel = conv.kernel_size[0]
        self.how = [0, conv.padding[0]], [1, 1], [1, 1], conv.groups  # padding, stride, dilation of a 2-D convolution
        shape = [1, conv.in_channels, 1, self.FRAMES]
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(conv.weight[:, :, None].to(dtype), *self.how, shape)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[2]  # (B, D, T); a frame more comes out where the kernel is even
        x = F.pad(x, (0, max(0, self.FRAMES - size)))[:, :, None]
        convolve = torch.ops.mkldnn._convolution_pointwise
        y = convolve(x.to(self.dtype), self.weight, self.bias, *self.how, "none", [], "").to(x.dtype)
        return y[:, :, 0, : size + 2 * self.how[0][1] - self.kernel + 1]


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
    """One layer of nn.GRU, batch first, from a zero state."""

    def __init__(self, gru: nn.GRU):
        super().__init__()
        self.project = PackedLinear(linear(gru.weight_ih_l0, gru.bias_ih_l0), torch.float32)
        self.recur = PackedLinear(linear(gru.weight_hh_l0, gru.bias_hh_l0), torch.float32)
        self.width = gru.hidden_size

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        sizes, states = [2 * self.width, self.width], []
        state = x.new_zeros(len(x), self.width)
        # what each frame adds to the two gates, and to the new state
        for gates, new in zip(*(part.unbind(1) for part in self.project(x).split(sizes, -1))):
            recurrent_gates, recurrent_new = self.recur(state).split(sizes, -1)
            reset, update = (gates + recurrent_gates).sigmoid_().chunk(2, -1)
            state = torch.addcmul(new, reset, recurrent_new).tanh_().lerp_(state, update)
            states.append(state)
        return torch.stack(states, 1), None
