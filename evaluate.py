"""What each exit of a trained model is worth and what it costs, and how early it may stop.

    python evaluate.py out                                  # the run's own test split
    python evaluate.py fold1 fold2 fold3                    # the runs of several folds, their test clips pooled
    python evaluate.py out --against other                  # the paired difference between two runs, or sets of runs
    python evaluate.py out --data path/to/another/corpus
    python evaluate.py out --audio a.wav b.flac             # classify files

The threshold of early exit that it chooses on dev is kept in the checkpoint's config.json.
"""

import argparse
import contextlib
import csv
import glob
import io
import json
import os
import random
import re
import shlex
import subprocess
import sys
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PureWindowsPath
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

RANK = int(os.environ.get("RANK", 0))  # which of WORLD processes this is, set by torchrun
WORLD = int(os.environ.get("WORLD_SIZE", 1))
HERE = f"{Path(__file__).resolve().parent}{os.sep}"
DATA = Path(HERE, "data")  # real speech and a small pre-trained network
THRESHOLDS = np.linspace(0, 1, 101).round(2).tolist()
DRAWS = 2000  # of the bootstrap


# -- clips: from a folder of a known corpus, or from a manifest -------------------------------------------------------
class Clip(NamedTuple):
    path: str
    label: str
    speaker: str | None
    split: str | None = None  # train, dev or test
    seconds: float | None = None  # once it has been looked at
    more: dict[str, str] = {}  # noqa: RUF012  a manifest's other columns; never changed in place


def target_of(clip: Clip, labels: list[str]) -> int:
    """Returns what the loss and `scores` get as the truth about a clip: the index of its label.

    Other tasks change this function: it may return a list of numbers, such as votes for each label.
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


def load_corpus(source) -> list[Clip]:
    """Lists the clips of a corpus, each once, with a split only where a manifest gives one; no audio is read.

    source: a folder of one of CORPORA, recognised by its file names, or a CSV or TSV manifest. Raises FileNotFoundError
    or ValueError, naming the file and line and what would be right.
    """
    source = os.fspath(source)
    if os.path.isdir(source):
        return read_folder(source)
    if not os.path.isfile(source):
        raise FileNotFoundError(f"{source}: no such folder or manifest; give one by --data")
    with sdser.file_errors(source, "not a manifest", "give a CSV or TSV with columns path, label (and speaker)"):
        return read_manifest(source)


def read_folder(folder: str) -> list[Clip]:
    """Returns the clips of a folder, by the file-name pattern of CORPORA that fits most of its audio files."""
    found = (Path(folder, name) for name in glob.iglob("**", root_dir=folder, recursive=True))  # without hidden names
    files = sorted(path for path in found if path.suffix.lower() in AUDIO_ENDINGS and path.is_file())
    if not files:
        raise ValueError(f"{folder}: holds no audio files ({', '.join(AUDIO_ENDINGS)})")
    matches = {}  # corpus -> a match, or None, for each file
    for corpus, (pattern, _) in CORPORA.items():
        pattern = re.compile(rf"(?:.*/)?{pattern}")
        matches[corpus] = [pattern.fullmatch(path.with_suffix("").as_posix()) for path in files]
    corpus = min(CORPORA, key=lambda corpus: matches[corpus].count(None))
    clips, copies, others, meaning = {}, [], [], CORPORA[corpus][1]
    for path, match in zip(files, matches[corpus]):
        if match is None:
            others.append(path)
            continue
        if match["label"] not in meaning:
            raise ValueError(f"{path}: unknown emotion {match['label']!r}; {corpus} has {', '.join(meaning)}")
        speaker = "OAF" if match["speaker"] == "OA" else match["speaker"]  # a few files of TESS
        recording = (path.stem, speaker)  # these corpora give every recording its own name
        if recording in clips:
            copies.append(f"{path} and {clips[recording].path}")
        else:
            clips[recording] = Clip(str(path), meaning[match["label"]], speaker)
    if not clips:
        raise ValueError(f"{folder}: {files[0].name} matches no known corpus ({', '.join(CORPORA)}); give a manifest")
    if others:
        warnings.warn(f"{folder}: {len(others)} files not of {corpus} left out, such as {others[0]}", stacklevel=3)
    if copies:
        warnings.warn(f"{folder}: {len(copies)} clips are there twice and count once: {copies[0]}", stacklevel=3)
    return list(clips.values())


def read_manifest(manifest: str) -> list[Clip]:
    """Returns the clips of a CSV or TSV whose first line names its columns; paths are relative to the manifest."""
    with open(manifest, encoding="utf-8-sig", newline="") as file:
        header = file.readline()
        delimiter = max(",\t;", key=header.count)
        names = [name.strip() for name in next(csv.reader([header], delimiter=delimiter), [])]
        if not {"path", "label"} <= set(names):
            raise ValueError(f"the first line reads {header.strip()!r}")
        parts = [name for name in names if name.lower() in ("start", "end", "offset", "duration")]
        if parts:
            advice = "cut the segments into files of their own first, as docs/corpora.md shows"
            raise ValueError(f"{manifest}: has a column {parts[0]}, but clips are read whole; {advice}")
        clips, repeated = {}, []
        reader = csv.reader(file, delimiter=delimiter)
        for row in reader:
            if not row:
                continue
            values = dict(zip(names, [value.strip() for value in row]))
            split = values.get("split") or None
            if len(row) != len(names) or not values["path"] or not values["label"] or split not in (None, *SPLITS):
                raise ValueError(f"line {reader.line_num + 1}: {row}; give path, label and maybe train, dev or test")
            path = os.path.normpath(os.path.join(os.path.dirname(manifest), values["path"]))
            more = {name: values[name] for name in names if name not in ("path", "label", "speaker", "split")}
            clip = Clip(path, values["label"], values.get("speaker") or None, split, more=more)
            if path in clips:
                repeated.append(path)
                if clip != clips[path]:
                    raise ValueError(f"line {reader.line_num + 1}: {path} is listed before, with other values")
            clips[path] = clip
    if not clips:
        raise ValueError("it lists no clips")
    if repeated:
        warnings.warn(f"{manifest}: {len(repeated)} lines repeat others and count once: {repeated[0]}", stacklevel=3)
    return list(clips.values())


# -- splits: no speaker is in two of them -----------------------------------------------------------------------------
def split_clips(clips: list[Clip], fold: tuple[int, int] = (1, 5), final: bool = False) -> list[Clip]:
    """Gives every clip a split, by speaker; depends only on the clips and the fold.

    clips: splits of their own are kept. fold: (I, N), of N groups of speakers the I-th is test, the next one dev, the
    rest train. final: dev trains too. Raises ValueError for too few speakers, an empty split, a label that is not in
    train, a speaker in two splits, or a clip with neither speaker nor split; warns of labels that dev or test lacks.
    """
    hint = ""
    if not any(clip.split for clip in clips):
        index, count = fold
        deals = {i: deal_speakers(clips, i, count) for i in range(1, count + 1)}
        clips = deals[index]
        whole = [f"{i}/{count}" for i in deals if not any(missing_labels(deals[i], split) for split in SPLITS)]
        hint = f"; every split has every label with --fold {' or '.join(whole)}" if whole else ""
    if final:
        clips = [clip._replace(split="train") if clip.split == "dev" else clip for clip in clips]
    check_splits(clips, ("train", "test") if final else SPLITS, hint)
    for split in ("test",) if final else ("dev", "test"):
        missing = missing_labels(clips, split)
        if missing:
            means = f"its {METRIC.upper()} is a mean over the others"
            warnings.warn(f"the {split} split lacks {', '.join(missing)}: {means}{hint}", stacklevel=2)
    return clips


def missing_labels(clips: list[Clip], split: str) -> list[str]:
    """Returns the labels that have no clip in a split."""
    return sorted({clip.label for clip in clips} - {clip.label for clip in clips if clip.split == split})


def deal_speakers(clips: list[Clip], index: int, count: int) -> list[Clip]:
    """Deals speakers into `count` groups: the one with the most clips first, into the group with the fewest so far."""
    sizes = Counter(clip.speaker for clip in clips)
    for clip in clips:
        if clip.speaker is None:
            raise ValueError(f"{clip.path}: has neither speaker nor split; the manifest must give one of them")
    if len(sizes) < count:
        raise ValueError(f"{len(sizes)} speakers are too few for {count} groups; give a --fold of fewer, at least 3")
    group_of, filled = {}, [0] * count
    for speaker in sorted(sizes, key=lambda speaker: (-sizes[speaker], speaker)):
        group_of[speaker] = filled.index(min(filled))
        filled[group_of[speaker]] += sizes[speaker]
    split_of = {index - 1: "test", index % count: "dev"}  # index counts from 1, groups from 0; dev is the next group
    return [clip._replace(split=split_of.get(group_of[clip.speaker], "train")) for clip in clips]


def check_splits(clips: list[Clip], splits: tuple[str, ...], hint: str = "") -> None:
    """Raises ValueError unless each of the splits has clips, train has every label, and no speaker is in two splits."""
    split_of = {}
    for clip in clips:
        if clip.split is None:
            raise ValueError(f"{clip.path}: has no split while other clips have one; give all a split, or none")
        first = split_of.setdefault(clip.speaker, clip.split)
        if clip.speaker and first != clip.split:
            advice = "keep each in one; to accept a corpus's own splits as they are, leave the column speaker out"
            raise ValueError(f"speaker {clip.speaker} is in two splits, {first} and {clip.split}; {advice}")
    for split in splits:
        if not any(clip.split == split for clip in clips):
            raise ValueError(f"the {split} split is empty; give each split some clips")
    missing = ", ".join(missing_labels(clips, "train"))
    if missing:
        raise ValueError(f"the train split lacks {missing}; leave labels out by --labels{hint}")


# -- reading and batching clips, and what a model answers to them -----------------------------------------------------
BATCH_SECONDS = 96  # of padded audio that is scored at once, as in a training batch of 16 clips of 6 s


def look_at(clips: list[Clip], listed: str | None = None, skip_bad: bool = False) -> list[Clip]:
    """Fills in each clip's seconds, from its header; raises ValueError if a clip cannot be read.

    Files that are scored are decoded whole, since their faults must show before the training, not after it.
    listed: the split.csv of the run that the clips belong to. skip_bad: decode every file whole, and leave out those
    that cannot be read, with a warning for each.
    """

    def measure(clip):
        try:
            with sdser.open_audio(clip.path) as (_, sound):
                seconds = sound.frames / sound.samplerate
            if clip.split != "train" and seconds > sdser.MAX_SECONDS:
                raise ValueError(f"{clip.path}: {seconds:.1f} s is over the limit of {sdser.MAX_SECONDS} s; cut it")
            if skip_bad or clip.split != "train":
                sdser.load_audio(clip.path)
            return clip._replace(seconds=seconds)
        except (OSError, ValueError) as error:
            return error

    with ThreadPoolExecutor(8) as pool:  # I/O-bound, so threads suffice
        found = list(progress(pool.map(measure, clips), "checking files", len(clips)))
    bad = [item for item in found if isinstance(item, Exception)]
    advice = "repair them, or leave them out; train.py has --skip-bad"
    if listed:
        advice = f"if the corpus has moved, change its paths: sed -i 's|OLD|NEW|' {quote(listed)}"
    if bad and (not skip_bad or len(bad) == len(clips)):
        raise ValueError(f"{bad[0]} ({len(bad)} of {len(clips)} clips are bad; {advice})")
    for error in bad if RANK == 0 else []:
        warnings.warn(f"left out: {error}", stacklevel=2)
    return [item for item in found if isinstance(item, Clip)]


class ClipDataset(Dataset):
    """Clip i is (waveform (T,), its target): whole, or tiled, or for training cropped at random.

    tile_seconds: repeat or cut to this length. crop_seconds: cut longer clips to it, at a place that `seed` decides.
    """

    def __init__(self, clips: list[Clip], labels: list[str], tile_seconds=None, crop_seconds=None, seed=""):
        self.clips, self.labels, self.tile_seconds = clips, labels, tile_seconds
        self.crop_seconds, self.seed = crop_seconds, seed

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        clip = self.clips[i]
        if self.tile_seconds:
            waveform = sdser.tile(sdser.load_audio(clip.path, 0.0, self.tile_seconds), self.tile_seconds)
        elif self.crop_seconds:
            # seeded by clip, so that neither workers nor processes nor a resumed run change the crop
            start = random.Random(f"{self.seed} {i}").random() * max(0.0, clip.seconds - self.crop_seconds)
            waveform = sdser.load_audio(clip.path, start, self.crop_seconds)
            waveform = waveform[: round(self.crop_seconds * sdser.SAMPLE_RATE)]
        else:
            waveform = sdser.load_audio(clip.path)
        return waveform, target_of(clip, self.labels)


def load(dataset: Dataset, batches: list[list[int]], workers: int) -> DataLoader:
    own = torch.Generator()  # so that loading draws nothing from the generator of dropout and masks
    return DataLoader(dataset, batch_sampler=batches, collate_fn=collate, num_workers=workers, generator=own)


def collate(items: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns a batch of waveforms (T,) and targets: (B, T) zero-padded at the end, lengths (B,), targets (B,)."""
    waveforms = [waveform for waveform, _ in items]
    lengths = torch.tensor([len(waveform) for waveform in waveforms])
    batch = torch.nn.utils.rnn.pad_sequence(waveforms, batch_first=True)
    if len(lengths.unique()) > 1:
        # A few more zeros, to a quarter of a second: oneDNN keeps buffers for every T that it has seen, and a corpus of
        # 1,440 clips has so many that they took as much memory as all else.
        batch = F.pad(batch, (0, -batch.shape[1] % 4000))
    return batch, lengths, torch.tensor([target for _, target in items])


@torch.no_grad()
def predict(model: sdser.MultiExitSER, clips: list[Clip], batch_size: int = 16, workers: int = 0) -> Tensor:
    """Returns logits (exits, N, C) of whole clips, float32 on the CPU; raises ValueError if they are not finite."""
    model.eval()
    logits = torch.zeros(len(model.exits), len(clips), len(model.labels))
    seconds = [model.tile_seconds or clip.seconds for clip in clips]
    batches = [[]]
    for i in np.argsort(seconds, kind="stable").tolist():  # sorted, so clip i is the longest so far
        full = len(batches[-1]) == batch_size or (len(batches[-1]) + 1) * seconds[i] > BATCH_SECONDS
        if batches[-1] and full:
            batches.append([])
        batches[-1].append(i)
    batches = batches[RANK::WORLD]
    loader = load(ClipDataset(clips, model.labels, model.tile_seconds), batches, workers)
    for batch, (waveforms, lengths, _) in zip(batches, progress(loader, "scoring", len(batches))):
        outputs = model(waveforms.to(model.backbone.device), lengths.to(model.backbone.device))
        logits[:, batch] = torch.stack([output.logits for output in outputs]).float().cpu()
    if WORLD > 1:
        dist.all_reduce(logits)  # each process has scored its share of the batches
    if not logits.isfinite().all():
        raise ValueError("the model's answers are not finite; try a smaller --lr")
    return logits


def progress(steps, title: str, total: int) -> tqdm:
    """Shows a bar on a terminal, for anything over a second; only the first of several processes shows one."""
    return tqdm(steps, title, total, leave=False, disable=True if RANK else None, delay=1)


# -- scores, and their intervals --------------------------------------------------------------------------------------
METRIC = "uar"  # the score by which epochs and thresholds are chosen, and the one with intervals


def scores(targets: Tensor, logits: Tensor) -> dict[str, float]:
    """Returns the UAR, accuracy and macro F1 of logits (N, C) for targets (N,).

    UAR and F1 are means over the classes that occur in the targets.
    """
    predictions, classes = logits.argmax(-1), logits.shape[-1]
    confusion = confusion_matrix(targets, predictions, classes)
    hits, true, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    f1 = (2 * hits / np.maximum(true + predicted, 1))[true > 0]
    uar = unweighted_average_recall(targets, predictions, classes)
    return {"uar": uar, "accuracy": float(hits.sum() / true.sum()), "macro_f1": float(f1.mean())}


def unweighted_average_recall(targets, predictions, num_classes: int) -> float:
    """Returns the mean recall of the classes that occur in the targets. Both arguments hold class indices, (N,)."""
    confusion = confusion_matrix(targets, predictions, num_classes)
    hits, true = confusion.diagonal(), confusion.sum(1)
    return float((hits[true > 0] / true[true > 0]).mean())


def confusion_matrix(targets, predictions, num_classes: int) -> np.ndarray:
    """Counts class indices (N,) and (N,) into (C, C), a row per true class, a column per prediction."""
    pairs = np.stack([np.asarray(targets, dtype=int), np.asarray(predictions, dtype=int)])
    if pairs.size == 0 or pairs.min() < 0 or pairs.max() >= num_classes:
        raise ValueError(f"class indices: there must be some, all from 0 to {num_classes - 1}")
    return np.bincount(pairs[0] * num_classes + pairs[1], minlength=num_classes**2).reshape(num_classes, num_classes)


def answers(exits: list[int], logits: Tensor) -> dict[int | str, Tensor]:
    """Names who answers, with what logits (N, C): each exit, and "fusion" of the students if there are two or more."""
    rows = dict(zip(exits, logits))
    return {**rows, "fusion": sdser.fuse(logits[:-1])} if len(exits) > 2 else rows


class Scored(NamedTuple):
    """N clips, pooled over runs of one kind, and what each clip's own run answered."""

    model: sdser.MultiExitSER  # of one run: labels, exits and costs are the same for all
    clips: list[Clip]
    run: torch.Tensor  # (N,) the index of each clip's checkpoint
    logits: torch.Tensor  # (exits, N, C)

    @property
    def targets(self) -> torch.Tensor:
        """The class index of each clip's label, (N,)."""
        return torch.tensor([target_of(clip, self.model.labels) for clip in self.clips])

    @property
    def units(self) -> np.ndarray:
        """What the bootstrap draws, (N,): each clip's speaker, or the clip itself if any speaker is unknown."""
        known = all(clip.speaker for clip in self.clips)
        return np.array([clip.speaker if known else clip.path for clip in self.clips])


def load_and_score(checkpoints: list[str], split: str | None, source: str | None, device: str) -> Scored:
    """Scores every run on its own clips of a split, or on another corpus; ValueError unless all are of one kind."""
    kinds, clips, run, logits = [], [], [], []
    for i, checkpoint in enumerate(checkpoints):
        model = sdser.MultiExitSER.from_pretrained(checkpoint).to(device)
        kinds.append((model.labels, model.tile_seconds, str(model)))  # str(model) lists the layers and their sizes
        if kinds[i] != kinds[0]:
            raise ValueError(f"{checkpoint}: its labels, window, exits or backbone differ; pool runs of one kind")
        chosen = choose_clips(checkpoint, split, source, model.labels)
        clips += chosen
        run += [i] * len(chosen)
        logits.append(predict(model, chosen))
    return Scored(model, clips, torch.tensor(run), torch.cat(logits, 1))


def choose_clips(checkpoint: str, split: str | None, source: str | None, labels: list[str]) -> list[Clip]:
    """Returns the run's own clips of a split, as its split.csv lists them, or else the clips of another corpus.

    Clips that were trained on are never scored by mistake: a corpus that has splits gives its test split, and one that
    looks like the run's own is refused. Clips with other labels than the model's are left out, with a warning.
    """
    listed = os.path.join(checkpoint, "split.csv")
    clips = load_corpus(listed if source is None else source)
    has_splits = any(clip.split for clip in clips)
    if source is not None and not has_splits and os.path.isfile(listed):
        ours = set(map(name_and_label, load_corpus(listed)))
        shared = sum(name_and_label(clip) in ours for clip in clips)
        if shared > len(clips) / 3:
            raise ValueError(f"{source}: {shared} of its {len(clips)} clips have names and labels of {listed}, so it "
                             "looks like the run's own corpus: leave --data out; if it really is another, list it in "
                             "a manifest with a column split")  # fmt: skip
    split = split or ("test" if has_splits else None)
    if split:
        clips = [clip for clip in clips if clip.split == split]
    known = [clip for clip in clips if clip.label in labels]
    if not known:
        raise ValueError(f"{source or checkpoint}: has no clips of {', '.join(labels)} in {split or 'any split'}")
    if len(known) < len(clips):
        others = ", ".join(sorted({clip.label for clip in clips} - set(labels)))
        message = f"left out {len(clips) - len(known)} of {len(clips)} clips, whose labels the model does not know"
        warnings.warn(f"{source or checkpoint}: {message}: {others}", stacklevel=2)
    return look_at(known, listed if source is None else None)


def name_and_label(clip: Clip) -> tuple[str, str]:
    """Identifies a clip whatever folder it is in; PureWindowsPath takes both kinds of slash for separators."""
    return PureWindowsPath(clip.path).stem, clip.label


def bootstrap(targets: torch.Tensor, logits: torch.Tensor, units: np.ndarray) -> np.ndarray:
    """Returns the metric (rows, DRAWS) of logits (rows, N, C) on DRAWS resamples, each of as many units as there are.

    Units are drawn with replacement: a speaker with all their clips, which are not independent. Two calls on the same
    units draw the same, so that their differences are paired.
    """
    names, unit = np.unique(units, return_inverse=True)
    clips_of = [torch.from_numpy(np.flatnonzero(unit == i)) for i in range(len(names))]
    rng, values = np.random.default_rng(0), []
    for _ in range(DRAWS):
        drawn = torch.cat([clips_of[i] for i in rng.integers(len(names), size=len(names))])
        values.append([scores(targets[drawn], row[drawn])[METRIC] for row in logits])
    return np.array(values).T


def interval(draws: np.ndarray, units: np.ndarray) -> list[float] | None:
    """Returns the 95 % interval of draws (DRAWS,); None if there is only one unit."""
    return np.percentile(draws, [2.5, 97.5]).tolist() if len(set(units)) > 1 else None


def compare(ours: Scored, theirs: Scored) -> list[dict]:
    """Returns the paired difference, ours minus theirs, at each exit that both have, and of fusion if both fuse."""
    rows_of_ours = answers(ours.model.exits, ours.logits)
    rows_of_theirs = answers(theirs.model.exits, theirs.logits)
    shared = [exit for exit in rows_of_ours if exit in rows_of_theirs]
    # Both sides must hold the same clips. One may hold each of them n times (n seeds), if n is the same for all clips.
    our_counts = Counter(zip((clip[:2] for clip in ours.clips), ours.units))
    their_counts = Counter(zip((clip[:2] for clip in theirs.clips), theirs.units))
    ratios = {count / their_counts[key] for key, count in our_counts.items() if key in their_counts}
    if our_counts.keys() != their_counts.keys() or len(ratios) != 1:
        raise ValueError("--against: give runs scored on the same clips, each clip equally often")
    if ours.model.labels != theirs.model.labels or not shared:
        raise ValueError("--against: give runs with the same labels and some exit in common")
    values, draws = [], []
    for scored, rows in ((ours, rows_of_ours), (theirs, rows_of_theirs)):
        logits = torch.stack([rows[exit] for exit in shared])
        values.append([scores(scored.targets, row)[METRIC] for row in logits])
        draws.append(bootstrap(scored.targets, logits, scored.units))
    differences = zip(shared, np.subtract(*values).tolist(), np.subtract(*draws))
    return [{"exit": exit, "difference": value, "ci95": interval(row, ours.units)} for exit, value, row in differences]


# -- early exit, and cost ---------------------------------------------------------------------------------------------
def exit_index(logits: torch.Tensor, thresholds: float | torch.Tensor) -> torch.Tensor:
    """Returns the index of the exit (N,) at which each clip leaves; logits: (exits, N, C); thresholds: one or (N,)."""
    stops = torch.stack([sdser.should_stop(logits[: i + 1], thresholds) for i in range(len(logits))])  # (exits, N)
    stops[-1] = True
    return stops.int().argmax(0)  # the first that stops


def early_logits(logits: torch.Tensor, thresholds: float | torch.Tensor) -> torch.Tensor:
    """Returns each clip's logits (N, C) from the exit at which it leaves."""
    return logits[exit_index(logits, thresholds), torch.arange(logits.shape[1])]


def lowest_threshold(targets: torch.Tensor, logits: torch.Tensor, tolerance: float) -> float:
    """Returns the lowest threshold, and so the cheapest, whose metric is within the tolerance of the deepest exit's."""
    deepest = scores(targets, logits[-1])[METRIC]
    for threshold in THRESHOLDS:
        if scores(targets, early_logits(logits, threshold))[METRIC] >= deepest - tolerance:
            return threshold
    raise ValueError(f"at no threshold is dev within {tolerance} of the deepest exit; give a larger --tolerance")


def calibrate(checkpoints: list[str], args) -> list[float]:
    """Chooses each run's threshold on its dev clips and keeps it in its config.json.

    Returns an empty list, and warns, if a run has no dev clips or no threshold is good enough.
    """
    chosen = []
    try:
        dev = load_and_score(checkpoints, "dev", None, args.device)
        runs = [dev.run == i for i in range(len(checkpoints))]
        chosen = [lowest_threshold(dev.targets[run], dev.logits[:, run], args.tolerance) for run in runs]
        for checkpoint, threshold in zip(checkpoints, chosen) if RANK == 0 else []:
            path = Path(checkpoint, "config.json")
            config = {**json.loads(path.read_text()), "threshold": threshold}
            sdser.replace_file(path, json.dumps(config, indent=2))
    except (OSError, ValueError) as error:  # --final trains on dev; a Hub model has none; a folder may be read-only
        problem = "the threshold is not kept" if chosen else "early exit is not calibrated"
        warnings.warn(f"{problem}: {error}", stacklevel=2)
    return chosen


@torch.no_grad()
def count_macs(model: sdser.MultiExitSER, samples: int, exit: int, heads_on_the_way: bool = False) -> int:
    """Counts the multiply-accumulates of the matrix products and convolutions that answer for one clip at an exit.

    samples: the clip's length at 16 kHz, not tiled yet. heads_on_the_way: with the shallower exits' heads.
    """
    if model.tile_seconds:
        samples = round(model.tile_seconds * sdser.SAMPLE_RATE)
    exits = [k for k in model.exits if k < exit and heads_on_the_way] + [exit]
    # torch's counter sees neither fused attention nor oneDNN's convolutions and recurrent networks
    no_mkldnn = torch.backends.mkldnn.flags(enabled=False, allow_tf32=None)
    no_cudnn = torch.backends.cudnn.flags(enabled=False)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), no_mkldnn, no_cudnn:
        frames = model.embed_frames(torch.zeros(1, samples, device=model.backbone.device))
        for previous, k in zip([0, *exits], exits):
            frames = model.run_layers(frames, previous, k)
            model.read_exit(k, frames)
    return counter.get_total_flops() // 2


def count_parameters(model: sdser.MultiExitSER, exits: list[int]) -> int:
    """Counts the parameters of a model that has only these exits, and only the layers that they need."""
    heads = [model.head_kinds[model.exits.index(k)] for k in exits]
    with torch.device("meta"):  # shapes without memory
        small = sdser.MultiExitSER(model.labels, model.backbone.config.to_dict(), exits, heads)
    return sum(p.numel() for p in small.parameters())


# -- the report, and plots --------------------------------------------------------------------------------------------
class Cost(NamedTuple):
    """The cost of a row of the table, for a clip of mean length; for early exit, averaged over the exits taken."""

    layers: float
    parameters: int
    macs_per_second: float  # of audio


def evaluate(args) -> tuple[dict, list[tuple[float, float]]]:
    """Returns everything that goes into the JSON, and early exit's cost and metric at each threshold."""
    scored = load_and_score(args.checkpoints, args.split, args.data, args.device)
    chosen = calibrate(args.checkpoints, args)
    model, clips, targets = scored.model, scored.clips, scored.targets
    exits, labels = model.exits, model.labels
    thresholds = torch.tensor(chosen)[scored.run] if chosen else None  # (N,), of each clip's run

    seconds = float(np.mean([clip.seconds for clip in clips]))
    samples = round(seconds * sdser.SAMPLE_RATE)
    on_the_way = np.array([count_macs(model, samples, k, heads_on_the_way=True) for k in exits]) / seconds
    logits_of = answers(exits, scored.logits)  # of each row of the table
    costs = {k: Cost(k, count_parameters(model, [k]), count_macs(model, samples, k) / seconds) for k in exits}
    if "fusion" in logits_of:
        costs["fusion"] = Cost(exits[-2], count_parameters(model, exits[:-1]), on_the_way[-2])
    if chosen:
        left_at = exit_index(scored.logits, thresholds).numpy()  # (N,)
        layers, macs = np.array(exits)[left_at].mean(), on_the_way[left_at].mean()
        costs["early exit"] = Cost(layers, count_parameters(model, exits), macs)
        logits_of["early exit"] = early_logits(scored.logits, thresholds)

    draws = bootstrap(targets, torch.stack(list(logits_of.values())), scored.units)
    rows = []
    for (exit, logits), row_draws in zip(logits_of.items(), draws):
        confusion = confusion_matrix(targets, logits.argmax(-1), len(labels))
        counts = zip(confusion.diagonal().tolist(), confusion.sum(1).tolist())
        recall = dict(zip(labels, [hits / total if total else None for hits, total in counts]))
        ci95 = interval(row_draws, scored.units)
        rows.append({"exit": exit, **scores(targets, logits), f"{METRIC}_ci95": ci95, "recall": recall,
                     "confusion": confusion.tolist(), **costs[exit]._asdict()})  # fmt: skip
    speakers = {clip.speaker for clip in clips}
    results = {"labels": labels, "checkpoints": args.checkpoints, "split": args.split or clips[0].split or "all",
               "clips": len(clips), "speakers": None if None in speakers else len(speakers),
               "chance": 1 / len({clip.label for clip in clips}), "rows": rows, "thresholds": chosen}  # fmt: skip
    results["predictions"], curve = [], []
    for i, clip in enumerate(clips):
        said = {str(exit): labels[logits[i].argmax()] for exit, logits in logits_of.items()}
        about = {"path": clip.path, "speaker": clip.speaker, "label": clip.label}
        results["predictions"].append({**about, "answers": said})
    if chosen:
        results["exit_share"] = {str(k): float((left_at == i).mean()) for i, k in enumerate(exits)}
        results["mean_layers"] = costs["early exit"].layers
        for threshold in THRESHOLDS:
            value = scores(targets, early_logits(scored.logits, threshold))[METRIC]
            curve.append((on_the_way[exit_index(scored.logits, threshold)].mean() / 1e9, value))
    if args.against:
        results["against"] = compare(scored, load_and_score(args.against, args.split, args.data, args.device))
    return results, curve


def report(results: dict, args) -> None:
    """Prints the result tables."""
    labels, rows = results["labels"], results["rows"]
    exits = [row["exit"] for row in rows if isinstance(row["exit"], int)]
    print(f"{', '.join(args.checkpoints)} on {args.data or 'its own clips'}: {results['split']}\n")
    metric = METRIC.upper()
    others = [name for name in ("accuracy", "macro_f1") if name in rows[0]]
    columns = "".join(f"  {name:>8}" for name in others)
    print(f"exit          layers  params M  GMAC/s  {metric:>5}  95 % interval {columns}")
    for row in rows:
        title = f"{row['exit']} (teacher)" if row["exit"] == exits[-1] and len(exits) > 1 else str(row["exit"])
        ci95 = between(row[f"{METRIC}_ci95"], ".3f")
        cost = f"{row['layers']:6.3g}  {row['parameters'] / 1e6:8.2f}  {row['macs_per_second'] / 1e9:6.2f}"
        worth = f"{row[METRIC]:.3f}  {ci95:14}" + "".join(f"  {row[name]:8.3f}" for name in others)
        print(f"{title:12}  {cost}  {worth}")
    speakers = "unknown speakers (so the intervals are too narrow)"
    if results["speakers"] == 1:
        speakers = "one speaker (an interval needs two: pool the runs of several folds)"
    elif results["speakers"]:
        speakers = f"{results['speakers']} speakers{' (few: rough intervals)' if results['speakers'] < 8 else ''}"
    print(f"{results['clips']} clips of {speakers}; chance is {results['chance']:.3f}")
    print("GMAC/s: billions of multiply-accumulates per second of audio, for a clip of the mean length")
    if results["thresholds"]:
        leaves = ", ".join(f"{100 * share:.0f} % at exit {k}" for k, share in results["exit_share"].items())
        chosen = ", ".join(map(str, results["thresholds"]))
        print(f"early exit at confidence {chosen}, the lowest whose {metric} on dev is within {args.tolerance} of exit "
              f"{exits[-1]}'s: {leaves}")  # fmt: skip

    print("\nrecall      " + "".join(f"{label[:10]:>11}" for label in labels))
    for row in rows:
        recalls = [f"{'-':>11}" if recall is None else f"{recall:11.3f}" for recall in row["recall"].values()]
        print(f"{row['exit']!s:12}" + "".join(recalls))
    if args.against:
        print(f"\ndifference in {metric} to {', '.join(args.against)}, paired, with 95 % interval")
        for row in results["against"]:
            print(f"  {row['exit']!s:8} {row['difference']:+.3f}  {between(row['ci95'], '+.3f')}")


def between(ci95: list[float] | None, form: str) -> str:
    """Returns an interval as text, "-" if there is none."""
    return "-" if ci95 is None else f"{ci95[0]:{form}} to {ci95[1]:{form}}"


def plot(results: dict, curve: list[tuple[float, float]], folder: str) -> None:
    figure = new_figure(figsize=(5.5, 4))
    axes = figure.subplots()
    for row in results["rows"]:
        cost, value = row["macs_per_second"] / 1e9, row[METRIC]
        ci95 = row[f"{METRIC}_ci95"]
        error = None if ci95 is None else np.abs(np.array([ci95]).T - value)
        if isinstance(row["exit"], int):
            axes.errorbar(cost, value, error, fmt="o", color="black", capsize=3)
            axes.annotate(f"exit {row['exit']}", (cost, value), (-5, 6), textcoords="offset points", ha="right")
        elif row["exit"] == "early exit":
            axes.plot(cost, value, "*", color="black", markersize=12, label="early exit, threshold chosen on dev")
            axes.plot(*np.array(curve).T, "-", color="gray", zorder=0, label="early exit, all thresholds")
    axes.axhline(results["chance"], color="gray", linestyle=":", label="chance")
    axes.set(xlabel="GMAC per second of audio", xlim=(0, None))
    axes.set(ylabel=f"{METRIC.upper()} (95 % interval)", ylim=(0, 1))
    axes.legend(loc="lower right", fontsize="small")
    save_figure(figure, Path(folder, "uar_against_cost.png"))
    print(f"\nplot: {folder}/uar_against_cost.png")


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
    threshold = args.threshold
    if threshold is None and args.exit is None:
        threshold = model.threshold
    status, answers = 0, []
    for path in args.audio:
        try:
            answer = model.classify(path, args.exit, threshold)[0]
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            status = 2
            continue
        answers.append({"path": path, **answer._asdict()})
        print(f"{path}  {answer.label}  {answer.confidence:.3f}  exit {answer.exit}  {answer.milliseconds:.0f} ms",
              flush=True)  # fmt: skip
    if args.json:
        sdser.replace_file(args.json, json.dumps(answers, indent=2))
    return status


# -- the command, and how a script ends -------------------------------------------------------------------------------
def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    checkpoint = dict(nargs="+", metavar="CHECKPOINT")
    add("checkpoints", help="folder written by train.py, or a Hub name; several of one kind are pooled", **checkpoint)
    add("--data", metavar="SOURCE", help="another corpus than the checkpoint's own (see train.py)")
    add("--split", choices=SPLITS, help="default: test, or all clips of a --data without splits")
    add("--against", help="also the paired differences to these", **checkpoint)
    real_or_0 = positive(float, zero=True)
    add("--tolerance", type=real_or_0, default=0.01, metavar="X", help="UAR early exit may lose on dev (default 0.01)")
    add("--json", metavar="FILE", help="write the results as JSON")
    add("--plot", metavar="DIR", help="write a plot of worth against cost (needs matplotlib)")
    add("--audio", nargs="+", metavar="FILE", help="classify these files instead")
    add("--exit", type=int, metavar="K", help="with --audio: run to this exit")
    add("--threshold", type=float, metavar="P", help="with --audio: leave at this confidence (default: the calibrated)")
    add("--device", metavar="D", help="default: cuda if available, else cpu")
    args = parser.parse_args(argv)
    if args.audio and (len(args.checkpoints) > 1 or args.against or args.data or args.split or args.plot):
        parser.error("--audio goes with one checkpoint, without --against, --data, --split and --plot")
    if not args.audio and (args.exit is not None or args.threshold is not None):
        parser.error("--exit and --threshold go with --audio")
    return args


def positive(kind: type, zero: bool = False, most: float = sys.float_info.max):
    """Returns an argparse type: a number of that kind, above 0 or, with zero=True, at least 0, and up to `most`."""

    def number(text):
        value = kind(text)
        if not 0 <= value <= most or (value == 0 and not zero):
            raise ValueError
        return value

    up_to = f" up to {most}" if most < sys.float_info.max else ""
    number.__name__ = f"positive {kind.__name__}{up_to}"  # as argparse's message calls it
    return number


def usable_device(name: str | None) -> str:
    """Returns the device asked for, by default cuda or else cpu; raises ValueError if it cannot be used here."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    with sdser.file_errors(f"--device {name}", "cannot be used here", "name another, for example cpu"):
        if name == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.zeros(1, device=name).item()
    return name


def check_writable(path, folder: bool = False) -> None:
    """Raises ValueError, before the work rather than after it, if a file, or files in a folder, cannot be written."""
    with sdser.file_errors(path, "cannot be written", "name another place"):
        if folder:
            os.makedirs(path, exist_ok=True)
        place = path if os.path.exists(path) else f"{Path(path).absolute().parent}/"
        if os.path.isdir(path) != folder or not os.access(place, os.W_OK):
            raise PermissionError("no file can be put there")


def quote(path) -> str:
    """Quotes a path for the shell of this system."""
    return subprocess.list2cmdline([str(path)]) if os.name == "nt" else shlex.quote(str(path))


@contextlib.contextmanager
def script(when_interrupted: str = "interrupted"):
    """Ends a script as its user expects: an error is one sentence and status 2, Ctrl-C is status 130."""
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    if hasattr(sys.stdout, "reconfigure"):  # for log files, and for consoles that lack some letters
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    if WORLD > 1:
        sys.stdout = sys.stdout if RANK == 0 else None
        on_gpus = torch.cuda.is_available() and dist.is_nccl_available()
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo")  # sums are on the CPU, gradients maybe not
    try:
        yield
    except KeyboardInterrupt:
        print(when_interrupted, file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        sentence = str(error).strip().rpartition("\n")[2]  # a loading process's error ends a traceback
        if "out of memory" in str(error) or "can't allocate memory" in str(error):
            sentence = "out of memory; training takes less with a smaller --batch-size and --accumulate, or --seconds"
        elif not isinstance(error, (ValueError, OSError)):
            raise
        print(f"error: {sentence}", file=sys.stderr)
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
        results, curve = evaluate(args)
        if RANK == 0:
            if args.json:
                sdser.replace_file(args.json, json.dumps(results, indent=2))
            report(results, args)
            if args.plot:
                plot(results, curve, args.plot)


if __name__ == "__main__":
    main()
