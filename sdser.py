"""Multi-exit speech emotion recognition with self-distillation, in one file.

A pre-trained speech transformer (wav2vec 2.0, HuBERT or WavLM) gets a classifier, an *exit*, at several of its layers.
While it is fine-tuned, the shallow exits (students) also learn from the deepest (the teacher), so that one network
can run at several depths: Ren, Nguyen, Chang, Schuller, "Fast Yet Effective Speech Emotion Recognition with
Self-distillation", ICASSP 2023, arXiv 2210.14636. What is called the paper's here is what its authors' released code
does.

In the order in which data meets it; in a hurry, read ExitHead, MultiExitSER.forward to early_exit, and the loss:

    audio       load_audio, prepare            file -> waveform
    backbone    load_backbone, standardize
    exits       ExitHead
    the model   MultiExitSER                   waveform -> one ExitOutput per exit; early exit; saving and loading
    the loss    self_distillation_loss         and fuse, which lets the exit with the largest margin decide
    metrics     unweighted_average_recall, scores

and last, file_errors and replacing, with which files are read and written: what fails is one sentence, nothing is lost.

Shapes: B clips, T samples or frames, D features, C classes. Waveforms are float32 at 16 kHz.
"""

import contextlib
import json
import math
import os
import re
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
import soundfile
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import PyTorchModelHubMixin, snapshot_download
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.utils import cached_file

SAMPLE_RATE = 16_000
MAX_SECONDS = 60  # attention memory grows with the square of the length
TORCHAUDIO = "install a pair that works, torch==2.11.0 torchaudio==2.11.0, or convert the file to 16 kHz"

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
        rate, frames = file.samplerate, file.frames
        if part_seconds:
            frames = min(frames, round(part_seconds * rate))
            file.seek(round(position * (file.frames - frames)))
        samples = file.read(frames, dtype="float32", always_2d=True)  # (T, channels)
        if len(samples) < frames:
            raise ValueError(f"{path}: cut short, {len(samples)} of {frames} samples are there; replace the file")
    waveform = torch.from_numpy(samples.mean(axis=1))  # (T,)
    if rate != SAMPLE_RATE:
        with file_errors(path, f"resampling from {rate} Hz needs torchaudio", TORCHAUDIO):
            import torchaudio  # here, so that nothing else needs it
        # The filter grows with rate / gcd(rate, 16000): odd rates, such as 11127 Hz, become a multiple of 25 Hz.
        waveform = torchaudio.functional.resample(waveform, max(25, 25 * round(rate / 25)), SAMPLE_RATE)
    check_waveform(path, waveform)
    return waveform


@contextlib.contextmanager
def open_audio(path, max_seconds: float | None = None):
    """Opens a file whose header can be believed; raises what `load_audio` raises, also for what is done with it."""
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file")
    if os.path.getsize(path) == 0:
        raise ValueError(f"{path}: the file is empty")
    with file_errors(path, "not an audio file that libsndfile can read", "ffmpeg -i IN OUT.wav converts most"):
        file = soundfile.SoundFile(path)
    with file, file_errors(path, "damaged or cut short", "replace the file"):
        # libsndfile reads a cut WAV as if it were whole and says so in its log alone. Programs that write into a pipe
        # declare 2 GiB or more, for "unknown".
        cut = re.search(r"^\s*(?:data|SSND) : (\d+) \(should be (\d+)\)", file.extra_info, re.MULTILINE)
        if cut and int(cut[2]) < int(cut[1]) < 0x7FFFF000:
            raise ValueError(f"{path}: cut short, {cut[2]} of {cut[1]} bytes of audio are there; replace the file")
        if not 1000 <= file.samplerate <= 1_000_000:  # resampling from what no device records takes gigabytes
            raise ValueError(
                f"{path}: a sample rate of {file.samplerate} Hz cannot be right; give one from 1 kHz to 1 MHz"
            )
        check_length(path, file.frames / file.samplerate, max_seconds)
        yield file


def check_length(name, seconds: float, max_seconds: float | None = None) -> None:
    if (samples := math.ceil(seconds * SAMPLE_RATE)) < 400:
        raise ValueError(f"{name}: {samples} samples at 16 kHz are shorter than one frame (400 samples, 25 ms)")
    if max_seconds and seconds > max_seconds:
        raise ValueError(
            f"{name}: {seconds:.1f} s is longer than the limit of {max_seconds} s; cut it into windows (see README)"
        )


def check_waveform(name, waveform: Tensor, max_seconds: float | None = None) -> None:
    """Raises ValueError if the waveform, (T,) float at 16 kHz, cannot be classified; warns about digital silence."""
    if waveform.ndim != 1 or not waveform.is_floating_point():
        shape = tuple(waveform.shape)
        raise ValueError(f"{name}: a waveform is a 1-D float tensor at 16 kHz, not {waveform.dtype} of shape {shape}")
    check_length(name, len(waveform) / SAMPLE_RATE, max_seconds)
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
        check_waveform("the waveform", waveform, MAX_SECONDS)
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
    "base": dict(activation_dropout=0.0, feat_proj_dropout=0.1),
    "large": dict(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, activation_dropout=0.0,
        feat_extract_norm="layer", conv_bias=True, do_stable_layer_norm=True,
    ),
}  # fmt: skip
MODEL_TYPES = ("wav2vec2", "hubert", "wavlm")


def load_config(backbone: str | dict) -> transformers.PretrainedConfig:
    """The `transformers` config of a built-in size, a local folder, a Hub name, or a saved dict.

    Its added attribute `do_normalize` tells whether the backbone was trained on zero-mean, unit-variance waveforms.
    """
    if isinstance(backbone, dict):
        backbone, config = "the backbone's config", {"do_normalize": True} | backbone
    elif backbone in SIZES:
        return transformers.Wav2Vec2Config(**SIZES[backbone], do_normalize=True)
    else:
        config = read_config(os.fspath(backbone))
    if config.get("model_type") not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        raise ValueError(f"{backbone}: model type {config.get('model_type')!r} is not supported; give one of {known}")
    if config.get("conv_pos_batch_norm"):
        raise ValueError(
            f"{backbone}: a batch norm in the position convolution is not supported; give another backbone"
        )
    with file_errors(backbone, "its configuration cannot be read", "save it anew"):
        config = transformers.AutoConfig.for_model(**config)
    if config.num_hidden_layers > 1000:
        raise ValueError(f"{backbone}: {config.num_hidden_layers} layers cannot be right; 1000 are built at most")
    return config


def read_config(backbone: str) -> dict:
    """config.json of a local folder or a Hub model, and `do_normalize` of its preprocessor_config.json, if any."""
    if os.path.isdir(backbone):
        errors = file_errors(backbone, "its configuration cannot be read", "save it anew")
    else:
        problem = f"not a built-in size ({', '.join(SIZES)}), a folder, or a Hub model within reach"
        if "/" not in backbone:
            raise FileNotFoundError(f"{backbone}: {problem}; give one")
        errors = file_errors(backbone, problem, "give one", FileNotFoundError)
    with errors:
        config, _ = transformers.PretrainedConfig.get_config_dict(backbone)
        preprocessor = cached_file(backbone, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
        preprocessing = json.loads(Path(preprocessor).read_text()) if preprocessor else {}
        return config | {"do_normalize": preprocessing.get("do_normalize", True)}


def load_backbone(backbone: str | dict, config: transformers.PretrainedConfig) -> transformers.PreTrainedModel:
    """Builds the backbone with `config.num_hidden_layers` layers, in float32; pre-trained unless built-in or a dict."""
    # An exit needs its layer, so none may be dropped; the adapter of some models sits behind the last layer, unused.
    config.layerdrop, config.add_adapter = 0.0, False
    if isinstance(backbone, dict) or backbone in SIZES:
        return transformers.AutoModel.from_config(config, dtype=torch.float32)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # else it lists every layer and quantizer weight left out on purpose
    try:
        with file_errors(backbone, "its weights cannot be loaded", "download or save it anew"):
            model, info = transformers.AutoModel.from_pretrained(
                backbone, config=config, dtype=torch.float32, output_loading_info=True
            )
    finally:
        transformers.logging.set_verbosity(verbosity)
    model.train()  # from_pretrained leaves it in evaluation mode, from_config in training mode
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


def normalize_each(norm: nn.Module, x: Tensor, lengths: Tensor) -> Tensor:
    """A norm over time, of each clip's own frames alone; zeros behind them. x: (B, channels, T); lengths: (B,)."""
    clips = [norm(clip[..., :length]) for clip, length in zip(x.split(1), lengths.tolist())]
    return torch.cat([F.pad(clip, (0, x.shape[-1] - clip.shape[-1])) for clip in clips])


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
        self.projector = nn.Linear(width, 256)
        self.classifier = nn.Linear(256, num_classes)
        for linear in (self.projector, self.classifier):  # as in the authors' code
            nn.init.kaiming_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, hidden: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """hidden: (B, T, D); valid: (B, T) bool or None -> logits (B, C), embedding (B, D)."""
        if self.kind in ("gru", "lstm"):
            # padding comes after the clip, so what runs forward in time never sees it
            hidden = F.selu(self.norm(self.rnn(hidden)[0]))  # (B, T, D)
        if valid is None:
            valid = hidden.new_ones(hidden.shape[:2], dtype=torch.bool)
        # a plain mean is attention with equal scores
        score = self.score(hidden).squeeze(-1) if self.kind == "attention" else hidden.new_zeros(valid.shape)
        weights = score.masked_fill(~valid, -torch.inf).softmax(-1)  # (B, T)
        embedding = torch.einsum("bt,btd->bd", weights, hidden)
        return self.classifier(self.projector(embedding)), embedding


class ExitOutput(NamedTuple):
    exit: int  # the layer it reads
    logits: Tensor  # (B, C)
    embedding: Tensor  # (B, D)


# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------


class Frames(NamedTuple):
    """Hidden states on their way through the layers."""

    hidden: Tensor  # (B, T, D)
    valid: Tensor | None  # (B, T) bool, which frames hold data; None where all do
    position_bias: Tensor | None = None  # (B * heads, T, T), which WavLM's layer 1 makes and its other layers reuse

    def keep(self, clips: Tensor) -> "Frames":
        """Those of some of the clips, (B,) bool, without the padding that only the others needed."""
        hidden, valid, bias = self.hidden[clips], self.valid, self.position_bias
        if bias is not None:
            bias = bias.unflatten(0, (len(clips), -1))[clips].flatten(0, 1)
        if valid is not None:
            size = int(valid[clips].sum(1).max())
            hidden, valid = hidden[:, :size], valid[clips, :size]
            bias = None if bias is None else bias[:, :size, :size]
        return Frames(hidden, valid, bias)


class Prediction(NamedTuple):
    label: str
    confidence: float  # the label's probability
    probabilities: dict[str, float]  # by label
    exit: int  # the exit that answered
    milliseconds: float  # from waveform to probabilities


# The modules of a backbone that are used here; its own forward never runs. `config` is always the backbone's.
#
#   feature_extractor.conv_layers   7 convolutions, (B, 1, samples) -> (B, channels, T), one frame per 20 ms
#   feature_projection              LayerNorm and Linear, (B, T, channels) -> (B, T, D)
#   masked_spec_embed               (D,), the learned vector in the place of masked frames
#   encoder.pos_conv_embed          a convolution over 128 frames, (B, T, D) -> (B, T, D), added to its input
#   encoder.layers                  L transformer layers, (B, T, D) -> (B, T, D)
#   encoder.layer_norm              before layer 1 (post-LN, do_stable_layer_norm false) or after the last (pre-LN)
#
# Padding could leak where positions mix: in the normalisation of the waveform, in the norm over time after convolution
# 1 of "base" models, in the position convolution, in attention, and where an exit pools. Convolutions 2 to 7 pad
# nothing, so that a clip's frames, counted by its length, read that clip's samples alone; all other norms are per
# frame. Where no clip of a batch is padded, lengths and `valid` are None, and the masks cost nothing.


class MultiExitSER(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="sdser",
    paper_url="https://arxiv.org/abs/2210.14636",
    pipeline_tag="audio-classification",
):
    """A speech transformer with a classifier at several depths.

    A new model is in training mode, one that `from_pretrained` loads in evaluation mode.

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
        config = load_config(backbone)
        layers = config.num_hidden_layers
        exits = default_exits(backbone, layers) if exits is None else [int(k) for k in exits]
        if not exits or any(a >= b for a, b in zip([0, *exits], exits)) or exits[-1] > layers:
            raise ValueError(f"exits {exits}: they must increase, from 1 to the backbone's {layers} layers at most")
        if isinstance(head, str):
            head = [head] * (len(exits) - 1) + ["mean" if len(exits) > 1 else head]
        if len(head) != len(exits) or set(head) - set(HEADS):
            raise ValueError(f"head {head}: give one of {', '.join(HEADS)}, or one for each of {len(exits)} exits")
        if len(labels) < 2 or len(set(labels)) < len(labels):
            raise ValueError(f"labels {list(labels)}: give at least two, all different")
        if not all(isinstance(label, str) for label in labels) or isinstance(labels, str):
            raise ValueError(f"labels {labels!r}: give a list of names")
        for name, value, low, high in (
            ("tile_seconds", tile_seconds, 0.025, MAX_SECONDS),
            ("threshold", threshold, 0, 1),
        ):
            if value is not None and not (isinstance(value, int | float) and low <= value <= high):
                raise ValueError(f"{name} {value!r}: give a number from {low} to {high}, or None")
        self.labels, self.exits, self.head_kinds = list(labels), exits, list(head)
        self.tile_seconds, self.threshold = tile_seconds, threshold
        config.num_hidden_layers = exits[-1]
        self.backbone = load_backbone(backbone, config)
        self.heads = nn.ModuleDict({
            str(exit): ExitHead(kind, config.hidden_size, len(labels)) for exit, kind in zip(exits, head)
        })  # fmt: skip
        self.masks_time = config.apply_spec_augment and config.mask_time_prob > 0
        if not self.masks_time and hasattr(self.backbone, "masked_spec_embed"):
            self.backbone.masked_spec_embed.requires_grad_(False)  # no loss would reach it

    @property
    def dtype(self) -> torch.dtype:
        return self.backbone.dtype

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
        exits = self.exits if exit is None else [self.check_exit(exit)]
        frames, outputs = self.embed_frames(waveforms, lengths), []
        for start, k in zip([0, *exits], exits):  # each exit goes on where the one before it stopped
            frames = self.run_layers(frames, start, k)
            outputs.append(self.read_exit(k, frames))
        return outputs

    def embed_frames(self, waveforms: Tensor, lengths: Tensor | None = None) -> Frames:
        """All that comes before the transformer layers: normalisation, CNN, projection, time mask, position."""
        lengths = self.checked_lengths(waveforms, lengths)
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
                # the GroupNorm of "base" models normalises over time: padding would count
                x = layer.activation(normalize_each(layer.layer_norm, layer.conv(x), lengths))
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
        return Frames(encoder.dropout(hidden), valid)

    def sample_time_mask(self, hidden: Tensor, valid: Tensor | None) -> Tensor:
        """SpecAugment's time mask (Park et al., 2019): (B, T) bool, true in random spans of frames.

        The backbone's config says how many and how long: mask_time_prob, mask_time_length and mask_time_min_masks. In
        short clips spans are shorter, so that the fewest allowed never cover more than half.
        """
        config, (batch, size, _), device = self.backbone.config, hidden.shape, hidden.device
        frames = valid.sum(1) if valid is not None else torch.full((batch,), size, device=device)  # (B,)
        least = config.mask_time_min_masks
        length = (frames // (2 * max(1, least))).clamp(max=config.mask_time_length)  # (B,) of a span
        count = config.mask_time_prob * frames / length.clamp(min=1) + torch.rand(batch, device=device)
        count = count.floor().clamp(min=least)  # (B,) spans of each clip
        most = max(least, 1 + int(config.mask_time_prob * size))  # S: no clip has more spans
        start = (torch.rand(batch, most, device=device) * (frames - length + 1)[:, None]).long()  # (B, S)
        t = torch.arange(size, device=device)
        masked = (t >= start[..., None]) & (t < (start + length[:, None])[..., None])  # (B, S, T)
        used = torch.arange(most, device=device) < count[:, None]  # (B, S)
        return (masked & used[..., None]).any(1)

    def run_layers(self, frames: Frames, start: int, stop: int) -> Frames:
        """Transformer layers start+1 to stop; padded frames are attended by none."""
        hidden, valid, bias = frames
        config, layers = self.backbone.config, self.backbone.encoder.layers[start:stop]
        if config.model_type == "wavlm":
            with warnings.catch_warnings():  # torch dislikes that transformers hands it a bool mask and a float bias
                warnings.filterwarnings("ignore", "Support for mismatched key_padding_mask")
                for layer in layers:
                    hidden, bias = layer(hidden, attention_mask=valid, position_bias=bias)
        else:
            mask = create_bidirectional_mask(config, hidden, valid)
            for layer in layers:
                hidden = layer(hidden, attention_mask=mask)
        return Frames(hidden, valid, bias)

    def read_exit(self, exit: int, frames: Frames) -> ExitOutput:
        """The classifier at layer `exit` on that layer's hidden states."""
        hidden, head = frames.hidden, self.heads[str(exit)]
        if self.backbone.config.do_stable_layer_norm:  # pre-LN: the encoder's last norm belongs to every exit
            hidden = self.backbone.encoder.layer_norm(hidden)
        # heads run in their own dtype even under autocast: half precision slows recurrence, and the losses need float32
        with torch.autocast(hidden.device.type, enabled=False):
            return ExitOutput(exit, *head(hidden.to(head.projector.weight.dtype), frames.valid))

    # -- early exit ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def early_exit(self, waveforms: Tensor, lengths: Tensor | None, threshold: float) -> tuple[Tensor, Tensor]:
        """Runs layer by layer; a clip leaves at the first exit whose top probability reaches the threshold.

        The deepest exit answers for those that stay to the end. Clips that have left are dropped from the batch, and
        the rest is trimmed to the longest that stays: no layer runs that no answer needs.

        Args:
            waveforms, lengths: as in `forward`.
            threshold: from 0 (all leave at the first exit) to 1 (only a probability that rounds to 1 leaves early).
        Returns:
            logits (B, C) and the exit (B,) int64 that gave them.
        Raises:
            ValueError: in training mode, in which dropout and masks decide; another threshold; and as `forward` does.
        """
        if self.training:
            raise ValueError("early_exit needs a model in evaluation mode: call model.eval() first")
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold {threshold}: give a probability from 0 to 1")
        frames = self.embed_frames(waveforms, lengths)
        logits = frames.hidden.new_empty(len(waveforms), len(self.labels), dtype=torch.float32)
        active = torch.arange(len(waveforms), device=logits.device)  # the clips still in the batch
        exits = torch.empty_like(active)
        for start, k in zip([0, *self.exits], self.exits):
            frames = self.run_layers(frames, start, k)
            output = self.read_exit(k, frames)
            logits[active], exits[active] = output.logits.float(), k
            stay = output.logits.float().softmax(-1).amax(-1) < threshold  # (B still active,)
            if not stay.any():
                break
            active, frames = active[stay], frames.keep(stay)
        return logits, exits

    @torch.no_grad()
    def classify(self, clips, exit: int | None = None, threshold: float | str | None = None) -> list[Prediction]:
        """Classifies files or waveforms, one at a time, in evaluation mode; the model's own mode is then restored.

        Args:
            clips: paths, or waveforms (T,) float at 16 kHz, of at most 60 s; or one of them alone.
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
        exit = self.exits[-1] if exit is None else self.check_exit(exit)
        one = isinstance(clips, str | os.PathLike) or getattr(clips, "ndim", None) == 1  # a list has no ndim
        device, training, predictions = next(self.parameters()).device, self.training, []
        self.eval()
        try:
            for clip in [clips] if one else clips:
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

    def check_exit(self, exit: int) -> int:
        if exit not in self.exits:
            raise ValueError(f"exit {exit}: the model has exits {', '.join(map(str, self.exits))}")
        return exit

    def checked_lengths(self, waveforms: Tensor, lengths: Tensor | None) -> Tensor | None:
        """lengths, or None where no clip is padded; raises ValueError unless the arguments of `forward` fit."""
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
                f"clips of {shortest} to {longest} samples in a batch of {size}: give at least {frame}, at most {size}"
            )
        return None if shortest == size else lengths

    # -- smaller, saved, loaded ---------------------------------------------------------------------------------------

    @property
    def arguments(self) -> dict:
        """What `MultiExitSER(**arguments)` needs for the same architecture, without the original backbone."""
        return dict(labels=self.labels, backbone=self.backbone.config.to_dict(), exits=self.exits,
                    head=self.head_kinds, tile_seconds=self.tile_seconds, threshold=self.threshold)  # fmt: skip

    def truncate(self, exit: int) -> "MultiExitSER":
        """A model of its own with `exit` layers and that one exit; weights are copied, logits are equal."""
        kind = self.head_kinds[self.exits.index(self.check_exit(exit))]
        small = MultiExitSER(**self.arguments | dict(exits=[exit], head=[kind], threshold=None))
        small.to(next(self.parameters()).device, self.dtype)
        weights = self.state_dict()
        small.load_state_dict({name: weights[name] for name in small.state_dict()})
        return small.train(self.training)

    def save_pretrained(self, folder, model_card_kwargs: dict | None = None, **_) -> None:
        """Writes config.json and model.safetensors, the Hub's convention, so that a kill leaves the last ones whole.

        Also a model card, README.md, where there is none. `push_to_hub(name)`, of huggingface_hub, uploads all three.
        """
        folder = Path(folder)
        with file_errors(folder, "cannot be made a folder", "name another"):
            folder.mkdir(parents=True, exist_ok=True)
        config, weights, card = (folder / name for name in ("config.json", "model.safetensors", "README.md"))
        arguments = json.dumps(self.arguments, indent=2).encode()
        with replacing(config) as config_file, replacing(weights) as weights_file:
            config_file.write(arguments)
            weights_file.write(safetensors.torch.save(self.state_dict(), {"format": "pt"}))
            weights_file.flush()  # all of it is on the disk, and only then
            if config.exists() and config.read_bytes() != arguments:
                config.unlink()  # of another model: it must not be found beside these weights
        if not card.exists():
            with replacing(card) as card_file:
                card_file.write(str(self.generate_model_card(**model_card_kwargs or {})).encode())

    @classmethod
    def from_pretrained(cls, checkpoint, **hub) -> "MultiExitSER":
        """Loads what `save_pretrained` wrote, from a folder or the Hub, in evaluation mode; nothing is unpickled.

        Args:
            hub: arguments of `huggingface_hub.snapshot_download`, such as revision and token.
        Raises:
            FileNotFoundError: no such folder, nor a Hub model in reach.
            ValueError: a checkpoint that is cut short, not ours, or of other shapes than its config says.
        """
        checkpoint = folder = os.fspath(checkpoint)
        files = ("config.json", "model.safetensors")
        if not os.path.isdir(folder):
            advice = "give a folder written by train.py, or a Hub name"
            with file_errors(checkpoint, "no such folder, nor a Hub model within reach", advice, FileNotFoundError):
                folder = snapshot_download(checkpoint, allow_patterns=files, **hub)
        for name in files:
            if not os.path.isfile(os.path.join(folder, name)):
                raise FileNotFoundError(f"{checkpoint}: holds no {name}; give a folder written by train.py")
        with file_errors(checkpoint, "not a whole sdser checkpoint", "train or copy it anew"):
            arguments = json.loads(Path(folder, "config.json").read_text())
            known = {name: arguments[name] for name in ("labels", "backbone", "exits", "head")}
            known |= {name: arguments.get(name) for name in ("tile_seconds", "threshold")}
            with torch.device("meta"):  # a config that the weights do not fit may ask for terabytes
                model = cls(**known)
            weights = safetensors.torch.load_file(os.path.join(folder, "model.safetensors"))
            # copied, since the file's alignment in memory would change how sums are rounded
            weights = {name: value.to(torch.float32, copy=True) for name, value in weights.items()}
            model.load_state_dict(weights, assign=True)
        return model.eval()


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

        L = CE(z_d, y) + 1/|S| Σ_{k in S} [ CE(z_k, y) + α T² KL(softmax(z_d/T) ‖ softmax(z_k/T)) + β MSE(f_k, f_d) ]

    S are the shallow exits (students), d the deepest (teacher), z logits, f embeddings.

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
        ce = F.cross_entropy(student.logits, targets)  # CE(z_k, y)
        loss = loss + ce / len(students)
        parts["ce_students"] += ce.item() / len(students)
        if kl_weight:  # T² KL(softmax(z_d/T) ‖ softmax(z_k/T))
            log_p_student = F.log_softmax(student.logits / temperature, -1)
            log_p_teacher = F.log_softmax(teacher_logits / temperature, -1)
            kl = temperature**2 * F.kl_div(log_p_student, log_p_teacher, reduction="batchmean", log_target=True)
            loss = loss + kl_weight * kl / len(students)
            parts["kl"] += kl.item() / len(students)
        if hint_weight:
            hint = F.mse_loss(student.embedding, teacher_embedding)  # MSE(f_k, f_d)
            loss = loss + hint_weight * hint / len(students)
            parts["hint"] += hint.item() / len(students)
    return loss, parts


def fuse(outputs: list[ExitOutput] | Tensor) -> Tensor:
    """The logits (B, C) of each clip's exit with the largest margin, top-1 minus top-2.

    outputs: the exits that take part, or their logits (exits, B, C). In the paper they are the students alone:
    `fuse(outputs[:-1])`.
    """
    logits = outputs if isinstance(outputs, Tensor) else torch.stack([output.logits for output in outputs])
    first, second = logits.topk(2, dim=-1).values.unbind(-1)  # (exits, B) each
    return logits[(first - second).argmax(0), torch.arange(logits.shape[1], device=logits.device)]


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
# Files: what goes wrong while one is read or written becomes one sentence that names it
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def file_errors(path, problem: str, advice: str, kind: type[Exception] = ValueError):
    """Turns whatever a library raises about a file into `kind`, "PATH: PROBLEM (what the library says); ADVICE".

    Sentences that name the file already, and those of contexts within this one, pass through.
    """
    try:
        yield
    except Exception as error:
        if str(error).startswith(f"{path}: ") or hasattr(error, "names_file"):
            raise
        reason = (getattr(error, "strerror", None) or str(error)).strip().partition("\n")[0].rstrip(".:")
        sentence = kind(f"{path}: {problem} ({reason}); {advice}")
        sentence.names_file = path
        raise sentence from error


@contextlib.contextmanager
def replacing(path):
    """Opens a file to write in the place of `path`, which it takes once it is whole; a failure leaves the old one.

    A link stays a link, and what is no file, such as /dev/null, is written to as it is.
    """
    with file_errors(path, "cannot be written", "make room, or name another place"):
        target = Path(os.path.realpath(path))
        if target.exists() and not target.is_file():
            with open(target, "wb") as file:
                yield file
            return
        temporary = target.with_name(f".{target.name}.tmp")
        try:
            with open(temporary, "wb") as file:
                yield file
            os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
