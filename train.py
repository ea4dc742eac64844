"""Fine-tunes a multi-exit speech emotion model with self-distillation.

    python train.py                                              # a toy on synthetic speech, minutes on a CPU
    python train.py --data path/to/EMO-DB --backbone small       # real speech, from scratch
    python train.py --data path/to/RAVDESS --backbone facebook/wav2vec2-base
    torchrun --nproc_per_node=2 train.py                         # data-parallel, each process on its share of a batch

Read top to bottom: the presets, the flags, the run and its training loop, what it writes; then the data, in the order
in which a clip lives: where it comes from, its split, its batch; last, several processes and how the script ends.
"""

import argparse
import contextlib
import csv
import hashlib
import inspect
import io
import json
import math
import os
import random
import re
import signal
import socket
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import islice
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

# What torchrun tells each process: which one it is, on its machine and of all. Alone, a process is 0 of 1.
RANK, LOCAL_RANK, WORLD = (int(os.environ.get(*pair)) for pair in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))

# The recipes, side by side; a flag given on the command line wins. toy: from scratch on a CPU in minutes. paper: the
# paper's recipe. fast: the same method for pre-trained backbones, several times as fast; the one we recommend.
PRESETS = {
    #                   toy           paper                     fast
    "backbone":        ("tiny",       "facebook/wav2vec2-base", "facebook/wav2vec2-base"),
    "exits":           (None,         None,                     None),         # None: as MultiExitSER chooses
    "head":            ("attention",  "gru",                    "attention"),
    "kl_weight":       (1.0,          1.0,                      1.0),
    "hint_weight":     (1.0,          1.0,                      1.0),
    "temperature":     (1.0,          1.0,                      1.0),
    "distill_warmup":  (0.5,          0.0,                      0.5),          # of steps, KL and hint growing from 0
    "detach_teacher":  (True,         True,                     True),
    "window":          ("natural",    "tile",                   "natural"),
    "seconds":         (3.0,          5.984,                    6.0),
    "epochs":          (10,           20,                       20),
    "batch_size":      (16,           16,                       16),
    "accumulate":      (1,            1,                        1),
    "lr":              (2e-3,         3e-5,                     5e-5),
    "head_lr":         (None,         None,                     1e-3),         # None: as lr
    "weight_decay":    (0.01,         0.0,                      0.01),         # AdamW; without decay it is Adam
    "warmup":          (0.1,          None,                     0.1),          # of steps, then cosine; None: constant
    "max_norm":        (1.0,          None,                     1.0),          # of the gradient
    "freeze_cnn":      (False,        False,                    True),
    "dtype":           ("float32",    "float32",                "bfloat16"),
}  # fmt: skip
PRESET_NAMES = ("toy", "paper", "fast")


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog="Defaults: see PRESETS in train.py."
    )
    add, flag = parser.add_argument, argparse.BooleanOptionalAction
    add("--preset", choices=PRESET_NAMES, help="default: toy for built-in backbones, fast for pre-trained ones")
    add("--data", metavar="SOURCE", help="synthetic (default), ravdess, emodb, a corpus folder, or a manifest")
    add("--backbone", help=f"Hub name, folder saved by transformers, or one of {', '.join(sdser.SIZES)}")
    add("--exits", type=int, nargs="+", metavar="K", help="layers that get an exit; the last is the teacher")
    add(
        "--head",
        choices=sdser.HEADS,
        nargs="+",
        metavar="H",
        help=f"of the shallow exits, or one for each exit: {', '.join(sdser.HEADS)}",
    )
    add("--labels", nargs="+", metavar="L", help="keep the clips of these labels alone (default: of all)")
    add("--final", action="store_true", default=None, help="train on train and dev, and keep the last epoch")
    add("--kl-weight", type=non_negative, metavar="A", help="alpha; 0 leaves the term out")
    add("--hint-weight", type=non_negative, metavar="B", help="beta; 0 leaves the term out")
    add("--temperature", type=positive, metavar="T", help="softens what the KL term compares; 1 leaves it")
    add("--distill-warmup", type=share, metavar="F", help="share of the steps over which alpha and beta grow from 0")
    add("--detach-teacher", action=flag, help="whether KL and hint gradients stop at the teacher's outputs")
    add("--label-fraction", type=fraction, metavar="F", help="train on this share of the training clips, by label")
    add("--fold", type=fold, metavar="I/N", help="cross-validation: speakers dealt into N groups, group I is test")
    add("--window", choices=("natural", "tile"), help="clips at natural length, or repeated or cut to --seconds")
    add("--seconds", type=clip_seconds, metavar="S", help="longer training clips are cropped at random; tile: to reach")
    add("--epochs", type=positive_int, metavar="N", help="passes over the training clips")
    add("--batch-size", type=positive_int, metavar="N", help="clips, of all processes together")
    add("--accumulate", type=positive_int, metavar="N", help="batches per step")
    add("--lr", type=positive, metavar="X", help="learning rate of the backbone")
    add("--head-lr", type=positive, metavar="X", help="learning rate of the exits; toy, paper: as --lr; fast: 1e-3")
    add("--freeze-cnn", action=flag, help="whether the convolutional encoder stays as it is")
    add("--dtype", choices=("float32", "bfloat16"), help="bfloat16: by autocast")
    add("--compile", action="store_true", default=None, help="compile the transformer layers (pays on CUDA)")
    add("--device", metavar="D", help="default: cuda where there is one, else cpu")
    add("--workers", type=natural, metavar="N", help="processes that load audio (default 0: none beside this one)")
    add("--seed", type=natural, metavar="N", help="default 0")
    add("--skip-bad", action="store_true", default=None, help="leave unreadable clips out instead of stopping")
    add("--out", default="out", metavar="DIR", help="default: out")
    add("--resume", action="store_true", help="go on with the run in --out; its flags need not be repeated")
    return parser.parse_args(argv)


def number(convert, test, wanted):
    """An argparse type: a number that passes the test."""

    def parse(text):
        try:
            value = convert(text)
        except ValueError:
            value = None
        if value is None or not math.isfinite(value) or not test(value):
            raise argparse.ArgumentTypeError(f"{text} is not {wanted}")
        return value

    return parse


positive = number(float, lambda x: x > 0, "a number above 0")
non_negative = number(float, lambda x: x >= 0, "a number of at least 0")
positive_int = number(int, lambda x: x > 0, "a whole number above 0")
natural = number(int, lambda x: 0 <= x < 2**31, "a whole number of at least 0")
clip_seconds = number(
    float, lambda x: 0.025 <= x <= sdser.MAX_SECONDS, "a length of at least one frame, 0.025 s, and at most 60 s"
)
fraction = number(float, lambda x: 0 < x <= 1, "a share above 0 and at most 1")
share = number(float, lambda x: 0 <= x <= 1, "a share from 0 to 1")


def fold(text: str) -> list[int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count) and int(count) >= 3):
        raise argparse.ArgumentTypeError(f"{text} is not I/N with I from 1 to N and N of at least 3")
    return [int(index), int(count)]


def complete_args(given: argparse.Namespace) -> tuple[argparse.Namespace, dict | None]:
    """Fills in what was not given, from the resumed run or else the preset; returns the run's state too."""
    given = {name: value for name, value in vars(given).items() if value is not None}
    if len(given.get("head", ())) == 1:
        [given["head"]] = given["head"]
    if given.pop("resume"):
        state = load_state(Path(given["out"]))
        before = {"labels": None, "final": False} | state["args"]  # of a run from before there were these flags
        for name, value in given.items():
            if name not in ("out", "device", "workers", "skip_bad") and before[name] != value:
                flag = "--" + name.replace("_", "-")
                raise ValueError(
                    f"{flag} {value}: the run in {given['out']} has {before[name]}; leave the flag out to resume it, "
                    "or train anew in another folder"
                )
        return argparse.Namespace(**{**before, **given}), state
    preset = given.get("preset") or ("toy" if given.get("backbone", "tiny") in sdser.SIZES else "fast")
    defaults = {name: row[PRESET_NAMES.index(preset)] for name, row in PRESETS.items()}
    defaults |= dict(preset=preset, data="synthetic", labels=None, final=False, fold=None, label_fraction=1.0, seed=0,
                     device=None, workers=0, compile=False, skip_bad=False)  # fmt: skip
    args = argparse.Namespace(**{**defaults, **given})
    args.head_lr = args.head_lr or args.lr
    return args, None


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace, state: dict | None) -> None:
    """Trains, keeps the best epoch by dev UAR, scores it once on test, and reports."""
    start, out = time.time(), Path(args.out)
    args.device = usable_device(args.device)
    check_writable(args.out, folder=True)
    refuse_strangers_files(out, args)
    if args.batch_size < WORLD:
        raise ValueError(f"--batch-size {args.batch_size}: give at least one clip for each of {WORLD} processes")
    data = load_data(args)
    torch.manual_seed(args.seed)
    tile_seconds = args.seconds if args.window == "tile" else None
    model = sdser.MultiExitSER(data.labels, args.backbone, args.exits, args.head, tile_seconds).to(args.device)
    dataset = TrainingClips(data.parts["train"], data.labels, args)
    steps = args.epochs * math.ceil(math.ceil(len(dataset) / args.batch_size) / args.accumulate)
    optimizer, scheduler = make_optimizer(model, args, steps)
    print(f"{args.backbone}: exits {model.exits}, {describe_parameters(model)}, preset {args.preset}, on {args.device}")
    log = restore(state, out, data, model, optimizer, scheduler) if state else []
    out.mkdir(parents=True, exist_ok=True)
    parallel = compiled_and_parallel(model, args)

    # Each epoch seeds its own dropout, masks, crops and order, so that a resumed run repeats an unbroken one.
    lengths = [args.seconds if tile_seconds else min(seconds, args.seconds) for seconds in data.seconds["train"]]
    for epoch in range(len(log) + 1, args.epochs + 1):
        epoch_start, title = time.time(), f"epoch {epoch:{len(str(args.epochs))}}/{args.epochs}"
        rng = np.random.default_rng([args.seed, epoch])
        torch.manual_seed(int(rng.integers(2**63)) ^ RANK)  # processes differ in dropout and masks, not in order
        dataset.epoch = epoch
        batches = make_batches(lengths, args.batch_size, rng)
        losses, unread = train_epoch(parallel, batches, dataset, optimizer, scheduler, args, steps, title)
        log.append({"epoch": epoch, **losses, "lr": scheduler.get_last_lr()[0]})
        if unread := (data.left_out if epoch == 1 else []) + unread:
            log[-1]["left_out"] = unread
        best, told = True, ""  # --final has no dev to choose by: the last epoch is kept
        if not args.final:
            with autocast(args):
                log[-1]["dev"] = score_exits(model, data, "dev", args)
            exits = log[-1]["dev"]["exits"]
            log[-1]["dev_uar"] = sum(row["uar"] for row in exits) / len(exits)
            best = log[-1]["dev_uar"] > max((line["dev_uar"] for line in log[:-1]), default=-1)
            told = "  dev UAR at exit " + "  ".join(f"{row['exit']}: {row['uar']:.3f}" for row in exits)
        log[-1]["seconds"] = time.time() - epoch_start
        print(f"{title}  loss {losses['loss']:.3f}{told}{'  best' if best and told else ''}", flush=True)
        if RANK == 0:
            save_epoch(out, args, data, log, best, model, optimizer, scheduler)
    wait()  # for the last one to be saved
    if RANK == 0:
        refuse_other_run(out, log)

    # The epoch that was kept, in float32: on dev once more, and on test for the first time.
    model = sdser.MultiExitSER.from_pretrained(out).to(args.device)
    results = {"labels": data.labels, "args": vars(args), "seconds": round(time.time() - start, 1)}
    results |= {split: score_exits(model, data, split, args) for split in ("dev", "test") if data.parts[split]}
    if RANK == 0:
        write_text(out / "results.json", json.dumps(results, indent=2))
        report(results, log, out)


def train_epoch(model, batches, dataset, optimizer, scheduler, args, steps: int, title: str):
    """One pass over the training clips, part of `steps` steps.

    Returns the mean loss and its parts, dict[str, float], and the paths of clips that could not be read, list[str].
    """
    model.train()
    tally = Tally(dataset)
    bar = progress(None, title, total=len(batches), unit="batch")
    for step, clips_in_step in in_steps(load_batches(dataset, batches, args), args.accumulate):
        ramp = distillation_ramp(scheduler.last_epoch, steps, args)  # last_epoch counts steps
        for indices, waveforms, lengths, targets in step:
            share_gradients(model, last=indices is step[-1][0])
            with autocast(args):
                outputs = model(waveforms, lengths)
            loss, parts = sdser.self_distillation_loss(
                outputs, targets, ramp * args.kl_weight, ramp * args.hint_weight, args.temperature, args.detach_teacher
            )
            refuse_non_finite("loss", loss, indices, dataset)
            # So that the step's gradient is that of one large batch; averaged over processes, hence times WORLD.
            (loss * len(indices) / clips_in_step * WORLD).backward()
            tally.add(indices, {"loss": loss.item(), **parts})
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_norm or math.inf)  # inf: measured alone
        refuse_non_finite("gradient", norm, [i for indices, *_ in step for i in indices], dataset)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        bar.update(len(step))
        bar.set_postfix(loss=f"{tally.running_loss():.3f}")
    bar.close()
    return tally.finish()


def distillation_ramp(step: int, steps: int, args) -> float:
    """The share of alpha and beta at a step of `steps`: early on there is nothing to be learned from the teacher."""
    return min(1.0, step / (args.distill_warmup * steps)) if args.distill_warmup else 1.0


def autocast(args):
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.dtype == "bfloat16")


def make_optimizer(model: sdser.MultiExitSER, args, steps: int):
    """Freezes what is not to be trained; AdamW over the rest, and the learning rate's course over `steps`."""
    model.backbone.feature_extractor.requires_grad_(not args.freeze_cnn)
    groups = [
        {"params": [p for p in model.backbone.parameters() if p.requires_grad], "lr": args.lr},
        {"params": list(model.heads.parameters()), "lr": args.head_lr},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=args.weight_decay)

    def factor(step):
        if args.warmup is None:
            return 1.0
        warmup = max(1, round(args.warmup * steps))
        decayed = (step - warmup) / max(1, steps - warmup)
        return (step + 1) / warmup if step < warmup else 0.5 + 0.5 * math.cos(math.pi * decayed)

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def in_steps(batches, accumulate: int):
    """Yields lists of `accumulate` batches, the last one maybe shorter, and their number of clips in all processes."""
    while step := list(islice(batches, accumulate)):
        if control_c:
            raise KeyboardInterrupt
        if clips := summed(torch.tensor(sum(len(indices) for indices, *_ in step))).item():  # 0: none could be read
            yield step, clips


class Tally:
    """What an epoch adds up: losses, weighted by clips, and which clips of the dataset could be read."""

    def __init__(self, dataset):
        self.dataset, self.sums = dataset, defaultdict(float)
        self.read = torch.zeros(len(dataset), dtype=torch.int64)

    def add(self, indices: list[int], losses: dict[str, float]) -> None:
        for name, value in losses.items():
            self.sums[name] += value * len(indices)
        self.read[indices] = 1

    def running_loss(self) -> float:
        return self.sums["loss"] / max(1, self.read.sum().item())

    def finish(self) -> tuple[dict[str, float], list[str]]:
        """Mean losses over the clips of all processes, and the paths that none could read."""
        clips = summed(self.read).sum().item()
        sums = summed(torch.tensor(list(self.sums.values()), dtype=torch.float64)).tolist()
        if not clips:
            raise ValueError("no training clip could be read")
        unread = [clip.path for clip, times in zip(self.dataset.clips, self.read.tolist()) if not times]
        return {name: value / clips for name, value in zip(self.sums, sums)}, unread


def refuse_non_finite(what: str, value: Tensor, indices: list[int], dataset) -> None:
    if not value.isfinite():
        paths = [dataset.clips[i].path for i in indices]
        names = ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
        raise ValueError(f"the {what} became {value.item()} on {names}; try a smaller --lr, or --dtype float32")


def score_exits(model: sdser.MultiExitSER, data: "Data", split: str, args) -> dict:
    """{"exits": [{"exit", "uar", "accuracy", "macro_f1"}, ...], "fusion": {...}} over the clips of a split.

    Fusion is that of the students, as in the authors' code; with fewer than two there is none.
    """
    clips, reading = data.parts[split], dict(batch_size=args.batch_size, workers=args.workers, skip_bad=args.skip_bad)
    paths = [clip.path for clip in clips]
    logits, readable = predict(model, paths, data.seconds[split], **reading)
    if not logits.isfinite().all():
        raise ValueError(f"the model's answers to the {split} split are not finite; try a smaller --lr")
    targets = torch.tensor([model.labels.index(clip.label) for clip in clips])[readable]  # (N,)
    if len(targets.unique()) < len(model.labels):
        raise ValueError(f"the {split} split is left without a readable clip of some label; mend its files")
    logits = logits[:, readable]  # (exits, N, C)
    scores = lambda answers: sdser.scores(targets, answers.argmax(-1), len(model.labels))  # noqa: E731
    results = {"exits": [{"exit": exit} | scores(answers) for exit, answers in zip(model.exits, logits)]}
    if len(logits) > 2:
        results["fusion"] = scores(sdser.fuse(logits[:-1]))
    if left_out := [path for path, read in zip(paths, readable) if not read]:
        results["left_out"] = left_out
    return results


def usable_device(name: str | None) -> str:
    """The device asked for, or cuda where there is one, else cpu; raises ValueError if it cannot be used here."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if name == "cuda":
            torch.cuda.set_device(LOCAL_RANK)
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:  # what torch raises for unknown and for absent devices
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--device {name}: cannot be used here ({reason}); leave the flag out") from error
    return name


def describe_parameters(model) -> str:
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    total, trained = sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)
    return f"{total / 1e6:.1f} M parameters, {trained / 1e6:.1f} M trained"


# -- what a run writes ------------------------------------------------------------------------------------------------

# In the order in which those of an earlier run go: the one that shows the folder to be a run's is the last.
RUN_FILES = ("results.json", "train_state.pt", "log.jsonl", "split.csv", "model.safetensors", "config.json")


def save_epoch(out: Path, args, data: "Data", log: list[dict], best: bool, model, optimizer, scheduler) -> None:
    """The best model first, then the state, then what only tells of it: a run killed in between repeats the epoch."""
    if len(log) == 1:  # only now does anything take the place of an earlier run
        for name in RUN_FILES:
            (out / name).unlink(missing_ok=True)
        write_text(out / "split.csv", split_csv(data.clips))
    else:
        refuse_other_run(out, log[:-1])
    if best:
        model.save_pretrained(out)
    state = {"args": vars(args), "log": log, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
             "scheduler": scheduler.state_dict()}  # fmt: skip
    memory = io.BytesIO()  # first, since torch's zip writer hides why a file cannot be written
    torch.save(state, memory)
    with sdser.replacing(out / "train_state.pt") as file:
        file.write(memory.getbuffer())
    write_text(out / "log.jsonl", log_lines(log))


def refuse_strangers_files(out: Path, args) -> None:
    """Raises ValueError if the run would replace files in --out that no run of this script has written, or its data."""
    split = out / "split.csv"
    if os.path.realpath(args.data) == os.path.realpath(split):
        raise ValueError(f"--out {out}: its split.csv, which is --data, would be replaced; name another folder")
    # A run killed in its first epoch leaves a split.csv, and maybe weights, without the config.json that tells its own.
    alone = ("split.csv", "model.safetensors")
    foreign = [name for name in RUN_FILES if name not in alone and (out / name).exists() and not is_checkpoint(out)]
    if split.is_file() and not split.read_bytes().startswith(",".join(Clip._fields).encode() + b"\n"):
        foreign.append(split.name)
    if foreign:
        raise ValueError(f"--out {out}: holds a {foreign[0]} that is not of a run; name another folder, or empty it")


def is_checkpoint(folder: Path) -> bool:
    """Whether its config.json is that of a `MultiExitSER`."""
    try:
        return {"labels", "exits"} <= json.loads((folder / "config.json").read_text()).keys()
    except (OSError, ValueError, AttributeError):
        return False


def refuse_other_run(out: Path, log: list[dict]) -> None:
    """Raises ValueError if the log that this run has written is no longer there: its model may not be, either."""
    path = out / "log.jsonl"
    if not path.is_file() or path.read_text() != log_lines(log):
        raise ValueError(f"--out {out}: another run has written into it meanwhile; give each run a folder of its own")


def load_state(out: Path) -> dict:
    """What the last finished epoch saved for `--resume`."""
    path = out / "train_state.pt"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, so there is no run to resume; leave --resume out")
    with sdser.file_errors(path, "cannot be read", "train anew without --resume"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        if missing := PRESETS.keys() - state["args"].keys():
            raise ValueError(f"it does not say {min(missing)}")
        return {name: state[name] for name in ("args", "log", "model", "optimizer", "scheduler")}


def restore(state: dict, out: Path, data: "Data", model, optimizer, scheduler) -> list[dict]:
    """Puts everything back to where the state left it; returns its log."""
    if (out / "split.csv").read_text(encoding="utf-8") != split_csv(data.clips):
        source = state["args"]["data"]
        raise ValueError(f"{source}: its clips or splits are no longer those of the run in {out}; train anew")
    with sdser.file_errors(out / "train_state.pt", "does not fit its model", "train anew"):
        for part, name in ((model, "model"), (optimizer, "optimizer"), (scheduler, "scheduler")):
            part.load_state_dict(state[name])
    if RANK == 0:
        write_text(out / "log.jsonl", log_lines(state["log"]))  # a kill may have come between the state and the log
    return state["log"]


def report(results: dict, log: list[dict], out: Path) -> None:
    splits = [split for split in ("dev", "test") if split in results]
    best = max(log, key=lambda line: line.get("dev_uar", line["epoch"]))["epoch"]
    chosen = "best epoch {}, by dev UAR averaged over exits" if "dev" in results else "last epoch, {}, kept"
    print(f"\n{chosen.format(best)} (chance {1 / len(results['labels']):.3f})\n")
    print((" " * 13 + "".join(f"{split:>10}      " for split in splits)).rstrip())
    print("exit        " + "    UAR  accuracy" * len(splits))
    exits = results["test"]["exits"]
    names = [str(row["exit"]) for row in exits] + ["fusion"] * ("fusion" in results["test"])
    if len(exits) > 1:
        names[len(exits) - 1] += " (teacher)"
    for name, *rows in zip(names, *(score_rows(results[split]) for split in splits)):
        print(f"{name:13}" + "".join(f"{row['uar']:.3f}  {row['accuracy']:8.3f}  " for row in rows).rstrip())
    print(f"\nin {out}: config.json, model.safetensors, results.json, log.jsonl, split.csv, train_state.pt")
    print(f"next: python evaluate.py {out}")


def score_rows(scored: dict) -> list[dict]:
    """Of one split's results: a row for each exit, then fusion's, if any."""
    return scored["exits"] + ([scored["fusion"]] if "fusion" in scored else [])


def log_lines(log: list[dict]) -> str:
    return "".join(json.dumps(line) + "\n" for line in log)


def split_csv(clips: list["Clip"]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Clip._fields)
    writer.writerows(clip._replace(path=os.path.abspath(clip.path)) for clip in clips)
    return text.getvalue()


def check_writable(path, folder: bool = False) -> None:
    """Raises ValueError now, before any work, if nothing can be written at that place."""
    if not str(path):
        raise ValueError(f"an empty name {'of a folder' if folder else 'of a file'} was given; give one")
    if not folder and Path(path).name in RUN_FILES and is_checkpoint(Path(path).parent):
        raise ValueError(f"{path}: is a file of the model in that folder; name another place")
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path) and os.access(path, os.W_OK):
        return  # such as /dev/null
    place = Path(path).absolute() if folder else Path(path).absolute().parent
    while folder and not place.exists():
        place = place.parent
    with sdser.file_errors(path, f"cannot be {'made a folder' if folder else 'written'}", "name another place"):
        if os.path.isdir(path) and not folder:
            raise ValueError("it is a folder")
        tempfile.TemporaryFile(dir=place).close()


def write_text(path, text: str) -> None:
    with sdser.replacing(path) as file:
        file.write(text.encode())


# ---------------------------------------------------------------------------------------------------------------------
# Where a clip comes from: folders by their file names, manifests, downloads, synthetic voices
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
    "synthetic": Corpus(
        "synthetic speech",
        r"(?P<speaker>voice\d\d)-(?P<label>[a-z]+)-\d\d",
        {label: label for label in ("anger", "fear", "happiness", "sadness")},
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
        raise ValueError(
            f"{folder}: {files[0].name} is no file name of a known corpus ({known}); give a manifest (docs/corpora.md)"
        )
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
    names = ("dev", *DEV_NAMES) if split == "dev" else (split,)
    paths = [os.path.join(folder, name + ending) for name in names for ending in MANIFEST_ENDINGS]
    found = [path for path in paths if os.path.isfile(path)]
    if len(found) > 1:
        raise ValueError(f"{folder}: {found[0]} and {found[1]} both give the split {split}; keep one")
    return found


# What manifests call our columns, and dev: ours first, then other common names.
COLUMNS = {
    "path": ("path", "wav", "file", "filename", "file_name", "audio"),
    "label": ("label", "emo", "emotion"),
    "speaker": ("speaker", "spk", "speaker_id"),
    "split": ("split",),
}
DEV_NAMES = ("devel", "valid", "val", "validation")


def read_table(manifest: str) -> tuple[list[str], list[tuple[int, dict]], str]:
    """The column names of a CSV, TSV or JSONL, its rows, each with its line number, and what separates columns."""
    with open(manifest, encoding="utf-8-sig", newline="") as file:
        if manifest.lower().endswith(".jsonl"):
            rows = [(number, json.loads(line)) for number, line in enumerate(file, 1) if line.strip()]
            if odd := [number for number, row in rows if not isinstance(row, dict)]:
                raise ValueError(f"line {odd[0]}: not an object")
            return list(dict.fromkeys(name for _, row in rows for name in row)), rows, ""
        header = file.readline()  # it tells, whatever the file's name: the authors' lists are a .csv with tabs
        delimiter = max(",\t;", key=header.count)
        file.seek(0)
        reader = csv.DictReader(file, delimiter=delimiter)
        rows = [(reader.line_num, row) for row in reader]
        if odd := [number for number, row in rows if None in row]:
            raise ValueError(f"line {odd[0]}: more fields than the first line names")
        return list(reader.fieldnames or []), rows, delimiter


def read_manifest(manifest: str) -> list[Clip]:
    """Clips of a CSV or TSV with a header, or of a JSONL; paths are relative to the manifest.

    Two columns between tabs, with other headings, are read as file name and label, as in the authors' lists.
    """
    with sdser.file_errors(manifest, "not readable as a manifest", "mend that line, or save it as UTF-8 text"):
        header, rows, delimiter = read_table(manifest)
    if not rows:
        raise ValueError(f"{manifest}: lists no clips")
    columns = {ours: next((name for name in names if name in header), None) for ours, names in COLUMNS.items()}
    if delimiter == "\t" and len(header) == 2 and not (columns["path"] and columns["label"]):
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
        split = "dev" if split in DEV_NAMES else split
        if not path or not label or split not in ("", *SPLITS):
            wrong = "no path" if not path else "no label" if not label else f"unknown split {split!r}"
            raise ValueError(f"{manifest}, line {number}: {wrong}; give a path, a label, and a split or nothing")
        path = os.path.normpath(os.path.join(os.path.dirname(manifest), path))
        clips.append(Clip(path, label, speaker or None, split or None))
    return clips


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
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{name}-") as temporary:
        archive, fresh = os.path.join(temporary, "archive.zip"), os.path.join(temporary, "unpacked")
        with sdser.file_errors(entry.url, "the download failed", "try again, or unpack it by hand"):
            fetch(entry.url, archive)
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


def fetch(url: str, path: str) -> None:
    """Downloads a file, with a progress bar; a server that is silent for a minute has failed."""
    timeout = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(60)
        torch.hub.download_url_to_file(url, path)
    finally:
        socket.setdefaulttimeout(timeout)


def unpack(archive: str, folder: str, name: str) -> None:
    """Unpacks a zip, refusing one that reaches out of its folder, is too large, or is damaged."""
    with sdser.file_errors(name, "not a whole zip archive", "try again"), zipfile.ZipFile(archive) as file:
        for member in file.infolist():
            parts = re.split(r"[/\\]", member.filename)
            if ".." in parts or parts[0] == "" or ":" in parts[0]:
                raise ValueError(f"{name}: the archive would write outside its folder ({member.filename})")
        if sum(member.file_size for member in file.infolist()) > MAX_UNPACKED:
            raise ValueError(f"{name}: the archive would unpack to more than {MAX_UNPACKED >> 30} GiB")
        file.extractall(folder)


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
    samples = int(seconds * sdser.SAMPLE_RATE)
    t = np.arange(samples) / samples  # 0 to 1 over the clip

    # source: a sawtooth's phase follows the pitch; breath is noise
    accents = np.repeat(rng.normal(0, prosody.accent / 2, syllables), -(-samples // syllables))[:samples]
    wave = prosody.tremor * np.sin(2 * np.pi * (6 * seconds * t + rng.uniform()))
    semitones = (
        prosody.pitch + rng.normal(0, 1.0) + prosody.contour * (t - 0.5) * rng.uniform(0.5, 1.5) + accents + wave
    )
    phase = np.cumsum(pitch * 2 ** (semitones / 12) / sdser.SAMPLE_RATE)
    source = 2 * (phase % 1) - 1 + rng.normal(0, prosody.breath, samples)

    # filter: each syllable in the frequency domain, then its loudness
    tilt, fade = prosody.tilt + rng.normal(0, 2), prosody.fade * rng.uniform(0.3, 1.7)
    clip = np.zeros(samples)
    for part in np.array_split(np.arange(samples), syllables):
        f = np.fft.rfftfreq(len(part), 1 / sdser.SAMPLE_RATE)
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
                    soundfile.write(fresh / f"voice{speaker + 1:02}-{label}-{n + 1:02}.wav", wave, sdser.SAMPLE_RATE)
        with contextlib.suppress(OSError):  # another process was first: the same files
            os.replace(fresh, folder)
    return str(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Its split: by speaker, no speaker stands in two
# ---------------------------------------------------------------------------------------------------------------------


def split_clips(clips: list[Clip], fold: tuple[int, int] | None = None, final: bool = False) -> list[Clip]:
    """Gives every clip a split, by speaker, every label in each split; depends on the clips and the fold alone.

    Args:
        clips: splits of their own are kept (all clips have one, or none).
        fold: (I, N), I from 1: of N groups of speakers, group I is test, the next one dev, the rest train.
            None: about 40 % of the clips train, 30 % dev, 30 % test.
        final: what would be dev trains too.
    Raises:
        ValueError: too few speakers, a label that cannot be in each split, a speaker in two splits, a clip with
            neither speaker nor split.
    """
    if any(clip.split for clip in clips):
        if fold:
            warnings.warn("the manifest brings its own splits; --fold is ignored", stacklevel=2)
    else:
        clips = deal_speakers(clips, fold)
    if final:
        clips = [clip._replace(split="train") if clip.split == "dev" else clip for clip in clips]
    check_splits(clips, ("train", "test") if final else SPLITS)
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


def check_splits(clips: list[Clip], splits: tuple[str, ...]) -> None:
    """Raises ValueError unless each of the splits has every label, and no speaker, nor file, stands in two."""
    home, label_of, labels_of = {}, {}, defaultdict(set)
    for clip in clips:
        if label_of.setdefault(clip.path, clip.label) != clip.label:
            raise ValueError(f"{clip.path} has two labels, {label_of[clip.path]} and {clip.label}; keep one")
        if clip.split is None:
            raise ValueError(f"{clip.path}: has no split while other clips have one; give all a split, or none")
        labels_of[clip.split].add(clip.label)
        for who in filter(None, (f"speaker {clip.speaker}" if clip.speaker else None, clip.path)):
            if home.setdefault(who, clip.split) != clip.split:
                raise ValueError(f"{who} stands in two splits, {home[who]} and {clip.split}; keep each in one")
    for split in splits:
        if missing := set().union(*labels_of.values()) - labels_of[split]:
            raise ValueError(f"the {split} split has no {', '.join(sorted(missing))}; every label must be in each")


# ---------------------------------------------------------------------------------------------------------------------
# Its batch
# ---------------------------------------------------------------------------------------------------------------------


class Data(NamedTuple):
    """The clips of a run that can be read."""

    labels: list[str]
    clips: list[Clip]
    parts: dict[str, list[Clip]]  # by split
    seconds: dict[str, list[float]]  # by split, each clip's
    left_out: list[str]  # paths that could not be read


def load_data(args) -> Data:
    """Lists the corpus, splits it by speaker, looks at every file before any costs training, and tells the counts."""
    with one_process_a_machine_first():  # it downloads, or makes, the corpus
        listed = load_corpus(args.data)
    listed = split_clips(keep_labels(listed, args.labels, args.data), args.fold, args.final)
    clips, seconds = keep_readable(listed, args.skip_bad)
    left_out = sorted({clip.path for clip in listed} - {clip.path for clip in clips})
    wait()
    check_splits(clips, ("train", "test") if args.final else SPLITS)
    labels, seconds_of = sorted({clip.label for clip in clips}), dict(zip(clips, seconds))
    clips = take_fraction(clips, args.label_fraction, args.seed)
    parts = {split: [clip for clip in clips if clip.split == split] for split in SPLITS}
    seconds = {split: [seconds_of[clip] for clip in part] for split, part in parts.items()}
    speakers = {split: len({clip.speaker for clip in part} - {None}) or "?" for split, part in parts.items()}
    counts = ", ".join(f"{len(part)} {split} ({speakers[split]})" for split, part in parts.items() if part)
    print(f"{args.data}: {len(labels)} emotions; clips (speakers): {counts}")
    return Data(labels, clips, parts, seconds, left_out)


def keep_labels(clips: list[Clip], labels: list[str] | None, source: str) -> list[Clip]:
    """The clips of these labels; of all labels for None."""
    known = sorted({clip.label for clip in clips})
    if unknown := [label for label in labels or () if label not in known]:
        raise ValueError(f"--labels {' '.join(unknown)}: {source} has {', '.join(known)}")
    if labels and len(set(labels)) < 2:
        raise ValueError(
            f"--labels {' '.join(labels)}: give at least two different ones; {source} has {', '.join(known)}"
        )
    return [clip for clip in clips if not labels or clip.label in labels]


def keep_readable(clips: list[Clip], skip_bad: bool) -> tuple[list[Clip], list[float]]:
    """The clips that can be read, and their seconds; without `skip_bad`, one that cannot be read stops the run."""
    found = look_at(clips)
    bad = [problem for problem in found if isinstance(problem, str)]
    if bad and not skip_bad:
        raise ValueError(f"{bad[0]} ({len(bad)} of {len(clips)} clips are bad; --skip-bad leaves them out)")
    for problem in bad if RANK == 0 else ():
        warnings.warn(f"left out: {problem}", stacklevel=2)
    good = [(clip, seconds) for clip, seconds in zip(clips, found) if not isinstance(seconds, str)]
    return [clip for clip, _ in good], [seconds for _, seconds in good]


def look_at(clips: list[Clip]) -> list[float | str]:
    """Each clip's seconds, or what is wrong with it."""

    def measure(clip):
        try:
            return audio_seconds(clip.path, None if clip.split == "train" else sdser.MAX_SECONDS)
        except (OSError, ValueError) as error:
            return str(error)

    found = []
    with ThreadPoolExecutor(8) as pool:  # waits for disks, not for this processor
        for i in progress(range(0, len(clips), 1000), "looking at files", unit=" thousand", delay=2):
            found += pool.map(measure, clips[i : i + 1000])
    return found


def audio_seconds(path, max_seconds: float | None = None) -> float:
    """A file's length, from its header and a look at its end: finds cut files without decoding them whole.

    Arguments and errors are those of `sdser.load_audio`, but for samples that are NaN or infinite.
    """
    with sdser.open_audio(path, max_seconds) as file:
        file.seek(file.frames - 1)
        if len(file.read(1)) < 1:
            raise ValueError("its end is missing")
        return file.frames / file.samplerate


def take_fraction(clips: list[Clip], share: float, seed: int) -> list[Clip]:
    """Keeps all dev and test clips, and a share of each label's training clips; larger shares hold smaller ones."""
    training = defaultdict(list)
    for clip in clips:
        if clip.split == "train":
            training[clip.label].append(clip)
    kept = set()
    for label in sorted(training):
        random.Random(seed).shuffle(training[label])
        kept.update(training[label][: max(1, round(share * len(training[label])))])
    return [clip for clip in clips if clip.split != "train" or clip in kept]


def make_batches(seconds: list[float], size: int, rng: np.random.Generator) -> list[list[int]]:
    """Clip indices in batches of similar length, in random order: sorted within pools of 8 batches, random across.

    Where all are of one length, as with `--window tile`, it is plain shuffling.
    """
    order, seconds = rng.permutation(len(seconds)), np.asarray(seconds)
    cut = lambda clips, n: [clips[i : i + n] for i in range(0, len(clips), n)]  # noqa: E731
    if np.ptp(seconds) == 0:
        return [batch.tolist() for batch in cut(order, size)]
    pools = [pool[np.argsort(seconds[pool], kind="stable")] for pool in cut(order, 8 * size)]
    batches = [batch.tolist() for pool in pools for batch in cut(pool, size)]
    rng.shuffle(batches)
    return batches


class AudioFiles(Dataset):
    """File i -> the waveform (T,) that the model reads, or the error message if it cannot be read."""

    advice = ""

    def __init__(self, paths: list[str], tile_seconds: float | None = None):
        self.paths, self.tile_seconds = paths, tile_seconds

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int):
        try:
            return self.read(i)
        except (OSError, ValueError) as error:
            return f"{error}{self.advice}"

    def read(self, i: int) -> Tensor:
        return sdser.prepare(self.paths[i], self.tile_seconds)


class TrainingClips(AudioFiles):
    """Clip i -> (waveform (T,), label index), long ones cropped; or the error message if it cannot be read."""

    def __init__(self, clips: list[Clip], labels: list[str], args):
        super().__init__([clip.path for clip in clips], args.seconds if args.window == "tile" else None)
        self.clips, self.labels, self.seconds, self.seed, self.epoch = clips, labels, args.seconds, args.seed, 0
        self.advice = "" if args.skip_bad else " (--skip-bad leaves such clips out)"

    def read(self, i: int) -> tuple[Tensor, int]:
        clip, samples = self.clips[i], round(self.seconds * sdser.SAMPLE_RATE)
        # seeded by clip and epoch, so that neither workers nor processes nor a resumed run change the crop
        position = 0.0 if self.tile_seconds else random.Random(f"{self.seed} {self.epoch} {i}").random()
        waveform = sdser.load_audio(clip.path, part_seconds=self.seconds, position=position)[:samples]
        return sdser.tile(waveform, samples) if self.tile_seconds else waveform, self.labels.index(clip.label)


def read_batches(files: AudioFiles, batches: list[list[int]], workers: int = 0, skip_bad: bool = False):
    """Reads files in batches, never more than a few at a time.

    Args:
        workers: processes that load audio; 0: none beside this one.
        skip_bad: warn of a file that cannot be read, instead of raising ValueError.
    Yields:
        for each batch, (index, item) of what could be read.
    """
    loader = DataLoader(files, batch_sampler=batches, collate_fn=list, num_workers=workers, generator=torch.Generator())
    for batch, items in zip(batches, loader):
        for problem in [item for item in items if isinstance(item, str)]:
            if not skip_bad:
                raise ValueError(problem)
            warnings.warn(f"left out: {problem}", stacklevel=3)
        yield [(i, item) for i, item in zip(batch, items) if not isinstance(item, str)]


def pad(waveforms: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Waveforms (T,) -> one batch (B, T) with zeros behind the shorter ones, and lengths (B,).

    Unless all are of one length, T is a multiple of 4,000: oneDNN keeps buffers for every shape that it meets, which
    for 1,440 clips of as many lengths took as much memory again as all else.
    """
    lengths = torch.tensor([len(waveform) for waveform in waveforms])
    batch = torch.nn.utils.rnn.pad_sequence(waveforms, batch_first=True)
    return F.pad(batch, (0, -batch.shape[1] % 4000 if lengths.unique().numel() > 1 else 0)), lengths


def load_batches(dataset: TrainingClips, batches: list[list[int]], args):
    """Yields this process's share of each batch: indices, waveforms (B, T), lengths (B,), targets (B,).

    A share without a readable clip is one frame of silence under no index, so that the process takes part in the step.
    """
    shares = [batch[RANK::WORLD] for batch in batches]
    for readable in read_batches(dataset, shares, args.workers, args.skip_bad):
        indices, items = zip(*readable) if readable else ((), [(torch.zeros(400), 0)])
        waveforms, targets = zip(*items)
        yield list(indices), *(tensor.to(args.device) for tensor in (*pad(waveforms), torch.tensor(targets)))


def file_batches(paths, seconds, tile_seconds=None, batch_size=16, **reading):
    """Reads files in batches of similar length, with a progress bar; several processes take turns at the batches.

    Args:
        paths, seconds: the files and their lengths, from `audio_seconds`.
        tile_seconds: of the model, see `sdser.MultiExitSER`.
        reading: workers and skip_bad, see `read_batches`.
    Yields:
        indices into paths, waveforms (B, T), lengths (B,).
    """
    order = np.argsort(seconds, kind="stable").tolist()
    mine = [order[i : i + batch_size] for i in range(0, len(order), batch_size)][RANK::WORLD]
    files = AudioFiles(paths, tile_seconds)
    for readable in progress(read_batches(files, mine, **reading), "evaluating", total=len(mine)):
        if readable:
            indices, waveforms = zip(*readable)
            yield list(indices), *pad(waveforms)


@torch.no_grad()
def predict(model: sdser.MultiExitSER, paths: list[str], seconds: list[float], **loading) -> tuple[Tensor, Tensor]:
    """Runs files through every exit; the arguments are those of `file_batches`.

    Returns:
        logits (exits, files, C) float32, and which files could be read, (files,) bool; on the CPU, of all processes.
    """
    device = next(model.parameters()).device
    model.eval()
    logits = torch.zeros(len(model.exits), len(paths), len(model.labels))
    readable = torch.zeros(len(paths), dtype=torch.int64)
    for indices, waveforms, lengths in file_batches(paths, seconds, model.tile_seconds, **loading):
        outputs = model(waveforms.to(device), lengths.to(device))
        logits[:, indices] = torch.stack([output.logits for output in outputs]).float().cpu()
        readable[indices] = 1
    wait()  # a process may take longer than TIMEOUT over its share
    return summed(logits), summed(readable).bool()


def progress(steps, title: str, **options) -> tqdm:
    """A bar on a terminal; of several processes the first one's alone."""
    return tqdm(steps, title, leave=False, disable=True if RANK else None, **options)


# ---------------------------------------------------------------------------------------------------------------------
# Several processes, and how a script ends
# ---------------------------------------------------------------------------------------------------------------------


TIMEOUT = timedelta(seconds=120)  # a process that hears nothing from another for so long gives up


def summed(values: Tensor) -> Tensor:
    """The sum over all processes."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def wait() -> None:
    """Until all processes are here, however long one of them downloads, or looks at files."""
    if dist.is_initialized():
        dist.monitored_barrier(timeout=timedelta(days=1))


@contextlib.contextmanager
def one_process_a_machine_first():
    """What is done within, the first process of each machine does before the others."""
    if LOCAL_RANK:
        wait()
    yield
    if not LOCAL_RANK:
        wait()


def compiled_and_parallel(model: sdser.MultiExitSER, args):
    """The model to train: its layers compiled if asked, its gradients averaged over processes if there are several."""
    if args.compile:
        for layer in model.backbone.encoder.layers:
            layer.compile(dynamic=True)
    if not dist.is_initialized():
        return model
    nccl = dist.new_group(backend="nccl", timeout=TIMEOUT) if "cuda" in args.device else None  # else gloo
    return DistributedDataParallel(model, process_group=nccl)


def share_gradients(model, last: bool) -> None:
    """Several processes exchange gradients once a step, with its last batch."""
    model.require_backward_grad_sync = last


control_c = False  # whether it was pressed, see on_control_c


def on_control_c(*_) -> None:
    """Stops the run at once or, where a destructor swallows the exception, before the next step."""
    global control_c
    control_c = True
    raise KeyboardInterrupt


def interrupted(out: Path, since: float) -> str:
    """What to say on Ctrl-C, from what is on the disk: it may have come while an epoch was being saved."""
    state = out / "train_state.pt"
    if not state.is_file() or state.stat().st_mtime < since:  # older than this run
        return "interrupted: no epoch was finished, so there is nothing to resume yet"
    return f"interrupted: python train.py --resume --out {out} goes on after epoch {len(load_state(out)['log'])}"


@contextlib.contextmanager
def script(when_interrupted=lambda: "interrupted"):
    """Ends a script as its user expects: an error is one sentence and status 2, Ctrl-C is status 130.

    Of several processes, all take part in what is done within; one reports.
    """
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    try:
        if WORLD > 1:
            sys.stdout = sys.stdout if RANK == 0 else None
            dist.init_process_group("gloo", timeout=TIMEOUT)
        yield
    except KeyboardInterrupt:
        if RANK == 0:
            print(when_interrupted(), file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        print("error: another process of this run died or hung; see what it said, then --resume", file=sys.stderr)
        sys.exit(2)
    if WORLD > 1:
        dist.destroy_process_group()


def main(argv=None) -> None:
    global control_c
    control_c = False
    signal.signal(signal.SIGINT, on_control_c)
    args, start = parse_args(argv), time.time()
    with script(lambda: interrupted(Path(args.out), 0 if args.resume else start)):
        run(*complete_args(args))


if __name__ == "__main__":
    main()
