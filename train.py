"""Fine-tunes a multi-exit speech emotion model with self-distillation.

    python train.py                                              # a toy on synthetic speech, a minute on a CPU
    python train.py --data path/to/EMO-DB --backbone small       # real speech, from scratch
    python train.py --data path/to/RAVDESS --backbone facebook/wav2vec2-base
    torchrun --nproc_per_node=2 train.py                         # data-parallel, each process on its share of a batch

Read top to bottom: the presets and flags; the run and its training loop; what a run writes; then the data: where a clip
comes from, its split, its batch; last, how the script ends.
"""

import argparse
import contextlib
import csv
import glob
import hashlib
import inspect
import io
import json
import math
import os
import random
import re
import shlex
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import sdser

DEV_METRIC = f"dev_{sdser.METRIC}"  # of an epoch, averaged over the exits: the best epoch is kept
RANK = int(os.environ.get("RANK", 0))  # which of WORLD processes this is, set by torchrun
WORLD = int(os.environ.get("WORLD_SIZE", 1))

# The recipes, side by side; a flag given on the command line wins. toy: from scratch on a CPU, in a minute. paper: the
# paper's recipe. fast: the same method for pre-trained backbones, several times as fast; the one we recommend.
PRESETS = {
    #                   toy           paper                     fast
    "backbone":        ("tiny",       "facebook/wav2vec2-base", "facebook/wav2vec2-base"),
    "head":            ("attention",  "gru",                    "attention"),
    "distill_warmup":  (0.5,          0.0,                      0.5),
    "window":          ("natural",    "tile",                   "natural"),
    "seconds":         (3.0,          5.984,                    6.0),
    "epochs":          (10,           20,                       20),
    "lr":              (2e-3,         3e-5,                     5e-5),
    "head_lr":         (None,         None,                     1e-3),         # None: as lr
    "weight_decay":    (0.01,         0.0,                      0.01),         # AdamW; without decay it is Adam
    "warmup":          (0.1,          None,                     0.1),          # of steps, then cosine; None: constant
    "max_norm":        (1.0,          None,                     1.0),          # of the gradient
    "freeze_cnn":      (False,        False,                    True),
    "dtype":           ("float32",    "float32",                None),         # bfloat16 if the device has it
}  # fmt: skip
PRESET_NAMES = ("toy", "paper", "fast")


ON_RESUME = ("--resume", "--out", "--device", "--workers")  # flags that may be given anew; the others are the run's own


def parse_args(argv=None) -> argparse.Namespace:
    """Parses the flags. Defaults yield to the preset, and the preset yields to flags; on resume, see ON_RESUME."""
    argv = sys.argv[1:] if argv is None else argv
    epilog = "Defaults that depend on the preset: see PRESETS in train.py."
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], epilog=epilog, allow_abbrev=False)
    add, on_or_off = parser.add_argument, argparse.BooleanOptionalAction
    real, real_or_0 = positive(float), positive(float, zero=True)
    whole, whole_or_0 = positive(int), positive(int, zero=True)
    add("--out", default="out", metavar="DIR", help="a new or empty folder (default: out)")
    add("--resume", action="store_true", help="continue the run in --out, with its own flags")
    add("--device", metavar="D", help="default: cuda if available, else cpu")
    add("--workers", type=whole_or_0, default=0, metavar="N", help="extra processes that load audio (default 0)")
    add("--data", default="synthetic", metavar="SOURCE", help="synthetic (default), a corpus folder, or a manifest")
    add("--preset", choices=PRESET_NAMES, help="default: toy for built-in backbones, fast for pre-trained ones")
    add("--backbone", help=f"Hub name, folder saved by transformers, or one of {', '.join(sdser.SIZES)}")
    add("--exits", type=int, nargs="+", metavar="K", help="layers that get an exit; the last is the teacher")
    heads = f"one for the shallow exits, or one for each exit: {', '.join(sdser.HEADS)}"
    add("--head", choices=sdser.HEADS, nargs="+", metavar="H", help=heads)
    add("--labels", nargs="+", metavar="L", help="keep only the clips with these labels")
    add("--final", action="store_true", help="train on train and dev, and keep the last epoch")
    add("--balanced", action="store_true", help="weight cross-entropy by inverse class frequency, at all exits")
    add("--kl-weight", type=real_or_0, default=1.0, metavar="A", help="alpha; 0 drops the term (default 1)")
    add("--hint-weight", type=real_or_0, default=1.0, metavar="B", help="beta; 0 drops the term (default 1)")
    add("--temperature", type=real, default=1.0, metavar="T", help="of the KL term (default 1)")
    add("--distill-warmup", type=real_or_0, metavar="F", help="share of the steps over which alpha and beta ramp up")
    add("--detach-teacher", action=on_or_off, default=True, help="no KL and hint gradient to the teacher's outputs")
    add("--label-fraction", type=real, default=1.0, metavar="F", help="share of each label's training clips")
    add("--fold", type=fold, default="1/5", metavar="I/N", help="deal speakers into N groups; the I-th is test")
    add("--window", choices=("natural", "tile"), help="clips at original length, or repeated or cut to --seconds")
    add("--seconds", type=real, metavar="S", help="natural: crop longer training clips at random; tile: length")
    add("--epochs", type=whole, metavar="N", help="passes over the training clips")
    add("--batch-size", type=whole, default=16, metavar="N", help="clips, over all processes (default 16)")
    add("--accumulate", type=whole, default=1, metavar="N", help="batches per step (default 1)")
    add("--lr", type=real_or_0, metavar="X", help="learning rate of the backbone; 0 trains only the exits")
    add("--head-lr", type=real, metavar="X", help="learning rate of the exits")
    add("--freeze-cnn", action=on_or_off, help="do not train the convolutional encoder")
    add("--dtype", choices=("float32", "bfloat16"), help="fast: bfloat16 (autocast) if the device computes in it")
    add("--seed", type=whole_or_0, default=0, metavar="N", help="default 0")
    add("--skip-bad", action="store_true", help="decode every file first, and leave out those that cannot be read")

    args = parser.parse_args(argv)
    others = {word.partition("=")[0] for word in argv if word.startswith("--")} - set(ON_RESUME)
    if args.resume and others:
        parser.error(f"--resume goes on with the run's own flags; leave out {', '.join(sorted(others))}")
    args.preset = args.preset or ("toy" if args.backbone in (None, *sdser.SIZES) else "fast")
    for name, values in PRESETS.items():
        if getattr(args, name, None) is None:
            setattr(args, name, values[PRESET_NAMES.index(args.preset)])
    if args.head_lr is None:
        args.head_lr = args.lr
    if args.head_lr == 0:
        parser.error("--lr 0 trains only the exits: give them a --head-lr")
    if len(args.head) == 1:
        args.head = args.head[0]
    return args


def positive(kind: type, zero: bool = False):
    """An argparse type: a finite number of that kind, above 0 or, with zero=True, at least 0."""

    def number(text):
        value = kind(text)
        if not 0 <= value < math.inf or (value == 0 and not zero):
            raise ValueError
        return value

    number.__name__ = f"positive {kind.__name__}"  # as argparse's message calls it
    return number


def fold(text: str) -> list[int]:
    index, count = map(int, text.split("/"))
    if not 1 <= index <= count or count < 3:
        raise argparse.ArgumentTypeError(f"{text} is not I/N with I from 1 to N and N of at least 3")
    return [index, count]


# -- the run ----------------------------------------------------------------------------------------------------------
def run(args: argparse.Namespace) -> None:
    """Trains, keeps the best epoch by dev UAR, scores it once on test, and reports."""
    start, out, state = time.time(), Path(args.out), None
    if args.resume:
        with sdser.file_errors(out / "train_state.pt", "no run to resume", "train in a new folder, without --resume"):
            state = torch.load(out / "train_state.pt", map_location="cpu", weights_only=True)
            again = {"resume": True, "out": args.out, "device": args.device, "workers": args.workers}
            args = argparse.Namespace(**{**state["args"], **again})
    elif out.is_dir() and any(out.iterdir()):
        raise ValueError(f"--out {out}: holds files already; name a new or empty folder, or --resume the run in it")
    args.device = usable_device(args.device)
    args.dtype = args.dtype or ("bfloat16" if computes_in_bfloat16(args.device) else "float32")
    check_writable(out, folder=True)

    labels, clips = load_data(args)
    training = [clip for clip in clips if clip.split == "train"]
    torch.manual_seed(args.seed)
    tile_seconds = args.seconds if args.window == "tile" else None
    model = sdser.MultiExitSER(labels, args.backbone, args.exits, args.head, tile_seconds).to(args.device)
    steps_per_epoch = math.ceil(math.ceil(len(training) / args.batch_size) / args.accumulate)
    optimizer, scheduler = make_optimizer(model, args, args.epochs * steps_per_epoch)
    log = []
    if state:
        with sdser.file_errors(out / "train_state.pt", "does not fit its model", "train again"):
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            scheduler.load_state_dict(state["scheduler"])
            log = state["log"]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    print(f"{args.backbone}, preset {args.preset}: exits {model.exits}, {trained:.1f} M parameters to train, "
          f"{args.dtype} on {args.device}")  # fmt: skip
    parallel = DistributedDataParallel(model) if WORLD > 1 else model  # averages gradients over processes

    # Each epoch seeds its own dropout, masks, crops and order, so that a resumed run repeats an unbroken one.
    for epoch in range(len(log) + 1, args.epochs + 1):
        epoch_start, title = time.time(), f"epoch {epoch:{len(str(args.epochs))}}/{args.epochs}"
        rng = np.random.default_rng([args.seed, epoch])
        torch.manual_seed(int(rng.integers(2**63)) ^ RANK)  # processes differ in dropout and masks, not in order
        batches = make_batches(training, args, rng)
        dataset = ClipDataset(training, labels, tile_seconds, args.seconds, f"{args.seed} {epoch}")
        first_step = (epoch - 1) * steps_per_epoch
        losses = train_epoch(parallel, dataset, batches, optimizer, scheduler, args, first_step, title)
        line = {"epoch": epoch, **losses, "lr": scheduler.get_last_lr()[0]}
        message = f"{title}  loss {losses['loss']:.3f}"
        best = True  # --final has no dev clips to choose by: the last epoch is kept
        if not args.final:
            with autocast(args):  # as in training, for speed
                line["dev"] = score(model, clips, "dev", args)
            values = {row["exit"]: row[sdser.METRIC] for row in line["dev"]["exits"]}
            line[DEV_METRIC] = sum(values.values()) / len(values)
            best = all(line[DEV_METRIC] > earlier[DEV_METRIC] for earlier in log)
            message += f"  dev {sdser.METRIC.upper()} at exit "
            message += "  ".join(f"{exit}: {value:.3f}" for exit, value in values.items())
            message += "  best" if best else ""
        line["seconds"] = time.time() - epoch_start
        log.append(line)
        print(message, flush=True)
        if RANK == 0:
            save_epoch(out, args, clips, log, best, model, optimizer, scheduler)

    # The epoch that was kept, in float32: on dev once more, and on test for the first time.
    if WORLD > 1:
        dist.barrier()  # it has been saved
    model = sdser.MultiExitSER.from_pretrained(out).to(args.device)
    results = {"labels": labels, "args": vars(args), "seconds": round(time.time() - start, 1)}
    for split in ("test",) if args.final else ("dev", "test"):
        results[split] = score(model, clips, split, args)
    if RANK == 0:
        sdser.replace_file(out / "results.json", json.dumps(results, indent=2))
        report(results, log, out)


def train_epoch(model, dataset, batches, optimizer, scheduler, args, first_step: int, title: str) -> dict[str, float]:
    """Trains one pass over the clips, in batches of indices; returns the mean loss and its parts."""
    # A step must have the gradient of one large batch. For example, with --accumulate 2, a step has two batches, say of
    # 5 and 3 clips. Of 2 processes, the first runs 3 and 2 of these clips, the second 2 and 1. Each of the four losses
    # is a mean over its clips, so it counts by its share of the step, 3/8, 2/8, 2/8 and 1/8; and double, because
    # DistributedDataParallel averages over the processes. One process without --accumulate multiplies by 1.
    model.train()
    own = [batch[RANK::WORLD] for batch in batches]  # this process's clips of each batch
    # A process left without clips runs one anyway, with weight 0, because every process must join every step.
    runs = [share or batch[:1] for share, batch in zip(own, batches)]
    class_weights = inverse_frequencies(dataset).to(args.device) if args.balanced else None
    sums, total_steps = Counter(), args.epochs * math.ceil(len(batches) / args.accumulate)
    bar = progress(load(dataset, runs, args.workers), title, len(batches))
    for i, (waveforms, lengths, targets) in enumerate(bar):
        step = i // args.accumulate  # of this epoch
        batches_of_step = batches[step * args.accumulate : (step + 1) * args.accumulate]
        clips_in_step = sum(len(batch) for batch in batches_of_step)
        # early on there is nothing to be learned from the teacher
        ramp = min(1.0, (first_step + step) / (args.distill_warmup * total_steps)) if args.distill_warmup else 1.0

        with autocast(args):
            outputs = model(waveforms.to(args.device), lengths.to(args.device))
        loss, parts = sdser.self_distillation_loss(
            outputs, targets.to(args.device), ramp * args.kl_weight, ramp * args.hint_weight, args.temperature,
            args.detach_teacher, class_weights,
        )  # fmt: skip
        share_of_step = len(own[i]) / clips_in_step
        (share_of_step * WORLD * loss).backward()
        for name, value in {"loss": loss.detach(), **parts}.items():
            sums[name] += value * len(own[i])  # on the device, read once an epoch

        if (i + 1) % args.accumulate == 0 or i + 1 == len(batches):
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_norm or math.inf)
            if not (loss + norm).isfinite():
                names = ", ".join(dataset.clips[k].path for k in runs[i])
                raise ValueError(f"loss or gradient not finite; try a smaller --lr or --dtype float32 (after {names})")
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            bar.set_postfix(loss=f"{loss.item():.3f}")
    totals = torch.stack(list(sums.values())).cpu()
    if WORLD > 1:
        dist.all_reduce(totals)  # over the processes
    return dict(zip(sums, (totals / len(dataset.clips)).tolist()))


def autocast(args):
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.dtype == "bfloat16")


def make_optimizer(model: sdser.MultiExitSER, args, steps: int):
    """Freezes what is not trained; returns AdamW for the rest, and its learning-rate schedule over `steps`."""
    if args.freeze_cnn:
        model.freeze_convolutions()
    if args.lr == 0:
        model.backbone.requires_grad_(False)
    groups = [
        {"params": [p for p in model.backbone.parameters() if p.requires_grad], "lr": args.lr},
        {"params": list(model.heads.parameters()), "lr": args.head_lr},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=args.weight_decay)

    def factor(step):
        if args.warmup is None:
            return 1.0
        warmup = max(1, round(args.warmup * steps))
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def inverse_frequencies(dataset: "ClipDataset") -> Tensor:
    """Returns weights (C,) of the classes, whose mean over the clips is 1."""
    counts = Counter(clip.label for clip in dataset.clips)
    return torch.tensor([len(dataset.clips) / len(counts) / counts[label] for label in dataset.labels])


def score(model: sdser.MultiExitSER, clips: list["Clip"], split: str, args) -> dict:
    """Returns the scores of a split: {"exits": [{"exit": 2, "uar", ...}, ...]}, and of "fusion" if there are students
    to fuse."""
    clips = [clip for clip in clips if clip.split == split]
    logits = predict(model, clips, args.batch_size, args.workers)  # (exits, N, C)
    targets = torch.tensor([target_of(clip, model.labels) for clip in clips])
    results = {"exits": [{"exit": exit, **sdser.scores(targets, row)} for exit, row in zip(model.exits, logits)]}
    if len(logits) > 2:
        results["fusion"] = sdser.scores(targets, sdser.fuse(logits[:-1]))
    return results


def usable_device(name: str | None) -> str:
    """Returns the device asked for, by default cuda or else cpu; raises ValueError if it cannot be used here."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    with sdser.file_errors(f"--device {name}", "cannot be used here", "leave the flag out"):
        if name == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.zeros(1, device=name).item()
    return name


def computes_in_bfloat16(device: str) -> bool:
    """Tells whether a device has bfloat16 in hardware; where it is emulated, it is far slower than float32."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()


# -- what a run writes ------------------------------------------------------------------------------------------------
def save_epoch(out: Path, args, clips: list["Clip"], log: list[dict], best: bool, model, optimizer, scheduler) -> None:
    """Writes everything that a run leaves; train_state.pt last: if the run dies before it, the epoch is repeated."""
    if len(log) == 1:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["path", "label", "speaker", "split", *clips[0].more])
        for clip in clips:
            writer.writerow([os.path.abspath(clip.path), clip.label, clip.speaker, clip.split, *clip.more.values()])
        sdser.replace_file(out / "split.csv", text.getvalue())
    if best:
        model.save_pretrained(out)
    sdser.replace_file(out / "log.jsonl", "".join(json.dumps(line) + "\n" for line in log))
    state = {"args": vars(args), "log": log, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
             "scheduler": scheduler.state_dict()}  # fmt: skip
    memory = io.BytesIO()  # first, since torch's zip writer hides why a file cannot be written
    torch.save(state, memory)
    sdser.replace_file(out / "train_state.pt", memory.getbuffer())


def check_writable(path, folder: bool = False) -> None:
    """Raises ValueError, before the work rather than after it, if a file, or files in a folder, cannot be written."""
    with sdser.file_errors(path, "cannot be written", "name another place"):
        if folder:
            os.makedirs(path, exist_ok=True)
        place = path if os.path.exists(path) else f"{Path(path).absolute().parent}/"
        if os.path.isdir(path) != folder or not os.access(place, os.W_OK):
            raise PermissionError("no file can be put there")


def report(results: dict, log: list[dict], out: Path) -> None:
    """Prints which epoch was kept, and the scores of each split and exit."""
    kept = f"last epoch, {len(log)}, kept"
    if "dev" in results:
        best = max(log, key=lambda line: line[DEV_METRIC])["epoch"]
        kept = f"best epoch {best}, by dev {sdser.METRIC.upper()} averaged over exits"
    print(f"\n{kept} (chance {1 / len(results['labels']):.3f})\n")
    names = list(results["test"]["exits"][0])[1:]  # of the scores
    print("split    exit" + "".join(f"  {name:>8}" for name in names))
    for split in [split for split in ("dev", "test") if split in results]:
        rows = list(results[split]["exits"])
        if "fusion" in results[split]:
            rows.append({"exit": "fusion", **results[split]["fusion"]})
        for row in rows:
            print(f"{split:6} {row['exit']!s:>6}" + "".join(f"  {row[name]:8.3f}" for name in names))
    print(f"\nin {out}: config.json, model.safetensors, results.json, log.jsonl, split.csv, train_state.pt")
    print(f"next: python evaluate.py {shlex.quote(str(out))}")


# -- where a clip comes from: a folder of a known corpus, a manifest, synthetic voices --------------------------------
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
    "synthetic": (r"(?P<speaker>voice\d\d)-(?P<label>[a-z]+)-\d\d",
                  {"anger": "anger", "fear": "fear", "happiness": "happiness", "sadness": "sadness"}),
}  # fmt: skip
BATCH_SECONDS = 96  # of padded audio that is scored at once, as in a training batch of 16 clips of 6 s
AUDIO_ENDINGS = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf")
SPLITS = ("train", "dev", "test")


def load_corpus(source) -> list[Clip]:
    """Lists the clips of a corpus, each once, with a split only where a manifest gives one; no audio is read.

    source: "synthetic", a folder of one of CORPORA, recognised by its file names, or a CSV or TSV manifest. Raises
    FileNotFoundError or ValueError, naming the file and line and what would be right.
    """
    source = make_synthetic() if source == "synthetic" else os.fspath(source)
    if os.path.isdir(source):
        return read_folder(source)
    if not os.path.isfile(source):
        raise FileNotFoundError(f"{source}: no such folder or manifest; give one, or synthetic")
    with sdser.file_errors(source, "not a manifest", "give a CSV or TSV with columns path, label (and speaker)"):
        return read_manifest(source)


def read_folder(folder: str) -> list[Clip]:
    """Returns the clips of a folder, by the file-name pattern of CORPORA that fits most of its audio files."""
    found = glob.iglob("**", root_dir=folder, recursive=True)  # follows links to folders, leaves out hidden names
    files = sorted(path for path in (Path(folder, name) for name in found) if path.suffix.lower() in AUDIO_ENDINGS)
    files = [path for path in files if path.is_file()]
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
        recording = (path.stem, speaker)  # these corpora name every recording differently
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


# -- synthetic speech -------------------------------------------------------------------------------------------------
# How an emotion moves a voice: its pitch, and that pitch's way from start to end, in semitones; its tempo in syllables
# per second; the power by which harmonics fall off; the noise beside the voice.
PROSODY = {
    #            pitch contour tempo fall  breath
    "anger":     (+2.0,  -8.0,  5.0,  0.4,  0.02),
    "fear":      (+5.0,  +1.0,  6.5,  0.9,  0.08),
    "happiness": (+3.0,  +8.0,  4.0,  0.7,  0.02),
    "sadness":   (-2.5,  -2.0,  2.7,  1.4,  0.05),
}  # fmt: skip
VOWELS = [(730, 1090, 2440), (270, 2290, 3010), (300, 870, 2240), (530, 1840, 2480), (570, 840, 2410)]  # formants, Hz


def synthesize(prosody: tuple, pitch: float, size: float, rng: np.random.Generator) -> np.ndarray:
    """Syllables of one vowel, (T,) float32, 1.0 to 1.6 s: harmonics of a moving pitch, louder near a formant.

    prosody: a row of PROSODY; pitch: the speaker's mean, Hz; size: the speaker's formants relative to VOWELS.
    """
    raised, contour, tempo, fall, breath = prosody
    seconds = rng.uniform(1.0, 1.6)
    t = np.arange(int(seconds * sdser.SAMPLE_RATE)) / sdser.SAMPLE_RATE
    semitones = raised + rng.normal(0, 1) + contour * rng.uniform(0.5, 1.5) * (t / seconds - 0.5)
    hertz = pitch * 2 ** (semitones / 12)
    phase = 2 * np.pi * np.cumsum(hertz) / sdser.SAMPLE_RATE
    formants, fall, voice = size * np.array(VOWELS[rng.integers(len(VOWELS))]), fall + rng.normal(0, 0.2), 0.0
    for harmonic in range(1, 21):
        gain = sum(1 / (1 + ((harmonic * hertz - formant) / 150) ** 2) for formant in formants)
        voice += harmonic**-fall * gain * np.sin(harmonic * phase)
    voice *= np.sin(np.pi * (tempo * rng.uniform(0.8, 1.2) * t + rng.uniform())) ** 2
    return (0.5 * voice / np.abs(voice).max() + rng.normal(0, breath, len(t))).astype(np.float32)


def make_synthetic(speakers: int = 12, clips: int = 24, seed: int = 0) -> str:
    """Writes the synthetic corpus into the cache, once; returns its folder. The same seed gives the same samples."""
    recipe = repr((speakers, clips, seed, PROSODY, VOWELS)) + inspect.getsource(synthesize)  # a change makes it again
    cache = Path.home() / ".cache" / "sdser"
    folder = cache / f"synthetic-{hashlib.sha256(recipe.encode()).hexdigest()[:8]}"
    if folder.is_dir():
        return str(folder)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as fresh:
        for speaker in range(speakers):
            rng = np.random.default_rng([seed, speaker])
            pitch = (105 if speaker % 2 else 190) * 2 ** (rng.normal(0, 2) / 12)  # low and high voices, Hz
            size = (0.95 if speaker % 2 else 1.1) * rng.uniform(0.94, 1.06)
            for label, prosody in PROSODY.items():
                for n in range(clips):
                    path = Path(fresh, "wav", f"voice{speaker + 1:02}-{label}-{n + 1:02}.wav")
                    path.parent.mkdir(exist_ok=True)
                    soundfile.write(path, synthesize(prosody, pitch, size, rng), sdser.SAMPLE_RATE)
        with contextlib.suppress(OSError):  # another process was first: the same files
            os.replace(path.parent, folder)
    return str(folder)


# -- its split: by speaker, no speaker stands in two ------------------------------------------------------------------
def split_clips(clips: list[Clip], fold: tuple[int, int] = (1, 5), final: bool = False) -> list[Clip]:
    """Gives every clip a split, by speaker, every label in each split; depends only on the clips and the fold.

    clips: splits of their own are kept. fold: (I, N), of N groups of speakers the I-th is test, the next one dev, the
    rest train. final: dev trains too. Raises ValueError for too few speakers, a split without some label, a speaker in
    two splits, or a clip with neither speaker nor split.
    """
    if not any(clip.split for clip in clips):
        clips = deal_speakers(clips, *fold)
    if final:
        clips = [clip._replace(split="train") if clip.split == "dev" else clip for clip in clips]
    check_splits(clips, ("train", "test") if final else SPLITS)
    return clips


def deal_speakers(clips: list[Clip], index: int, count: int) -> list[Clip]:
    """Deals speakers into `count` groups, the one with most clips first, each into the group with fewest so far."""
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
    split_of = {index - 1: "test", index % count: "dev"}
    return [clip._replace(split=split_of.get(group_of[clip.speaker], "train")) for clip in clips]


def check_splits(clips: list[Clip], splits: tuple[str, ...]) -> None:
    """Raises ValueError unless each of the splits has every label, and no speaker is in two."""
    split_of, labels_of = {}, defaultdict(set)
    for clip in clips:
        if clip.split is None:
            raise ValueError(f"{clip.path}: has no split while other clips have one; give all a split, or none")
        labels_of[clip.split].add(clip.label)
        first = split_of.setdefault(clip.speaker, clip.split)
        if clip.speaker and first != clip.split:
            raise ValueError(f"speaker {clip.speaker} is in two splits, {first} and {clip.split}; keep each in one")
    for split in splits:
        missing = set().union(*labels_of.values()) - labels_of[split]
        if missing:
            names = ", ".join(sorted(missing))
            raise ValueError(f"the {split} split lacks {names}; try another --fold, or leave labels out by --labels")


# -- its batch --------------------------------------------------------------------------------------------------------
def load_data(args) -> tuple[list[str], list[Clip]]:
    """Returns the labels, and the clips with their splits, of files that can be read; prints the counts."""
    splits = ("train", "test") if args.final else SPLITS
    if args.resume:
        listed = os.path.join(args.out, "split.csv")
        clips = look_at(load_corpus(listed), if_moved(listed))
    else:
        clips = load_corpus(args.data)
        if args.labels:
            known = {clip.label for clip in clips}
            if len(set(args.labels)) < 2 or not set(args.labels) <= known:
                raise ValueError(f"--labels {' '.join(args.labels)}: give at least two of {', '.join(sorted(known))}")
            clips = [clip for clip in clips if clip.label in args.labels]
        clips = split_clips(clips, args.fold, args.final)
        clips = look_at(clips, "--skip-bad goes on without them", args.skip_bad)
        check_splits(clips, splits)  # bad clips may be left out
        clips = take_fraction(clips, args.label_fraction, args.seed)
    for clip in clips:
        if clip.split != "train" and clip.seconds > sdser.MAX_SECONDS:
            raise ValueError(f"{clip.path}: {clip.seconds:.1f} s is over the limit of {sdser.MAX_SECONDS} s; cut it")
    counts = Counter(clip.label for clip in clips)
    labels = sorted(counts)
    if len({label.casefold() for label in labels}) < len(labels):
        warnings.warn(f"{args.data}: some labels differ in case alone: {', '.join(labels)}", stacklevel=2)
    print(f"{args.data}: {', '.join(f'{label} {counts[label]}' for label in labels)}")
    for split in splits:
        part = [clip for clip in clips if clip.split == split]
        speakers = {clip.speaker for clip in part} - {None}
        print(f"{split}: {len(part)} clips of {len(speakers) or 'unknown'} speakers")
    return labels, clips


def if_moved(split_csv: str) -> str:
    """Returns what to do when a run's own clips are not where its split.csv says."""
    return f"if the corpus has moved, change its paths: sed -i 's|OLD|NEW|' {shlex.quote(split_csv)}"


def look_at(clips: list[Clip], advice: str = "repair them, or leave them out", skip_bad: bool = False) -> list[Clip]:
    """Fills in each clip's seconds, from its header; raises ValueError, with the advice, if a clip cannot be read.

    skip_bad: decode every file whole, and leave out those that cannot be read, with a warning for each.
    """

    def measure(clip):
        try:
            with sdser.open_audio(clip.path) as (_, sound):
                seconds = sound.frames / sound.samplerate
            if skip_bad:
                sdser.load_audio(clip.path)
            return clip._replace(seconds=seconds)
        except (OSError, ValueError) as error:
            return error

    with ThreadPoolExecutor(8) as pool:  # I/O-bound, so threads suffice
        found = list(progress(pool.map(measure, clips), "checking files", len(clips)))
    bad = [item for item in found if isinstance(item, Exception)]
    if bad and (not skip_bad or len(bad) == len(clips)):
        raise ValueError(f"{bad[0]} ({len(bad)} of {len(clips)} clips are bad; {advice})")
    for error in bad if RANK == 0 else []:
        warnings.warn(f"left out: {error}", stacklevel=2)
    return [item for item in found if isinstance(item, Clip)]


def take_fraction(clips: list[Clip], share: float, seed: int) -> list[Clip]:
    """Keeps all dev and test clips, and a share of each label's training clips; larger shares hold smaller ones."""
    kept = {clip.path for clip in clips if clip.split != "train"}
    for label in {clip.label for clip in clips}:
        training = [clip.path for clip in clips if clip.split == "train" and clip.label == label]
        random.Random(seed).shuffle(training)
        kept.update(training[: max(1, round(share * len(training)))])
    return [clip for clip in clips if clip.path in kept]


def make_batches(clips: list[Clip], args, rng: np.random.Generator) -> list[list[int]]:
    """Returns clip indices in batches of similar length: sorted within pools of 8 batches, random across."""
    size, order = args.batch_size, rng.permutation(len(clips))
    seconds = np.array([min(clip.seconds, args.seconds) for clip in clips])  # of the crop
    if args.window == "tile" or np.ptp(seconds) == 0:  # all are of one length: plain shuffling
        return [order[i : i + size].tolist() for i in range(0, len(order), size)]
    batches = []
    for i in range(0, len(order), 8 * size):
        pool = order[i : i + 8 * size]
        pool = pool[np.argsort(seconds[pool], kind="stable")]
        batches += [pool[k : k + size].tolist() for k in range(0, len(pool), size)]
    rng.shuffle(batches)
    return batches


class ClipDataset(Dataset):
    """Clip i is (waveform (T,), its target): whole, or tiled, or for training cropped at random.

    tile_seconds: repeat or cut to this length. crop_seconds: cut longer clips to it, at a place that `seed` decides.
    """

    def __init__(self, clips: list[Clip], labels: list[str], tile_seconds=None, crop_seconds=None, seed=""):
        self.clips, self.labels, self.tile_seconds = clips, labels, tile_seconds
        self.crop_seconds, self.seed = crop_seconds, seed

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        clip, start, seconds = self.clips[i], 0.0, self.tile_seconds or self.crop_seconds
        if self.crop_seconds and not self.tile_seconds:
            # seeded by clip, so that neither workers nor processes nor a resumed run change the crop
            start = random.Random(f"{self.seed} {i}").random() * max(0.0, clip.seconds - seconds)
        waveform = sdser.load_audio(clip.path, start, seconds)
        if self.tile_seconds:
            waveform = sdser.tile(waveform, round(seconds * sdser.SAMPLE_RATE))
        elif self.crop_seconds:
            waveform = waveform[: round(seconds * sdser.SAMPLE_RATE)]
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
    for i in np.argsort(seconds, kind="stable").tolist():  # so i is the longest of its batch
        full = len(batches[-1]) == batch_size or (len(batches[-1]) + 1) * seconds[i] > BATCH_SECONDS
        if full and batches[-1]:
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


# -- how a script ends ------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def script(when_interrupted: str = "interrupted"):
    """Ends a script as its user expects: an error is one sentence and status 2, Ctrl-C is status 130."""
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    if WORLD > 1:
        sys.stdout = sys.stdout if RANK == 0 else None
        dist.init_process_group()
    try:
        yield
    except KeyboardInterrupt:
        print(when_interrupted, file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        sentence = str(error).strip().rpartition("\n")[2]  # a loading process's error ends a traceback
        print(f"error: {sentence}", file=sys.stderr)
        sys.exit(2)
    if WORLD > 1:
        dist.destroy_process_group()


def main(argv=None) -> None:
    args = parse_args(argv)
    resume = f"python train.py --resume --out {shlex.quote(args.out)}"
    with script(f"interrupted: {resume} continues after the last epoch printed, if any"):
        run(args)


if __name__ == "__main__":
    main()
