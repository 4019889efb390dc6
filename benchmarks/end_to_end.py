"""eosin against its peers, end to end on one slide, with what the encoder alone could do.

Each tool runs in its own process and environment, makes tiles of the same size at 0.5 mpp with
its own tissue detection, and embeds them with the same timm network and weights in bfloat16.
Rounds are interleaved, so that a machine that slows down slows everyone. In every round the
encoder alone is timed too, on tiles in memory: that is the ceiling of its backend.

    python benchmarks/end_to_end.py --peer lazyslide=PYTHON --peer slide2vec=PYTHON \\
        --peer tiatoolbox=PYTHON

PYTHON is the interpreter of an environment that has that tool, and timm.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
SCRIPTS = HERE / "peers"
SEED = 0
CHECKED_TILES = 64
sys.path.insert(0, str(SCRIPTS))


@dataclass(frozen=True, kw_only=True, slots=True)
class Contender:
    """One thing that is timed.

    Attributes:
        name: What the table calls it.
        python: Interpreter that runs it.
        script: File name under ``peers/``.
        ceiling: Backend whose encoder-only rate bounds it.
        arguments: Options only it takes.
    """

    name: str
    python: str
    script: str
    ceiling: str
    arguments: tuple[str, ...] = ()


def contenders(options: argparse.Namespace) -> list[Contender]:
    """List eosin once a backend, each peer, and the plain loop."""
    listed = [
        Contender(
            name=f"eosin ({backend})",
            python=sys.executable,
            script="eosin_run.py",
            ceiling=f"{backend}-bf16",
            arguments=("--backend", backend),
        )
        for backend in options.eosin_backend
    ]
    for peer in options.peer:
        name, found, python = peer.partition("=")
        script = f"{name}_run.py"
        if not found or not (SCRIPTS / script).is_file():
            known = ", ".join(sorted(path.stem.removesuffix("_run") for path in SCRIPTS.glob("*_run.py")))
            raise SystemExit(f"--peer {peer}: write NAME=PYTHON with NAME one of {known}")
        listed.append(Contender(name=name, python=os.path.abspath(python), script=script, ceiling="torch-bf16"))
    loop = Contender(name="plain loop", python=sys.executable, script="reference_loop.py", ceiling="torch-bf16")
    return [*listed, loop]


def ceilings(listed: list[Contender]) -> list[Contender]:
    """List the encoder-only runs: every backend in use, and float32 for scale."""
    backends = sorted({one.ceiling for one in listed} | {"torch-fp32"})
    return [
        Contender(
            name=backend, python=sys.executable, script="ceiling.py", ceiling=backend, arguments=("--backend", backend)
        )
        for backend in backends
    ]


def session_memory(session: int) -> tuple[int, int]:
    """Return (RSS, PSS) in KiB, summed over the processes of a session."""
    rss = pss = 0
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) != session:
                continue
            lines = (entry / "smaps_rollup").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it ended between listing and reading
        sizes = {line.split(":")[0]: int(line.split()[1]) for line in lines[1:] if line.endswith("kB")}
        rss += sizes.get("Rss", 0)
        pss += sizes.get("Pss", 0)
    return rss, pss


def run_watched(command: list[str], folder: Path, *, threads: int, limit_s: float) -> dict:
    """Run a command in a session of its own; return its wall time, peak memory and last JSON line.

    It runs in `folder`, because some tools leave log files where they are started.

    A command that fails or runs past `limit_s` gives a dict with "error" instead.
    """
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "disabled",
    }
    peak = [0, 0]
    done = threading.Event()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        started = time.perf_counter()
        process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=err, env=environment, start_new_session=True)

        def watch() -> None:
            while not done.wait(0.5):
                peak[:] = [max(pair) for pair in zip(peak, session_memory(process.pid), strict=True)]

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            code = process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            wall_s = time.perf_counter() - started
            done.set()
            watcher.join()
            end_session(process)
        out.seek(0)
        err.seek(0)
        lines = [line for line in out.read().splitlines() if line.startswith("{")]
        if code != 0 or not lines:
            reason = f"not done after {limit_s:.0f} s" if code is None else f"exit {code}"
            return {"error": reason, "stderr": err.read()[-1500:]}
    return json.loads(lines[-1]) | {"wall_s": wall_s, "peak_rss_mib": peak[0] / 1024, "peak_pss_mib": peak[1] / 1024}


def end_session(process: subprocess.Popen) -> None:
    """End whatever a command left running in the session we opened for it."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def save_weights(encoder: str, path: Path) -> None:
    """Write seeded random weights whose features depend on the tile.

    timm starts the layer scales of these networks at 1e-5, which leaves the class token nearly
    constant; they are set to 1 so that a wrong pixel shows in the features.
    """
    import harness  # pyright: ignore[reportMissingImports]
    import torch

    torch.manual_seed(SEED)
    model = harness.create_model(encoder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gamma" in name:
                parameter.fill_(1.0)
    torch.save(model.state_dict(), path)


def reference_features(slide: Path, coords: np.ndarray, encoder: str, weights: Path) -> np.ndarray:
    """Features (n, D) by OpenSlide at level 0, one antialiased resize and float32 torch."""
    import harness  # pyright: ignore[reportMissingImports]
    import openslide
    import torch
    from PIL import Image

    tile_px = harness.ARCHITECTURES[encoder].tile_px
    model, transform = harness.load_model(encoder, weights), harness.tile_transform()
    features = []
    with openslide.OpenSlide(slide) as opened, torch.inference_mode():
        side0_px = round(tile_px * harness.MPP / float(opened.properties[openslide.PROPERTY_NAME_MPP_X]))
        for x, y in coords:
            region = opened.read_region((int(x), int(y)), 0, (side0_px, side0_px))
            tile = Image.new("RGB", region.size, "white")  # shows where a tile leaves the slide
            tile.paste(region, mask=region.getchannel("A"))
            tile = tile.resize((tile_px, tile_px), Image.Resampling.BILINEAR)
            features.append(model(transform(tile)[None])[0].numpy())
    return np.stack(features)


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Row-wise cosine similarity (n,) of two (n, D) arrays."""
    return (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


def compare(a: np.ndarray, b: np.ndarray, mean: np.ndarray) -> dict[str, float]:
    """Summarise the agreement of paired features, as they are and after `mean` is subtracted.

    Random weights put all features near one direction, so cosines are close to 1 whatever the
    tile; the centred ones tell tiles apart, and are compared with those of different tiles.
    """
    plain, centred = cosine(a, b), cosine(a - mean, b - mean)
    other = cosine(a - mean, np.roll(b, 1, axis=0) - mean)
    return {
        "n": len(a),
        "median": float(np.median(plain)),
        "p5": float(np.percentile(plain, 5)),
        "centred_median": float(np.median(centred)),
        "centred_p5": float(np.percentile(centred, 5)),
        "centred_median_of_different_tiles": float(np.median(other)),
    }


def agreement(work: Path, listed: list[Contender], options: argparse.Namespace, weights: Path) -> dict:
    """Compare features: each tool's with the float32 reference, and each tool's with eosin's.

    Grids start at different places, so few tiles may coincide between two tools; the reference
    is computed at each tool's own coordinates.
    """
    loaded = {}
    for one in listed:
        path = work / f"{one.name}.npz"
        if path.is_file():
            with np.load(path) as arrays:
                loaded[one.name] = arrays["features"], arrays["coords"]
    pairs: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, (features, coords) in loaded.items():
        chosen = np.linspace(0, len(coords) - 1, min(CHECKED_TILES, len(coords))).astype(int)
        reference = reference_features(options.slide, coords[chosen], options.encoder, weights)
        pairs[name] = reference, features[chosen]
    if not pairs:
        return {}
    mean = np.concatenate([reference for reference, _ in pairs.values()]).mean(0)
    found: dict[str, dict] = {name: {"with_fp32_reference": compare(*pair, mean)} for name, pair in pairs.items()}
    first = listed[0].name
    if first not in loaded:
        return found
    rows = {tuple(xy): i for i, xy in enumerate(loaded[first][1].tolist())}
    for name, (features, coords) in loaded.items():
        shared = [(rows[tuple(xy)], i) for i, xy in enumerate(coords.tolist()) if tuple(xy) in rows]
        found[name]["tiles_shared_with_eosin"] = len(shared)
        if name != first and len(shared) > 1:
            mine, theirs = (list(column) for column in zip(*shared, strict=True))
            found[name][f"with_{first}"] = compare(loaded[first][0][mine], features[theirs], mean)
    return found


def numbers(result: dict) -> dict:
    """Keep what was measured, or the error, of one run; versions are in the summary."""
    return {key: value for key, value in result.items() if isinstance(value, (int, float)) or key == "error"}


def spread(values: list[float]) -> dict[str, float]:
    """Median, lowest and highest of some numbers."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def times_as_fast(rounds: list[dict], ours: str, theirs: str) -> dict[str, dict[str, float]]:
    """Our tiles per second over theirs, round by round; empty when ours never ran."""
    pairs = [(r[ours], r[theirs]) for r in rounds if "error" not in r[ours]]
    return {
        key: spread([a["tiles"] / a[f"{key}_s"] * b[f"{key}_s"] / b["tiles"] for a, b in pairs])
        for key in ("embed", "wall")
        if pairs
    }


def summarise(rounds: list[dict], listed: list[Contender]) -> dict[str, dict]:
    """Per contender: rates, memory, share of its ceiling, and how many times as fast eosin is.

    Ratios are taken inside a round and then summarised over rounds.
    """
    ours = [one.name for one in listed if one.script == "eosin_run.py"]
    summary: dict[str, dict] = {}
    for one in listed:
        ran = [r for r in rounds if "error" not in r[one.name]]
        if not ran:
            summary[one.name] = {"error": rounds[0][one.name]["error"]}
            continue
        rate = [r[one.name]["tiles"] / r[one.name]["embed_s"] for r in ran]
        entry = {
            "tiles": ran[0][one.name]["tiles"],
            "embed_tiles_per_s": spread(rate),
            "wall_tiles_per_s": spread([r[one.name]["tiles"] / r[one.name]["wall_s"] for r in ran]),
            "wall_s": spread([r[one.name]["wall_s"] for r in ran]),
            "peak_rss_mib": max(r[one.name]["peak_rss_mib"] for r in ran),
            "peak_pss_mib": max(r[one.name]["peak_pss_mib"] for r in ran),
            "embed_covers": ran[0][one.name]["embed_covers"],
            "versions": ran[0][one.name]["versions"],
        }
        capped = [(v, r[one.ceiling]) for v, r in zip(rate, ran, strict=True) if "error" not in r[one.ceiling]]
        if capped:
            entry["share_of_ceiling"] = spread([v / ceiling["images_per_s"] for v, ceiling in capped])
        if one.name not in ours:
            entry["eosin_times_as_fast"] = {name: times_as_fast(ran, name, one.name) for name in ours}
        summary[one.name] = entry
    return summary


NOTE = "Cosines: median / 5th percentile [after the mean of all reference features is subtracted]."


def agreed(check: dict | None) -> str:
    """Write one comparison of features as a cell."""
    if check is None:
        return "-"
    centred = f"[{check['centred_median']:.4f} / {check['centred_p5']:.4f}]"
    return f"{check['median']:.5f} / {check['p5']:.5f} {centred}"


def table(summary: dict[str, dict], agree: dict, bounds: dict[str, dict]) -> str:
    """Markdown of the summary."""
    lines = [
        "| tool | tiles | tiles/s embed | tiles/s wall | wall s | share of ceiling | eosin's embed rate over this "
        "| peak RSS / PSS MiB | cosine to fp32 reference | tiles shared with eosin: cosine |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]

    def cell(entry: dict, key: str, digits: int) -> str:
        if key not in entry:
            return "-"
        low, mid, high = (f"{entry[key][part]:.{digits}f}" for part in ("min", "median", "max"))
        return f"{mid} ({low}-{high})"

    for name, entry in summary.items():
        if "error" in entry:
            lines.append(f"| {name} | failed: {entry['error']} |" + "  |" * 8)
            continue
        versions = entry["versions"]
        version = next((v for k, v in versions.items() if k == name.split(" ")[0]), "")
        check = agree.get(name, {})
        ratios = ", ".join(
            f"{ours.removeprefix('eosin ').strip('()')} {cell(ratio, 'embed', 2)}"
            for ours, ratio in entry.get("eosin_times_as_fast", {}).items()
        )
        shared = next((value for key, value in check.items() if key.startswith("with_eosin")), None)
        lines.append(
            f"| {name} {version} | {entry['tiles']} | {cell(entry, 'embed_tiles_per_s', 1)} "
            f"| {cell(entry, 'wall_tiles_per_s', 1)} | {cell(entry, 'wall_s', 1)} "
            f"| {cell(entry, 'share_of_ceiling', 2)} | {ratios or '-'} "
            f"| {entry['peak_rss_mib']:.0f} / {entry['peak_pss_mib']:.0f} "
            f"| {agreed(check.get('with_fp32_reference'))} "
            f"| {check.get('tiles_shared_with_eosin', 0)}: {agreed(shared)} |"
        )
    rates = ", ".join(
        f"{name} {entry['median']:.1f} ({entry['min']:.1f}-{entry['max']:.1f})" for name, entry in bounds.items()
    )
    return "\n".join([*lines, "", f"Encoder alone, images/s: {rates}.", "", NOTE])


def machine() -> dict:
    """Describe the processor and memory, without names or paths."""
    info = Path("/proc/cpuinfo").read_text()
    field = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in info.splitlines())}
    flags = [flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if flag in field.get("flags", "").split()]
    memory_kib = int(Path("/proc/meminfo").read_text().split()[1])
    return {
        "cpu": field.get("model name", platform.machine()),
        "cpus": os.cpu_count(),
        "flags": flags,
        "memory_gib": round(memory_kib / 2**20, 1),
        "system": platform.platform(),
    }


def commit() -> str:
    """Return the commit this ran at, marked when files differ from it."""
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()


def make_slide(path: Path, size_px: int) -> None:
    """Make the test slide with the benchmark's slide maker."""
    maker = [sys.executable, str(HERE / "slidemaker.py"), str(path), "--size-px", str(size_px)]
    subprocess.run(maker, check=True, stdout=sys.stderr)


def parse() -> tuple[argparse.Namespace, str]:
    """Read the options; also return the command without this machine's paths."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slide", type=Path, help="take this slide instead of making one")
    parser.add_argument("--slide-px", type=int, default=16384, help="side of the slide that is made")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--eosin-backend", nargs="+", default=["openvino", "torch"], choices=["openvino", "torch"])
    parser.add_argument("--encoder", default="vits14", choices=["vits14", "vits16-dinov3"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit-s", type=float, default=600.0, help="a tool that runs longer counts as hung")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "end_to_end.json")
    options = parser.parse_args()
    shown = [part if "=" not in part else f"{part.partition('=')[0]}=PYTHON" for part in sys.argv[1:]]
    paths = {str(options.slide): "SLIDE", str(options.out): options.out.name}
    return options, shlex.join(["python", "benchmarks/end_to_end.py", *(paths.get(part, part) for part in shown)])


def run_round(number: int, everyone: list[Contender], work: Path, weights: Path, options: argparse.Namespace) -> dict:
    """Run every contender once, starting one later than in the round before."""
    turn = number % len(everyone)
    results = {}
    for one in everyone[turn:] + everyone[:turn]:
        command = [one.python, str(SCRIPTS / one.script), *one.arguments]
        command += ["--slide", str(options.slide), "--out", str(work / f"{one.name}.npz"), "--weights", str(weights)]
        command += ["--encoder", options.encoder, "--batch", str(options.batch), "--threads", str(options.threads)]
        result = run_watched(command, work, threads=options.threads, limit_s=options.limit_s)
        results[one.name] = result
        brief = {key: round(value, 1) for key, value in result.items() if isinstance(value, float)}
        print(f"round {number + 1}  {one.name}: {result.get('error', brief)}", file=sys.stderr, flush=True)
        if "error" in result:
            print(result["stderr"], file=sys.stderr, flush=True)
    return results


def main() -> None:
    """Prepare, run the rounds, compare, write and print."""
    options, command = parse()
    listed = contenders(options)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if options.slide is None:
            options.slide = work / "slide.svs"
            make_slide(options.slide, options.slide_px)
        options.slide = options.slide.resolve()
        weights = work / "weights.pt"
        save_weights(options.encoder, weights)
        options.slide.read_bytes()  # into the page cache, for everyone
        bounds = ceilings(listed)
        rounds = [run_round(i, [*listed, *bounds], work, weights, options) for i in range(options.rounds)]
        agree = agreement(work, listed, options, weights)
        slide_bytes = options.slide.stat().st_size
    summary = summarise(rounds, listed)
    encoder_alone = {
        one.name: spread([r[one.name]["images_per_s"] for r in rounds])
        for one in bounds
        if all("error" not in r[one.name] for r in rounds)
    }
    record = {
        "command": command,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": machine(),
        "settings": {
            "encoder": options.encoder,
            "batch": options.batch,
            "threads": options.threads,
            "seed": SEED,
            "slide_bytes": slide_bytes,
        },
        "summary": summary,
        "encoder_alone_images_per_s": encoder_alone,
        "agreement": agree,
        "rounds": [{name: numbers(result) for name, result in one.items()} for one in rounds],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{command}\n\n{table(summary, agree, encoder_alone)}")


if __name__ == "__main__":
    main()
