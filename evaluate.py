"""Scores each exit of trained models and says what it costs; everything that must stay equal for scores to compare.

    python evaluate.py out                                  # the run's own test split
    python evaluate.py fold1 fold2 fold3                    # the runs of several folds, their test clips pooled
    python evaluate.py out --against other                  # the paired difference between two runs, or sets of runs
    python evaluate.py out --data path/to/another/corpus
    python evaluate.py out --audio a.wav b.flac             # classify files

It reads checkpoints and changes nothing in them. From top to bottom:

    clips             Clip, target_of; load_corpus: a folder of a known corpus, or a manifest
    splits            split_clips: no speaker is in two of them
    reading           inspect_clips, before any work; batches; predict: clips -> logits
    scores            scores; bootstrap, intervals; early exit
    costs             count_macs, count_parameters
    the report        Pool: the clips and logits of several runs; its tables, as JSON, text and plot
    the command       classifying files; flags; how each of the scripts ends
"""

import argparse
import contextlib
import csv
import glob
import io
import json
import os
import re
import sys
import unicodedata
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PureWindowsPath
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import sdser
from sdser import InputError

WORLD = int(os.environ.get("WORLD_SIZE") or 1)  # how many processes torchrun has started, and which of them this is
RANK = int(os.environ.get("RANK") or 0) if WORLD > 1 else 0
HERE = Path(__file__).resolve().parent
DATA = HERE / "data"  # real speech and a small pre-trained network


# -- clips: from a folder of a known corpus, or from a manifest -------------------------------------------------------
class Clip(NamedTuple):
    path: str
    label: str
    speaker: str | None
    split: str | None = None  # train, dev or test
    seconds: float | None = None  # see inspect_clips
    more: dict[str, str] = {}  # noqa: RUF012  a manifest's other columns; never changed in place


def labels_of(clips: list[Clip]) -> list[str]:
    """Returns what a model of these clips has logits for. Other tasks change this and the next two functions."""
    return sorted({clip.label for clip in clips})


def is_known(clip: Clip, labels: list[str]) -> bool:
    """Returns whether a model with these labels can be trained and scored on a clip."""
    return clip.label in labels


def target_of(clip: Clip, labels: list[str]) -> int:
    """Returns what the loss and `scores` take as the truth about a clip: the index of its label.

    It may return a list of numbers, such as the proportion of annotators that voted for each label.
    """
    return labels.index(clip.label)


# Each corpus has a pattern for the names of its files, without their ending, and what its label codes mean.
CORPORA = {
    "RAVDESS": (r"03-01-(?P<label>\d\d)-\d\d-\d\d-\d\d-(?P<speaker>\d\d)",  # speech; songs are 03-02-...
                {"01": "neutral", "02": "calm", "03": "happiness", "04": "sadness", "05": "anger", "06": "fear",
                 "07": "disgust", "08": "surprise"}),
    "EMO-DB": (r"(?P<speaker>\d\d)[ab]\d\d(?P<label>[A-Z])[a-z]?",
               {"W": "anger", "L": "boredom", "E": "disgust", "A": "fear", "F": "happiness", "T": "sadness",
                "N": "neutral"}),
    "CREMA-D": (r"(?P<speaker>\d{4})_[A-Z]{3}_(?P<label>[A-Z]{3})_[A-Z]{1,2}",
                {"ANG": "anger", "DIS": "disgust", "FEA": "fear", "HAP": "happiness", "NEU": "neutral",
                 "SAD": "sadness"}),
    "SAVEE": (r"(?P<speaker>DC|JE|JK|KL)[_/](?P<label>[a-z]{1,2})\d\d",
              {"a": "anger", "d": "disgust", "f": "fear", "h": "happiness", "n": "neutral", "sa": "sadness",
               "su": "surprise"}),
    "TESS": (r"(?P<speaker>OAF?|YAF)_[^/]+_(?P<label>[a-z]+)",
             {"angry": "anger", "disgust": "disgust", "fear": "fear", "happy": "happiness", "neutral": "neutral",
              "ps": "surprise", "sad": "sadness"}),
    "DEMoS": (r"(?:NP|PR)_(?P<speaker>[fm]_\d+)_(?P<label>[a-z]{3})\d+[a-z]?",
              {"rab": "anger", "dis": "disgust", "pau": "fear", "col": "guilt", "gio": "happiness", "tri": "sadness",
               "sor": "surprise", "neu": "neutral"}),
    "URDU": (r"(?P<speaker>S[MF]\d+)_F\d+_(?P<label>[A-Z])\d+",
             {"A": "anger", "H": "happiness", "N": "neutral", "S": "sadness"}),
}  # fmt: skip
AUDIO_ENDINGS = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf")
SPLITS = ("train", "dev", "test")
COLUMNS = ("path", "label", "speaker", "split")  # of a manifest


def load_corpus(source) -> list[Clip]:
    """Lists the clips of a corpus, each once, with a split only where a manifest gives one; no audio is read.

    source: a folder of one of CORPORA, recognised by its file names, or a CSV or TSV manifest. Raises FileNotFoundError
    or InputError, naming the file and line and what would be right.
    """
    source = os.fspath(source)
    if not os.path.exists(source):
        raise FileNotFoundError(f"{source}: no such folder or manifest")
    return read_folder(source) if os.path.isdir(source) else read_manifest(source)


def read_folder(folder: str) -> list[Clip]:
    """Returns the clips of a folder, by the file-name pattern of CORPORA that fits most of its audio files."""
    files = audio_files(folder)
    names = [path.with_suffix("").as_posix() for path in files]
    matches = {corpus: [re.fullmatch(rf"(?:.*/)?{pattern}", name) for name in names]
               for corpus, (pattern, _) in CORPORA.items()}  # fmt: skip
    corpus = min(CORPORA, key=lambda corpus: matches[corpus].count(None))
    clips, copies, skipped, meaning = {}, [], [], CORPORA[corpus][1]
    for path, match in zip(files, matches[corpus]):
        if match is None:
            skipped.append(path)
            continue
        if match["label"] not in meaning:
            raise InputError(f"{path}: unknown emotion {match['label']!r}; {corpus} has {', '.join(meaning)}")
        speaker = "OAF" if match["speaker"] == "OA" else match["speaker"]  # a few files of TESS
        recording = (path.stem, speaker)  # these corpora give every recording its own name
        if recording in clips:
            copies.append(f"{path} and {clips[recording].path}")
        else:
            clips[recording] = Clip(str(path), meaning[match["label"]], speaker)
    if not clips:
        raise InputError(f"{folder}: {files[0].name} matches no known corpus ({', '.join(CORPORA)}); write a manifest")
    if skipped:
        warnings.warn(f"{folder}: ignored {len(skipped)} files that are not {corpus}: {skipped[0]}", stacklevel=3)
    if copies:
        warnings.warn(f"{folder}: ignored {len(copies)} duplicates: {copies[0]}", stacklevel=3)
    return list(clips.values())


def audio_files(folder: str) -> list[Path]:
    """Lists the audio files below a folder, but for hidden ones; raises InputError if there are none."""
    paths = (Path(folder, name) for name in glob.iglob("**", root_dir=folder, recursive=True))
    files = sorted(path for path in paths if path.suffix.lower() in AUDIO_ENDINGS and path.is_file())
    if not files:
        raise InputError(f"{folder}: holds no audio files ({', '.join(AUDIO_ENDINGS)})")
    return files


def read_manifest(manifest: str) -> list[Clip]:
    """Returns the clips of a CSV or TSV whose first line names its columns; paths are relative to the manifest."""
    rows = read_rows(manifest)
    _, header = next(rows, (1, []))
    names = [name.lower() if name.lower() in COLUMNS else name for name in header]
    if not {"path", "label"} <= set(names):
        advice = "expected a CSV or TSV whose first line has the columns path and label (and speaker)"
        raise InputError(f"{manifest}: the first line reads {', '.join(header)!r}; {advice}")
    parts = [name for name in names if name.lower() in ("start", "end", "offset", "duration")]
    if parts:
        advice = "first cut the segments into separate files, as docs/corpora.md shows"
        raise InputError(f"{manifest}: has a column {parts[0]}, but clips are read whole; {advice}")
    others = [name for name in names if name not in COLUMNS]
    clips, repeated = {}, []
    for number, row in rows:
        values = dict(zip(names, row))
        split = values.get("split") or None
        if len(row) != len(names) or not values["path"] or not values["label"] or split not in (None, *SPLITS):
            advice = "expected path, label and optionally a split: train, dev or test"
            raise InputError(f"{manifest}: line {number} reads {row}; {advice}")
        path = os.path.normpath(os.path.join(os.path.dirname(manifest), values["path"]))
        decomposed = unicodedata.normalize("NFD", path)  # as a Mac spells letters with accents
        path = decomposed if os.path.exists(decomposed) and not os.path.exists(path) else path
        more = {name: values[name] for name in others}
        clip = Clip(path, values["label"], values.get("speaker") or None, split, more=more)
        if path in clips:
            repeated.append(path)
            if clip != clips[path]:
                raise InputError(f"{manifest}: line {number}: {path} is listed before, with other values")
        clips[path] = clip
    if not clips:
        raise InputError(f"{manifest}: lists no clips")
    if others:
        warnings.warn(f"{manifest}: other columns are kept as clip.more: {', '.join(others)}", stacklevel=3)
    if repeated:
        warnings.warn(f"{manifest}: ignored {len(repeated)} duplicates: {repeated[0]}", stacklevel=3)
    return list(clips.values())


def read_rows(manifest: str):
    """Yields the lines of a CSV or TSV that are not empty, each as its number and its cleaned fields."""
    with sdser.file_errors(manifest, "not a text file", "expected a CSV or TSV in UTF-8"):
        lines = Path(manifest).read_text(encoding="utf-8-sig").splitlines()
    delimiter = max(",\t;", key=lines[0].count) if lines else ","
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL  # in a TSV, sentences may begin with a quote
    for number, line in enumerate(lines, 1):
        if line.strip():  # each line by itself, so that no row runs on over several lines
            with sdser.file_errors(manifest, f"line {number}: a quotation mark is not closed", "close or double it"):
                [row] = csv.reader([line], delimiter=delimiter, quoting=quoting, strict=True)
            yield number, [clean(field) for field in row]


def clean(text: str) -> str:
    """Returns a field in one spelling: Unicode's NFC, no zero-width characters; empty if pandas had no value."""
    text = unicodedata.normalize("NFC", re.sub("[\u200b-\u200d\u2060\ufeff]", "", text)).strip()
    return "" if text in ("nan", "NaN", "None", "<NA>") else text


# -- splits: no speaker is in two of them -----------------------------------------------------------------------------
def split_clips(clips: list[Clip], fold: tuple[int, int] = (1, 5), final: bool = False) -> list[Clip]:
    """Gives every clip a split, by speaker; depends only on the clips and the fold. Warns of names spelled in two ways.

    clips: splits that they have are kept. fold: (I, N), of N groups of speakers the I-th is test, the next dev, the
    rest train. final: dev trains too. Raises InputError for too few speakers, a clip with neither speaker nor split,
    and what `check_splits` refuses.
    """
    if not any(clip.split for clip in clips):
        clips = deal_speakers(clips, *fold)
    if final:
        clips = [clip._replace(split="train") if clip.split == "dev" else clip for clip in clips]
    check_splits(clips, final)
    for kind in ("label", "speaker"):
        names = {getattr(clip, kind) or "" for clip in clips}
        spellings = Counter(name.casefold() for name in names)
        alike = sorted(name for name in names if spellings[name.casefold()] > 1)
        if alike:
            warnings.warn(f"some {kind}s differ only in case: {', '.join(alike)}", stacklevel=2)
    return clips


def deal_speakers(clips: list[Clip], index: int, count: int) -> list[Clip]:
    """Deals speakers into `count` groups: the one with the most clips first, into the group with the fewest so far."""
    sizes = Counter(clip.speaker for clip in clips)
    for clip in clips:
        if clip.speaker is None:
            raise InputError(f"{clip.path}: has neither speaker nor split; the manifest must have one of them")
    if len(sizes) < count:
        advice = "use fewer groups in --fold" if len(sizes) >= 3 else "add speakers, or a column split"
        raise InputError(f"{len(sizes)} speakers are too few for {count} groups; {advice}")
    group_of, filled = {}, [0] * count
    for speaker in sorted(sizes, key=lambda speaker: (-sizes[speaker], speaker)):
        group_of[speaker] = filled.index(min(filled))
        filled[group_of[speaker]] += sizes[speaker]
    split_of = {index - 1: "test", index % count: "dev"}  # index counts from 1, groups from 0; dev is the next group
    return [clip._replace(split=split_of.get(group_of[clip.speaker], "train")) for clip in clips]


def check_splits(clips: list[Clip], final: bool) -> None:
    """Raises InputError unless each split (but dev if final) has clips, train has every label, each speaker one split.

    Warns of labels that dev or test lacks.
    """
    split_of, labels = {}, {clip.label for clip in clips}
    for clip in clips:
        if clip.split is None:
            raise InputError(f"{clip.path}: has no split while other clips have one; every clip needs a split, or none")
        other = split_of.setdefault(clip.speaker, clip.split)
        if clip.speaker and other != clip.split:
            advice = "keep each in one; to accept a corpus's own splits as they are, leave the column speaker out"
            raise InputError(f"speaker {clip.speaker} is in two splits, {other} and {clip.split}; {advice}")
    for split in ("train", "test") if final else SPLITS:
        present = {clip.label for clip in clips if clip.split == split}
        problem = f"the {split} split lacks {', '.join(sorted(labels - present))}"
        if not present:
            raise InputError(f"the {split} split is empty; every split needs clips")
        if present != labels and split == "train":
            raise InputError(f"{problem}; use another --fold, or leave labels out by --labels")
        if present != labels:
            message = f"its {METRIC.upper()} is a mean over the others (another --fold may have all)"
            warnings.warn(f"{problem}: {message}", stacklevel=1)  # this line, so that a second check is silent


# -- reading clips, and the logits that a model gives them ------------------------------------------------------------
BATCH_SECONDS = 24  # of padded audio that is scored at once; on a CPU, larger batches are slower


def inspect_clips(clips: list[Clip], skip_bad: bool = False) -> list[Clip]:
    """Fills in each clip's seconds, from its header; raises InputError if a clip cannot be read.

    Files that are scored are decoded whole, since their faults must show before the training, not after it.
    skip_bad: decode every file whole, and leave out those that cannot be read, with a warning for each.
    """

    def inspect(clip: Clip) -> Clip | Exception:
        try:
            with sdser.open_audio(clip.path) as (_, sound):
                seconds = sound.frames / sound.samplerate
            if clip.split != "train" and seconds > sdser.MAX_SECONDS:
                raise InputError(f"{clip.path}: {seconds:.1f} s is over the limit of {sdser.MAX_SECONDS} s; cut it")
            if skip_bad or clip.split != "train":
                sdser.load_audio(clip.path)
            return clip._replace(seconds=seconds)
        except (OSError, InputError) as error:
            return error

    with ThreadPoolExecutor(8) as pool:  # I/O-bound, so threads suffice
        inspected = list(progress(pool.map(inspect, clips), "checking files", len(clips)))
    good = [clip for clip in inspected if isinstance(clip, Clip)]
    errors = [error for error in inspected if isinstance(error, Exception)]
    if errors and not (skip_bad and good):
        advice = "repair them or leave them out, as train.py --skip-bad does; has the corpus moved? see docs/corpora.md"
        raise InputError(f"{errors[0]} ({len(errors)} of {len(clips)} clips are bad; {advice})")
    for error in errors:
        warnings.warn(f"left out: {error}", stacklevel=2)
    return good


class ClipDataset(Dataset):
    """Returns clip i as (its waveform (T,), its target): whole, or repeated or cut to tile_seconds."""

    def __init__(self, clips: list[Clip], labels: list[str], tile_seconds: float | None):
        self.clips, self.labels, self.tile_seconds = clips, labels, tile_seconds

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.read(i), target_of(self.clips[i], self.labels)

    def read(self, i: int) -> Tensor:
        waveform = sdser.load_audio(self.clips[i].path, seconds=self.tile_seconds)
        return sdser.tile(waveform, self.tile_seconds) if self.tile_seconds else waveform


def load_batches(dataset: ClipDataset, batches: list[list[int]], workers: int) -> DataLoader:
    """Loads batches of clips, each a list of their indices, as `collate` returns them."""
    own = torch.Generator()  # so that loading draws nothing from the generator of dropout and masks
    return DataLoader(dataset, batch_sampler=batches, collate_fn=collate, num_workers=workers, generator=own)


def collate(items: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns a batch of waveforms (T,) and targets: (B, T) zero-padded at the end, lengths (B,), targets (B,)."""
    waveforms, targets = [waveform for waveform, _ in items], torch.tensor([target for _, target in items])
    lengths = torch.tensor([len(waveform) for waveform in waveforms])
    batch = torch.nn.utils.rnn.pad_sequence(waveforms, batch_first=True)
    if len(lengths.unique()) > 1:
        # A few more zeros, to a quarter of a second: oneDNN keeps buffers for every T that it has seen, and a corpus of
        # 1,440 clips has so many that they took as much memory as all else.
        batch = F.pad(batch, (0, -batch.shape[1] % 4000))
    return batch, lengths, targets


@torch.no_grad()
def predict(model: sdser.MultiExitSER, clips: list[Clip], batch_size: int = 16, workers: int = 0) -> Tensor:
    """Returns logits (exits, N, C) of whole clips, float32 on the CPU; InputError if not finite; calls model.eval()."""
    model.eval()
    logits = torch.zeros(len(model.exits), len(clips), len(model.labels))
    seconds = [model.tile_seconds or clip.seconds for clip in clips]
    batches = [[]]
    for i in np.argsort(seconds, kind="stable").tolist():  # sorted, so clip i is the longest so far
        is_full = len(batches[-1]) == batch_size or (len(batches[-1]) + 1) * seconds[i] > BATCH_SECONDS
        if batches[-1] and is_full:
            batches.append([])
        batches[-1].append(i)
    batches = batches[RANK::WORLD]  # each process scores its part
    loader = load_batches(ClipDataset(clips, model.labels, model.tile_seconds), batches, workers)
    for batch, (waveforms, lengths, _) in zip(batches, progress(loader, "scoring", len(batches))):
        outputs = model(waveforms.to(model.backbone.device), lengths)
        logits[:, batch] = torch.stack([output.logits for output in outputs]).float().cpu()
    if WORLD > 1:
        dist.all_reduce(logits)
    if not logits.isfinite().all():
        raise InputError("the model's logits are not finite; try a smaller --lr")
    return logits


def targets_of(clips: list[Clip], labels: list[str]) -> Tensor:
    """Returns what `target_of` says of each clip, stacked: (N,) int64, or (N, C) for votes."""
    return torch.tensor([target_of(clip, labels) for clip in clips])


def progress(steps, title: str, total: int) -> tqdm:
    """Shows a bar on a terminal, for anything over a second; only the first of several processes shows one."""
    return tqdm(steps, title, total, leave=False, disable=True if RANK else None, delay=1)


# -- scores, and their intervals --------------------------------------------------------------------------------------
METRIC = "uar"  # the score by which thresholds are chosen, and the one with intervals
DRAWS = 2000  # of the bootstrap


def scores(targets: Tensor, logits: Tensor) -> dict[str, float]:
    """Returns the UAR (unweighted average recall), accuracy and macro F1 of logits (N, C).

    targets: as `targets_of` returns them. UAR and F1 are means over the classes that occur in them.
    """
    confusion = confusion_matrix(targets, logits)
    hits, true, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    f1 = (2 * hits / np.maximum(true + predicted, 1))[true > 0]
    return {METRIC: metric(targets, logits), "accuracy": float(hits.sum() / true.sum()), "macro_f1": float(f1.mean())}


def metric(targets: Tensor, logits: Tensor) -> float:
    """Returns the score METRIC and no other, for the many draws of the bootstrap."""
    return float(np.nanmean(recalls(targets, logits)))


def recalls(targets: Tensor, logits: Tensor) -> np.ndarray:
    """Returns the recall of each class, (C,), NaN for a class that does not occur."""
    confusion = confusion_matrix(targets, logits)
    true = confusion.sum(1)
    return np.where(true > 0, confusion.diagonal() / np.maximum(true, 1), np.nan)


def confusion_matrix(targets: Tensor, logits: Tensor) -> np.ndarray:
    """Counts clips into (C, C): a row per true class (the one with the most votes), a column per predicted class."""
    classes = logits.shape[-1]
    if targets.ndim == 2:
        targets = targets.argmax(-1)
    cells = targets * classes + logits.argmax(-1)
    return np.bincount(cells.numpy(), minlength=classes**2).reshape(classes, classes)


def bootstrap(targets: Tensor, logits: Tensor, units: list[str]) -> np.ndarray:
    """Returns the metric (rows, DRAWS) of logits (rows, N, C) on DRAWS resamples, each of as many units as there are.

    Units are drawn with replacement: a speaker with all their clips, which are not independent. Two calls on the same
    units draw the same, so that their differences are paired.
    """
    names, unit = np.unique(units, return_inverse=True)  # unit: (N,) an index of names
    rng, values = np.random.default_rng(0), []
    for _ in progress(range(DRAWS), "bootstrap", DRAWS):
        times_drawn = np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))
        clips = torch.from_numpy(np.repeat(np.arange(len(unit)), times_drawn[unit]))
        values.append([metric(targets[clips], row[clips]) for row in logits])
    return np.array(values).T


def interval(draws: np.ndarray, units: list[str]) -> list[float] | None:
    """Returns the 95% interval of draws (DRAWS,); None if there are fewer than five units.

    The percentiles of draws of few units are too narrow. They are pushed out as far as Student's t with n - 1 degrees
    of freedom is wider than the normal distribution, and by the factor sqrt(n / (n - 1)) (Hesterberg, 2015): for 10
    units, to 0.86% and 99.14%.
    """
    n = len(set(units))
    if n < 5:
        return None
    v = n - 1
    t = 1.95996 + 2.37227 / v + 2.82250 / v**2 + 2.55585 / v**3 + 1.58954 / v**4  # Abramowitz and Stegun, 26.7.5
    tail = 100 * NormalDist().cdf(-t * (n / v) ** 0.5)
    return np.percentile(draws, [tail, 100 - tail]).tolist()


# -- early exit -------------------------------------------------------------------------------------------------------
def exit_index(logits: Tensor, thresholds: float | Tensor) -> Tensor:
    """Returns the index of the exit (N,) at which each clip leaves; logits: (exits, N, C); thresholds: one or (N,)."""
    stops = torch.stack([sdser.should_stop(logits[: i + 1], thresholds) for i in range(len(logits))])  # (exits, N)
    stops[-1] = True
    return stops.int().argmax(0)  # the first that stops


def early_logits(logits: Tensor, thresholds: float | Tensor) -> Tensor:
    """Returns each clip's logits (N, C) from the exit at which it leaves."""
    return logits[exit_index(logits, thresholds), torch.arange(logits.shape[1])]


def choose_threshold(targets: Tensor, logits: Tensor, tolerance: float) -> float | None:
    """Lowers the threshold from 1 as long as the metric stays within the tolerance of the deepest exit's.

    Returns the last threshold before it first falls below, since any lower one that passed again would be luck; None if
    none passes.
    """
    enough, chosen = metric(targets, logits[-1]) - tolerance, None
    for threshold in sdser.THRESHOLDS:
        if metric(targets, early_logits(logits, threshold)) < enough:
            break
        chosen = threshold
    return chosen


# -- costs ------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def count_macs(model: sdser.MultiExitSER, samples: int, exit: int, heads_on_the_way: bool = False) -> int:
    """Counts the multiply-accumulates of the matrix products and convolutions that run for one clip up to an exit.

    The model must be on the CPU. samples: the clip's length at 16 kHz, before it is tiled. heads_on_the_way: with the
    heads of the shallower exits.
    """
    if model.tile_seconds:
        samples = round(model.tile_seconds * sdser.SAMPLE_RATE)
    # torch's counter sees neither fused attention nor oneDNN's recurrent networks
    no_mkldnn = torch.backends.mkldnn.flags(enabled=False, allow_tf32=None)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), no_mkldnn:
        frames = model.embed_frames(torch.zeros(1, samples))
        for k in model.exits[: model.exits.index(exit) + 1]:
            frames = model.run_layers(frames, k)
            if k == exit or heads_on_the_way:
                model.read_exit(k, frames)
    return counter.get_total_flops() // 2


def count_parameters(model: sdser.MultiExitSER, exits: list[int]) -> int:
    """Counts the parameters of a model that has only these exits, and only the layers that they need."""
    heads = [model.head_kinds[model.exits.index(k)] for k in exits]
    with torch.device("meta"):  # shapes without memory
        small = sdser.MultiExitSER(model.labels, model.backbone.config.to_dict(), exits, heads)
    return sum(p.numel() for p in small.parameters())


# -- tables -----------------------------------------------------------------------------------------------------------
def logits_by_row(exits: list[int], logits: Tensor, thresholds: float | Tensor | None = None) -> dict:
    """Returns a table's rows, name -> logits (N, C): each exit, "fusion" of two or more students, and "early exit"."""
    rows = dict(zip(exits, logits))
    if len(exits) > 2:
        rows["fusion"] = sdser.fuse(logits[:-1])
    if thresholds is not None:
        rows["early exit"] = early_logits(logits, thresholds)
    return rows


class Pool(NamedTuple):
    """Holds N clips, pooled over runs with the same architecture, and each clip's logits from its own run."""

    model: sdser.MultiExitSER  # of one run: labels, exits and costs are the same for all
    clips: list[Clip]
    run: Tensor  # (N,) the index of each clip's checkpoint
    logits: Tensor  # (exits, N, C)
    thresholds: list[float | None]  # of each checkpoint

    @property
    def targets(self) -> Tensor:
        return targets_of(self.clips, self.model.labels)

    @property
    def units(self) -> list[str]:
        """Returns what the bootstrap draws, (N,): each clip's speaker, or the clip itself if any speaker is unknown."""
        known = all(clip.speaker for clip in self.clips)
        return [clip.speaker if known else clip.path for clip in self.clips]


def score_runs(
    checkpoints: list[str], split: str | None, source: str | None, device: str, tolerance: float | None = None
) -> Pool:
    """Scores every run on its own clips of a split, or on another corpus; InputError unless all are of one kind.

    tolerance: if set, each run's threshold is chosen anew, on its own dev clips.
    """
    clips, run, logits, thresholds, first = [], [], [], [], None
    for i, checkpoint in enumerate(checkpoints):
        model = sdser.MultiExitSER.from_pretrained(checkpoint).to(device)
        kind = model.labels, model.tile_seconds, str(model)  # whose text lists the layers and their sizes
        first = first or kind
        if kind != first:
            raise InputError(f"{checkpoint}: its labels, window, exits or backbone differ; pool runs with the same")
        run_clips = choose_clips(checkpoint, split, source, model.labels)
        clips += run_clips
        run += [i] * len(run_clips)
        logits.append(predict(model, run_clips))
        threshold = model.threshold
        if tolerance is not None:
            dev = choose_clips(checkpoint, "dev", None, model.labels)
            threshold = choose_threshold(targets_of(dev, model.labels), predict(model, dev), tolerance)
            if threshold is None:
                raise InputError(f"{checkpoint}: no threshold keeps dev within {tolerance}; use a larger --tolerance")
        thresholds.append(threshold)
    return Pool(model.cpu(), clips, torch.tensor(run), torch.cat(logits, 1), thresholds)


def choose_clips(checkpoint: str, split: str | None, source: str | None, labels: list[str]) -> list[Clip]:
    """Returns the run's own clips of a split, as its split.csv lists them, or else the clips of another corpus.

    Another corpus that has splits is scored on test. One without, more than a third of whose names and labels are those
    of the run's own clips, is refused, since it holds training clips. Clips whose labels the model does not know are
    left out, with a warning.
    """
    listed = os.path.join(checkpoint, "split.csv")
    if source is None and not os.path.isfile(listed):
        raise InputError(f"{checkpoint}: has no split.csv, which lists the clips of a run; say by --data what to score")
    clips = load_corpus(listed if source is None else source)
    has_splits = any(clip.split for clip in clips)
    if source is not None and not has_splits and os.path.isfile(listed):
        own = {name_and_label(clip) for clip in load_corpus(listed)}
        shared = sum(name_and_label(clip) in own for clip in clips)
        if shared > len(clips) / 3:
            raise InputError(f"{source}: {shared} of its {len(clips)} clips have names and labels of {listed}, so it "
                             "looks like the run's own corpus: leave --data out; if it really is another, list it in "
                             "a manifest with a column split")  # fmt: skip
    split = split or ("test" if has_splits else None)
    if split:
        clips = [clip for clip in clips if clip.split == split]
    known = [clip for clip in clips if is_known(clip, labels)]
    if not known:
        raise InputError(f"{source or checkpoint}: has no clips of {', '.join(labels)} in {split or 'any split'}")
    if len(known) < len(clips):
        unknown = ", ".join(sorted({clip.label for clip in clips} - set(labels)))
        message = f"left out {len(clips) - len(known)} of {len(clips)} clips, whose labels the model does not know"
        warnings.warn(f"{source or checkpoint}: {message}: {unknown}", stacklevel=2)
    return inspect_clips(known)


def name_and_label(clip: Clip) -> tuple[str, str]:
    """Identifies a clip whatever folder it is in; PureWindowsPath takes both kinds of slash for separators."""
    return clean(PureWindowsPath(clip.path).stem), clip.label


def compare(ours: Pool, theirs: Pool) -> list[dict]:
    """Returns the paired difference, ours minus theirs, at each exit that both have, and of fusion if both fuse."""
    # Both sides must hold the same clips. One may hold each of them n times (n seeds), if n is the same for all clips.
    pools = (ours, theirs)
    counts = [Counter((clip.path, clip.label, unit) for clip, unit in zip(pool.clips, pool.units)) for pool in pools]
    ratios = {counts[0][clip] / count for clip, count in counts[1].items()}
    if counts[0].keys() != counts[1].keys() or len(ratios) != 1:
        raise InputError("--against: both sides must be scored on the same clips, each clip the same number of times")
    rows = [logits_by_row(pool.model.exits, pool.logits) for pool in pools]
    shared = [name for name in rows[0] if name in rows[1]]
    if ours.model.labels != theirs.model.labels or not shared:
        raise InputError("--against: both sides must have the same labels, and at least one exit in common")
    values = [[metric(pool.targets, row[name]) for name in shared] for pool, row in zip(pools, rows)]
    logits = [torch.stack([row[name] for name in shared]) for row in rows]  # (rows, N, C) of each side
    draws = [bootstrap(pool.targets, side, pool.units) for pool, side in zip(pools, logits)]
    differences = zip(shared, np.subtract(*values).tolist(), np.subtract(*draws))
    return [{"exit": name, "difference": value, "ci95": interval(row, ours.units)} for name, value, row in differences]


def row_costs(model: sdser.MultiExitSER, seconds: float, left_at: Tensor | None) -> tuple[dict, np.ndarray]:
    """Returns the costs of each row of the table for a clip of this length, and those of early exit at each exit.

    left_at: the index of the exit (N,) at which each clip leaves early, over which the row "early exit" is averaged.
    """
    exits, samples = model.exits, round(seconds * sdser.SAMPLE_RATE)
    on_the_way = np.array([count_macs(model, samples, k, heads_on_the_way=True) for k in exits]) / seconds
    costs = {k: (k, count_parameters(model, [k]), count_macs(model, samples, k) / seconds) for k in exits}
    if len(exits) > 1:
        costs["fusion"] = (exits[-2], count_parameters(model, exits[:-1]), on_the_way[-2])
    if left_at is not None:
        layers = np.array(exits)[left_at].mean()
        costs["early exit"] = (layers, count_parameters(model, exits), on_the_way[left_at].mean())
    names = ("layers", "parameters", "macs_per_second")  # of audio
    return {name: dict(zip(names, cost)) for name, cost in costs.items()}, on_the_way


def evaluate(args) -> dict:
    """Returns everything that goes into the JSON."""
    pool = score_runs(args.checkpoints, args.split, args.data, args.device, args.tolerance)
    model, clips, targets = pool.model, pool.clips, pool.targets
    thresholds = None if None in pool.thresholds else torch.tensor(pool.thresholds)[pool.run]  # (N,)
    left_at = None if thresholds is None else exit_index(pool.logits, thresholds)  # (N,)
    costs, on_the_way = row_costs(model, float(np.mean([clip.seconds for clip in clips])), left_at)
    logits = logits_by_row(model.exits, pool.logits, thresholds)
    draws, rows = bootstrap(targets, torch.stack(list(logits.values())), pool.units), []
    for (name, row_logits), row_draws in zip(logits.items(), draws):
        row = {"exit": name, **scores(targets, row_logits), f"{METRIC}_ci95": interval(row_draws, pool.units)}
        by_run = [metric(targets[pool.run == i], row_logits[pool.run == i]) for i in range(len(args.checkpoints))]
        row[f"{METRIC}_sd_over_runs"] = float(np.std(by_run, ddof=1)) if len(by_run) > 1 else None
        rows.append({**row, **by_label(targets, row_logits, model.labels), **costs[name]})
    results = {
        "labels": model.labels,
        "checkpoints": args.checkpoints,
        "split": args.split or clips[0].split or "all",
        "clips": len(clips),
        "speakers": len({clip.speaker for clip in clips}) if all(clip.speaker for clip in clips) else None,
        "chance": 1 / len(labels_of(clips)),
        "scores": list(scores(targets, row_logits)),
        "rows": rows,
        "thresholds": pool.thresholds,
    }
    if left_at is not None:
        results["exit_share"] = {str(k): float((left_at == i).double().mean()) for i, k in enumerate(model.exits)}
        results["mean_layers"] = costs["early exit"]["layers"]
    results["early_exit_curve"] = []
    for threshold in sdser.THRESHOLDS:
        macs = on_the_way[exit_index(pool.logits, threshold)].mean()
        value = metric(targets, early_logits(pool.logits, threshold))
        results["early_exit_curve"].append({"threshold": threshold, "macs_per_second": macs, METRIC: value})
    if args.against:
        results["against"] = compare(pool, score_runs(args.against, args.split, args.data, args.device))
    results["predictions"] = []
    for i, clip in enumerate(clips):
        answers = {str(name): model.labels[row_logits[i].argmax()] for name, row_logits in logits.items()}
        about = {"path": clip.path, "speaker": clip.speaker, "label": clip.label}
        results["predictions"].append({**about, "answers": answers})
    return results


def by_label(targets: Tensor, logits: Tensor, labels: list[str]) -> dict:
    """Returns a row's recall per label and its confusion matrix; a task without classes returns nothing here."""
    recall = [None if np.isnan(value) else value for value in recalls(targets, logits).tolist()]
    return {"recall": dict(zip(labels, recall)), "confusion": confusion_matrix(targets, logits).tolist()}


# -- the report, and plots --------------------------------------------------------------------------------------------
def report(results: dict, args) -> None:
    rows, title = results["rows"], METRIC.upper()
    exits = [row["exit"] for row in rows if isinstance(row["exit"], int)]
    print(f"{', '.join(args.checkpoints)} on {args.data or 'its own clips'}: {results['split']}\n")
    more = [name for name in results["scores"] if name != METRIC]
    columns = "".join(f"  {name:>8}" for name in more)
    pooled = len(results["checkpoints"]) > 1
    runs = "  over runs" if pooled else ""
    print(f"exit          layers  params M  GMAC/s  {title:>5}{runs}  95% interval  {columns}")
    for row in rows:
        name = f"{row['exit']} (teacher)" if row["exit"] == exits[-1] and len(exits) > 1 else str(row["exit"])
        cost = f"{row['layers']:6.3g}  {row['parameters'] / 1e6:8.2f}  {row['macs_per_second'] / 1e9:6.2f}"
        values = "".join(f"  {row[name]:8.3f}" for name in more)
        runs = f"  {'±' + format(row[f'{METRIC}_sd_over_runs'], '.3f'):>9}" if pooled else ""
        print(f"{name:12}  {cost}  {row[METRIC]:.3f}{runs}  {between(row[f'{METRIC}_ci95'], '.3f'):14}{values}")
    print(f"{results['clips']} clips of {results['speakers'] or 'unknown'} speakers; chance is {results['chance']:.3f}")
    if results["speakers"] is None:
        print("intervals: over clips, since speakers are unknown, and so too narrow")
    elif rows[0][f"{METRIC}_ci95"] is None:
        print("intervals: none for fewer than five speakers; pool the runs of several folds")
    if pooled:
        print(f"over runs: the standard deviation of the runs' {title}; intervals do not cover it")
    print("GMAC/s: billions of multiply-accumulates per second of audio, for a clip of the mean length")
    if "exit_share" in results:
        leaves = ", ".join(f"{100 * proportion:.0f}% at exit {k}" for k, proportion in results["exit_share"].items())
        print(f"early exit at the threshold {', '.join(map(str, results['thresholds']))}: clips leave {leaves}")
    if args.tolerance is not None:
        print(f"the threshold was chosen on dev for this report, to lose at most {args.tolerance} {title}; to keep it, "
              'write it into config.json as "threshold"')  # fmt: skip

    if "recall" in rows[0]:
        width = max(11, *(len(label) + 2 for label in results["labels"]))
        print("\nrecall      " + "".join(f"{label:>{width}}" for label in results["labels"]))
        for row in rows:
            values = ["-" if recall is None else f"{recall:.3f}" for recall in row["recall"].values()]
            print(f"{row['exit']!s:12}" + "".join(f"{value:>{width}}" for value in values))
    if args.against:
        print(f"\ndifference in {title} to {', '.join(args.against)}, paired, with 95% interval")
        for row in results["against"]:
            print(f"  {row['exit']!s:8} {row['difference']:+.3f}  {between(row['ci95'], '+.3f')}")


def between(ci95: list[float] | None, form: str) -> str:
    """Returns an interval as text, "-" if there is none."""
    return "-" if ci95 is None else f"{ci95[0]:{form}} to {ci95[1]:{form}}"


def plot_cost(results: dict, folder: str) -> None:
    """Plots each exit's metric against its cost, and early exit's at all thresholds."""
    figure = new_figure(figsize=(5.5, 4))
    axes = figure.subplots()
    for i, row in enumerate(results["rows"]):
        cost, value, ci95 = row["macs_per_second"] / 1e9, row[METRIC], row[f"{METRIC}_ci95"]
        error = None if ci95 is None else np.abs(np.array([ci95]).T - value)
        if isinstance(row["exit"], int):
            axes.errorbar(cost, value, error, fmt="o", color="black", capsize=3)
            side, shift = ("left", 5) if i % 2 else ("right", -5)  # neighbours may lie close together
            axes.annotate(f"exit {row['exit']}", (cost, value), (shift, 6), textcoords="offset points", ha=side)
        elif row["exit"] == "early exit":
            axes.plot(cost, value, "*", color="black", markersize=12, label="early exit, threshold chosen on dev")
    curve = [(point["macs_per_second"] / 1e9, point[METRIC]) for point in results["early_exit_curve"]]
    axes.plot(*np.array(curve).T, "-", color="gray", zorder=0, label="early exit, all thresholds")
    axes.axhline(results["chance"], color="gray", linestyle=":", label="chance")
    axes.set(xlabel="GMAC per second of audio", xlim=(0, None))
    axes.set(ylabel=f"{METRIC.upper()} (95% interval)", ylim=(0, 1))
    axes.legend(loc="lower right", fontsize="small")
    save_figure(figure, Path(folder, f"{METRIC}_against_cost.png"))


def plot_confusion(results: dict, folder: str) -> None:
    """Plots, for each exit, the proportion of each label's clips that got each prediction."""
    rows = [row for row in results["rows"] if isinstance(row["exit"], int)]
    labels, ticks = results["labels"], range(len(results["labels"]))
    figure = new_figure(figsize=(4 * len(rows), 4))
    for axes, row in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows):
        counts = np.array(row["confusion"])
        proportions = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        axes.imshow(proportions, cmap="Greys", vmin=0, vmax=1)
        for (true, predicted), value in np.ndenumerate(proportions):
            color = "white" if value > 0.5 else "black"
            axes.text(predicted, true, f"{value:.2f}", ha="center", va="center", color=color, fontsize="small")
        axes.set(title=f"exit {row['exit']}", xlabel="predicted", ylabel="true")
        axes.set_xticks(ticks, labels, rotation=90)
        axes.set_yticks(ticks, labels)
    save_figure(figure, Path(folder, "confusion.png"))


def new_figure(**size):
    with sdser.file_errors("--plot", "needs matplotlib", "pip install matplotlib"):
        import matplotlib.figure
    return matplotlib.figure.Figure(layout="constrained", **size)


def save_figure(figure, path) -> None:
    image = io.BytesIO()
    figure.savefig(image, format=Path(path).suffix[1:] or "png", dpi=120)
    sdser.replace_file(path, image.getbuffer())


# -- classifying files ------------------------------------------------------------------------------------------------
def classify_files(args) -> int:
    """Prints a line per file as soon as it is known; returns the exit status, 2 if a file could not be read."""
    model = sdser.MultiExitSER.from_pretrained(args.checkpoints[0]).to(args.device)
    threshold = model.threshold if args.threshold is None and args.exit is None else args.threshold
    model.check_exit(args.exit)
    status, predictions = 0, []
    for path in [path for name in args.audio for path in expand(name)]:
        try:
            [prediction] = model.classify(path, args.exit, threshold)
        except (InputError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            status = 2
            continue
        predictions.append({"path": path, **prediction._asdict()})
        print(f"{path}  {prediction.label}  {prediction.confidence:.3f}  exit {prediction.exit}  "
              f"{prediction.milliseconds:.0f} ms", flush=True)  # fmt: skip
    if args.json:
        sdser.replace_file(args.json, json.dumps(predictions, indent=2))
    return status


def expand(name: str) -> list[str]:
    """Returns the audio files of a folder, the files that fit a wildcard, or else the name itself."""
    if os.path.isdir(name):
        return list(map(str, audio_files(name)))
    return [name] if os.path.exists(name) else sorted(glob.glob(name)) or [name]


# -- the command, and how a script ends -------------------------------------------------------------------------------
def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    pooled = "folder written by train.py, or a Hub name; several runs with the same architecture are pooled"
    add("checkpoints", nargs="+", metavar="CHECKPOINT", help=pooled)
    add("--data", metavar="SOURCE", help="another corpus than the checkpoint's own (see train.py)")
    add("--split", choices=SPLITS, help="default: test, or all clips of a --data without splits")
    add("--against", nargs="+", metavar="CHECKPOINT", help="also the paired differences to these")
    anew = f"choose early exit's threshold anew on dev, for this report: the {METRIC.upper()} that it may lose"
    add("--tolerance", type=positive(float, or_zero=True), metavar="X", help=anew)
    add("--json", metavar="FILE", help="write the results as JSON")
    add("--plot", metavar="DIR", help=f"plot {METRIC.upper()} against cost, and confusions (needs matplotlib)")
    add("--audio", nargs="+", metavar="FILE", help="classify these files instead")
    add("--exit", type=int, metavar="K", help="with --audio: run to this exit")
    add("--threshold", type=float, metavar="P", help="with --audio: leave early at this threshold (default: the run's)")
    add("--device", metavar="D", help="default: cuda if available, else cpu")
    args = parser.parse_args(argv)
    if args.audio and (len(args.checkpoints) > 1 or args.against or args.data or args.split or args.plot):
        parser.error("--audio goes with one checkpoint, without --against, --data, --split and --plot")
    if not args.audio and (args.exit is not None or args.threshold is not None):
        parser.error("--exit and --threshold go with --audio")
    return args


def positive(kind: type, or_zero: bool = False, limit: float = sys.float_info.max):
    """Returns an argparse type: a number of that kind, above 0 or, with or_zero, at least 0, and up to the limit."""

    def number(text):
        value = kind(text)
        if not 0 <= value <= limit or (value == 0 and not or_zero):
            raise ValueError
        return value

    lowest = "at least" if or_zero else "above"
    number.__name__ = f"{kind.__name__} {lowest} 0" + (f" and up to {limit:g}" if limit < sys.float_info.max else "")
    return number  # whose name argparse puts into its message


def usable_device(name: str | None) -> str:
    """Returns the device asked for, by default cuda or else cpu; raises InputError if it cannot be used here.

    Makes one of several GPUs this process's own, and float32 mean float32 there: no TF32 in convolutions and GRUs.
    """
    torch.backends.cudnn.allow_tf32 = False
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    with sdser.file_errors(f"--device {name}", "cannot be used here", "choose another, for example cpu"):
        if name == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.zeros(1, device=name).item()
    return name


def check_writable(path, folder: bool = False) -> None:
    """Raises InputError, before the work, if a file, or files in a folder, cannot be written; creates the folder."""
    with sdser.file_errors(path, "cannot be written", "choose another path"):
        if folder:
            os.makedirs(path, exist_ok=True)
        place = path if os.path.exists(path) else Path(path).absolute().parent
        if os.path.isdir(path) != folder or not os.access(place, os.W_OK):
            raise PermissionError("no file can be put there")


@contextlib.contextmanager
def script(when_interrupted: str = "interrupted"):
    """Runs a script's work: prepares its output, forms the process group, and ends it as its user expects.

    What a user did wrong, a file system's error and too little memory become one sentence and status 2, Ctrl-C status
    130. Anything else is a fault in the code, and shows its traceback.
    """
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    if hasattr(sys.stdout, "reconfigure"):  # for log files, and for consoles that lack some letters
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    if RANK > 0:  # the first of several processes speaks for all
        sys.stdout = None
        warnings.simplefilter("ignore")
    try:
        if WORLD > 1:
            on_gpus = torch.cuda.is_available() and dist.is_nccl_available()
            with sdser.file_errors("WORLD_SIZE", "no process group can be formed", "unset it, or start by torchrun"):
                dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo")  # sums are on the CPU
        yield
    except KeyboardInterrupt:
        print(when_interrupted, file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        sentence = str(error).strip().rpartition("\n")[2]  # a loading process's error ends a traceback
        if "out of memory" in str(error) or "can't allocate memory" in str(error):
            sentence = "out of memory; in training, use a smaller --batch-size with a larger --accumulate, or --seconds"
        elif not isinstance(error, (InputError, OSError)):
            raise
        print(f"error: {sentence.removeprefix('sdser.InputError: ')}", file=sys.stderr)
        sys.exit(2)
    if WORLD > 1:
        dist.destroy_process_group()


def main(argv=None) -> None:
    args = parse_args(argv)
    with script():
        args.device = usable_device(args.device)
        if args.json:
            check_writable(args.json)
        if args.plot:
            check_writable(args.plot, folder=True)
            new_figure()  # or say that matplotlib is absent
        if args.audio:
            sys.exit(classify_files(args))
        results = evaluate(args)
        if RANK == 0:
            if args.json:
                sdser.replace_file(args.json, json.dumps(results, indent=2))
            report(results, args)
            if args.plot:
                plot_cost(results, args.plot)
                if "confusion" in results["rows"][0]:
                    plot_confusion(results, args.plot)
                print(f"\nplots: in {args.plot}")


if __name__ == "__main__":
    main()
