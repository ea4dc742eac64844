"""Fine-tunes a multi-exit speech emotion model with self-distillation.

    python train.py                                              # real speech, two minutes on a CPU
    python train.py --data path/to/RAVDESS                       # the same small network, another corpus
    python train.py --data path/to/RAVDESS --backbone facebook/wav2vec2-base
    torchrun --nproc_per_node=2 train.py                         # data-parallel, each process on its part of a batch

First the recipes and flags, then the run and its training loop, then what the loop needs and what a run writes.
Corpora, splits and scores are in evaluate.py.
"""

import argparse
import csv
import io
import json
import math
import os
import random
import shlex
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import evaluate
import sdser
from evaluate import RANK, WORLD, Clip, positive
from sdser import InputError

# The recipes; a flag given on the command line wins. fast: for pre-trained backbones, the one we recommend. toy:
# fine-tunes the small network in data/, in two minutes on a CPU. scratch: for random weights. paper: as the authors.
FAST = dict(
    backbone="facebook/wav2vec2-base", head="stats", window="natural", seconds=6.0, epochs=20, batch_size=16,
    lr=5e-5,  # of the backbone
    head_lr=1e-3, freeze_cnn=True,
    weight_decay=0.01,  # AdamW; at 0 it is Adam
    schedule="cosine",  # of the learning rates, after a warm-up over a tenth of the steps
    max_norm=1.0,  # at which gradients are clipped; None: they are not
    dtype="auto",  # bfloat16 if the hardware supports it
)  # fmt: skip
HUBERT_SMALL = str(evaluate.DATA / "hubert-small")
PRESETS = {
    "toy": FAST | dict(backbone=HUBERT_SMALL, exits=[1, 2, 6], seconds=2.0, epochs=12, batch_size=8, lr=5e-4,
                       dtype="float32"),
    "scratch": FAST | dict(backbone="tiny", head="attention", seconds=3.0, epochs=10, lr=2e-3, head_lr=2e-3,
                           freeze_cnn=False, dtype="float32"),
    "paper": FAST | dict(head="gru", window="tile", seconds=5.984, lr=3e-5, head_lr=3e-5,
                         weight_decay=0.0, schedule="constant", max_norm=None, freeze_cnn=False, dtype="float32"),
    "fast": FAST,
}  # fmt: skip
WITH_RESUME = ("--resume", "--out", "--device", "--workers")  # flags allowed with --resume; the rest come from the run
TOLERANCE = 0.01  # UAR that early exit may lose on dev, against the deepest exit


def parse_args(argv=None) -> argparse.Namespace:
    """Parses the flags. Flags win over the preset, and the preset over defaults; with --resume, see WITH_RESUME."""
    argv = sys.argv[1:] if argv is None else argv
    epilog = "Defaults that depend on the preset: see PRESETS in train.py."
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], epilog=epilog, allow_abbrev=False)
    add, on_or_off = parser.add_argument, argparse.BooleanOptionalAction
    real, real_or_0, fraction = positive(float), positive(float, or_zero=True), positive(float, limit=1)
    whole, whole_or_0 = positive(int), positive(int, or_zero=True)
    add("--out", default="out", metavar="DIR", help="a new or empty folder (default: out)")
    add("--resume", action="store_true", help="continue the run in --out, with its own flags")
    add("--device", metavar="D", help="default: cuda if available, else cpu")
    add("--workers", type=whole_or_0, metavar="N", help="processes that load audio (default: 4 on cuda, else 0)")
    add("--data", default=str(evaluate.DATA / "emodb"), metavar="SOURCE", help="corpus folder or manifest (CSV or TSV)")
    add("--preset", choices=PRESETS, help="default: toy; for other backbones scratch if built-in, else fast")
    add("--backbone", help=f"Hub name, folder saved by transformers, or one of {', '.join(sdser.SIZES)}")
    add("--exits", type=whole, nargs="+", metavar="K", help="layers that get an exit; the last is the teacher")
    heads = f"one for the shallow exits, or one for each exit: {', '.join(sdser.HEADS)}"
    add("--head", choices=sdser.HEADS, nargs="+", metavar="H", help=heads)
    add("--labels", nargs="+", metavar="L", help="keep only the clips with these labels")
    add("--final", action="store_true", help="train on dev, too; early exit then has no threshold")
    add("--balanced", action="store_true", help="weight cross-entropy by inverse class frequency, at all exits")
    add("--kl-weight", type=real_or_0, default=1.0, metavar="A", help="alpha; 0 drops the term (default 1)")
    add("--hint-weight", type=real_or_0, default=1.0, metavar="B", help="beta; 0 drops the term (default 1)")
    add("--temperature", type=real, default=1.0, metavar="T", help="of the KL term (default 1)")
    add("--detach-teacher", action=on_or_off, default=True, help="stop KL and hint gradients at the teacher")
    add("--label-fraction", type=fraction, default=1.0, metavar="F", help="fraction of each label's training clips")
    add("--fold", type=fold, default="1/5", metavar="I/N", help="divide speakers into N groups; the I-th is test")
    add("--window", choices=("natural", "tile"), help="clips at original length, or repeated or cut to --seconds")
    add("--seconds", type=real, metavar="S", help="maximum training-clip length (natural) or exact length (tile)")
    add("--epochs", type=whole, metavar="N", help="passes over the training clips")
    add("--batch-size", type=whole, metavar="N", help="clips, over all processes")
    add("--accumulate", type=whole, default=1, metavar="N", help="batches per step (default 1)")
    add("--lr", type=real_or_0, metavar="X", help="learning rate of the backbone; 0 trains only the exits")
    add("--head-lr", type=real, metavar="X", help="learning rate of the exits")
    add("--freeze-cnn", action=on_or_off, help="do not train the convolutional encoder")
    add("--dtype", choices=("float32", "bfloat16"), help="fast: bfloat16 (autocast) if the hardware supports it")
    add("--seed", type=whole_or_0, default=0, metavar="N", help="default 0")
    add("--skip-bad", action="store_true", help="decode every file first, and leave out those that cannot be read")

    args = parser.parse_args(argv)
    other_flags = {word.partition("=")[0] for word in argv if word.startswith("--")} - set(WITH_RESUME)
    if args.resume and other_flags:
        parser.error(f"--resume reuses the run's flags; remove {', '.join(sorted(other_flags))}")
    if args.preset is None and args.backbone in sdser.SIZES:
        args.preset = "scratch"
    elif args.preset is None:
        args.preset = "toy" if os.path.abspath(args.backbone or HUBERT_SMALL) == HUBERT_SMALL else "fast"
    recipe = PRESETS[args.preset]
    if args.lr and recipe["lr"] == recipe["head_lr"]:
        recipe = recipe | {"head_lr": args.lr}  # where a preset has one rate for all, --head-lr follows --lr
    parser.set_defaults(preset=args.preset, **recipe)
    args = parser.parse_args(argv)
    if args.exits and list(args.exits) != sorted(set(args.exits)):
        parser.error(f"--exits: expected increasing numbers, not {args.exits}")
    if not isinstance(args.head, str) and len(args.head) == 1:
        [args.head] = args.head
    return args


def fold(text: str) -> list[int]:
    index, count = map(int, text.split("/"))
    if not 1 <= index <= count or count < 3:
        raise argparse.ArgumentTypeError(f"{text} is not I/N with I from 1 to N and N of at least 3")
    return [index, count]


# -- the run ----------------------------------------------------------------------------------------------------------
def run(args: argparse.Namespace) -> None:
    """Trains, saves and scores on dev after each epoch, scores once on test, and reports."""
    start, out = time.time(), Path(args.out)
    state = read_state(out) if args.resume else None
    if state:
        vars(args).update({name: value for name, value in state["args"].items() if f"--{name}" not in WITH_RESUME})
    elif out.is_dir() and any(out.iterdir()):
        raise InputError(f"--out {out}: is not empty; choose another folder, or --resume the run in it")
    args.device = evaluate.usable_device(args.device)
    if args.workers is None:  # one process cannot load clips fast enough for a GPU
        args.workers = 4 if args.device.startswith("cuda") else 0
    if args.dtype == "auto":
        args.dtype = "bfloat16" if computes_in_bfloat16(args.device) else "float32"
    evaluate.check_writable(out, folder=True)

    labels, clips = load_data(args)
    train_clips, dev_clips, test_clips = ([clip for clip in clips if clip.split == split] for split in evaluate.SPLITS)
    torch.manual_seed(args.seed)
    if state:  # a resumed run no longer needs the backbone that it started from
        model = sdser.MultiExitSER.from_pretrained(out).to(args.device)
    else:
        tile_seconds = args.seconds if args.window == "tile" else None
        model = sdser.MultiExitSER(labels, args.backbone, args.exits, args.head, tile_seconds).to(args.device)
    steps_per_epoch = math.ceil(math.ceil(len(train_clips) / args.batch_size) / args.accumulate)
    optimizer, scheduler = make_optimizer(model, args, args.epochs * steps_per_epoch)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    log = state["log"] if state else []
    if state:
        with sdser.file_errors(out / "train_state.pt", "does not fit the model beside it", "train in a new folder"):
            for name, part in parts.items():
                part.load_state_dict(state.pop(name))  # which frees its memory
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    print(f"{short(args.backbone)}, preset {args.preset}: exits {model.exits}, {trained:.1f} M parameters to train, "
          f"{args.dtype} on {args.device}")  # fmt: skip
    parallel = DistributedDataParallel(model) if WORLD > 1 else model  # averages gradients over processes

    # Each epoch seeds its own dropout, masks, crops and order, so that a resumed run repeats an unbroken one.
    for epoch in range(len(log) + 1, args.epochs + 1):
        epoch_start, title = time.time(), f"epoch {epoch:{len(str(args.epochs))}}/{args.epochs}"
        rng = np.random.default_rng([args.seed, epoch])
        torch.manual_seed(int(rng.integers(2**63)) ^ RANK)  # processes differ in dropout and masks, not in order
        batches = make_batches(train_clips, args, rng)
        dataset = TrainingClips(train_clips, labels, args, epoch)
        losses = train_epoch(parallel, dataset, batches, optimizer, scheduler, args, title)
        line = {"epoch": epoch, **losses, "lr": scheduler.get_last_lr()[0]}
        message = f"{title}  loss {losses['loss']:.3f}"
        if dev_clips:
            logits = evaluate.predict(model, dev_clips, args.batch_size, args.workers)
            line["dev"] = score(model, dev_clips, logits)
            model.threshold = evaluate.choose_threshold(evaluate.targets_of(dev_clips, labels), logits, TOLERANCE)
            by_exit = "".join(f"  {row['exit']}: {row[evaluate.METRIC]:.3f}" for row in line["dev"]["exits"])
            message += f"  dev {evaluate.METRIC.upper()} at exit{by_exit}"
        line["seconds"] = time.time() - epoch_start
        log.append(line)
        if RANK == 0:
            save_epoch(out, args, clips, log, parts)
        print(message)  # every epoch that is printed has been saved

    results = {"labels": labels, "args": vars(args), "seconds": round(time.time() - start, 1)}
    if dev_clips:
        results["dev"] = log[-1]["dev"]
    logits = evaluate.predict(model, test_clips, args.batch_size, args.workers)
    results["test"] = score(model, test_clips, logits)
    if RANK == 0:
        sdser.replace_file(out / "results.json", json.dumps(results, indent=2))
        report(results, model.threshold, len(dev_clips), out)


def train_epoch(model, dataset, batches, optimizer, scheduler, args, title: str) -> dict[str, float]:
    """Trains one pass over the clips, in batches of indices; returns the mean loss and its parts."""
    model.train()
    my_batches, loss_weights = divide(batches, args.accumulate)
    class_weights = inverse_frequencies(dataset).to(args.device) if args.balanced else None
    sums = Counter()
    bar = evaluate.progress(evaluate.load_batches(dataset, my_batches, args.workers), title, len(batches))
    for i, (waveforms, lengths, targets) in enumerate(bar):
        with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            outputs = model(waveforms.to(args.device), lengths)
        loss, parts = sdser.self_distillation_loss(outputs, targets.to(args.device), args.kl_weight, args.hint_weight,
                                                   args.temperature, args.detach_teacher, class_weights)  # fmt: skip
        (loss_weights[i] * loss).backward()
        for name, value in {"loss": loss.detach(), **parts}.items():
            sums[name] += value * len(targets) * (loss_weights[i] > 0)  # not another process's clip

        if (i + 1) % args.accumulate == 0 or i + 1 == len(batches):
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_norm or math.inf)  # inf only measures
            if not (loss + norm).isfinite():
                paths = ", ".join(dataset.clips[k].path for k in my_batches[i])
                raise InputError(f"loss or gradient not finite; try a smaller --lr or --dtype float32 (after {paths})")
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            bar.set_postfix(loss=f"{loss.item():.3f}")
    totals = torch.stack(list(sums.values())).cpu()
    if WORLD > 1:
        dist.all_reduce(totals)  # over the processes
    return dict(zip(sums, (totals / len(dataset.clips)).tolist()))


# -- what the loop needs ----------------------------------------------------------------------------------------------
def make_optimizer(model: sdser.MultiExitSER, args, steps: int):
    """Freezes what is not trained; returns AdamW for the rest, and its learning-rate schedule over `steps`."""
    if args.freeze_cnn:
        model.backbone.feature_extractor.requires_grad_(False)
    if args.lr == 0:
        model.backbone.requires_grad_(False)
    groups = [
        {"params": [p for p in model.backbone.parameters() if p.requires_grad], "lr": args.lr},
        {"params": list(model.heads.parameters()), "lr": args.head_lr},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=args.weight_decay, fused=True)
    warmup = max(1, round(0.1 * steps))

    def factor(step):
        if args.schedule == "constant":
            return 1.0
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


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


def divide(batches: list[list[int]], accumulate: int) -> tuple[list[list[int]], list[float]]:
    """Returns this process's clips of each batch, and the weight of their loss.

    A loss is a mean over clips. It is weighted by its share of the step's clips, so that the step has the gradient of
    one large batch. For example, a step has batches of 5 and 3 clips, and two processes:

        process 0    3 clips, weight 3/8    2 clips, weight 2/8
        process 1    2 clips, weight 2/8    1 clip,  weight 1/8

    times WORLD, by which DistributedDataParallel divides. Every process must join every step, so a process without
    clips runs another's clip with weight 0.
    """
    my_batches, loss_weights = [], []
    for i, batch in enumerate(batches):
        step_start = i - i % accumulate
        clips_in_step = sum(len(other) for other in batches[step_start : step_start + accumulate])
        part = batch[RANK::WORLD]
        my_batches.append(part or batch[:1])
        loss_weights.append(WORLD * len(part) / clips_in_step)
    return my_batches, loss_weights


class TrainingClips(evaluate.ClipDataset):
    """Clips longer than --seconds are cropped at random, anew in each epoch."""

    def __init__(self, clips: list[Clip], labels: list[str], args, epoch: int):
        super().__init__(clips, labels, args.seconds if args.window == "tile" else None)
        self.crop_seconds, self.seed = args.seconds, f"{args.seed} {epoch}"

    def read(self, i: int) -> Tensor:
        if self.tile_seconds:
            return super().read(i)
        # seeded by clip, so that neither workers nor processes nor a resumed run change the crop
        slack = max(0.0, self.clips[i].seconds - self.crop_seconds)
        start = slack * random.Random(f"{self.seed} {i}").random()
        waveform = sdser.load_audio(self.clips[i].path, start, self.crop_seconds)
        return waveform[: round(self.crop_seconds * sdser.SAMPLE_RATE)]


def inverse_frequencies(dataset: evaluate.ClipDataset) -> Tensor:
    """Returns one weight per class, (C,); their mean over the clips is 1."""
    counts = Counter(clip.label for clip in dataset.clips)
    return torch.tensor([len(dataset.clips) / len(counts) / counts[label] for label in dataset.labels])


def computes_in_bfloat16(device: str) -> bool:
    """Returns whether a device has bfloat16 in hardware; where it is emulated, it is far slower than float32."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    has_bfloat16 = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)  # a Mac's torch has no oneDNN
    return device == "cpu" and has_bfloat16()


def load_data(args) -> tuple[list[str], list[Clip]]:
    """Returns the labels, and the clips with their splits, of files that can be read; prints the counts."""
    if args.resume:
        clips = evaluate.inspect_clips(evaluate.load_corpus(os.path.join(args.out, "split.csv")))
    else:
        clips = evaluate.load_corpus(args.data)
        if args.labels:
            args.labels, known = [evaluate.clean(label) for label in args.labels], {clip.label for clip in clips}
            if len(set(args.labels)) < 2 or not set(args.labels) <= known:
                options = ", ".join(sorted(known))
                raise InputError(f"--labels {' '.join(args.labels)}: expected at least two of {options}")
            clips = [clip for clip in clips if clip.label in args.labels]
        clips = evaluate.split_clips(clips, args.fold, args.final)
        clips = evaluate.inspect_clips(clips, skip_bad=args.skip_bad)
        evaluate.check_splits(clips, args.final)  # bad clips may be left out
        clips = take_fraction(clips, args.label_fraction, args.seed)
    counts = Counter(clip.label for clip in clips)
    print(f"{short(args.data)}: {', '.join(f'{label} {counts[label]}' for label in sorted(counts))}")
    for split in ("train", "test") if args.final else evaluate.SPLITS:
        part = [clip for clip in clips if clip.split == split]
        speakers = {clip.speaker for clip in part} - {None}
        print(f"{split}: {len(part)} clips of {len(speakers) or 'unknown'} speakers")
    return evaluate.labels_of(clips), clips


def take_fraction(clips: list[Clip], fraction: float, seed: int) -> list[Clip]:
    """Keeps dev and test clips, and a fraction of each label's training clips; a larger one includes a smaller."""
    kept = {clip.path for clip in clips if clip.split != "train"}
    for label in {clip.label for clip in clips}:
        paths = [clip.path for clip in clips if clip.split == "train" and clip.label == label]
        random.Random(seed).shuffle(paths)
        kept.update(paths[: max(1, round(fraction * len(paths)))])
    return [clip for clip in clips if clip.path in kept]


def short(path: str) -> str:
    """Returns a path without this project's folder, for messages."""
    return os.path.relpath(path, evaluate.HERE) if Path(path).is_relative_to(evaluate.HERE) else path


# -- what a run writes and reads back ---------------------------------------------------------------------------------
def score(model: sdser.MultiExitSER, clips: list[Clip], logits: Tensor) -> dict:
    """Returns {"exits": [{"exit": 2, "uar": 0.8, ...}, ...], "fusion": {...}}; fusion needs at least two students."""
    targets, rows = evaluate.targets_of(clips, model.labels), evaluate.logits_by_row(model.exits, logits)
    scored = {"exits": [{"exit": k, **evaluate.scores(targets, rows[k])} for k in model.exits]}
    if "fusion" in rows:
        scored["fusion"] = evaluate.scores(targets, rows["fusion"])
    return scored


def save_epoch(out: Path, args, clips: list[Clip], log: list[dict], parts: dict) -> None:
    """Writes an epoch's files, train_state.pt last: if the run dies before that is written, the epoch is repeated."""
    if len(log) == 1:
        with sdser.file_errors(out, "cannot be written, or another run has started there", "choose another --out"):
            (out / "split.csv").touch(exist_ok=False)
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([*evaluate.COLUMNS, *clips[0].more])
        for clip in clips:
            writer.writerow([os.path.abspath(clip.path), clip.label, clip.speaker, clip.split, *clip.more.values()])
        sdser.replace_file(out / "split.csv", text.getvalue())
    parts["model"].save_pretrained(out)
    sdser.replace_file(out / "log.jsonl", "".join(json.dumps(line) + "\n" for line in log))
    state = {"args": vars(args), "log": log} | {name: part.state_dict() for name, part in parts.items()}
    memory = io.BytesIO()  # first, since torch's zip writer hides why a file cannot be written
    torch.save(state, memory)
    sdser.replace_file(out / "train_state.pt", memory.getbuffer())


def read_state(out: Path) -> dict:
    """Returns what `save_epoch` wrote last, and removes the temporary files of a killed process."""
    with sdser.file_errors(out / "train_state.pt", "no run to resume", "train in a new folder, without --resume"):
        state = torch.load(out / "train_state.pt", map_location="cpu", weights_only=True)
        state = {name: state[name] for name in ("args", "log", "model", "optimizer", "scheduler")}
    for left_over in out.glob(".*.tmp"):
        left_over.unlink(missing_ok=True)
    return state


def report(results: dict, threshold: float | None, dev_clips: int, out: Path) -> None:
    """Prints the scores of each split and exit, and early exit's threshold."""
    print(f"\nafter the last epoch (chance {1 / len(results['labels']):.3f})\n")
    names = list(results["test"]["exits"][0])[1:]  # of the scores
    print("split    exit" + "".join(f"  {name:>8}" for name in names))
    for split in [split for split in ("dev", "test") if split in results]:
        rows = list(results[split]["exits"])
        if "fusion" in results[split]:
            rows.append({"exit": "fusion", **results[split]["fusion"]})
        for row in rows:
            print(f"{split:6} {row['exit']!s:>6}" + "".join(f"  {row[name]:8.3f}" for name in names))
    if dev_clips:
        print(f"\nearly exit's threshold, chosen on {dev_clips} dev clips: {threshold}")
    print(f"\nin {out}: config.json, model.safetensors, README.md, results.json, log.jsonl, split.csv, train_state.pt")
    print(f"next: python evaluate.py {shlex.quote(out.as_posix())}")


def main(argv=None) -> None:
    args = parse_args(argv)
    resume = f"python train.py --resume --out {shlex.quote(Path(args.out).as_posix())}"
    with evaluate.script(f"interrupted: {resume} continues after the last epoch printed, if any"):
        run(args)


if __name__ == "__main__":
    main()
