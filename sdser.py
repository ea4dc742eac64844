"""Multi-exit speech emotion recognition with self-distillation, in one file.

A pre-trained speech transformer (wav2vec 2.0, HuBERT or WavLM) gets a classifier, an *exit*, at several of its layers.
While it is fine-tuned, the shallow exits (students) also learn from the deepest (the teacher), so that one network
can run at several depths: Ren, Nguyen, Chang, Schuller, "Fast Yet Effective Speech Emotion Recognition with
Self-distillation", ICASSP 2023, arXiv 2210.14636. Here "the paper's" means what its authors' released code does.

First the method, then its supporting code:

    the exits         Frames, ExitHead, ExitOutput: the frames of one layer -> logits and embedding
    the loss          self_distillation_loss; fuse, in which the exit with the largest margin decides; should_stop
    the model         MultiExitSER: forward, early_exit; classify, truncate, saving and loading
    padding           what keeps a padded batch exact; SpecAugment's time mask
    the backbone      load_config, load_backbone; audio: load_audio; files

Shapes: B clips, T samples or frames, D features, C classes. Waveforms are float32 at 16 kHz; a frame is 20 ms.
A user's mistake raises InputError or FileNotFoundError, whose message is one sentence that says what would be right.
"""

import contextlib
import inspect
import io
import json
import math
import os
import re
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import numpy as np
import safetensors.torch
import soundfile
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask

SAMPLE_RATE = 16_000
HEADS = ("gru", "lstm", "attention", "mean", "stats")
__version__ = "1.0.0"


# -- the exits ---------------------------------------------------------------------------------------------------------
class Frames(NamedTuple):
    """Holds the frames of a batch on their way through the layers."""

    hidden: Tensor  # (B, T, D)
    valid: Tensor | None = None  # (B, T) bool, which frames hold data; None where all do
    depth: int = 0  # how many layers they have passed
    position_bias: Tensor | None = None  # (B * heads, T, T), which WavLM's layer 1 makes and its other layers reuse


class ExitHead(nn.Module):
    """Pools the frames of one layer into an embedding f_k, and classifies it: logits z_k.

    gru, lstm    one-layer recurrent network from a zero state, LayerNorm, SELU, mean over frames, as in the paper
    attention    mean over frames, weighted by a learned linear layer
    mean         mean over frames, as in the paper at the deepest exit
    stats        mean and standard deviation over frames (Snyder et al., 2018), so its embedding is twice as wide
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
        self.projector = nn.Linear(2 * width if kind == "stats" else width, 256)
        self.classifier = nn.Linear(256, num_classes)
        for linear in (self.projector, self.classifier):  # as in the authors' code
            nn.init.kaiming_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, frames: Frames) -> tuple[Tensor, Tensor]:
        """Returns logits (B, C) and embedding (B, D), or (B, 2 D) with "stats"."""
        hidden, valid = frames.hidden, frames.valid
        if self.kind in ("gru", "lstm"):
            # padding comes after the clip, so a network that runs forward in time never sees it
            hidden = F.selu(self.norm(self.rnn(hidden)[0]))  # (B, T, D)
        if self.kind == "attention":
            attention = self.score(hidden).squeeze(-1)  # (B, T)
            if valid is not None:
                attention = attention.masked_fill(~valid, -torch.inf)
            embedding = torch.einsum("bt,btd->bd", attention.softmax(-1), hidden)
        else:
            embedding = mean_over_time(hidden, valid)
        if self.kind == "stats":
            variance = mean_over_time((hidden - embedding[:, None]).square(), valid)
            embedding = torch.cat([embedding, (variance + 1e-5).sqrt()], -1)  # (B, 2 D)
        return self.classifier(self.projector(embedding)), embedding  # no activation in between, as in the paper


class ExitOutput(NamedTuple):
    exit: int  # the layer it reads
    logits: Tensor  # (B, C)
    embedding: Tensor  # (B, D), or (B, 2 D) with "stats"


# -- the loss, fusion, and the stop rule -------------------------------------------------------------------------------
def criterion(logits: Tensor, targets: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Returns each clip's cross-entropy, (B,); targets: class indices (B,), or probabilities (B, C)."""
    return F.cross_entropy(logits, targets, class_weights, reduction="none")


def probabilities(logits: Tensor) -> Tensor:
    """Returns what logits (..., C) say about the classes, as probabilities (..., C)."""
    return logits.softmax(-1)


def self_distillation_loss(
    outputs: list[ExitOutput], targets: Tensor, kl_weight: float = 1.0, hint_weight: float = 1.0,
    temperature: float = 1.0, detach_teacher: bool = True, class_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Returns the paper's loss, its KL term fixed: all exits learn the labels, the shallow ones also from the deepest.

        L = CE(z_d, y) + 1/|S| Σ_{k in S} [ CE(z_k, y) + α T² KL(softmax(z_d/T) ‖ softmax(z_k/T)) + β MSE(f_k, f_d) ]

    S are the shallow exits (students), d the deepest (teacher), z logits, f embeddings.

    Args:
        outputs: what the model returned, shallow to deep; a single exit has no students, and its loss is CE(z_d, y).
        targets: (B,) int64 class indices y, or (B, C) probabilities.
        kl_weight: α, for the teacher's probabilities (Hinton et al., 2015); at 0 the term is not computed.
        hint_weight: β, for the teacher's embedding, the hint (FitNets, Romero et al., 2015); at 0 it is not computed.
        temperature: T softens both distributions; multiplying by T² keeps the scale of the gradients roughly the same.
        detach_teacher: the KL and hint terms send no gradient through z_d and f_d (Zhang et al., 2019); they still
            train the layers that the teacher shares with the students.
        class_weights: (C,) float, per class, for the cross-entropy at every exit; None means 1.
    Returns:
        the loss, a scalar: the sum over the batch divided by B. And its parts, detached scalars: ce (the teacher's),
        ce_students, kl and hint (averaged over the students). They are not yet weighted by α and β.
    """
    *students, teacher = outputs
    teacher_logits, teacher_embedding = teacher.logits, teacher.embedding
    if detach_teacher:  # the gradient of KL and hint stops here
        teacher_logits, teacher_embedding = teacher_logits.detach(), teacher_embedding.detach()
    # CE(z_d, y), divided by B whatever the weights, so that batches add up
    ce = criterion(teacher.logits, targets, class_weights).mean()
    ce_students = kl = hint = torch.zeros_like(ce.detach())
    for student in students:
        ce_k = criterion(student.logits, targets, class_weights).mean()  # CE(z_k, y)
        ce_students = ce_students + ce_k / len(students)
        if kl_weight:  # T² KL(softmax(z_d/T) ‖ softmax(z_k/T))
            # stacked, since F.kl_div would broadcast logits of another shape
            log_q, log_p = F.log_softmax(torch.stack([student.logits, teacher_logits]) / temperature, -1)
            # F.kl_div(log q, log p) is KL(p ‖ q): the student q comes first
            divergence = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
            kl = kl + temperature**2 * divergence / len(students)
        if hint_weight:
            hint = hint + F.mse_loss(student.embedding, teacher_embedding) / len(students)  # MSE(f_k, f_d)
    loss = ce + ce_students + kl_weight * kl + hint_weight * hint
    parts = {"ce": ce, "ce_students": ce_students, "kl": kl, "hint": hint}
    return loss, {name: part.detach() for name, part in parts.items()}


def fuse(logits: Tensor | list[ExitOutput]) -> Tensor:
    """Returns the logits (B, C) of each clip's exit with the largest margin, top-1 minus top-2.

    logits: (exits, B, C), or outputs, of the exits that take part; in the paper the students: `fuse(outputs[:-1])`.
    """
    if isinstance(logits, list):
        logits = torch.stack([output.logits for output in logits])
    first, second = logits.topk(2, dim=-1).values.unbind(-1)  # (exits, B) each
    return logits[(first - second).argmax(0), torch.arange(logits.shape[1], device=logits.device)]


THRESHOLDS = [i / 100 for i in range(100, -1, -1)]  # from 1 (only a probability that rounds to 1 stops) to 0 (all do)


def should_stop(logits: Tensor, threshold: float | Tensor) -> Tensor:
    """Returns which clips leave at the latest exit, a mask (B,) bool: the stop rule of early exit.

    logits: (exits so far, B, C), of all exits, for rules that compare them; threshold: in THRESHOLDS' range, one or
    (B,). By this rule, a clip leaves when the latest exit's top probability reaches the threshold.
    """
    return probabilities(logits[-1]).amax(-1) >= threshold


# -- the model ---------------------------------------------------------------------------------------------------------
# The modules of a backbone that are used here; its own forward never runs. `config` is always the backbone's.
#
#   feature_extractor.conv_layers   7 convolutions, (B, 1, samples) -> (B, channels, T), one frame per 20 ms
#   feature_projection              LayerNorm and Linear, (B, T, channels) -> (B, T, D)
#   masked_spec_embed               (D,), the learned vector that replaces masked frames
#   encoder.pos_conv_embed          a convolution over 128 frames, (B, T, D) -> (B, T, D), added to its input
#   encoder.layers                  L transformer layers, (B, T, D) -> (B, T, D)
#   encoder.layer_norm              before layer 1 (post-LN, do_stable_layer_norm false) or after the last (pre-LN)


class MultiExitSER(
    nn.Module, huggingface_hub.PyTorchModelHubMixin,  # push_to_hub, and a model card with what follows
    library_name="sdser", paper_url="https://arxiv.org/abs/2210.14636", pipeline_tag="audio-classification",
):  # fmt: skip
    """Runs a speech transformer with a classifier at several depths.

    Args:
        labels: class names, in the order of the logits.
        backbone: a Hub name, a folder saved by `transformers`, a size in SIZES (random weights), or a config dict.
        exits: increasing layer numbers, from 1; the last is the teacher, and layers beyond it are not kept.
            Default: 1 2 4 for "tiny", 2 4 6 for "small", otherwise L/4, 2L/3, 5L/6, L of L layers.
        head: a list of names in HEADS, one per exit. Or one name: that head at the shallow exits and "mean" at the
            deepest, but for "stats", which stands at all; with a single exit, that exit gets it.
        tile_seconds: if set, the model was trained on clips that were repeated or cut to this length, and `classify`
            does the same to its input.
        threshold: of early exit, chosen on dev clips; `classify(threshold="auto")` uses it.
    Raises InputError if the arguments do not describe a model; the message says what is allowed.
    """

    def __init__(
        self, labels: list[str], backbone: str | dict = "facebook/wav2vec2-base", exits: list[int] | None = None,
        head: str | list[str] = "gru", tile_seconds: float | None = None, threshold: float | None = None,
    ):  # fmt: skip
        super().__init__()
        config = load_config(backbone)
        if exits is None:
            exits = default_exits(backbone, config.num_hidden_layers)
        if isinstance(head, str):
            head = [head] * (len(exits) - 1) + [head if head == "stats" or len(exits) == 1 else "mean"]
        self.check_arguments(labels, exits, head, tile_seconds, threshold, config.num_hidden_layers)
        self.labels, self.exits, self.head_kinds = list(labels), list(exits), list(head)
        self.tile_seconds, self.threshold = tile_seconds, threshold
        self.backbone = load_backbone(backbone, config, layers=exits[-1])
        width, classes = config.hidden_size, len(labels)
        self.heads = nn.ModuleDict({str(k): ExitHead(kind, width, classes) for k, kind in zip(exits, head)})

    def forward(self, waveforms: Tensor, lengths: Tensor | None = None, exit: int | None = None) -> list[ExitOutput]:
        """Runs only the layers that the requested exits need; no frame of a clip reads padding (see "padding" below).

        Args:
            waveforms: (B, T) float, raw 16 kHz; what lies beyond a clip's length is ignored, NaN included.
            lengths: (B,) int64, valid samples of each clip; None if all T are.
            exit: a single exit; None for all.
        Returns one ExitOutput per exit, shallow to deep. Raises InputError for shapes that do not fit, a clip shorter
        than one frame, or an exit that the model lacks.
        """
        self.check_exit(exit)
        frames, outputs = self.embed_frames(waveforms, lengths), []
        for k in self.exits if exit is None else [exit]:
            frames = self.run_layers(frames, k)  # resumes at the exit before
            outputs.append(self.read_exit(k, frames))
        return outputs

    def embed_frames(self, waveforms: Tensor, lengths: Tensor | None = None) -> Frames:
        """Turns waveforms (B, samples) into the frames that enter layer 1; does everything before it."""
        return self.add_positions(self.extract_features(waveforms, lengths))

    def extract_features(self, waveforms: Tensor, lengths: Tensor | None = None) -> Frames:
        """Turns waveforms (B, samples) into frames, which do not yet know where in the clip they are."""
        config, lengths = self.backbone.config, self.real_lengths(waveforms, lengths)  # None where nothing is padded
        valid = None if lengths is None else valid_mask(lengths, waveforms.shape[1])  # (B, samples)
        if config.do_normalize:
            waveforms = standardize(waveforms, valid)
        elif valid is not None:
            waveforms = torch.where(valid, waveforms, 0)

        x = waveforms[:, None].to(self.backbone.dtype)  # (B, 1, samples)
        frame_counts = lengths  # (B,), still counts of samples
        for i, layer in enumerate(self.backbone.feature_extractor.conv_layers):
            if lengths is not None:  # no convolution pads, so a clip's first frames come from its own samples only
                frame_counts = (frame_counts - config.conv_kernel[i]) // config.conv_stride[i] + 1  # (B,)
            if i == 0 and config.feat_extract_norm == "group" and lengths is not None:
                # the GroupNorm of "base" models normalises over time: padding would count
                x = layer.activation(normalize_each(layer.layer_norm, layer.conv(x), frame_counts))
            else:
                x = layer(x)  # (B, channels, frames)

        hidden = first(self.backbone.feature_projection(x.transpose(1, 2)))  # (B, frames, D), one frame per 20 ms
        hidden = hidden.to(self.backbone.dtype)  # autocast has made it bfloat16
        valid = None if lengths is None else valid_mask(frame_counts, hidden.shape[1])  # (B, frames)
        return Frames(hidden, valid)

    def add_positions(self, frames: Frames) -> Frames:
        """Masks spans of frames in training, and adds what tells the layers where in the clip a frame is."""
        hidden, config, encoder = frames.hidden, self.backbone.config, self.backbone.encoder
        if self.training and config.mask_time_prob > 0:
            mask = sample_time_mask(config, hidden, frames.valid)
            hidden = torch.where(mask[..., None], self.backbone.masked_spec_embed.to(hidden.dtype), hidden)
        if frames.valid is not None:
            hidden = torch.where(frames.valid[..., None], hidden, 0)  # the convolution must see zeros past the end
        # in float32 even under autocast: in bfloat16, oneDNN computes it wrongly for some widths on processors with AMX
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = hidden + encoder.pos_conv_embed(hidden)
        if not config.do_stable_layer_norm:  # post-LN: this norm stands before layer 1; pre-LN: see read_exit
            hidden = encoder.layer_norm(hidden)
        return frames._replace(hidden=encoder.dropout(hidden))

    def run_layers(self, frames: Frames, depth: int) -> Frames:
        """Runs the transformer layers from where the frames are to layer `depth`; no frame attends to padding."""
        config, hidden, bias = self.backbone.config, frames.hidden, frames.position_bias
        is_wavlm = config.model_type == "wavlm"
        mask = frames.valid if is_wavlm else create_bidirectional_mask(config, hidden, frames.valid)
        for layer in self.backbone.encoder.layers[frames.depth : depth]:
            if is_wavlm:  # its layers pass on a position bias
                hidden, bias = layer(hidden, attention_mask=mask, position_bias=bias)
            else:
                hidden = first(layer(hidden, attention_mask=mask))
        return frames._replace(hidden=hidden, depth=depth, position_bias=bias)

    def read_exit(self, exit: int, frames: Frames) -> ExitOutput:
        """Classifies the frames of layer `exit` by that exit's head."""
        hidden, head = frames.hidden, self.heads[str(exit)]
        if self.backbone.config.do_stable_layer_norm:  # pre-LN: the encoder's last norm belongs to every exit
            hidden = self.backbone.encoder.layer_norm(hidden)
        # heads run in their own dtype even under autocast: half precision slows recurrence, and the losses need float32
        with torch.autocast(hidden.device.type, enabled=False):
            logits, embedding = head(frames._replace(hidden=hidden.to(head.projector.weight.dtype)))
        return ExitOutput(exit, logits, embedding)

    @torch.no_grad()
    def early_exit(self, waveforms: Tensor, lengths: Tensor | None, threshold: float) -> tuple[Tensor, Tensor]:
        """Runs layer by layer; a clip leaves at the first exit where `should_stop` says so, or at the deepest.

        Clips that have left are dropped from the batch, and the others trimmed to the longest that stays: no layer runs
        unless some clip needs it. Returns logits (B, C) and the exit (B,) int64 that gave them; raises InputError as
        `forward` does, in training mode, and for a threshold outside THRESHOLDS' range.
        """
        self.check_early_exit(threshold)
        frames = self.embed_frames(waveforms, lengths)
        final_logits = frames.hidden.new_empty(len(waveforms), len(self.labels), dtype=torch.float32)
        active = torch.arange(len(waveforms), device=final_logits.device)  # the clips still in the batch
        exits = torch.empty_like(active)
        logits_so_far = final_logits.new_empty(0, *final_logits.shape)  # (exits so far, B, C)
        for k in self.exits:
            frames = self.run_layers(frames, k)
            logits = self.read_exit(k, frames).logits.float()
            final_logits[active], exits[active] = logits, k
            logits_so_far = torch.cat([logits_so_far, logits[None]])
            stay = ~should_stop(logits_so_far, threshold)  # (clips still in the batch,)
            if not stay.any():
                break
            active, frames, logits_so_far = active[stay], keep_clips(frames, stay), logits_so_far[:, stay]
        return final_logits, exits

    # -- classification, smaller models, files --------------------------------------------------------------------

    @torch.no_grad()
    def classify(
        self, clips, exit: int | None = None, threshold: float | str | None = None, sample_rate: int = SAMPLE_RATE
    ) -> "list[Prediction]":
        """Classifies files or waveforms, one at a time, in evaluation mode; then restores the mode of every module.

        So a model in training mode must not be shared by threads; one in evaluation mode may be.

        Args:
            clips: a list of paths, file objects or waveforms (T,) float, of up to 60 s; or a single one.
            exit: run to this exit and no further. Default: the deepest.
            threshold: stop at the first exit whose top probability reaches this; "auto": the model's own threshold.
            sample_rate: of the waveforms; files carry their own.
        Raises InputError or FileNotFoundError, naming the argument or the clip that cannot be read.
        """
        if exit is not None and threshold is not None:
            raise InputError("exit and threshold exclude each other: pass only one")
        if threshold == "auto":
            threshold = self.threshold
            if threshold is None:
                raise InputError('threshold "auto": this model has no threshold; pass a number from 0 to 1')
        if exit is None:
            exit = self.exits[-1]
        modes = {module: module.training for module in self.modules()}
        self.eval()
        predictions = []
        try:
            for clip in clips if isinstance(clips, list) else [clips]:
                waveform = read_clip(clip, self.tile_seconds, sample_rate).to(self.backbone.device)[None]  # (1, T)
                start = time.perf_counter()
                if threshold is None:
                    [(exit_used, logits, _)] = self(waveform, exit=exit)
                else:
                    logits, exit_used = self.early_exit(waveform, None, threshold)
                by_label = dict(zip(self.labels, probabilities(logits[0].float()).tolist()))
                milliseconds = 1000 * (time.perf_counter() - start)
                label = max(by_label, key=by_label.get)
                predictions.append(Prediction(label, by_label[label], by_label, int(exit_used), milliseconds))
        finally:
            for module, mode in modes.items():
                module.training = mode
        return predictions

    def truncate(self, exit: int) -> "MultiExitSER":
        """Returns a model of `exit` layers and only that exit, with copied weights and identical logits."""
        self.check_exit(exit)
        head = self.head_kinds[self.exits.index(exit)]
        small = MultiExitSER(self.labels, self.backbone.config.to_dict(), [exit], [head], self.tile_seconds)
        small.to(self.backbone.device, self.backbone.dtype)
        weights = self.state_dict()
        small.load_state_dict({name: weights[name] for name in small.state_dict()})
        return small.train(self.training)

    def save_pretrained(self, folder, push_to_hub: bool = False, repo_id=None, model_card_kwargs=None, **hub) -> None:
        """Writes model.safetensors and config.json, the Hub's convention, each whole or not at all.

        It also writes a model card, README.md, if there is none. The method `push_to_hub(name)`, of huggingface_hub,
        uploads all three; so does push_to_hub=True here, which passes `hub` on to it.
        """
        folder = Path(folder)
        with file_errors(folder, "cannot be made a folder", "choose another path"):
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
        without such a folder or Hub model, InputError for files that are damaged or do not fit each other.
        """
        checkpoint = folder = os.fspath(checkpoint)
        advice = "expected what train.py and model.save_pretrained write: config.json and model.safetensors"
        files = ["config.json", "model.safetensors"]
        if not os.path.isdir(folder):
            with file_errors(checkpoint, "neither a folder nor a reachable Hub model", advice, FileNotFoundError):
                folder = huggingface_hub.snapshot_download(checkpoint, allow_patterns=files, **hub)
        names = ("labels", "backbone", "exits", "head", "tile_seconds", "threshold")
        with file_errors(checkpoint, "not an sdser checkpoint, or an incomplete or damaged one", advice):
            saved = json.loads(Path(folder, "config.json").read_text())
            arguments = {name: saved[name] for name in names}
            weights = safetensors.torch.load_file(Path(folder, "model.safetensors"))
        try:
            with torch.device("meta"):  # no memory yet: a damaged config may ask for terabytes
                model = cls(**arguments)
        except InputError as error:
            raise InputError(f"{checkpoint}: in config.json, {error}") from error
        shapes, expected = ({name: list(x.shape) for name, x in y.items()} for y in (weights, model.state_dict()))
        differ = [name for name in {**expected, **shapes} if shapes.get(name) != expected.get(name)]
        if differ:
            pairs = [f"{x} is {shapes.get(x, 'missing')}, not {expected.get(x, 'expected')}" for x in differ[:3]]
            raise InputError(f"{checkpoint}: {len(differ)} weights do not fit the config: {', '.join(pairs)}")
        # copied, because tensor alignment affects rounding
        weights = {name: value.to(torch.float32, copy=True) for name, value in weights.items()}
        model.load_state_dict(weights, assign=True)
        return model.eval()

    # -- argument checks ------------------------------------------------------------------------------------------

    @staticmethod
    def check_arguments(labels, exits, head, tile_seconds, threshold, layers: int) -> None:
        """Raises InputError unless the arguments of `__init__` fit a backbone with this many layers."""
        if not isinstance(labels, list | tuple) or not all(isinstance(label, str) for label in labels):
            raise InputError(f"labels {labels!r}: expected a list of names")
        if len(set(labels)) < max(2, len(labels)):
            raise InputError(f"labels {labels!r}: expected at least two names, all different")
        are_layers = isinstance(exits, list | tuple) and all(isinstance(exit, int) for exit in exits)
        if not are_layers or not exits or list(exits) != sorted(set(exits)) or exits[0] < 1 or exits[-1] > layers:
            raise InputError(f"exits {exits!r}: expected increasing numbers from 1 to at most {layers}, the last layer")
        if not isinstance(head, list | tuple) or len(head) != len(exits) or not all(kind in HEADS for kind in head):
            raise InputError(f"head {head}: expected one of {', '.join(HEADS)}, or one for each of {len(exits)} exits")
        if "stats" in head and set(head) != {"stats"}:
            raise InputError(f"head {head}: stats needs stats at every exit, since the hint compares their embeddings")
        ranges = (
            ("tile_seconds", tile_seconds, 0.025, MAX_SECONDS),
            ("threshold", threshold, THRESHOLDS[-1], THRESHOLDS[0]),
        )
        for name, value, low, high in ranges:
            if value is not None and not (isinstance(value, int | float) and low <= value <= high):
                raise InputError(f"{name} {value!r}: expected a number from {low} to {high}, or None")

    @staticmethod
    def real_lengths(waveforms: Tensor, lengths: Tensor | None) -> Tensor | None:
        """Checks a batch; returns its lengths, on the waveforms' device, or None if no clip is padded."""
        if waveforms.ndim != 2 or not waveforms.is_floating_point():
            raise InputError(f"waveforms: expected floats (B, T), not {waveforms.dtype} {tuple(waveforms.shape)}")
        size = waveforms.shape[1]
        if lengths is not None and lengths.shape != waveforms.shape[:1]:
            raise InputError(f"lengths {tuple(lengths.shape)}: expected one for each of {len(waveforms)} clips")
        shortest, longest = (size, size) if lengths is None else (int(lengths.min()), int(lengths.max()))
        if shortest < MIN_SAMPLES or longest > size:
            raise InputError(f"lengths {shortest} to {longest}: expected {MIN_SAMPLES} (one frame) to {size}")
        return None if shortest == size else lengths.to(waveforms.device)

    def check_early_exit(self, threshold: float) -> None:
        if self.training:  # dropout and masks would decide
            raise InputError("early_exit needs a model in evaluation mode: call model.eval() first")
        if not THRESHOLDS[-1] <= threshold <= THRESHOLDS[0]:
            raise InputError(f"threshold {threshold}: expected a number from {THRESHOLDS[-1]} to {THRESHOLDS[0]}")

    def check_exit(self, exit: int | None) -> None:
        if exit not in (None, *self.exits):
            raise InputError(f"exit {exit}: the model has exits {', '.join(map(str, self.exits))}")


class Prediction(NamedTuple):
    label: str
    confidence: float  # the label's probability
    probabilities: dict[str, float]  # by label
    exit: int  # the exit that decided
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
    """Applies a norm over time to each clip's own frames of x (B, channels, T), lengths (B,); zero-pads the end."""
    clips = [norm(clip[..., :length]) for clip, length in zip(x.split(1), lengths.tolist())]
    return torch.cat([F.pad(clip, (0, x.shape[-1] - clip.shape[-1])) for clip in clips])


def mean_over_time(x: Tensor, valid: Tensor | None) -> Tensor:
    """Averages (B, T, D) over each clip's own frames; returns (B, D)."""
    if valid is None:
        return x.mean(1)
    return torch.where(valid[..., None], x, 0).sum(1) / valid.sum(1, keepdim=True)


def keep_clips(frames: Frames, clips: Tensor) -> Frames:
    """Returns the frames of some of the clips, (B,) bool, without the padding that only the others needed."""
    hidden, valid, bias = frames.hidden[clips], frames.valid, frames.position_bias
    if bias is not None:
        bias = bias.unflatten(0, (len(clips), -1))[clips].flatten(0, 1)
    if valid is not None:
        size = int(valid[clips].sum(1).max())
        hidden, valid = hidden[:, :size], valid[clips, :size]
        bias = None if bias is None else bias[:, :size, :size]
    return frames._replace(hidden=hidden, valid=valid, position_bias=bias)


def sample_time_mask(config: transformers.PretrainedConfig, hidden: Tensor, valid: Tensor | None) -> Tensor:
    """Draws SpecAugment's time mask (Park et al., 2019): (B, T) bool, true in random spans of frames.

    The config's mask_time_prob is the proportion of frames to mask (spans may overlap, so it is a little less),
    mask_time_length the length of a span, mask_time_min_masks the minimum number of spans. In short clips, spans are
    shorter, so that the minimum number of them covers at most half of the clip.
    """
    # An example: a clip of 500 frames with wav2vec2-base's 0.05, 10 and 2. A span has min(500 // 4, 10) = 10 frames;
    # there are 0.05 * 500 / 10 = 2.5 on average, so 2 or 3; each starts at a random frame from 0 to 490. A clip of 20
    # frames gets the least number, 2, of spans of 20 // 4 = 5 frames.
    (batch, size, _), device = hidden.shape, hidden.device
    num_frames = valid.sum(1) if valid is not None else torch.full((batch,), size, device=device)  # (B,)
    min_spans = config.mask_time_min_masks
    max_spans = max(min_spans, 1 + int(config.mask_time_prob * size))  # S: never exceeded, even by one-frame spans
    span_length = (num_frames // (2 * max(1, min_spans))).clamp(max=config.mask_time_length)  # (B,)
    mean_spans = config.mask_time_prob * num_frames / span_length.clamp(min=1)  # (B,)
    num_spans = (mean_spans + torch.rand(batch, device=device)).floor().clamp(min=min_spans)  # (B,)
    start = (torch.rand(batch, max_spans, device=device) * (num_frames - span_length + 1)[:, None]).long()  # (B, S)
    end = start + span_length[:, None]
    t = torch.arange(size, device=device)
    in_span = (t >= start[..., None]) & (t < end[..., None])  # (B, S, T)
    is_used = torch.arange(max_spans, device=device) < num_spans[:, None]  # (B, S)
    return (in_span & is_used[..., None]).any(1)


# -- the backbone: convolutional encoder and transformer, from `transformers` -----------------------------------------
# Built-in shapes with random weights, of about 1, 3, 95 and 315 million parameters. What is not named is as in
# facebook/wav2vec2-base, so "base" is exactly that model; "large" is facebook/wav2vec2-large-lv60, a pre-LN
# layout: each sublayer is normalised before it, not after it.
SIZES = {
    "tiny": dict(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512, conv_dim=[32] * 7,
                 num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4),
    "small": dict(hidden_size=192, num_hidden_layers=6, num_attention_heads=4, intermediate_size=768,
                  conv_dim=[96] * 7),
    "base": dict(feat_proj_dropout=0.1),
    "large": dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
                  feat_extract_norm="layer", conv_bias=True, do_stable_layer_norm=True),
}  # fmt: skip

warnings.filterwarnings("ignore", "Support for mismatched key_padding_mask")  # WavLM's layers: a bool and a float mask

# The families of backbones: for each, what is read here and its config leaves out. do_normalize: whether the backbone
# was trained on zero-mean, unit-variance waveforms; `transformers` keeps that elsewhere, see reads_normalized.
FAMILIES = {name: {"do_normalize": True} for name in ("wav2vec2", "hubert", "wavlm")}


def default_exits(backbone: str | dict, layers: int) -> list[int]:
    if backbone in ("tiny", "small"):
        return [1, 2, 4] if backbone == "tiny" else [2, 4, 6]
    return sorted({max(1, round(layers * depth)) for depth in (1 / 4, 2 / 3, 5 / 6, 1)})


def load_config(backbone: str | dict) -> transformers.PretrainedConfig:
    """Returns the config of a size, folder, Hub name or dict, with what FAMILIES adds; raises InputError for others."""
    if not isinstance(backbone, dict | str | os.PathLike):
        raise InputError(f"backbone {backbone!r}: expected a size, a folder, a Hub name, or a config as a dict")
    name = "the backbone's config" if isinstance(backbone, dict) else os.fspath(backbone)
    if isinstance(backbone, dict):
        config = backbone
    elif backbone in SIZES:
        config = {"model_type": "wav2vec2", "activation_dropout": 0.0, **SIZES[backbone]}
    else:
        config = read_config(name)
    family = config.get("model_type")
    if family not in FAMILIES or config.get("conv_pos_batch_norm"):
        advice = f"expected {', '.join(FAMILIES)}, without batch norm in the position convolution"
        raise InputError(f"{name}: its model_type is {family}; {advice}")
    with file_errors(name, "its configuration cannot be read", "save it again"):
        # no config may choose what code runs: attention can come from the Hub, and so can whole classes
        config = {key: config[key] for key in config if key != "auto_map" and "attn_implementation" not in key}
        return transformers.AutoConfig.for_model(**{**FAMILIES[family], **config})


def read_config(backbone: str) -> dict:
    """Returns the config of a folder saved by `transformers` or of a Hub model; with `do_normalize`."""
    sizes = ", ".join(SIZES)
    is_local = os.path.isabs(backbone) or "/" not in backbone or os.path.isdir(backbone)  # or else perhaps on the Hub
    if is_local and not os.path.isfile(os.path.join(backbone, "config.json")):
        raise InputError(f"{backbone}: not a built-in size ({sizes}), a Hub name, or a folder saved by transformers")
    with file_errors(backbone, "not a transformers checkpoint, or not a reachable Hub model", f"or use one of {sizes}"):
        config, _ = transformers.PretrainedConfig.get_config_dict(backbone)
    if {"labels", "exits", "backbone"} <= config.keys():
        advice = "MultiExitSER.from_pretrained(RUN).backbone.save_pretrained(FOLDER) makes a backbone of it"
        raise InputError(f"{backbone}: is an sdser run; {advice}")
    if "do_normalize" not in config:
        config["do_normalize"] = reads_normalized(backbone)
    return config


def reads_normalized(backbone: str) -> bool:
    """Returns what a backbone's feature extractor says about `do_normalize`; without one, True, with a warning."""
    name = "preprocessor_config.json"
    with file_errors(backbone, f"its {name} cannot be read", "download it again"):
        try:
            return transformers.AutoFeatureExtractor.from_pretrained(backbone, trust_remote_code=False).do_normalize
        except OSError as error:
            if isinstance(error.__context__, json.JSONDecodeError):  # it is there, but damaged
                raise
    if not os.path.isdir(backbone):
        absent = huggingface_hub.try_to_load_from_cache(backbone, name) is huggingface_hub._CACHED_NO_EXIST
        with file_errors(backbone, f"only the Hub knows whether it has a {name}", "go online once"):
            if not absent and huggingface_hub.file_exists(backbone, name):
                raise OSError("download failed")
    message = "has no preprocessor_config.json; assuming that it was trained on normalised waveforms"
    warnings.warn(f"{backbone}: {message} (do_normalize true)", stacklevel=2)
    return True


def load_backbone(backbone: str | dict, config: transformers.PretrainedConfig, layers: int):
    """Builds the backbone with its first layers, in float32; pre-trained unless built-in or a dict.

    It changes the config to what is built: every exit needs its layer, so none may be dropped at random in training;
    and the adapter of some models sits behind the last layer, unused.
    """
    config.num_hidden_layers, config.layerdrop, config.add_adapter = layers, 0.0, False
    if not config.apply_spec_augment:
        config.mask_time_prob = 0.0
    if isinstance(backbone, dict) or backbone in SIZES:
        model = transformers.AutoModel.from_config(config, dtype=torch.float32)
    else:
        model = load_weights(os.fspath(backbone), config)
    if config.mask_time_prob == 0 and hasattr(model, "masked_spec_embed"):
        model.masked_spec_embed.requires_grad_(False)  # no loss would reach it
    model.config.name_or_path = ""  # or a checkpoint would publish this machine's folders
    return model


def load_weights(backbone: str, config: transformers.PretrainedConfig) -> transformers.PreTrainedModel:
    """Loads a pre-trained backbone, in training mode; raises InputError if its weights do not fit its config."""
    verbosity, has_bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()  # else it lists every layer and quantizer weight left out on purpose
    transformers.logging.disable_progress_bar()
    try:
        with file_errors(backbone, "its weights cannot be loaded", "download or save it again"):
            model, info = transformers.AutoModel.from_pretrained(
                backbone, config=config, dtype=torch.float32, output_loading_info=True
            )
    finally:
        transformers.logging.set_verbosity(verbosity)
        if has_bars:
            transformers.logging.enable_progress_bar()
    missing = set(info["missing_keys"]) - {"masked_spec_embed"}
    if missing:
        raise InputError(f"{backbone}: lacks {len(missing)} weights, for example {min(missing)}; save it again")
    return model.train()  # from_pretrained leaves it in evaluation mode, from_config in training mode


def first(output):
    """Returns the first of several outputs; which modules return a tuple depends on the family and the version."""
    return output[0] if isinstance(output, tuple) else output


# -- audio ------------------------------------------------------------------------------------------------------------
MAX_SECONDS = 60  # of a clip to classify: attention's memory grows with the square of the length
MIN_SAMPLES = 400  # one frame of the convolutional encoder, 25 ms
HEADER_SLACK = 0.01  # seconds by which a header may promise more audio than there is


def load_audio(file, start: float = 0.0, seconds: float | None = None) -> Tensor:
    """Reads an audio file, or a part of it, as a waveform (T,), float32, mono at 16 kHz, nominally in [-1, 1].

    Args:
        file: a path or a binary file object; anything libsndfile reads (WAV, FLAC, OGG, MP3, ...), at any sample
            rate. Channels are averaged.
        start, seconds: the part to read; default: from the start to the end.
    Raises FileNotFoundError, or InputError for what is not audio, truncated, shorter than one frame, or not finite.
    """
    with open_audio(file) as (name, sound):
        rate, offset = sound.samplerate, round(start * sound.samplerate)
        wanted = sound.frames - offset  # samples
        if seconds is not None:
            wanted = min(wanted, round(seconds * rate))
        with file_errors(name, "damaged or truncated", "replace the file"):
            if sound.seekable() and sound.format != "MP3":  # libmpg123 seeks inexactly, and prints errors when it does
                sound.seek(offset)
                offset = 0
            samples = sound.read(offset + wanted, dtype="float32", always_2d=True)[offset:]  # (T, channels)
    if wanted - len(samples) > HEADER_SLACK * rate:
        raise InputError(f"{name}: truncated: only {len(samples)} of {wanted} samples present; replace the file")
    waveform = samples.mean(axis=1)
    if np.square(waveform).mean() < 1e-3 * np.square(samples).mean():  # 30 dB weaker
        raise InputError(f"{name}: its channels cancel each other; keep one: ffmpeg -i IN -af pan=mono|c0=c0 OUT.wav")
    return to_16_khz(name, torch.from_numpy(waveform), rate)


@contextlib.contextmanager
def open_audio(file):
    """Yields a file's name and its `soundfile.SoundFile`, once its header has been checked."""
    name = name_of(file)
    if not hasattr(file, "read") and not os.path.isfile(file):
        raise FileNotFoundError(f"{name}: no such audio file")
    if inspect.iscoroutinefunction(getattr(file, "read", None)):
        raise InputError(f"{name}: its read is asynchronous, as of a FastAPI UploadFile; pass its .file")
    with file_errors(name, "not an audio file that libsndfile can read", "ffmpeg -i IN OUT.wav converts most"):
        with contextlib.suppress(AttributeError, OSError):  # a path, and a stream that cannot go back
            file.seek(0)  # it may have been read before
        file = io.BytesIO(file.read()) if hasattr(file, "read") else os.fspath(file)
        sound = soundfile.SoundFile(file)
    with sound:
        check_header(name, sound)
        if sound.format == "MP3":
            check_mp3(name, file.getvalue() if isinstance(file, io.BytesIO) else Path(file).read_bytes())
        yield name, sound


def name_of(file) -> str:
    """Returns what messages call a path or a file object, whose name may be None or a number."""
    if not hasattr(file, "read"):
        return os.fspath(file)
    name = getattr(file, "name", None)
    return name if isinstance(name, str) and name else "the file object"


def check_mp3(name: str, content: bytes) -> None:
    """Raises InputError if an MP3 does not declare its length, which libsndfile then guesses, too short or too long."""
    tag, start = content[:10], 0
    if tag[:3] == b"ID3":  # a tag comes first; its size is given in four times 7 bits
        start = 10 + (tag[6] << 21) + (tag[7] << 14) + (tag[8] << 7) + tag[9]
    if not any(mark in content[start : start + 200] for mark in (b"Xing", b"Info", b"VBRI")):
        raise InputError(f"{name}: an MP3 that does not declare its length; convert it: ffmpeg -i IN OUT.wav")


def check_header(name: str, sound: soundfile.SoundFile) -> None:
    """Raises InputError if the file is incomplete, which libsndfile reports only in its log."""
    if sound.frames == 0:
        raise InputError(f"{name}: declares no audio; ffmpeg -ignore_length 1 -i IN OUT.wav may repair it")
    if sound.frames > 2**48:  # a FLAC that was written into a pipe
        raise InputError(f"{name}: does not declare its length; convert it: ffmpeg -i IN OUT.wav")
    check_size(name, sound.frames, sound.samplerate)
    # WAV, AIFF, AU, W64 and RF64 each declare the bytes of audio, or of the whole file, under another name
    declared = r"^\s*(?:data|SSND|Data Size|riff|Riff size)\s*: (\d+) \(should be (\d+)\)"
    cut = re.search(declared, sound.extra_info, re.MULTILINE)
    if cut:
        promised, present = int(cut[1]), int(cut[2])  # bytes of audio: what the header claims, what is there
        missing = sound.frames / sound.samplerate * (promised / present - 1)  # seconds
        # Some recorders count the header as audio; programs that write into a pipe declare 2 GiB or more: "unknown".
        if missing > HEADER_SLACK and promised < 0x7FFFF000:
            raise InputError(f"{name}: truncated: only {present} of {promised} bytes present; replace the file")
    if "after the last page" in sound.extra_info:  # of an Ogg
        raise InputError(f"{name}: truncated: its end is missing; replace the file")


def check_size(name, samples: int, rate: int) -> None:
    """Raises InputError for a rate that no device has, or for fewer samples than one frame."""
    if not 1000 <= rate <= 1_000_000:  # resampling would take gigabytes
        raise InputError(f"{name}: a sample rate of {rate} Hz, outside 1 kHz to 1 MHz, cannot be right")
    if samples / rate < MIN_SAMPLES / SAMPLE_RATE:
        raise InputError(f"{name}: {samples / rate:.4f} s are shorter than one frame, {MIN_SAMPLES / SAMPLE_RATE} s")


def to_16_khz(name, waveform: Tensor, rate: int) -> Tensor:
    """Resamples a waveform (T,) to 16 kHz; raises InputError if it cannot be classified, warns if it is silent."""
    check_size(name, len(waveform), rate)
    if rate != SAMPLE_RATE:
        advice = "pip install torchaudio, or convert the file to 16 kHz"
        with file_errors(name, f"resampling from {rate} Hz needs torchaudio", advice):
            import torchaudio  # here, so that nothing else needs it
        # The filter grows with rate / gcd(rate, 16000): odd rates, such as 11127 Hz, become a multiple of 25 Hz.
        waveform = torchaudio.functional.resample(waveform, max(25, 25 * round(rate / 25)), SAMPLE_RATE)
    if not waveform.isfinite().all():
        raise InputError(f"{name}: holds NaN or infinite samples; re-export it")
    if not waveform.any():
        warnings.warn(f"{name}: digital silence; its prediction means nothing", stacklevel=2)
    return waveform


def read_clip(clip, tile_seconds: float | None = None, sample_rate: int = SAMPLE_RATE) -> Tensor:
    """Reads a path, a file object or a 1-D float array of at most 60 s; returns the waveform (T,), float32, 16 kHz."""
    if isinstance(clip, str | os.PathLike) or hasattr(clip, "read"):
        name, waveform = name_of(clip), load_audio(clip, seconds=MAX_SECONDS + 1)
    elif getattr(clip, "ndim", None) == 1 and "float" in str(clip.dtype):  # numpy's, torch's and pandas' dtypes
        name, waveform = "the waveform", to_16_khz("the waveform", torch.as_tensor(clip).float(), sample_rate)
    else:
        raise InputError(f"{type(clip).__name__}: pass paths, file objects or 1-D arrays of floats, or a list of them")
    if len(waveform) > MAX_SECONDS * SAMPLE_RATE:
        raise InputError(f"{name}: longer than the limit of {MAX_SECONDS} s; cut it into windows (see the README)")
    return waveform if tile_seconds is None else tile(waveform, tile_seconds)


def tile(waveform: Tensor, seconds: float) -> Tensor:
    """Repeats or cuts a waveform (T,) to this length, as the paper does to reach 5.984 s (95,744 samples)."""
    samples = round(seconds * SAMPLE_RATE)
    return waveform.repeat(math.ceil(samples / len(waveform)))[:samples]


# -- files: every error is one sentence that names the file -----------------------------------------------------------
class InputError(ValueError):
    """Says in one sentence what a user gave that cannot be used, and what would be right."""


@contextlib.contextmanager
def file_errors(path, problem: str, advice: str, kind: type[Exception] = InputError):
    """Turns whatever a library raises while it reads or writes a file into "PATH: PROBLEM (REASON); ADVICE".

    Wrap only calls of libraries: a fault in our own code must show its traceback.
    """
    try:
        yield
    except Exception as error:
        reason = (getattr(error, "strerror", None) or str(error)).strip().partition("\n")[0].rstrip(".:")
        raise kind(f"{path}: {problem} ({reason}); {advice}") from error


def replace_file(path, content: bytes | str) -> None:
    """Writes a file whole, or leaves what was there; keeps symlinks, and writes straight to such as /dev/stdout."""
    content = content.encode() if isinstance(content, str) else content
    with file_errors(path, "cannot be written", "free some space or choose another path"):
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
