"""Fine-tunes a multi-exit speech emotion model with self-distillation.

    python train.py                                              # real speech, two minutes on a CPU
    python train.py --data path/to/RAVDESS                       # the same small network, another corpus
    python train.py --data path/to/RAVDESS --backbone facebook/wav2vec2-base
    torchrun --nproc_per_node=2 train.py                         # data-parallel, each process on its share of a batch

First the flags, the run and its training loop; then the data: where a clip comes from, its split, its batch.
"""

import argparse
import contextlib
import csv
import glob
import io
import json
import math
import os
import random
import re
import shlex
import subprocess
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
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

HERE = f"{Path(__file__).resolve().parent}{os.sep}"
DATA = Path(HERE, "data")  # real speech and a small pre-trained network
HUBERT_SMALL = str(DATA / "hubert-small")
WAV2VEC2 = "facebook/wav2vec2-base"

# The recipes, side by side; a flag given on the command line wins. toy: fine-tunes the network in data/, in two minutes
# on a CPU. scratch: random weights. paper: the paper's recipe. fast: the same method for pre-trained backbones, several
# times as fast; the one we recommend.
PRESETS = {
    #                   toy           scratch       paper         fast
    "backbone":        (HUBERT_SMALL, "tiny",       WAV2VEC2,     WAV2VEC2),
    "exits":           ([2, 4, 6],    None,         None,         None),       # None: see default_exits in sdser.py
    "head":            ("attention",  "attention",  "gru",        "attention"),
    "distill_warmup":  (0.5,          0.5,          0.0,          0.5),
    "window":          ("natural",    "natural",    "tile",       "natural"),
    "seconds":         (2.0,          3.0,          5.984,        6.0),
    "epochs":          (12,           10,           20,           20),
    "batch_size":      (8,            16,           16,           16),
    "lr":              (5e-4,         2e-3,         3e-5,         5e-5),
    "head_lr":         (1e-3,         None,         None,         1e-3),       # None: as lr
    "weight_decay":    (0.01,         0.01,         0.0,          0.01),       # AdamW; without decay it is Adam
    "warmup":          (0.1,          0.1,          None,         0.1),        # of steps, then cosine; None: constant
    "max_norm":        (1.0,          1.0,          None,         1.0),        # of the gradient
    "freeze_cnn":      (True,         False,        False,        True),
    "dtype":           ("float32",    "float32",    "float32",    None),       # None: bfloat16 if the device has it
}  # fmt: skip
PRESET_NAMES = ("toy", "scratch", "paper", "fast")
ON_RESUME = ("--resume", "--out", "--device", "--workers")  # the flags that --resume takes; the others are the run's


def parse_args(argv=None) -> argparse.Namespace:
    """Parses the flags. Flags win over the preset, and the preset over defaults; on resume, see ON_RESUME."""
    argv = sys.argv[1:] if argv is None else argv
    epilog = "Defaults that depend on the preset: see PRESETS in train.py."
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], epilog=epilog, allow_abbrev=False)
    add, on_or_off = parser.add_argument, argparse.BooleanOptionalAction
    real, real_or_0, share = positive(float), positive(float, zero=True), positive(float, most=1)
    whole, whole_or_0 = positive(int), positive(int, zero=True)
    add("--out", default="out", metavar="DIR", help="a new or empty folder (default: out)")
    add("--resume", action="store_true", help="continue the run in --out, with its own flags")
    add("--device", metavar="D", help="default: cuda if available, else cpu")
    add("--workers", type=whole_or_0, metavar="N", help="processes that load audio (default: 4 on cuda, else 0)")
    add("--data", default=str(DATA / "emodb"), metavar="SOURCE", help="corpus folder or manifest (default: data/emodb)")
    add("--preset", choices=PRESET_NAMES, help="default: toy; for other backbones scratch if built-in, else fast")
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
    ramp = "share of the steps, 0 to 1, over which alpha and beta ramp up"
    add("--distill-warmup", type=positive(float, zero=True, most=1), metavar="F", help=ramp)
    add("--detach-teacher", action=on_or_off, default=True, help="no KL and hint gradient to the teacher's outputs")
    add("--label-fraction", type=share, default=1.0, metavar="F", help="share of each label's training clips, up to 1")
    add("--fold", type=fold, default="1/5", metavar="I/N", help="deal speakers into N groups; the I-th is test")
    add("--window", choices=("natural", "tile"), help="clips at original length, or repeated or cut to --seconds")
    add("--seconds", type=real, metavar="S", help="natural: crop longer training clips at random; tile: length")
    add("--epochs", type=whole, metavar="N", help="passes over the training clips")
    add("--batch-size", type=whole, metavar="N", help="clips, over all processes")
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
    if args.preset is None and args.backbone in sdser.SIZES:
        args.preset = "scratch"
    elif args.preset is None:
        args.preset = "toy" if os.path.abspath(args.backbone or HUBERT_SMALL) == HUBERT_SMALL else "fast"
    for name, values in PRESETS.items():
        if getattr(args, name, None) is None:
            setattr(args, name, values[PRESET_NAMES.index(args.preset)])
    if args.head_lr is None:
        args.head_lr = args.lr
    if args.head_lr == 0:
        parser.error("--lr 0 trains only the exits: give them a --head-lr")
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
            args = argparse.Namespace(**{**vars(args), **state["args"], **again})
        for left_over in out.glob(".*.tmp"):  # by a process that was killed while it wrote
            left_over.unlink(missing_ok=True)
    elif out.is_dir() and any(out.iterdir()):
        raise ValueError(f"--out {out}: holds files already; name a new or empty folder, or --resume the run in it")
    args.device = usable_device(args.device)
    if args.workers is None:  # a GPU takes less time for a step than one process needs to read its clips
        args.workers = 4 if args.device.startswith("cuda") else 0
    args.dtype = args.dtype or ("bfloat16" if computes_in_bfloat16(args.device) else "float32")
    check_writable(out, folder=True)

    labels, clips = load_data(args)
    training = [clip for clip in clips if clip.split == "train"]
    torch.manual_seed(args.seed)
    tile_seconds = args.seconds if args.window == "tile" else None
    if state:  # a resumed run no longer needs the backbone that it started from
        model = sdser.MultiExitSER.from_pretrained(out).to(args.device)
        model.threshold = None  # of other weights
    else:
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
    name = args.backbone.removeprefix(HERE)
    print(f"{name}, preset {args.preset}: exits {model.exits}, {trained:.1f} M parameters to train, "
          f"{args.dtype} on {args.device}")  # fmt: skip
    parallel = DistributedDataParallel(model) if WORLD > 1 else model  # averages gradients over processes

    # Each epoch seeds its own dropout, masks, crops and order, so that a resumed run repeats an unbroken one.
    for epoch in range(len(log) + 1, args.epochs + 1):
        epoch_start, title = time.time(), f"epoch {epoch:{len(str(args.epochs))}}/{args.epochs}"
        rng = np.random.default_rng([args.seed, epoch])
        torch.manual_seed(int(rng.integers(2**63)) ^ RANK)  # processes differ in dropout and masks, not in order
        batches = make_batches(training, args, rng)
        dataset = ClipDataset(training, labels, tile_seconds, args.seconds, f"{args.seed} {epoch}")
        losses = train_epoch(parallel, dataset, batches, optimizer, scheduler, args, title)
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
        if RANK == 0:
            save_epoch(out, args, clips, log, best, model, optimizer, scheduler)
        print(message)  # once it is saved, so that Ctrl-C loses nothing that has been seen

    # The kept epoch is scored in float32, on dev once more and on test for the first time.
    if WORLD > 1:
        dist.barrier()  # until rank 0 has saved it
    model = sdser.MultiExitSER.from_pretrained(out).to(args.device)
    results = {"labels": labels, "args": vars(args), "seconds": round(time.time() - start, 1)}
    for split in ("test",) if args.final else ("dev", "test"):
        results[split] = score(model, clips, split, args)
    if RANK == 0:
        sdser.replace_file(out / "results.json", json.dumps(results, indent=2))
        report(results, log, out)


def train_epoch(model, dataset, batches, optimizer, scheduler, args, title: str) -> dict[str, float]:
    """Trains one pass over the clips, in batches of indices; returns the mean loss and its parts."""
    model.train()
    my_batches = [batch[RANK::WORLD] for batch in batches]
    # A process left without clips runs one anyway, with weight 0, because every process must join every step.
    to_run = [mine or batch[:1] for mine, batch in zip(my_batches, batches)]
    class_weights = inverse_frequencies(dataset).to(args.device) if args.balanced else None
    sums, total_steps = Counter(), args.epochs * math.ceil(len(batches) / args.accumulate)
    bar = progress(load(dataset, to_run, args.workers), title, len(batches))
    for i, (waveforms, lengths, targets) in enumerate(bar):
        first = i - i % args.accumulate  # index of the step's first batch
        clips_in_step = sum(len(batch) for batch in batches[first : first + args.accumulate])
        # early on there is nothing to be learned from the teacher; last_epoch counts the steps of the whole run
        ramp = min(1.0, scheduler.last_epoch / (args.distill_warmup * total_steps)) if args.distill_warmup else 1.0

        with autocast(args):
            outputs = model(waveforms.to(args.device), lengths.to(args.device))
        loss, parts = sdser.self_distillation_loss(
            outputs, targets.to(args.device), ramp * args.kl_weight, ramp * args.hint_weight, args.temperature,
            args.detach_teacher, class_weights,
        )  # fmt: skip
        # A loss is a mean over this process's clips of a batch. It counts by its share of the step's clips, so that the
        # step has the gradient of one large batch. For example, with --accumulate 2, a step may have batches of 5 and 3
        # clips; of 2 processes, one runs 3 and 2 of them, the other 2 and 1: the shares are 3/8, 2/8, 2/8 and 1/8.
        share = len(my_batches[i]) / clips_in_step
        (share * WORLD * loss).backward()  # times WORLD, because DistributedDataParallel divides by it
        for name, value in {"loss": loss.detach(), **parts}.items():
            sums[name] += value * len(my_batches[i])

        if (i + 1) % args.accumulate == 0 or i + 1 == len(batches):
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_norm or math.inf)
            if not (loss + norm).isfinite():
                names = ", ".join(dataset.clips[k].path for k in to_run[i])
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
    """Returns one weight per class, (C,); their mean over the clips is 1."""
    counts = Counter(clip.label for clip in dataset.clips)
    return torch.tensor([len(dataset.clips) / len(counts) / counts[label] for label in dataset.labels])


def score(model: sdser.MultiExitSER, clips: list["Clip"], split: str, args) -> dict:
    """Returns {"exits": [{"exit": 2, "uar": 0.8, ...}, ...], "fusion": {...}}; fusion only of two students or more."""
    clips = [clip for clip in clips if clip.split == split]
    targets = torch.tensor([target_of(clip, model.labels) for clip in clips])
    logits_of = answers(model.exits, predict(model, clips, args.batch_size, args.workers))
    rows = {exit: sdser.scores(targets, logits) for exit, logits in logits_of.items()}
    fusion = {"fusion": rows.pop("fusion")} if "fusion" in rows else {}
    return {"exits": [{"exit": exit, **row} for exit, row in rows.items()], **fusion}


def answers(exits: list[int], logits: Tensor) -> dict[int | str, Tensor]:
    """Names who answers, with what logits (N, C): each exit, and "fusion" of the students if there are two or more."""
    rows = dict(zip(exits, logits))
    return {**rows, "fusion": sdser.fuse(logits[:-1])} if len(exits) > 2 else rows


def usable_device(name: str | None) -> str:
    """Returns the device asked for, by default cuda or else cpu; raises ValueError if it cannot be used here."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    with sdser.file_errors(f"--device {name}", "cannot be used here", "name another, for example cpu"):
        if name == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.zeros(1, device=name).item()
    return name


def computes_in_bfloat16(device: str) -> bool:
    """Tells whether a device has bfloat16 in hardware; where it is emulated, it is far slower than float32."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    has_bfloat16 = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)  # a Mac's torch has no oneDNN
    return device == "cpu" and has_bfloat16()


# -- what a run writes ------------------------------------------------------------------------------------------------
def save_epoch(out: Path, args, clips: list["Clip"], log: list[dict], best: bool, model, optimizer, scheduler) -> None:
    """Writes an epoch's files, train_state.pt last: if the run dies before that is written, the epoch is repeated."""
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
    print(f"\nin {out}: config.json, model.safetensors, README.md, results.json, log.jsonl, split.csv, train_state.pt")
    print(f"next: python evaluate.py {quote(out)}")


def quote(path) -> str:
    """Quotes a path for the shell of this system."""
    return subprocess.list2cmdline([str(path)]) if os.name == "nt" else shlex.quote(str(path))


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
BATCH_SECONDS = 96  # of padded audio that is scored at once, as in a training batch of 16 clips of 6 s
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
            means = f"its {sdser.METRIC.upper()} is a mean over the others"
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


# -- batches ----------------------------------------------------------------------------------------------------------
def load_data(args) -> tuple[list[str], list[Clip]]:
    """Returns the labels, and the clips with their splits, of files that can be read; prints the counts."""
    splits = ("train", "test") if args.final else SPLITS
    if args.resume:
        listed = os.path.join(args.out, "split.csv")
        clips = look_at(load_corpus(listed), listed)
    else:
        clips = load_corpus(args.data)
        if args.labels:
            known = {clip.label for clip in clips}
            if len(set(args.labels)) < 2 or not set(args.labels) <= known:
                raise ValueError(f"--labels {' '.join(args.labels)}: give at least two of {', '.join(sorted(known))}")
            clips = [clip for clip in clips if clip.label in args.labels]
        clips = split_clips(clips, args.fold, args.final)
        clips = look_at(clips, skip_bad=args.skip_bad)
        check_splits(clips, splits)  # bad clips may be left out
        clips = take_fraction(clips, args.label_fraction, args.seed)
    counts = Counter(clip.label for clip in clips)
    labels = sorted(counts)
    for kind, names in (("labels", labels), ("speakers", sorted({clip.speaker or "" for clip in clips}))):
        spellings = Counter(name.casefold() for name in names)
        same = [name for name in names if spellings[name.casefold()] > 1]
        if same:
            warnings.warn(f"{args.data}: some {kind} differ only in case: {', '.join(same)}", stacklevel=2)
    print(f"{args.data.removeprefix(HERE)}: {', '.join(f'{label} {counts[label]}' for label in labels)}")
    for split in splits:
        part = [clip for clip in clips if clip.split == split]
        speakers = {clip.speaker for clip in part} - {None}
        print(f"{split}: {len(part)} clips of {len(speakers) or 'unknown'} speakers")
    return labels, clips


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


def take_fraction(clips: list[Clip], share: float, seed: int) -> list[Clip]:
    """Keeps all dev and test clips, and a share of each label's training clips; a larger share contains a smaller."""
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


# -- how a script ends ------------------------------------------------------------------------------------------------
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
    resume = f"python train.py --resume --out {quote(args.out)}"
    with script(f"interrupted: {resume} continues after the last epoch printed, if any"):
        run(args)


if __name__ == "__main__":
    main()
