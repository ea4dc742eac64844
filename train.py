"""Fine-tunes a multi-exit speech emotion model with self-distillation.

    python train.py                                              # a toy on synthetic speech, minutes on a CPU
    python train.py --data path/to/EMO-DB --backbone small       # real speech, from scratch
    python train.py --data path/to/RAVDESS --backbone facebook/wav2vec2-base
    torchrun --nproc_per_node=2 train.py                         # data-parallel, each process on its share of a batch

Read top to bottom: the presets, the flags, the data, one evaluation, the training loop, the report.
"""

import argparse
import csv
import io
import json
import math
import os
import random
import signal
import sys
import time
import warnings
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

import sdser

# What torchrun tells each process: which one it is, on its machine and of all. Alone, a process is 0 of 1.
RANK, LOCAL_RANK, WORLD = (int(os.environ.get(*pair)) for pair in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
TIMEOUT = timedelta(seconds=120)  # a process that hears nothing of another for so long gives up
control_c = False  # whether it was pressed, see on_control_c

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
    add("--head", choices=sdser.HEADS, help="of the shallow exits")
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
clip_seconds = number(float, lambda x: x >= 0.025, "a length of at least one frame, 0.025 s")
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
    if given.pop("resume"):
        state = load_state(Path(given["out"]))
        for name, value in given.items():
            if name not in ("out", "device", "workers", "skip_bad") and state["args"][name] != value:
                flag, before = "--" + name.replace("_", "-"), state["args"][name]
                raise ValueError(
                    f"{flag} {value}: the run in {given['out']} has {before}; leave the flag out to resume it"
                )
        return argparse.Namespace(**{**state["args"], **given}), state
    preset = given.get("preset") or ("toy" if given.get("backbone", "tiny") in sdser.SIZES else "fast")
    defaults = {name: row[PRESET_NAMES.index(preset)] for name, row in PRESETS.items()}
    defaults |= dict(preset=preset, data="synthetic", fold=None, label_fraction=1.0, seed=0, device=None, workers=0,
                     compile=False, skip_bad=False)  # fmt: skip
    args = argparse.Namespace(**{**defaults, **given})
    args.head_lr = args.head_lr or args.lr
    return args, None


# -- data -------------------------------------------------------------------------------------------------------------


def keep_readable(clips: list[sdser.Clip], skip_bad: bool) -> tuple[list[sdser.Clip], list[float]]:
    """The clips that can be read, and their seconds; without `skip_bad`, one that cannot be read stops the run."""

    def measure(clip):
        try:
            return sdser.audio_seconds(clip.path, None if clip.split == "train" else sdser.MAX_SECONDS)
        except (OSError, ValueError) as error:
            return str(error)

    found = []
    with ThreadPoolExecutor(8) as pool:  # waits for disks, not for this processor
        for i in sdser.progress(range(0, len(clips), 1000), "looking at files", unit=" thousand", delay=2):
            found += pool.map(measure, clips[i : i + 1000])
    bad = [problem for problem in found if isinstance(problem, str)]
    if bad and not skip_bad:
        raise ValueError(f"{bad[0]} ({len(bad)} of {len(clips)} clips are bad; --skip-bad leaves them out)")
    for problem in bad if RANK == 0 else ():
        warnings.warn(f"left out: {problem}", stacklevel=2)
    good = [(clip, seconds) for clip, seconds in zip(clips, found) if not isinstance(seconds, str)]
    return [clip for clip, _ in good], [seconds for _, seconds in good]


def take_fraction(clips: list[sdser.Clip], share: float, seed: int) -> list[sdser.Clip]:
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


class TrainingClips(Dataset):
    """Clip i -> (waveform (T,), label index), long ones cropped; or the error message if it cannot be read."""

    def __init__(self, clips, labels, args):
        self.clips, self.labels, self.seed, self.epoch = clips, labels, args.seed, 0
        self.tile, self.seconds = args.window == "tile", args.seconds
        self.advice = "" if args.skip_bad else " (--skip-bad leaves such clips out)"

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, i):
        clip, samples = self.clips[i], round(self.seconds * sdser.SAMPLE_RATE)
        # seeded by clip and epoch, so that neither workers nor processes nor a resumed run change the crop
        position = 0.0 if self.tile else random.Random(f"{self.seed} {self.epoch} {i}").random()
        try:
            waveform = sdser.load_audio(clip.path, part_seconds=self.seconds, position=position)[:samples]
        except (OSError, ValueError) as error:
            return f"{error}{self.advice}"
        return sdser.tile(waveform, samples) if self.tile else waveform, self.labels.index(clip.label)


def make_batches(seconds: list[float], size: int, rng: np.random.Generator) -> list[list[int]]:
    """Clip indices in batches of similar length, in random order: sorted within pools of 8 batches, random across."""
    order, seconds = rng.permutation(len(seconds)), np.asarray(seconds)
    pools = [order[i : i + 8 * size] for i in range(0, len(order), 8 * size)]
    pools = [pool[np.argsort(seconds[pool], kind="stable")] for pool in pools]
    batches = [pool[i : i + size].tolist() for pool in pools for i in range(0, len(pool), size)]
    rng.shuffle(batches)
    return batches


def load_batches(dataset, batches, args):
    """Yields this process's share of each batch: indices, waveforms (B, T), lengths (B,), targets (B,).

    A share without a readable clip is one frame of silence under no index, so that the process takes part in the step.
    """
    shares = [batch[RANK::WORLD] for batch in batches]
    for readable in sdser.read_batches(dataset, shares, args.workers, args.skip_bad):
        indices, items = zip(*readable) if readable else ((), [(torch.zeros(400), 0)])
        waveforms, targets = zip(*items)
        yield list(indices), *sdser.pad(waveforms), torch.tensor(targets)


# -- several processes ------------------------------------------------------------------------------------------------


def summed(values: torch.Tensor) -> torch.Tensor:
    """The sum over all processes."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def wait() -> None:
    """Until all processes are here, however long one of them downloads, or looks at files."""
    if dist.is_initialized():
        dist.monitored_barrier(timeout=timedelta(days=1))


# -- evaluation -------------------------------------------------------------------------------------------------------


def score_exits(model: sdser.MultiExitSER, clips: list[sdser.Clip], seconds: list[float], args) -> dict:
    """{"exits": [{"exit", "uar", "accuracy", "macro_f1"}, ...], "fusion": {...}} over the clips."""
    paths, share = [clip.path for clip in clips], slice(RANK, None, WORLD)
    reading = dict(batch_size=args.batch_size, workers=args.workers, skip_bad=args.skip_bad)
    logits = torch.zeros(len(model.exits), len(clips), len(model.labels))
    readable = torch.zeros(len(clips), dtype=torch.int64)
    with autocast(args):
        logits[:, share], readable[share] = sdser.predict(model, paths[share], seconds[share], **reading)
    logits, readable = summed(logits), summed(readable).bool()
    if not logits.isfinite().all():
        raise ValueError(f"the model's answers to the {clips[0].split} split are not finite; try a smaller --lr")
    left_out = [path for path, read in zip(paths, readable) if not read]
    targets = torch.tensor([model.labels.index(clip.label) for clip in clips])[readable]  # (N,)
    if len(targets.unique()) < len(model.labels):
        raise ValueError(f"the {clips[0].split} split is left without a readable clip of some label; mend its files")
    logits = logits[:, readable]  # (exits, N, C)
    predictions = [*logits.argmax(-1), sdser.fuse(logits).argmax(-1)]
    *exits, fusion = (sdser.scores(targets, row, len(model.labels)) for row in predictions)
    rows = {"exits": [{"exit": exit} | row for exit, row in zip(model.exits, exits)], "fusion": fusion}
    return rows | ({"left_out": left_out} if left_out else {})


def autocast(args):
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.dtype == "bfloat16")


# -- training ---------------------------------------------------------------------------------------------------------


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


def distillation_ramp(step: int, steps: int, args) -> float:
    """The share of alpha and beta at a step of `steps`: early on there is nothing to be learned from the teacher."""
    return min(1.0, step / (args.distill_warmup * steps)) if args.distill_warmup else 1.0


def train_epoch(model, batches, dataset, optimizer, scheduler, args, steps: int, title: str):
    """One pass over the training clips, part of `steps` steps.

    Returns the mean loss and its parts, dict[str, float], and the paths of clips left out, list[str].
    """
    model.train()
    sums, read = defaultdict(float), torch.zeros(len(dataset), dtype=torch.int64)
    loader = load_batches(dataset, batches, args)
    bar = sdser.progress(None, title, total=len(batches), unit="batch")
    while step := list(islice(loader, args.accumulate)):
        if control_c:
            raise KeyboardInterrupt
        step_clips = summed(torch.tensor(sum(len(indices) for indices, *_ in step))).item()
        if not step_clips:
            continue  # none could be read
        ramp = distillation_ramp(scheduler.last_epoch, steps, args)  # last_epoch counts steps
        for i, (indices, waveforms, lengths, targets) in enumerate(step, 1):
            model.require_backward_grad_sync = i == len(step)  # DistributedDataParallel then exchanges gradients
            with autocast(args):
                outputs = model(waveforms.to(args.device), lengths.to(args.device))
            loss, parts = sdser.self_distillation_loss(
                outputs,
                targets.to(args.device),
                ramp * args.kl_weight,
                ramp * args.hint_weight,
                args.temperature,
                args.detach_teacher,
            )
            refuse_non_finite("loss", loss, indices, dataset)
            # So that the step's gradient is that of one large batch; averaged over processes, hence times WORLD.
            (loss * len(indices) / step_clips * WORLD).backward()
            for name, value in {"loss": loss.item(), **parts}.items():
                sums[name] += value * len(indices)
            read[indices] = 1
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_norm or math.inf)  # inf: measured alone
        refuse_non_finite("gradient", norm, [i for indices, *_ in step for i in indices], dataset)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        bar.update(len(step))
        bar.set_postfix(loss=f"{sums['loss'] / max(1, read.sum().item()):.3f}")
    bar.close()
    clips, means = summed(read).sum().item(), summed(torch.tensor(list(sums.values()), dtype=torch.float64))
    if not clips:
        raise ValueError("no training clip could be read")
    left_out = [clip.path for clip, times in zip(dataset.clips, read.tolist()) if not times]
    return {name: value / clips for name, value in zip(sums, means.tolist())}, left_out


def refuse_non_finite(what: str, value: torch.Tensor, indices: list[int], dataset) -> None:
    if not value.isfinite():
        paths = [dataset.clips[i].path for i in indices]
        names = ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
        raise ValueError(f"the {what} became {value.item()} on {names}; try a smaller --lr, or --dtype float32")


def run(args: argparse.Namespace, state: dict | None) -> None:
    """Trains, keeps the best epoch by dev UAR, scores it once on test, and reports."""
    start, out = time.time(), Path(args.out)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if args.device == "cuda":
            torch.cuda.set_device(LOCAL_RANK)
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:  # what torch raises for unknown and for absent devices
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--device {args.device}: cannot be used here ({reason}); leave the flag out") from error

    if args.batch_size < WORLD:
        raise ValueError(f"--batch-size {args.batch_size}: give at least one clip for each of {WORLD} processes")

    # Data: split by speaker, unreadable clips found before they cost anything.
    if LOCAL_RANK:
        wait()  # the first process of each machine downloads, or makes, the corpus
    listed = sdser.load_corpus(args.data)
    if not LOCAL_RANK:
        wait()
    listed = sdser.split_clips(listed, args.fold)
    clips, seconds = keep_readable(listed, args.skip_bad)
    left_out = sorted({clip.path for clip in listed} - {clip.path for clip in clips})
    wait()
    sdser.check_splits(clips)
    labels = sorted({clip.label for clip in clips})
    seconds_of = dict(zip(clips, seconds))
    clips = take_fraction(clips, args.label_fraction, args.seed)
    parts = {split: [clip for clip in clips if clip.split == split] for split in sdser.SPLITS}
    seconds = {split: [seconds_of[clip] for clip in part] for split, part in parts.items()}
    speakers = {split: len({clip.speaker for clip in part} - {None}) or "?" for split, part in parts.items()}
    counts = ", ".join(f"{len(part)} {split} ({speakers[split]})" for split, part in parts.items())
    print(f"{args.data}: {len(labels)} emotions; clips (speakers): {counts}")
    dataset = TrainingClips(parts["train"], labels, args)
    cropped = [min(length, args.seconds) for length in seconds["train"]]

    # Model, optimizer, and where a resumed run left them.
    torch.manual_seed(args.seed)
    tile_seconds = args.seconds if args.window == "tile" else None
    model = sdser.MultiExitSER(labels, args.backbone, args.exits, args.head, tile_seconds).to(args.device)
    steps = args.epochs * math.ceil(math.ceil(len(dataset) / args.batch_size) / args.accumulate)
    optimizer, scheduler = make_optimizer(model, args, steps)
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{args.backbone}: exits {model.exits}, {total / 1e6:.1f} M parameters, {trained / 1e6:.1f} M trained, "
          f"preset {args.preset}, on {args.device}")  # fmt: skip
    log = []
    if state:
        if (out / "split.csv").read_text(encoding="utf-8") != split_csv(clips):
            raise ValueError(f"{args.data}: its clips or splits are no longer those of the run in {out}; train anew")
        try:
            for part, name in ((model, "model"), (optimizer, "optimizer"), (scheduler, "scheduler")):
                part.load_state_dict(state[name])
        except Exception as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{out / 'train_state.pt'}: does not fit its model ({reason}); train anew") from error
        log = state["log"]
        if RANK == 0:
            write(out / "log.jsonl", log_lines(log))  # a kill may have come between the state and the log
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {out}: cannot be made a folder ({error.strerror}); name another") from error
    if args.compile:
        for layer in model.backbone.encoder.layers:
            layer.compile(dynamic=True)
    parallel = model
    if dist.is_initialized():
        nccl = dist.new_group(backend="nccl", timeout=TIMEOUT) if "cuda" in args.device else None  # else gloo
        parallel = DistributedDataParallel(model, process_group=nccl)

    # Training. Each epoch seeds its own dropout, masks, crops and order, so a resumed run repeats an unbroken one.
    for epoch in range(len(log) + 1, args.epochs + 1):
        epoch_start = time.time()
        rng = np.random.default_rng([args.seed, epoch])
        torch.manual_seed(int(rng.integers(2**63)) ^ RANK)  # processes differ in dropout and masks, not in order
        dataset.epoch = epoch
        batches = make_batches(cropped, args.batch_size, rng)
        title = f"epoch {epoch:{len(str(args.epochs))}}/{args.epochs}"
        losses, unread = train_epoch(parallel, batches, dataset, optimizer, scheduler, args, steps, title)
        dev = score_exits(model, parts["dev"], seconds["dev"], args)
        mean_uar = sum(row["uar"] for row in dev["exits"]) / len(dev["exits"])
        best = mean_uar > max((line["dev_uar"] for line in log), default=-1)
        log.append({"epoch": epoch, **losses, "lr": scheduler.get_last_lr()[0], "seconds": time.time() - epoch_start,
                    "dev_uar": mean_uar, "dev": dev})  # fmt: skip
        if unread := (left_out if epoch == 1 else []) + unread:
            log[-1]["left_out"] = unread
        per_exit = "  ".join(f"{row['exit']}: {row['uar']:.3f}" for row in dev["exits"])
        print(f"{title}  loss {losses['loss']:.3f}  dev UAR at exit {per_exit}  {'best' if best else ''}", flush=True)
        if RANK == 0:
            save_epoch(out, args, clips, log, best, model, optimizer, scheduler)
    wait()  # for the last one to be saved

    # The best epoch, on dev once more and on test for the first time.
    model = sdser.MultiExitSER.from_pretrained(out).to(args.device)
    results = {"labels": labels, "args": vars(args), "seconds": round(time.time() - start, 1)}
    results |= {split: score_exits(model, parts[split], seconds[split], args) for split in ("dev", "test")}
    if RANK == 0:
        write(out / "results.json", json.dumps(results, indent=2))
        report(results, log, out)


def save_epoch(out: Path, args, clips, log: list[dict], best: bool, model, optimizer, scheduler) -> None:
    """The best model first, then the state, then what only tells of it: a run killed in between repeats the epoch."""
    if len(log) == 1:  # only now does anything take the place of an earlier run
        for name in ("results.json", "train_state.pt", "log.jsonl", "model.safetensors", "config.json"):
            (out / name).unlink(missing_ok=True)
        write(out / "split.csv", split_csv(clips))
    if best:
        model.save_pretrained(out)
    state = {"args": vars(args), "log": log, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
             "scheduler": scheduler.state_dict()}  # fmt: skip
    write(out / "train_state.pt", lambda path: torch.save(state, path))
    write(out / "log.jsonl", log_lines(log))


def report(results: dict, log: list[dict], out: Path) -> None:
    best = max(log, key=lambda line: line["dev_uar"])["epoch"]
    print(f"\nbest epoch {best}, by dev UAR averaged over exits (chance {1 / len(results['labels']):.3f})\n")
    print("                    dev             test")
    print("exit           UAR  accuracy    UAR  accuracy")
    deepest = results["dev"]["exits"][-1]["exit"]
    rows = zip(
        [*results["dev"]["exits"], results["dev"]["fusion"]], [*results["test"]["exits"], results["test"]["fusion"]]
    )
    for dev, test in rows:
        name = dev.get("exit", "fusion")
        name = f"{name} (teacher)" if name == deepest and len(results["dev"]["exits"]) > 1 else str(name)
        print(f"{name:12} {dev['uar']:.3f}  {dev['accuracy']:8.3f}  {test['uar']:.3f}  {test['accuracy']:8.3f}")
    print(f"\nin {out}: config.json, model.safetensors, results.json, log.jsonl, split.csv, train_state.pt")
    print(f"next: python evaluate.py {out}")


def log_lines(log: list[dict]) -> str:
    return "".join(json.dumps(line) + "\n" for line in log)


def split_csv(clips: list[sdser.Clip]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(sdser.Clip._fields)
    writer.writerows(clip._replace(path=os.path.abspath(clip.path)) for clip in clips)
    return text.getvalue()


def write(path: Path, content) -> None:
    """Writes text, or what `content(path)` writes, so that a kill leaves the old file or the new one, whole."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(content, encoding="utf-8") if isinstance(content, str) else content(temporary)
    os.replace(temporary, path)


def load_state(out: Path) -> dict:
    """What the last finished epoch saved for `--resume`."""
    path = out / "train_state.pt"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, so there is no run to resume; leave --resume out")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if missing := PRESETS.keys() - state["args"].keys():
            raise ValueError(f"it does not say {min(missing)}")
        return {name: state[name] for name in ("args", "log", "model", "optimizer", "scheduler")}
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path}: cannot be read ({reason}); train anew without --resume") from error


def interrupted(out: Path, since: float) -> str:
    """What to say on Ctrl-C, from what is on the disk: it may have come while an epoch was being saved."""
    state = out / "train_state.pt"
    if not state.is_file() or state.stat().st_mtime < since:  # older than this run
        return "interrupted: no epoch was finished, so there is nothing to resume yet"
    return f"interrupted: python train.py --resume --out {out} goes on after epoch {len(load_state(out)['log'])}"


def on_control_c(*_) -> None:
    """Stops the run at once or, where a destructor swallows the exception, before the next step."""
    global control_c
    control_c = True
    raise KeyboardInterrupt


def main(argv=None) -> None:
    global control_c
    control_c = False
    signal.signal(signal.SIGINT, on_control_c)
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    args, start = parse_args(argv), time.time()
    try:
        if WORLD > 1:
            sys.stdout = sys.stdout if RANK == 0 else None  # one process reports
            dist.init_process_group("gloo", timeout=TIMEOUT)
        run(*complete_args(args))
    except KeyboardInterrupt:
        if RANK == 0:
            print(interrupted(Path(args.out), 0 if args.resume else start), file=sys.stderr)
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


if __name__ == "__main__":
    main()
