"""Multi-exit speech emotion recognition with self-distillation, in one file.

A pre-trained speech transformer (wav2vec 2.0, HuBERT or WavLM) gets a classifier, an *exit*, at several of its layers.
While it is fine-tuned, the shallow exits (students) also learn from the deepest (the teacher), so that one network
can run at several depths: Ren, Nguyen, Chang, Schuller, "Fast Yet Effective Speech Emotion Recognition with
Self-distillation", ICASSP 2023, arXiv 2210.14636. Here "the paper's" means what its authors' released code does.

First the method, then what it needs:

    the exits         ExitHead, ExitOutput: hidden states of one layer -> logits and embedding
    the loss          self_distillation_loss; fuse, in which the exit with the largest margin decides; should_stop
    the model         MultiExitSER: forward, early_exit; classify, truncate, saving and loading
    padding           what keeps a padded batch exact; SpecAugment's time mask
    the backbone      load_backbone; audio: load_audio; metrics: scores; files

Shapes: B clips, T samples or frames, D features, C classes. Waveforms are float32 at 16 kHz; a frame is 20 ms.
"""

import contextlib
import io
import json
import math
import os
import re
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import soundfile
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import PyTorchModelHubMixin, snapshot_download
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask

SAMPLE_RATE = 16_000
HEADS = ("gru", "lstm", "attention", "mean")
HUB = dict(library_name="sdser", paper_url="https://arxiv.org/abs/2210.14636", pipeline_tag="audio-classification")


# -- the exits ---------------------------------------------------------------------------------------------------------
class ExitHead(nn.Module):
    """Hidden states of one layer -> logits z_k and embedding f_k.

    gru, lstm    one-layer recurrent network from a zero state, LayerNorm, SELU, mean over frames, as in the paper
    attention    mean over frames, weighted by a learned linear layer
    mean         mean over frames, as in the paper at the deepest exit
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
        """hidden: (B, T, D); valid: (B, T) bool, None if every frame is valid -> logits (B, C), embedding (B, D)."""
        if self.kind in ("gru", "lstm"):
            # padding comes after the clip, so a network that runs forward in time never sees it
            hidden = F.selu(self.norm(self.rnn(hidden)[0]))  # (B, T, D)
        if self.kind == "attention":
            score = self.score(hidden).squeeze(-1)  # (B, T)
            score = score if valid is None else score.masked_fill(~valid, -torch.inf)
            embedding = torch.einsum("bt,btd->bd", score.softmax(-1), hidden)
        elif valid is None:
            embedding = hidden.mean(1)
        else:  # the mean over each clip's own frames
            embedding = torch.where(valid[..., None], hidden, 0).sum(1) / valid.sum(1, keepdim=True)
        return self.classifier(self.projector(embedding)), embedding  # no activation in between, as in the paper


class ExitOutput(NamedTuple):
    exit: int  # the layer it reads
    logits: Tensor  # (B, C)
    embedding: Tensor  # (B, D)


# -- the loss, fusion, and the stop rule -------------------------------------------------------------------------------
def self_distillation_loss(
    outputs: list[ExitOutput],
    targets: Tensor,
    kl_weight: float = 1.0,
    hint_weight: float = 1.0,
    temperature: float = 1.0,
    detach_teacher: bool = True,
    class_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The paper's loss, its KL corrected: all exits learn the labels, and the shallow ones what the deepest knows.

        L = CE(z_d, y) + 1/|S| Σ_{k in S} [ CE(z_k, y) + α T² KL(softmax(z_d/T) ‖ softmax(z_k/T)) + β MSE(f_k, f_d) ]

    S are the shallow exits (students), d the deepest (teacher), z logits, f embeddings.

    Args:
        outputs: what the model returned, shallow to deep; a single exit has no students, and its loss is CE(z_d, y).
        targets: (B,) int64 class indices y.
        kl_weight: α, for the teacher's probabilities (Hinton et al., 2015); at 0 the term is not computed.
        hint_weight: β, for the teacher's embedding, the hint (FitNets, Romero et al., 2015); at 0 it is not computed.
        temperature: T softens both distributions; T² keeps the term's gradients about as large for any T.
        detach_teacher: the KL and hint terms send no gradient through z_d and f_d (Zhang et al., 2019); they still
            train the layers that the teacher shares with the students.
        class_weights: (C,) float, per class, for the cross-entropy at every exit; None means 1.
    Returns:
        the loss, a scalar, averaged over the batch (a sum divided by B), and its parts by name, detached scalars,
        unweighted and averaged over students: ce (the teacher's), ce_students, kl, hint.
    """
    *students, teacher = outputs
    teacher_logits, teacher_embedding = teacher.logits, teacher.embedding
    if detach_teacher:  # the gradient of KL and hint stops here
        teacher_logits, teacher_embedding = teacher_logits.detach(), teacher_embedding.detach()
    # CE(z_d, y), divided by B whatever the weights, so that batches add up
    ce = F.cross_entropy(teacher.logits, targets, class_weights, reduction="none").mean()
    ce_students = kl = hint = torch.zeros_like(ce.detach())
    for student in students:
        ce_k = F.cross_entropy(student.logits, targets, class_weights, reduction="none").mean()  # CE(z_k, y)
        ce_students = ce_students + ce_k / len(students)
        if kl_weight:  # T² KL(softmax(z_d/T) ‖ softmax(z_k/T))
            log_p_student = F.log_softmax(student.logits / temperature, -1)
            log_p_teacher = F.log_softmax(teacher_logits / temperature, -1)
            # F.kl_div(q, p) is KL(p ‖ q): the student comes first, and both are log-probabilities
            divergence = F.kl_div(log_p_student, log_p_teacher, reduction="batchmean", log_target=True)
            kl = kl + temperature**2 * divergence / len(students)
        if hint_weight:
            hint = hint + F.mse_loss(student.embedding, teacher_embedding) / len(students)  # MSE(f_k, f_d)
    loss = ce + ce_students + kl_weight * kl + hint_weight * hint
    parts = {"ce": ce, "ce_students": ce_students, "kl": kl, "hint": hint}
    return loss, {name: part.detach() for name, part in parts.items()}


def fuse(outputs: list[ExitOutput] | Tensor) -> Tensor:
    """The logits (B, C) of each clip's exit with the largest margin, top-1 minus top-2.

    outputs: the exits that take part, or their logits (exits, B, C). In the paper they are only the students:
    `fuse(outputs[:-1])`.
    """
    logits = outputs if isinstance(outputs, Tensor) else torch.stack([output.logits for output in outputs])
    first, second = logits.topk(2, dim=-1).values.unbind(-1)  # (exits, B) each
    return logits[(first - second).argmax(0), torch.arange(logits.shape[1], device=logits.device)]


def should_stop(logits: Tensor, threshold: float | Tensor) -> Tensor:
    """The stop rule of early exit: tells which clips, (B,) bool, leave at the last of the exits that have run.

    logits: (exits so far, B, C). A clip leaves when the last exit's top probability reaches the threshold.
    """
    return logits[-1].softmax(-1).amax(-1) >= threshold


# -- the model ---------------------------------------------------------------------------------------------------------
class Frames(NamedTuple):
    """The frames of a batch on their way through the layers."""

    hidden: Tensor  # (B, T, D)
    valid: Tensor | None  # (B, T) bool, which frames hold data; None where all do
    position_bias: Tensor | None = None  # (B * heads, T, T), which WavLM's layer 1 makes and its other layers reuse


# The modules of a backbone that are used here; its own forward never runs. `config` is always the backbone's.
#
#   feature_extractor.conv_layers   7 convolutions, (B, 1, samples) -> (B, channels, T), one frame per 20 ms
#   feature_projection              LayerNorm and Linear, (B, T, channels) -> (B, T, D)
#   masked_spec_embed               (D,), the learned vector that replaces masked frames
#   encoder.pos_conv_embed          a convolution over 128 frames, (B, T, D) -> (B, T, D), added to its input
#   encoder.layers                  L transformer layers, (B, T, D) -> (B, T, D)
#   encoder.layer_norm              before layer 1 (post-LN, do_stable_layer_norm false) or after the last (pre-LN)


class MultiExitSER(nn.Module, PyTorchModelHubMixin, **HUB):
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
        ValueError, FileNotFoundError: if the arguments do not describe a model; the message says what would.
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
        if exits is None:
            exits = default_exits(backbone, config.num_hidden_layers)
        head = [head] if isinstance(head, str) else list(head)
        if len(head) == 1 and len(exits) > 1:
            head = head * (len(exits) - 1) + ["mean"]
        self.check_arguments(labels, exits, head, tile_seconds, config.num_hidden_layers)
        self.labels, self.exits, self.head_kinds = list(labels), list(exits), head
        self.tile_seconds, self.threshold = tile_seconds, threshold
        config.num_hidden_layers = exits[-1]
        self.backbone = load_backbone(backbone, config)
        heads = {str(exit): ExitHead(kind, config.hidden_size, len(labels)) for exit, kind in zip(exits, head)}
        self.heads = nn.ModuleDict(heads)

    def forward(self, waveforms: Tensor, lengths: Tensor | None = None, exit: int | None = None) -> list[ExitOutput]:
        """Runs only the layers that the requested exits need; no frame of a clip reads padding (see "padding" below).

        Args:
            waveforms: (B, T) float, raw 16 kHz; what lies beyond a clip's length is ignored, NaN included.
            lengths: (B,) int64, valid samples of each clip; None if all T are.
            exit: a single exit; None for all.
        Returns:
            one ExitOutput per exit, shallow to deep.
        Raises:
            ValueError: shapes that do not fit, a clip shorter than one frame, an exit that the model lacks.
        """
        exits = self.exits if exit is None else [self.check_exit(exit)]
        frames, outputs = self.embed_frames(waveforms, lengths), []
        for previous, k in zip([0, *exits], exits):  # each exit resumes where the one before it stopped
            frames = self.run_layers(frames, previous, k)
            outputs.append(self.read_exit(k, frames))
        return outputs

    def embed_frames(self, waveforms: Tensor, lengths: Tensor | None = None) -> Frames:
        """Everything before the transformer layers: normalisation, CNN, projection, time mask, position."""
        lengths = self.check_batch(waveforms, lengths)  # None where nothing is padded
        config, encoder = self.backbone.config, self.backbone.encoder
        valid = None if lengths is None else valid_mask(lengths, waveforms.shape[1])  # (B, samples)
        if config.do_normalize:
            waveforms = standardize(waveforms, valid)
        elif valid is not None:
            waveforms = torch.where(valid, waveforms, 0)

        x = waveforms[:, None].to(self.backbone.dtype)  # (B, 1, samples)
        for i, layer in enumerate(self.backbone.feature_extractor.conv_layers):
            if lengths is not None:  # samples become frames; no convolution pads, so each frame sees only its own clip
                lengths = (lengths - config.conv_kernel[i]) // config.conv_stride[i] + 1
            if i == 0 and config.feat_extract_norm == "group" and lengths is not None:
                # the GroupNorm of "base" models normalises over time: padding would count
                x = layer.activation(normalize_each(layer.layer_norm, layer.conv(x), lengths))
            else:
                x = layer(x)  # (B, channels, frames)

        hidden = self.backbone.feature_projection(x.transpose(1, 2))  # (B, frames, D), one frame per 20 ms
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden  # HuBERT's returns no tuple
        hidden = hidden.to(self.backbone.dtype)  # autocast has made it bfloat16
        valid = None if lengths is None else valid_mask(lengths, hidden.shape[1])  # (B, frames)
        if self.training and config.mask_time_prob > 0:
            mask = sample_time_mask(config, hidden, valid)
            hidden = torch.where(mask[..., None], self.backbone.masked_spec_embed.to(hidden.dtype), hidden)
        if valid is not None:
            hidden = torch.where(valid[..., None], hidden, 0)  # the position convolution must see zeros past the end
        # in float32 even under autocast: in bfloat16, oneDNN computes it wrongly for some widths on processors with AMX
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = hidden + encoder.pos_conv_embed(hidden)
        if not config.do_stable_layer_norm:  # post-LN: this norm stands before layer 1; pre-LN: see read_exit
            hidden = encoder.layer_norm(hidden)
        return Frames(encoder.dropout(hidden), valid)

    def run_layers(self, frames: Frames, start: int, stop: int) -> Frames:
        """Transformer layers start+1 to stop; no frame attends to padding."""
        hidden, valid, bias = frames
        config, layers = self.backbone.config, self.backbone.encoder.layers[start:stop]
        if config.model_type == "wavlm":
            with warnings.catch_warnings():  # torch warns about a bool mask with a float bias
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
            logits, embedding = head(hidden.to(head.projector.weight.dtype), frames.valid)
        return ExitOutput(exit, logits, embedding)

    @torch.no_grad()
    def early_exit(self, waveforms: Tensor, lengths: Tensor | None, threshold: float) -> tuple[Tensor, Tensor]:
        """Runs layer by layer; a clip leaves at the first exit where `should_stop` says so.

        The deepest exit answers for the clips that stay to the end. Clips that have left are dropped from the batch,
        and the rest is trimmed to the longest that stays: no layer runs unless an answer needs it.

        Args:
            waveforms, lengths: as in `forward`.
            threshold: from 0 (all leave at the first exit) to 1 (only a probability that rounds to 1 leaves early).
        Returns:
            logits (B, C) and the exit (B,) int64 that gave them.
        Raises:
            ValueError: as in `forward`; also in training mode, and for a threshold outside 0 to 1.
        """
        self.check_early_exit(threshold)
        frames = self.embed_frames(waveforms, lengths)
        logits = frames.hidden.new_empty(len(waveforms), len(self.labels), dtype=torch.float32)
        active = torch.arange(len(waveforms), device=logits.device)  # the clips still in the batch
        used = torch.empty_like(active)
        seen = logits.new_empty(0, *logits.shape)  # of all exits so far, for stop rules that compare exits
        for previous, k in zip([0, *self.exits], self.exits):
            frames = self.run_layers(frames, previous, k)
            answer = self.read_exit(k, frames).logits.float()
            logits[active], used[active] = answer, k
            seen = torch.cat([seen, answer[None]])
            stay = ~should_stop(seen, threshold)  # (clips still in the batch,)
            if not stay.any():
                break
            active, frames, seen = active[stay], keep_clips(frames, stay), seen[:, stay]
        return logits, used

    # -- answers, smaller models, files ---------------------------------------------------------------------------

    @torch.no_grad()
    def classify(
        self, clips, exit: int | None = None, threshold: float | str | None = None, sample_rate: int = SAMPLE_RATE
    ) -> "list[Prediction]":
        """Classifies files or waveforms, one at a time, in evaluation mode; the model's own mode is then restored.

        Args:
            clips: a list of paths, file objects or waveforms (T,) float, of up to 60 s; or a single one.
            exit: run to this exit and no further. Default: the deepest.
            threshold: stop at the first exit whose confidence reaches this (0 to 1); "auto": the calibrated value.
            sample_rate: of the waveforms; files carry their own.
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
        training, device = self.training, self.backbone.device
        self.eval()
        predictions = []
        try:
            for clip in clips if isinstance(clips, list) else [clips]:
                waveform = read_clip(clip, self.tile_seconds, sample_rate).to(device)[None]  # (1, T)
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

    def truncate(self, exit: int) -> "MultiExitSER":
        """Returns a model of `exit` layers with only that exit, whose weights are copies and whose logits are equal."""
        head = self.head_kinds[self.exits.index(self.check_exit(exit))]
        backbone = self.backbone.config.to_dict()
        small = MultiExitSER(self.labels, backbone, [exit], [head], self.tile_seconds)
        small.to(self.backbone.device, self.backbone.dtype)
        weights = self.state_dict()
        small.load_state_dict({name: weights[name] for name in small.state_dict()})
        return small.train(self.training)

    def freeze_convolutions(self) -> None:
        """Freezes the convolutional encoder; everything else stays as trainable as it was."""
        self.backbone.feature_extractor.requires_grad_(False)

    def save_pretrained(self, folder, push_to_hub: bool = False, repo_id=None, model_card_kwargs=None, **hub) -> None:
        """Writes model.safetensors and config.json, the Hub's convention, each whole or not at all.

        It also writes a model card, README.md, if there is none. The method `push_to_hub(name)`, of huggingface_hub,
        uploads all three; so does push_to_hub=True here, which passes `hub` on to it.
        """
        folder = Path(folder)
        with file_errors(folder, "cannot be made a folder", "name another"):
            folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / "model.safetensors", safetensors.torch.save(self.state_dict(), {"format": "pt"}))
        arguments = dict(labels=self.labels, backbone=self.backbone.config.to_dict(), exits=self.exits,
                         head=self.head_kinds, tile_seconds=self.tile_seconds, threshold=self.threshold)  # fmt: skip
        replace_file(folder / "config.json", json.dumps(arguments, indent=2))
        if not (folder / "README.md").exists():
            replace_file(folder / "README.md", str(self.generate_model_card(**model_card_kwargs or {})))
        if push_to_hub:
            self.push_to_hub(repo_id or folder.name, **hub)

    @classmethod
    def from_pretrained(cls, checkpoint, **hub) -> "MultiExitSER":
        """Loads what `save_pretrained` wrote, from a folder or the Hub, in evaluation mode; nothing is unpickled.

        `hub`: arguments of `huggingface_hub.snapshot_download`, such as revision and token. Raises FileNotFoundError
        without such a folder or Hub model, ValueError for a checkpoint that is cut short or not of its config's shapes.
        """
        checkpoint = folder = os.fspath(checkpoint)
        if not os.path.isdir(folder):
            advice = "give a folder written by train.py, or a Hub name"
            with file_errors(checkpoint, "no such folder, nor a Hub model within reach", advice, FileNotFoundError):
                folder = snapshot_download(checkpoint, allow_patterns=["config.json", "model.safetensors"], **hub)
        with file_errors(checkpoint, "not a whole sdser checkpoint", "give a folder written by train.py"):
            saved = json.loads(Path(folder, "config.json").read_text())
            with torch.device("meta"):  # no memory yet: a damaged config may ask for terabytes
                names = ("labels", "backbone", "exits", "head", "tile_seconds", "threshold")
                model = cls(**{name: saved[name] for name in names})
            weights = safetensors.torch.load_file(Path(folder, "model.safetensors"))
            # copied, because tensor alignment affects rounding
            weights = {name: value.to(torch.float32, copy=True) for name, value in weights.items()}
            model.load_state_dict(weights, assign=True)
        return model.eval()

    # -- what is refused ------------------------------------------------------------------------------------------

    @staticmethod
    def check_arguments(labels, exits, head, tile_seconds, layers: int) -> None:
        """Raises ValueError unless the arguments of `__init__` fit a backbone with this many layers."""
        names = [label for label in labels if isinstance(label, str)]
        if isinstance(labels, str) or len(labels) < 2 or len(set(names)) < len(labels):
            raise ValueError(f"labels {labels!r}: give a list of at least two names, all different")
        if not exits or any(a >= b for a, b in zip([0, *exits], exits)) or exits[-1] > layers:
            raise ValueError(f"exits {exits}: they must increase, from 1 to the backbone's {layers} layers at most")
        if len(head) != len(exits) or set(head) - set(HEADS):
            raise ValueError(f"head {head}: give one of {', '.join(HEADS)}, or one for each of {len(exits)} exits")
        if tile_seconds is not None and not 0.025 <= tile_seconds <= MAX_SECONDS:
            raise ValueError(f"tile_seconds {tile_seconds}: give a number from 0.025 to {MAX_SECONDS}, or None")

    @staticmethod
    def check_batch(waveforms: Tensor, lengths: Tensor | None) -> Tensor | None:
        """Raises ValueError unless the arguments form a batch; returns the lengths, or None if no clip is padded."""
        if waveforms.ndim != 2 or not waveforms.is_floating_point():
            raise ValueError(f"waveforms must be a (B, T) float tensor, not {waveforms.dtype} {tuple(waveforms.shape)}")
        size = waveforms.shape[1]
        if lengths is not None and lengths.shape != waveforms.shape[:1]:
            raise ValueError(f"lengths of shape {tuple(lengths.shape)}: give one for each of {len(waveforms)} clips")
        shortest, longest = (size, size) if lengths is None else (int(lengths.min()), int(lengths.max()))
        if shortest < MIN_SAMPLES or longest > size:
            raise ValueError(f"lengths {shortest} to {longest}: they must be from {MIN_SAMPLES} (a frame) to {size}")
        return None if shortest == size else lengths

    def check_early_exit(self, threshold: float) -> None:
        if self.training:  # dropout and masks would decide
            raise ValueError("early_exit needs a model in evaluation mode: call model.eval() first")
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold {threshold}: give a probability from 0 to 1")

    def check_exit(self, exit: int) -> int:
        if exit not in self.exits:
            raise ValueError(f"exit {exit}: the model has exits {', '.join(map(str, self.exits))}")
        return exit


class Prediction(NamedTuple):
    label: str
    confidence: float  # the label's probability
    probabilities: dict[str, float]  # by label
    exit: int  # the exit that answered
    milliseconds: float  # from waveform to probabilities


# -- padding, and the time mask ---------------------------------------------------------------------------------------

# Padding could leak wherever frames mix: in the normalisation of the waveform, in the norm over time after the first
# convolution of "base" models, in the position convolution, in attention, and where an exit pools. Each of these looks
# only at a clip's own frames. Nothing else mixes them: convolutions 2 to 7 pad nothing, so a clip's first frames, as
# many as its length gives, come from its own samples, and all other norms are per frame. Where no clip of a batch is
# padded, lengths and `valid` are None, and the masks cost nothing.


def valid_mask(lengths: Tensor, size: int) -> Tensor:
    """Turns lengths (B,) into a mask (B, size) bool, true where a position holds data rather than padding."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def standardize(waveforms: Tensor, valid: Tensor | None) -> Tensor:
    """Gives each clip zero mean and unit variance over its valid samples, as `Wav2Vec2FeatureExtractor` does.

    waveforms: (B, T); valid: (B, T) bool, or None if all samples are valid. Padding, which may hold anything, NaN
    included, becomes zero.
    """
    if valid is None:
        variance, mean = torch.var_mean(waveforms, -1, correction=0, keepdim=True)  # (B, 1)
        return (waveforms - mean) * torch.rsqrt(variance + 1e-7)
    count = valid.sum(-1, keepdim=True)  # (B, 1)
    mean = torch.where(valid, waveforms, 0).sum(-1, keepdim=True) / count
    centred = torch.where(valid, waveforms - mean, 0)
    return centred * torch.rsqrt(centred.square().sum(-1, keepdim=True) / count + 1e-7)


def normalize_each(norm: nn.Module, x: Tensor, lengths: Tensor) -> Tensor:
    """Applies a norm over time to each clip's own frames, zero-padded at the end.

    x: (B, channels, T); lengths: (B,) in frames.
    """
    clips = [norm(clip[..., :length]) for clip, length in zip(x.split(1), lengths.tolist())]
    return torch.cat([F.pad(clip, (0, x.shape[-1] - clip.shape[-1])) for clip in clips])


def keep_clips(frames: Frames, clips: Tensor) -> Frames:
    """Returns the frames of some of the clips, (B,) bool, without the padding that only the others needed."""
    hidden, valid, bias = frames.hidden[clips], frames.valid, frames.position_bias
    if bias is not None:
        bias = bias.unflatten(0, (len(clips), -1))[clips].flatten(0, 1)
    if valid is not None:
        size = int(valid[clips].sum(1).max())
        hidden, valid = hidden[:, :size], valid[clips, :size]
        bias = None if bias is None else bias[:, :size, :size]
    return Frames(hidden, valid, bias)


def sample_time_mask(config: transformers.PretrainedConfig, hidden: Tensor, valid: Tensor | None) -> Tensor:
    """Draws SpecAugment's time mask (Park et al., 2019): (B, T) bool, true in random spans of frames.

    The config's mask_time_prob is the share of frames to mask (spans may overlap, so it is a little less),
    mask_time_length the length of a span, mask_time_min_masks the least number of spans. In short clips, spans are
    shorter, so that the least number of them covers at most half of the clip.
    """
    # An example: a clip of 500 frames with wav2vec2-base's 0.05, 10 and 2. A span has min(500 // 4, 10) = 10 frames;
    # there are 0.05 * 500 / 10 = 2.5 on average, so 2 or 3; each starts at a random frame from 0 to 490. A clip of 20
    # frames gets the least number, 2, of spans of 20 // 4 = 5 frames.
    (batch, size, _), device = hidden.shape, hidden.device
    num_frames = valid.sum(1) if valid is not None else torch.full((batch,), size, device=device)  # (B,)
    least = config.mask_time_min_masks
    span_length = (num_frames // (2 * max(1, least))).clamp(max=config.mask_time_length)  # (B,)
    mean_spans = config.mask_time_prob * num_frames / span_length.clamp(min=1)  # (B,)
    num_spans = (mean_spans + torch.rand(batch, device=device)).floor().clamp(min=least)  # (B,)
    most = max(least, 1 + int(config.mask_time_prob * size))  # S: num_spans is never more, even of one-frame spans
    start = (torch.rand(batch, most, device=device) * (num_frames - span_length + 1)[:, None]).long()  # (B, S)
    end = start + span_length[:, None]
    t = torch.arange(size, device=device)
    in_span = (t >= start[..., None]) & (t < end[..., None])  # (B, S, T)
    is_used = torch.arange(most, device=device) < num_spans[:, None]  # (B, S)
    return (in_span & is_used[..., None]).any(1)


# -- the backbone: convolutional encoder and transformer, from `transformers` -----------------------------------------

# Built-in shapes with random weights, of about 1, 3, 95 and 315 million parameters. What is not named is as in
# facebook/wav2vec2-base, so "base" is exactly that model; "large" is facebook/wav2vec2-large-lv60, a pre-LN
# layout: each sublayer is normalised before it, not after it.
SIZES = {
    "tiny": dict(
        hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512, conv_dim=[32] * 7,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
    ),
    "small": dict(
        hidden_size=192, num_hidden_layers=6, num_attention_heads=4, intermediate_size=768, conv_dim=[96] * 7,
    ),
    "base": dict(feat_proj_dropout=0.1),
    "large": dict(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
        feat_extract_norm="layer", conv_bias=True, do_stable_layer_norm=True,
    ),
}  # fmt: skip


def default_exits(backbone: str | dict, layers: int) -> list[int]:
    if backbone in ("tiny", "small"):
        return [1, 2, 4] if backbone == "tiny" else [2, 4, 6]
    return sorted({max(1, round(layers * share)) for share in (1 / 4, 2 / 3, 5 / 6, 1)})


def load_config(backbone: str | dict) -> transformers.PretrainedConfig:
    """The `transformers` config of a built-in size, a local folder, a Hub name, or a saved dict.

    Its added attribute `do_normalize` tells whether the backbone was trained on zero-mean, unit-variance waveforms.
    """
    if isinstance(backbone, dict):
        config, backbone = backbone, "the backbone's config"  # what messages call it
    elif backbone in SIZES:
        config = {"model_type": "wav2vec2", "activation_dropout": 0.0, **SIZES[backbone]}
    else:
        backbone = os.fspath(backbone)
        problem = f"not a built-in size ({', '.join(SIZES)}), a folder of transformers, or a Hub model within reach"
        with file_errors(backbone, problem, "give one"):
            looks_local = os.path.isabs(backbone) or "/" not in backbone
            if looks_local and not os.path.isdir(backbone):  # probably a typo: do not ask the Hub
                raise FileNotFoundError("no such folder")
            config, _ = transformers.PretrainedConfig.get_config_dict(backbone)
            if {"labels", "exits", "backbone"} <= config.keys():
                advice = "MultiExitSER.from_pretrained(RUN).backbone.save_pretrained(FOLDER) makes a backbone of it"
                raise ValueError(f"{backbone}: is a run of sdser; {advice}")
            if "do_normalize" not in config:
                config["do_normalize"] = reads_normalized(backbone)
    if config.get("model_type") not in ("wav2vec2", "hubert", "wavlm") or config.get("conv_pos_batch_norm"):
        raise ValueError(f"{backbone}: give a wav2vec2, hubert or wavlm without batch norm in its position convolution")
    with file_errors(backbone, "its configuration cannot be read", "save it again"):
        return transformers.AutoConfig.for_model(**{"do_normalize": True, **config})


def reads_normalized(backbone: str) -> bool:
    """Returns what a backbone's feature extractor says about `do_normalize`; without one, True, with a warning."""
    try:
        return transformers.AutoFeatureExtractor.from_pretrained(backbone).do_normalize
    except OSError as error:
        if isinstance(error.__context__, json.JSONDecodeError):  # it is there, but damaged
            raise
        message = "has no preprocessor_config.json; assuming that it was trained on normalised waveforms"
        warnings.warn(f"{backbone}: {message} (do_normalize true)", stacklevel=2)
        return True


def load_backbone(backbone: str | dict, config: transformers.PretrainedConfig) -> transformers.PreTrainedModel:
    """Builds the backbone with `config.num_hidden_layers` layers, in float32; pre-trained unless built-in or a dict."""
    # An exit needs its layer, so none may be dropped; the adapter of some models sits behind the last layer, unused.
    config.layerdrop, config.add_adapter = 0.0, False
    if not config.apply_spec_augment:
        config.mask_time_prob = 0.0
    if isinstance(backbone, dict) or backbone in SIZES:
        model = transformers.AutoModel.from_config(config, dtype=torch.float32)
    else:
        verbosity = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()  # else it lists every layer and quantizer weight left out on purpose
        transformers.logging.disable_progress_bar()
        try:
            with file_errors(backbone, "its weights cannot be loaded", "download or save it again"):
                model, info = transformers.AutoModel.from_pretrained(
                    backbone, config=config, dtype=torch.float32, output_loading_info=True
                )
        finally:
            transformers.logging.set_verbosity(verbosity)
            transformers.logging.enable_progress_bar()
        model.train()  # from_pretrained leaves it in evaluation mode, from_config in training mode
        missing = set(info["missing_keys"]) - {"masked_spec_embed"}
        if missing:
            raise ValueError(f"{backbone}: {len(missing)} weights are missing, {min(missing)} for one; save it again")
    if config.mask_time_prob == 0 and hasattr(model, "masked_spec_embed"):
        model.masked_spec_embed.requires_grad_(False)  # no loss would reach it
    return model


# -- audio ------------------------------------------------------------------------------------------------------------
MAX_SECONDS = 60  # of a clip to classify: attention's memory grows with the square of the length
MIN_SAMPLES = 400  # one frame of the convolutional encoder, 25 ms
TOLERANCE = 0.01  # seconds by which a header may promise more audio than there is


def load_audio(file, start: float = 0.0, seconds: float | None = None) -> Tensor:
    """Reads an audio file, or a part of it, as a waveform (T,), float32, mono at 16 kHz, nominally in [-1, 1].

    Args:
        file: a path or a binary file object; anything libsndfile reads (WAV, FLAC, OGG, MP3, ...), at any sample
            rate. Channels are averaged.
        start, seconds: the part to read; default: from the start to the end.
    Raises:
        FileNotFoundError: no such file.
        ValueError: not audio, cut short, empty, shorter than one frame, or with NaN or infinite samples.
    """
    with open_audio(file) as (name, sound):
        rate, first = sound.samplerate, round(start * sound.samplerate)
        size = sound.frames - first
        if seconds is not None:
            size = min(size, round(seconds * rate))
        skip = first
        if sound.seekable() and sound.format != "MP3":  # libmpg123 seeks inexactly, and prints errors when it does
            sound.seek(first)
            skip = 0
        samples = sound.read(skip + size, dtype="float32", always_2d=True)[skip:]  # (T, channels)
        if size - len(samples) > TOLERANCE * rate:
            raise ValueError(f"{name}: cut short, {len(samples)} of {size} samples are there; replace the file")
    return to_16_khz(name, torch.from_numpy(samples.mean(axis=1)), rate)


@contextlib.contextmanager
def open_audio(file):
    """Yields a file's name and its `soundfile.SoundFile`, once its header has been checked."""
    if hasattr(file, "read"):
        name, file = str(getattr(file, "name", "the file object")), io.BytesIO(file.read())
    else:
        name = file = os.fspath(file)
        if not os.path.isfile(file):
            raise FileNotFoundError(f"{file}: is {'a folder' if os.path.isdir(file) else 'no file'}; give audio files")
    with file_errors(name, "not an audio file that libsndfile can read", "ffmpeg -i IN OUT.wav converts most"):
        sound = soundfile.SoundFile(file)
    with file_errors(name, "damaged or cut short", "replace the file"), sound:
        check_header(name, sound)
        if sound.format == "MP3":
            check_mp3(name, file.getvalue() if isinstance(file, io.BytesIO) else Path(file).read_bytes())
        yield name, sound


def check_mp3(name: str, content: bytes) -> None:
    """Raises ValueError if an MP3 does not declare its length, which libsndfile then guesses, too short or too long."""
    tag, start = content[:10], 0
    if tag[:3] == b"ID3":  # a tag comes first; its size is given in four times 7 bits
        start = 10 + (tag[6] << 21) + (tag[7] << 14) + (tag[8] << 7) + tag[9]
    if not any(mark in content[start : start + 200] for mark in (b"Xing", b"Info", b"VBRI")):
        raise ValueError(f"{name}: an MP3 that does not declare its length; convert it: ffmpeg -i IN OUT.wav")


def check_header(name: str, sound: soundfile.SoundFile) -> None:
    """Raises ValueError if the file is incomplete, which libsndfile reports only in its log."""
    if sound.frames == 0:
        raise ValueError(f"{name}: declares no audio; ffmpeg -ignore_length 1 -i IN OUT.wav may repair it")
    check_size(name, sound.frames, sound.samplerate)
    cut = re.search(r"^\s*(?:data|SSND) : (\d+) \(should be (\d+)\)", sound.extra_info, re.MULTILINE)
    if cut:
        promised, present = int(cut[1]), int(cut[2])  # bytes of audio: what the header claims, what is there
        missing = sound.frames / sound.samplerate * (promised / present - 1)  # seconds
        # Some recorders count the header as audio; programs that write into a pipe declare 2 GiB or more: "unknown".
        if missing > TOLERANCE and promised < 0x7FFFF000:
            raise ValueError(f"{name}: cut short, {present} of {promised} bytes of audio are there; replace the file")
    if re.search("end-of-stream|after the last page", sound.extra_info, re.IGNORECASE):  # of an Ogg
        raise ValueError(f"{name}: cut short, its end is missing; replace the file")


def check_size(name, samples: int, rate: int) -> None:
    """Raises ValueError for a rate that no device has, or for fewer samples than one frame."""
    if not 1000 <= rate <= 1_000_000:  # resampling would take gigabytes
        raise ValueError(f"{name}: a sample rate of {rate} Hz, outside 1 kHz to 1 MHz, cannot be right")
    if samples * SAMPLE_RATE < MIN_SAMPLES * rate:
        raise ValueError(f"{name}: {samples / rate:.4f} s are shorter than one frame, {MIN_SAMPLES / SAMPLE_RATE} s")


def to_16_khz(name, waveform: Tensor, rate: int) -> Tensor:
    """Resamples a waveform (T,) to 16 kHz; raises ValueError if it cannot be classified, warns if it is silent."""
    check_size(name, len(waveform), rate)
    if rate != SAMPLE_RATE:
        advice = "install a pair that works, torch==2.11.0 torchaudio==2.11.0, or convert the file to 16 kHz"
        with file_errors(name, f"resampling from {rate} Hz needs torchaudio", advice):
            import torchaudio  # here, so that nothing else needs it
        # The filter grows with rate / gcd(rate, 16000): odd rates, such as 11127 Hz, become a multiple of 25 Hz.
        waveform = torchaudio.functional.resample(waveform, max(25, 25 * round(rate / 25)), SAMPLE_RATE)
    if not waveform.isfinite().all():
        raise ValueError(f"{name}: holds NaN or infinite samples; write it again from its source")
    if not waveform.any():
        warnings.warn(f"{name}: digital silence; its prediction means nothing", stacklevel=2)
    return waveform


def read_clip(clip, tile_seconds: float | None = None, sample_rate: int = SAMPLE_RATE) -> Tensor:
    """Reads a path, a file object or a 1-D float array of at most 60 s; returns the waveform (T,), float32, 16 kHz."""
    if isinstance(clip, str | os.PathLike) or hasattr(clip, "read"):
        name = getattr(clip, "name", "the file object") if hasattr(clip, "read") else clip
        waveform = load_audio(clip, seconds=MAX_SECONDS + 1)
    elif getattr(clip, "ndim", None) == 1 and torch.as_tensor(clip).is_floating_point():
        name = "the waveform"
        waveform = to_16_khz(name, torch.as_tensor(clip).float(), sample_rate)
    else:
        shape = f" {clip.dtype} of shape {tuple(clip.shape)}" if hasattr(clip, "dtype") else ""
        raise ValueError(f"{type(clip).__name__}{shape}: pass paths, file objects or 1-D arrays of floats, or a list")
    if len(waveform) > MAX_SECONDS * SAMPLE_RATE:
        raise ValueError(f"{name}: longer than the limit of {MAX_SECONDS} s; cut it into windows (see the README)")
    return waveform if tile_seconds is None else tile(waveform, tile_seconds)


def tile(waveform: Tensor, seconds: float) -> Tensor:
    """Repeats or cuts a waveform (T,) to this length, as the paper does to reach 5.984 s (95,744 samples)."""
    samples = round(seconds * SAMPLE_RATE)
    return waveform.repeat(math.ceil(samples / len(waveform)))[:samples]


# -- metrics ----------------------------------------------------------------------------------------------------------


# -- files: every error is one sentence that names the file -----------------------------------------------------------
@contextlib.contextmanager
def file_errors(path, problem: str, advice: str, kind: type[Exception] = ValueError):
    """Turns whatever a library raises about a file into `kind`, "PATH: PROBLEM (what the library says); ADVICE".

    Errors that already begin with the file's name pass unchanged.
    """
    try:
        yield
    except Exception as error:
        if str(error).startswith(f"{path}: "):
            raise
        reason = (getattr(error, "strerror", None) or str(error)).strip().partition("\n")[0].rstrip(".:")
        raise kind(f"{path}: {problem} ({reason}); {advice}") from error


def replace_file(path, content: bytes | str) -> None:
    """Writes a file whole or not at all: a failure leaves what was there.

    Symlinks are kept; special files such as /dev/stdout are written to directly.
    """
    content = content.encode() if isinstance(content, str) else content
    with file_errors(path, "cannot be written", "make room, or name another place"):
        if os.path.exists(path) and not os.path.isfile(path):
            Path(path).write_bytes(content)
            return
        target = Path(os.path.realpath(path))
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            temporary.write_bytes(content)
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
