"""Every figure of the README and the docs: ``python -m benchmarks WHAT`` (``--help`` lists what).

Each case runs in a fresh process, by turns with what it is compared to, and counts as the ratio of medians, because
the machines these run on are shared and noisy.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import platform
import statistics
import subprocess
import sys

import torch
import transformers

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results.json"
# Bytes that block maps may cost beside a fused forward pass.
CAPTURE_BYTES = 100 * 10**6
# Case, what it is measured against, what is measured, rounds, and the ratios asked for: time, and peak memory.
PAIRS = [
    ("eager", "native", "by rows", 3, 0.4, 1 / 8),
    ("sdpa", "native", "by rows", 5, 1.1, None),
    ("capture", "off", "on", 5, 1.5, None),
    ("training", "native", "by rows", 3, None, 1 / 4),
]
# Beside the table: the middle of an autoencoder.
VAE = ("vae", "native", "by rows", 3, 1.0, 1 / 8)
OVERHEADS = [("prefill 512", 1.01), ("decode", 1.01)]


def measure(case: str, variant: str) -> dict[str, float]:
    """One measurement in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.case", case, variant]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent, check=False)
    if done.returncode:
        raise SystemExit(f"{case} {variant} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def pair(case: str, first: str, second: str, rounds: int) -> dict[str, object]:
    """Two variants by turns; medians of seconds and peak bytes, and all values."""
    seen: dict[str, list[dict[str, float]]] = {first: [], second: []}
    for _ in range(rounds):
        for variant in (first, second):
            seen[variant].append(measure(case, variant))
            print(
                f"  {case:10} {variant:8} {seen[variant][-1]['seconds']:7.2f} s", file=sys.stderr, flush=True
            )
    medians = {
        variant: {key: statistics.median(run[key] for run in runs) for key in ("seconds", "peak")}
        for variant, runs in seen.items()
    }
    return {
        "variants": medians,
        "runs": seen,
        "time_ratio": medians[second]["seconds"] / medians[first]["seconds"],
        "peak_ratio": medians[second]["peak"] / max(1, medians[first]["peak"]),
        "peak_difference": medians[second]["peak"] - medians[first]["peak"],
    }


def run_all(names: list[str]) -> dict[str, object]:
    """The main figures; earlier results of cases that are not named are kept."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() and names else {}
    for case, first, second, rounds, *_ in PAIRS:
        if not names or case in names:
            results[case] = pair(case, first, second, rounds)
    for case, _ in OVERHEADS:
        if not names or case in names:
            print(f"  {case}", file=sys.stderr, flush=True)
            results[case] = measure(case, "pairs")
    results["machine"] = {
        "cores": torch.get_num_threads(),
        "processor": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    RESULTS.write_text(json.dumps(results, indent=1))
    return results


def table(results: dict[str, object]) -> str:
    """What was asked and what was measured."""
    lines = [
        f"{'case':12} {'against':8} {'time':>18} {'ratio':>6} {'asked':>6} {'peak MB':>14} {'ratio':>6} {'asked':>6}"
    ]
    for case, first, second, _, time_goal, peak_goal in PAIRS:
        if case not in results:
            continue
        found, a, b = results[case], *(results[case]["variants"][v] for v in (first, second))
        lines.append(
            f"{case:12} {second:8} {a['seconds']:7.2f} -> {b['seconds']:5.2f} s {found['time_ratio']:6.2f} "
            f"{_goal(time_goal):>6} {a['peak'] / 1e6:6.0f} -> {b['peak'] / 1e6:4.0f} {found['peak_ratio']:6.2f} "
            f"{_goal(peak_goal):>6}"
        )
    for case, goal in OVERHEADS:
        if case in results:
            found = results[case]
            lines.append(
                f"{case:12} {'patched':8} {found['native'] * 1e3:6.1f} -> {found['patched'] * 1e3:5.1f} ms "
                f"{found['ratio']:6.3f} {_goal(goal):>6}"
            )
    return "\n".join(lines)


def missed(results: dict[str, object]) -> list[str]:
    """Cases that did not reach what was asked."""
    wrong = []
    for case, _, _, _, time_goal, peak_goal in PAIRS:
        found = results.get(case)
        if found and time_goal is not None and found["time_ratio"] > time_goal:
            wrong.append(f"{case}: time {found['time_ratio']:.2f}x, asked at most {time_goal:.3g}x")
        if found and peak_goal is not None and found["peak_ratio"] > peak_goal:
            wrong.append(f"{case}: peak {found['peak_ratio']:.2f}x, asked at most {peak_goal:.3g}x")
    if "capture" in results and results["capture"]["peak_difference"] >= CAPTURE_BYTES:
        wrong.append(
            f"capture: {results['capture']['peak_difference'] / 1e6:.0f} MB more, asked less than 100"
        )
    for case, goal in OVERHEADS:
        if case in results and results[case]["ratio"] > goal:
            wrong.append(f"{case}: {results[case]['ratio']:.3f}x, asked at most {goal:.3g}x")
    return wrong


def _goal(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def plot(results: dict[str, object], path: pathlib.Path) -> None:
    """Time and peak memory of each pair, as one picture."""
    from matplotlib.figure import Figure

    cases = [entry for entry in PAIRS if entry[0] in results]
    titles = {
        "eager": "eager\n8,192 tokens",
        "sdpa": "fused\n8,192 tokens",
        "capture": "fused with\nblock maps",
        "training": "training\n4,096 tokens",
    }
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axes, key, label in zip(
        figure.subplots(1, 2), ("seconds", "peak"), ("seconds", "GB beyond the model"), strict=True
    ):
        scale = 1.0 if key == "seconds" else 1e-9
        for place, (case, first, second, *_) in enumerate(cases):
            variants = results[case]["variants"]
            for shift, variant, colour in ((-0.2, first, "#8a8f98"), (0.2, second, "#0b6fa4")):
                value = variants[variant][key] * scale
                axes.bar(place + shift, value, 0.36, color=colour)
                axes.text(
                    place + shift, value, f"{variant}\n{value:.3g}", ha="center", va="bottom", fontsize=7
                )
        axes.set_xticks(range(len(cases)), [titles[case] for case, *_ in cases], fontsize=8)
        axes.set_ylabel(label)
        axes.margins(y=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        "Llama shape, 2 layers, hidden 1024, float32, 2 CPU cores: native (grey), attnpatch (blue)",
        fontsize=10,
    )
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)


def finish(results: dict[str, object]) -> None:
    """Draw and print; the exit code says whether everything asked was reached."""
    plot(results, HERE.parent / "docs" / "benchmarks.png")
    print(table(results))
    wrong = missed(results)
    print("\n".join(f"missed: {line}" for line in wrong) or "all that was asked is reached")
    raise SystemExit(1 if wrong else 0)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    choices = "all tiles sweep rounding startup overhead explain vae fuse page pictures table".split()
    parser.add_argument("what", nargs="?", default="all", choices=choices)
    parser.add_argument(
        "--only",
        nargs="*",
        default=[],
        help="names of cases, for 'all' and 'fuse'",
    )
    parser.add_argument("--rounds", type=int, default=3, help="how often each variant runs, for 'fuse'")
    options = parser.parse_args()
    if options.what == "all":
        results = run_all(options.only)
        finish(results)
    elif options.what == "table":
        finish(json.loads(RESULTS.read_text()))
    elif options.what == "startup":
        from benchmarks.startup import startup

        startup()
    elif options.what == "overhead":
        from benchmarks.overhead import overhead

        overhead()
    elif options.what == "explain":
        from benchmarks import explain

        explain.table()
    elif options.what == "vae":
        found = pair(*VAE[:4])
        print(
            f"vae: time {found['time_ratio']:.2f}x (asked {VAE[4]:.3g}), peak {found['peak_ratio']:.3f}x (asked {VAE[5]:.3g})"
        )
        raise SystemExit(found["time_ratio"] > VAE[4] or found["peak_ratio"] > VAE[5])
    elif options.what == "fuse":
        from benchmarks import fused

        raise SystemExit(fused.main(measure, options.only, options.rounds))
    elif options.what == "page":
        from benchmarks import page

        raise SystemExit(page.main())
    elif options.what == "pictures":
        from benchmarks.pictures import pictures

        pictures()
    else:
        from benchmarks import kernels

        getattr(kernels, options.what)()


if __name__ == "__main__":
    main()
