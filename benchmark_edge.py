"""Which exit fits this CPU, and which file to deploy: times each exit in its deployed form.

    python benchmark_edge.py --backbone base                      # latency needs no trained weights
    python benchmark_edge.py out --budget-ms 80                   # the deepest exit of a trained model that fits
    python benchmark_edge.py out --export model.onnx --exit 4     # one exit as a file, or as a folder

First the files: what can be written, and what runs them; then the measurements, the report, and the command.
"""

import argparse
import contextlib
import importlib.util
import inspect
import json
import logging
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from itertools import product
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor, nn

import evaluate
import sdser
from sdser import InputError

# -- writing one exit as a file ---------------------------------------------------------------------------------------
# What each file ending can hold; a name without an ending means a folder, which can also be one for `transformers`.
PRECISIONS = {".onnx": ("fp32", "fp16", "int8"), "": ("fp32", "transformers")}
FORMATS = "; ".join(f"{ending or 'a folder'}: {', '.join(names)}" for ending, names in PRECISIONS.items())
LARGEST_ONNX = 1.5 * 2**30  # bytes of weights; beyond 2 GiB, protobuf writes none


def export(model: sdser.MultiExitSER, exit: int, files: list[tuple[str, str]]) -> None:
    """Writes one exit as files or folders, each a precision and a path; raises InputError if one is not possible."""
    for precision, path in files:
        check_export(precision, path, evaluate.count_parameters(model, [exit]))
    model = model.truncate(exit)
    for precision, path in files:
        if precision == "transformers":
            write_transformers(model, path)
        elif not Path(path).suffix:
            model.save_pretrained(path)
    onnx_files = [(precision, path) for precision, path in files if Path(path).suffix]
    with tempfile.TemporaryDirectory() as folder:
        fp32 = os.path.join(folder, "fp32.onnx")
        if onnx_files:
            write_onnx(model.requires_grad_(False), fp32)
        del model  # converting takes memory, too
        for precision, path in onnx_files:
            converted = fp32 if precision == "fp32" else convert(fp32, precision)
            sdser.replace_file(path, Path(converted).read_bytes())


def check_export(precision: str, path: str, weights: int = 0) -> None:
    """Raises InputError, before any work, if this cannot be written; weights: how many the exit has, once known."""
    ending = Path(path).suffix.lower()
    if precision not in PRECISIONS.get(ending, ()):
        raise InputError(f"{path}: cannot store {precision}; options: {FORMATS}")
    if ending == ".onnx" and not has_onnx():
        raise InputError(f"{path}: needs three packages: pip install onnx onnxscript onnxruntime")
    if ending == ".onnx" and 4 * weights > LARGEST_ONNX:
        raise InputError(f"{path}: {4 * weights / 2**30:.1f} GiB of weights are too many for one file; export a folder")


def has_onnx() -> bool:
    return all(importlib.util.find_spec(package) for package in ("onnx", "onnxscript", "onnxruntime"))


class ExportedExit(nn.Module):
    """Computes what an .onnx file does: class probabilities (1, C) of a raw waveform (1, T) at 16 kHz."""

    def __init__(self, model: sdser.MultiExitSER):
        super().__init__()
        self.model = model

    def forward(self, waveform: Tensor) -> Tensor:
        if self.model.tile_seconds:
            samples = round(self.model.tile_seconds * sdser.SAMPLE_RATE)
            length = torch.tensor(waveform.shape[1])  # a tensor, so that the export keeps it variable
            waveform = waveform[:, torch.arange(samples) % length]  # tiled as in training
        return sdser.probabilities(self.model(waveform)[0].logits)


def write_onnx(small: sdser.MultiExitSER, path: str) -> None:
    """Writes a model of one exit and its labels as an .onnx for clips of any length; changes the model on the way."""
    # A recurrent network must be exported as a loop, or the length of the traced clip is baked in.
    from torch.export._patches import register_gru_while_loop_decomposition as gru_loop
    from torch.export._patches import register_lstm_while_loop_decomposition as lstm_loop

    for module in list(small.modules()):
        if nn.utils.parametrize.is_parametrized(module):  # weight norm would be recomputed at every call
            nn.utils.parametrize.remove_parametrizations(module, "weight")
    small.backbone.set_attn_implementation("eager")  # fused attention exports IsNaN, which some runtimes refuse
    waveform, any_length = torch.randn(1, 3 * sdser.SAMPLE_RATE), ({1: torch.export.Dim.DYNAMIC},)
    names = dict(input_names=["waveform"], output_names=["probabilities"])
    with torch.no_grad(), warnings.catch_warnings(action="ignore"), gru_loop(), lstm_loop():
        program = torch.export.export(ExportedExit(small), (waveform,), dynamic_shapes=any_length)
        onnx_program = torch.onnx.export(program, dynamo=True, verbose=False, **names)
    for graph in onnx_program.model.graphs():
        for node in graph:
            node.metadata_props.clear()  # where in this machine's files each node comes from
    onnx_program.model.metadata_props["labels"] = json.dumps(small.labels)
    onnx_program.save(path)


def convert(fp32: str, precision: str) -> str:
    """Writes an .onnx in fp16 or int8 beside the one in fp32; returns its path."""
    path = fp32.replace("fp32", precision)
    if precision == "fp16":
        import onnx
        from onnxruntime.transformers.float16 import convert_float_to_float16

        onnx.save(convert_float_to_float16(onnx.load(fp32), keep_io_types=True), path)
    else:  # int8, only of the matrix products: onnxruntime's int8 convolutions are slower than float32
        from onnxruntime.quantization import QuantType, quantize_dynamic

        # 7-bit weights: on processors with AVX2 and no VNNI, products of 8-bit signed numbers saturate
        types = dict(op_types_to_quantize=["MatMul", "Gemm"], weight_type=QuantType.QInt8, reduce_range=True)
        quantize_dynamic(fp32, path, per_channel=True, **types)
    return path


def write_transformers(small: sdser.MultiExitSER, path: str) -> None:
    """Writes a folder for `pipeline("audio-classification")`.

    An exit with a mean head is the `ForSequenceClassification` model of transformers: its projector is linear, so it
    may come before the mean, as there, or after it, as here.
    """
    if small.head_kinds != ["mean"] or small.tile_seconds:
        kind = "tiled clips" if small.tile_seconds else f"a {small.head_kinds[0]} head"
        raise InputError(f"{path}: transformers has mean heads and no tiling, this exit has {kind}; write an .onnx")
    config = type(small.backbone.config)(**small.backbone.config.to_dict())
    config.id2label = dict(enumerate(small.labels))
    config.label2id = {label: i for i, label in config.id2label.items()}
    config.classifier_proj_size = 256
    config.use_weighted_layer_sum = False  # or it would not read the last layer
    model = transformers.AutoModelForAudioClassification.from_config(config)
    model.base_model.load_state_dict(small.backbone.state_dict())
    model.projector.load_state_dict(small.heads[str(small.exits[0])].projector.state_dict())
    model.classifier.load_state_dict(small.heads[str(small.exits[0])].classifier.state_dict())
    model.save_pretrained(path)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=config.do_normalize).save_pretrained(path)
    warnings.warn("in transformers, padding can change answers: pass it one clip at a time", stacklevel=2)


# -- running a file ---------------------------------------------------------------------------------------------------
# Each loader returns a function from a waveform (1, T) float32 to probabilities (1, C), both numpy, and imports what it
# needs itself, so that `peak_megabytes` can run its source in a process without torch.
def load_torch(path: str, threads: int):
    import torch

    import sdser

    torch.set_num_threads(threads)
    model = sdser.MultiExitSER.from_pretrained(path)
    return lambda waveform: [list(model.classify(waveform[0])[0].probabilities.values())]


def load_transformers(path: str, threads: int):
    import transformers

    pipeline = transformers.pipeline("audio-classification", model=path, device="cpu")
    return lambda waveform: pipeline.model(**pipeline.preprocess(waveform[0])).logits.softmax(-1).detach().numpy()


def load_onnxruntime(path: str, threads: int):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3  # only errors
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda waveform: session.run(None, {"waveform": waveform})[0]


def load_openvino(path: str, threads: int):
    import openvino

    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_NUM_THREADS": threads})
    return lambda waveform: compiled({"waveform": waveform})[0]


# For each row of the table: what loads its file, the file's ending, and its precision.
BACKENDS = {
    "torch": (load_torch, "", "fp32"),
    "onnxruntime": (load_onnxruntime, ".onnx", "fp32"),
    "onnxruntime-fp16": (load_onnxruntime, ".onnx", "fp16"),
    "onnxruntime-int8": (load_onnxruntime, ".onnx", "int8"),
    "openvino": (load_openvino, ".onnx", "fp32"),
}


def load_clips(checkpoint: str | None, labels: list[str]) -> tuple[list[np.ndarray], str]:
    """Returns up to eight waveforms (1, T), and where from: the checkpoint's own test clips, or else data/emodb."""
    clips, source = [], "its own test split"
    if checkpoint:
        try:
            clips = evaluate.choose_clips(checkpoint, "test", None, labels)
        except (OSError, InputError) as error:
            warnings.warn(f"files are compared on clips of data/emodb: {error}", stacklevel=2)
    if not clips:
        clips, source = evaluate.load_corpus(evaluate.DATA / "emodb"), "data/emodb"
    return [sdser.read_clip(clip.path)[None].numpy() for clip in clips[:: math.ceil(len(clips) / 8)]], source


def exact_probabilities(model: sdser.MultiExitSER, exit: int, clips: list[np.ndarray]) -> np.ndarray:
    """Returns the model's own class probabilities at an exit, (clips, C)."""
    return np.array([list(model.classify(clip[0], exit=exit)[0].probabilities.values()) for clip in clips])


def largest_change(run, clips: list[np.ndarray], exact: np.ndarray) -> float:
    """Returns the largest change in any class probability of any clip; exact: the model's own, (clips, C)."""
    return float(np.abs(np.concatenate([run(clip) for clip in clips]) - exact).max())


def megabytes(path: str) -> float:
    files = Path(path).glob("*.safetensors") if os.path.isdir(path) else [Path(path)]
    return sum(file.stat().st_size for file in files) / 1e6


# -- measuring --------------------------------------------------------------------------------------------------------
def run_apart(program: str) -> str:
    """Runs Python source in a separate process, next to these files; returns what it prints."""
    here = Path(__file__).parent  # where `python -c` looks for modules first
    done = subprocess.run([sys.executable, "-c", program], cwd=here, capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip() or f"status {done.returncode}"  # nothing is said by what the system has killed
        raise InputError(f"subprocess failed: {reason.splitlines()[-1]}")
    return done.stdout


def peak_megabytes(load, path: str, threads: int, samples: int) -> float | None:
    """Measures the peak memory of a process that only runs that file; None where the system does not report it.

    This script has imported torch, which takes more memory than an .onnx, so the process gets only the source text of
    `load` (a function of this file), and reports its own peak.
    """
    if not os.path.exists("/proc/self/status"):
        return None
    program = f"{inspect.getsource(load)}\nimport numpy\nrun = {load.__name__}({path!r}, {threads})\n"
    program += f"run(0.1 * numpy.random.randn(1, {samples}).astype('float32'))\nprint(open('/proc/self/status').read())"
    status = run_apart(program)
    return int(re.search(r"VmHWM:\s*(\d+)", status)[1]) * 1024 / 1e6  # os.wait4 would count the parent's memory too


def measure(runs: dict, threads: int, args) -> dict:
    """Times an exit's files in turn, so that a drift hits all alike: {(backend, seconds): [ms, ...]}."""
    torch.set_num_threads(threads)
    waveforms, rng, times = {}, np.random.default_rng(0), defaultdict(list)
    for seconds in args.seconds:
        waveforms[seconds] = (0.1 * rng.normal(size=(1, round(seconds * sdser.SAMPLE_RATE)))).astype(np.float32)
    for round_ in range(-2, args.rounds):  # the first two warm up
        for backend, run in runs.items():
            run(waveforms[args.seconds[0]])  # its threads wake up
            for seconds, waveform in waveforms.items():
                start = time.perf_counter()
                run(waveform)
                if round_ >= 0:
                    times[backend, seconds].append(1000 * (time.perf_counter() - start))
            if backend != "torch":
                time.sleep(0.05)  # its threads keep spinning, slowing the next measurement
    return times


def benchmark(model: sdser.MultiExitSER, args) -> dict:
    """Measures everything, exit by exit, so that only one exit's files are in memory; returns what the JSON holds."""
    clips, source = load_clips(args.checkpoint, model.labels)
    samples, rows = round(max(args.seconds) * sdser.SAMPLE_RATE), []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # Windows keeps files that are in use
        model.save_pretrained(os.path.join(folder, "model"))
        exact = {exit: exact_probabilities(model, exit, clips) for exit in args.exits}
        macs = {(exit, seconds): evaluate.count_macs(model, round(seconds * sdser.SAMPLE_RATE), exit)
                for exit, seconds in product(args.exits, args.seconds)}  # fmt: skip
        model.to("meta")  # frees its memory; from here on, only its shapes are needed
        for exit in evaluate.progress(args.exits, "exits", len(args.exits)):
            loaders, columns, files = {}, {}, set()  # by backend; several may run one file
            for backend in args.backends:
                load, ending, precision = BACKENDS[backend]
                loaders[backend] = load, os.path.join(folder, f"{exit}-{precision}{ending}")
                files.add((precision, loaders[backend][1]))
            # exporting takes gigabytes, which only the end of a process frees
            whole = f"sdser.MultiExitSER.from_pretrained({os.path.join(folder, 'model')!r})"
            run_apart(f"import sdser\nfrom benchmark_edge import export\nexport({whole}, {exit}, {sorted(files)!r})")
            for backend, (load, path) in loaders.items():
                columns[backend] = {
                    "peak_rss_mb": peak_megabytes(load, path, max(args.threads), samples),
                    "parameters": evaluate.count_parameters(model, [exit]),
                    "size_mb": megabytes(path),
                    "max_probability_change": largest_change(load(path, args.threads[0]), clips, exact[exit]),
                }
            for threads in args.threads:
                runs = {backend: load(path, threads) for backend, (load, path) in loaders.items()}
                for (backend, seconds), milliseconds in measure(runs, threads, args).items():
                    p50, p95 = np.percentile(milliseconds, [50, 95])
                    rows.append({"exit": exit, "backend": backend, "seconds": seconds, "threads": threads,
                                 "p50_ms": p50, "p95_ms": p95, "macs": macs[exit, seconds],
                                 **columns[backend]})  # fmt: skip
                del runs  # before the next are loaded
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, TypeError):
        name = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1]
    machine = {"cpu": name, "cores": os.cpu_count(), "torch": torch.__version__}
    return {"machine": machine, "compared_on": f"{len(clips)} clips of {source}", "rows": rows}


# -- the report, the plot ---------------------------------------------------------------------------------------------
def report(results: dict, args) -> None:
    """Prints the table, and what fits the budget."""
    machine, cells = results["machine"], defaultdict(list)
    for row in results["rows"]:
        cells[row["threads"], row["exit"], row["backend"]].append(row)
    print(f"{args.checkpoint or args.backbone} on {machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}")
    print(f"milliseconds for one clip, median (95 %) of {args.rounds} runs\n")
    lengths = "".join(f"{f'{seconds:g} s':>16}" for seconds in args.seconds)
    print(f"threads  exit  backend         {lengths}  peak MB  file MB  change")
    for threads, exit, backend in sorted(cells, key=lambda cell: cell[0]):
        rows = cells[threads, exit, backend]
        times = "".join(f"{row['p50_ms']:8.1f} ({row['p95_ms']:5.1f})" for row in rows)
        peak, change = rows[0]["peak_rss_mb"] or math.nan, rows[0]["max_probability_change"]
        print(f"{threads:7}  {exit:4}  {backend:16}{times}  {peak:7.0f}  {rows[0]['size_mb']:7.1f}  {change:.0e}")
    print("\npeak MB: of a process that runs only that file")
    print(f"change: the largest change in any class probability, on {results['compared_on']}")
    for threads in args.threads if args.budget_ms else []:
        for seconds in args.seconds:
            shown = [row for row in results["rows"] if (row["threads"], row["seconds"]) == (threads, seconds)]
            print(f"{seconds:g} s, {threads} thread(s): {fit_budget(shown, args.budget_ms)}")


def fit_budget(rows: list[dict], milliseconds: float) -> str:
    """Names the deepest exit that answers in time, and the file that changes its probabilities least."""
    fits = [row for row in rows if row["p95_ms"] <= milliseconds]
    if not fits:
        best = min(rows, key=lambda row: row["p95_ms"])
        return f"nothing fits {milliseconds:g} ms; nearest is exit {best['exit']} by {best['backend']}"
    best = min(fits, key=lambda row: (-row["exit"], row["max_probability_change"]))
    _, ending, precision = BACKENDS[best["backend"]]
    return (f"exit {best['exit']} is the deepest within {milliseconds:g} ms, by {best['backend']}: "
            f"--exit {best['exit']} --export model{ending} --precision {precision}")  # fmt: skip


def plot(results: dict, args) -> None:
    """Plots latency against exit, a line per backend and a panel per clip length, for the largest --threads."""
    panels = len(args.seconds)
    figure = evaluate.new_figure(figsize=(1.5 + 3 * panels, 3.5))
    axes = figure.subplots(1, panels, squeeze=False)
    rows = [row for row in results["rows"] if row["threads"] == max(args.threads)]
    for panel, seconds in zip(axes[0], args.seconds):
        for i, backend in enumerate(dict.fromkeys(row["backend"] for row in rows)):
            shown = [row for row in rows if (row["backend"], row["seconds"]) == (backend, seconds)]
            shown.sort(key=lambda row: row["exit"])
            style = dict(marker="osD^vP*X"[i % 8], linestyle=["-", "--", ":", "-."][i % 4], color=str(0.1 * (i % 6)))
            panel.plot([row["exit"] for row in shown], [row["p50_ms"] for row in shown], **style, label=backend)
        panel.set(title=f"{seconds:g} s of audio", xlabel="exit (layers)", ylim=(0, None))
        panel.set_xticks(sorted({row["exit"] for row in rows}))
    axes[0][0].set_ylabel(f"median ms, {max(args.threads)} thread(s)")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    evaluate.save_figure(figure, args.plot)


def export_and_check(model: sdser.MultiExitSER, args) -> None:
    """Writes the file, loads it back, and prints how far its probabilities are from the model's."""
    exit, path = model.exits[-1] if args.exit is None else args.exit, args.export
    export(model, exit, [(args.precision, path)])
    print(f"{path}: exit {exit}, {args.precision}, {megabytes(path):.1f} MB, labels {', '.join(model.labels)}")
    load = load_onnxruntime if Path(path).suffix else load_torch
    load = load_transformers if args.precision == "transformers" else load
    clips, source = load_clips(args.checkpoint, model.labels)
    change = largest_change(load(path, max(args.threads)), clips, exact_probabilities(model, exit, clips))
    print(f"loaded back and run on {len(clips)} clips of {source}: no probability differs by more than {change:.1e}")
    print(f"how to run it: {load.__name__} in benchmark_edge.py, and docs/edge.md")


# -- the command ------------------------------------------------------------------------------------------------------
def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add, positive = parser.add_argument, evaluate.positive
    add("checkpoint", nargs="?", help="folder written by train.py, or a Hub name")
    add("--backbone", choices=sdser.SIZES, help="instead of a checkpoint: a built-in shape with random weights")
    heads = "with --backbone: one for the shallow exits, or one for each exit (default stats)"
    add("--head", choices=sdser.HEADS, nargs="+", metavar="H", help=heads)
    add("--exits", type=int, nargs="+", metavar="K", help="default: all of the model's")
    add("--seconds", type=positive(float), nargs="+", default=[1.0, 3.0, 6.0], metavar="S", help="default 1 3 6")
    add("--threads", type=positive(int), nargs="+", metavar="N", help="default: 1, and as many as there are cores")
    add("--backends", nargs="+", choices=BACKENDS, help="default: torch, and onnxruntime's if it is installed")
    add("--rounds", type=positive(int), default=20, metavar="N", help="timed runs of each, in turn (default 20)")
    add("--budget-ms", type=positive(float), metavar="MS", help="name the deepest exit that meets it in 95 %% of runs")
    add("--json", metavar="FILE", help="write the results as JSON")
    add("--plot", metavar="FILE", help="write a plot of the latencies (needs matplotlib)")
    add("--export", metavar="FILE", help="write one exit as FILE.onnx or as a folder, and measure nothing")
    add("--exit", type=int, metavar="K", help="with --export (default: the deepest)")
    add("--precision", metavar="P", help=f"with --export: {FORMATS} (default fp32)")
    args = parser.parse_args(argv)
    if (args.checkpoint is None) == (args.backbone is None):
        parser.error("expected either a checkpoint or --backbone")
    if args.checkpoint and args.head:
        parser.error("--head goes with --backbone; a checkpoint has its own heads")
    if not args.export and (args.exit is not None or args.precision):
        parser.error("--exit and --precision go with --export; to time some exits or backends: --exits, --backends")
    if args.export and (args.json or args.plot or args.budget_ms):
        parser.error("--json, --plot and --budget-ms go with measuring; --export measures nothing")
    args.precision = args.precision or "fp32"
    if args.head is None or len(args.head) == 1:
        args.head = args.head[0] if args.head else "stats"
    if args.backends is None:
        args.backends = ["torch", "onnxruntime", "onnxruntime-int8"] if has_onnx() else ["torch"]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    args.threads = args.threads or sorted({1, cores})
    return args


def main(argv=None) -> None:
    args = parse_args(argv)
    logging.disable(logging.WARNING)  # the exporters' remarks to their own developers
    with evaluate.script():
        for path in filter(None, (args.json, args.plot)):
            evaluate.check_writable(path)
        if args.plot:
            evaluate.new_figure()  # or say that matplotlib is absent
        if "openvino" in args.backends and not importlib.util.find_spec("openvino"):
            raise InputError("--backends openvino: needs a package: pip install openvino")
        if args.export:
            check_export(args.precision, args.export)
            if os.path.isdir(args.export) and os.listdir(args.export):
                raise InputError(f"--export {args.export}: is not empty; choose another folder")
            evaluate.check_writable(args.export, folder=not Path(args.export).suffix)
        if args.checkpoint:
            model = sdser.MultiExitSER.from_pretrained(args.checkpoint)
        else:
            labels = ["anger", "disgust", "fear", "guilt", "happiness", "sadness", "surprise"]  # the paper's
            torch.manual_seed(0)
            model = sdser.MultiExitSER(labels, args.backbone, args.exits, args.head).eval()
        args.exits = args.exits or model.exits
        for exit in [*args.exits, args.exit]:
            model.check_exit(exit)
        if args.export:
            return export_and_check(model, args)
        for exit, backend in product(args.exits, args.backends):
            _, ending, precision = BACKENDS[backend]
            check_export(precision, f"{backend}{ending}", evaluate.count_parameters(model, [exit]))
        results = benchmark(model, args)
        if args.json:
            sdser.replace_file(args.json, json.dumps(results, indent=2))
        report(results, args)
        if args.plot:
            plot(results, args)


if __name__ == "__main__":
    main()
