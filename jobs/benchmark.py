"""Compare the ways of answering a table's rows on this machine: rates, memory, and whether the answers are the same.

Every measurement is a process of its own, and the ways are run in turn within each round, so that a machine's drift
hits all alike. Needs the `bench` extra; a way that can not be run here is named in the tables, with the reason.
"""

import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

import bench_models
import bench_ways

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
MODELS = ["smol", "wide"]
REFERENCES = ["tutorial", "genai", "openvino"]
SAME_AS = "slots-prefix"
ONNX_WAYS = ["tutorial", "genai", "slots", SAME_AS, "job"]
FLAGS = ["avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8"]
PACKAGES = ["phibatch", "onnxruntime", "onnxruntime-genai", "pyspark", "mlflow", "numpy"]

WIDTH = 180
"""Columns of the tables where there is no terminal, such as in a file."""

Result = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """The command's options."""

    models: list[str]
    workloads: list[str]
    ways: list[str]
    rounds: int
    rows: int
    slots: int
    cache: Path
    out: Path
    openvino_python: str | None


class Refused(Exception):
    """Raised where something can not be run; the message is the reason."""


def run_python(python: str, arguments: list[str], given: str | None = None) -> str:
    """Standard output of a Python process. Raises Refused with the last line of its errors."""
    quiet = {"ORT_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false", "PYSPARK_PYTHON": sys.executable}
    done = subprocess.run(  # noqa: S603, our own words
        [python, *arguments], input=given, capture_output=True, text=True, check=False, env={**os.environ, **quiet}
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"]
        raise Refused(lines[-1])
    return done.stdout


def prepare_model(settings: Settings, name: str) -> None:
    """Convert a model once, for onnxruntime-genai and, where its exporter is there, for OpenVINO."""
    optimum = Path(settings.openvino_python).with_name("optimum-cli") if settings.openvino_python else None
    arguments = [str(HERE / "bench_models.py"), str(settings.cache), name]
    if optimum is not None and optimum.exists() and any(way.startswith("openvino") for way in settings.ways):
        arguments.append(str(optimum))
    run_python(sys.executable, arguments)


def place(settings: Settings, way: str, model: str) -> tuple[str, str]:
    """The Python that runs a way, and the model's files for it. Raises Refused where there are none."""
    folder = settings.cache / model
    if way.startswith("openvino"):
        if settings.openvino_python is None:
            raise Refused("openvino_genai is not installed here, and --openvino-python names no other Python")
        if not (folder / "openvino").is_dir():
            raise Refused("the model is not exported: there is no optimum-cli beside OpenVINO's Python")
        return settings.openvino_python, str(folder)
    if way == "llamacpp":
        if importlib.util.find_spec("llama_cpp") is None:
            raise Refused("llama_cpp is not installed")
        if model != "smol":
            raise Refused("there is no GGUF of random weights")
        return sys.executable, str(bench_models.find_gguf())
    if way == "job" and not (shutil.which("java") or os.environ.get("JAVA_HOME")):
        raise Refused("Spark needs Java 17, and there is no java on PATH")
    return sys.executable, str(folder)


def run_way(settings: Settings, way: str, model: str, rows: list[bench_models.Row]) -> Result:
    """One measurement: the last line that bench_ways prints."""
    python, files = place(settings, way, model)
    threads = len(os.sched_getaffinity(0))
    task = {"way": way, "model": files, "rows": rows, "threads": threads, "slots": settings.slots}
    result: Result = json.loads(
        run_python(python, [str(HERE / "bench_ways.py")], json.dumps(task)).splitlines()[-1],
    )
    return result


def run_workload(
    settings: Settings, model: str, workload: str, roof: float, absent: dict[str, str], say: Callable[[str], None]
) -> list[Result]:
    """Every way over one workload, in turn; those that can not be run are put into `absent`, with the reason."""
    rows = bench_models.make_rows(workload, settings.rows)
    distinct = {json.dumps({**row, "custom_id": ""}): row for row in reversed(rows)}
    results: list[Result] = []
    for way in settings.ways:
        # Only the job knows equal rows; an engine is given each of them once.
        given = rows if way == "job" else sorted(distinct.values(), key=lambda row: str(row["custom_id"]))
        try:
            one = run_way(settings, way, model, given)
        except Refused as reason:
            absent[f"{model} {workload} {way}"] = str(reason)
            say(f"{model} {workload} {way}: absent, {reason}")
            continue
        computed = one["computed_tokens"] and one["computed_tokens"] / one["seconds"]
        texts = dict(zip((row["custom_id"] for row in given), one.pop("texts"), strict=True))
        results.append(
            {
                "model": model,
                "workload": workload,
                "way": way,
                **one,
                "rows_per_second": one["rows"] / one["seconds"],
                "new_tokens_per_second": one["new_tokens"] / one["seconds"],
                "computed_tokens_per_second": computed,
                "roof_share": computed / roof if computed and way in ONNX_WAYS else None,
                "load_average": os.getloadavg()[0],
                "texts": texts,
            }
        )
        say(f"{model} {workload} {way}: {one['seconds']:.1f} s, {one['rows'] / one['seconds']:.2f} rows/s")
    compare(results)
    return results


def compare(results: list[Result]) -> None:
    """Add what needs the other ways of the round: rates as multiples of theirs, and how many answers are equal."""
    rates = {one["way"]: one["rows_per_second"] for one in results}
    texts = {one["way"]: one.pop("texts") for one in results}
    for one in results:
        own, known = texts[one["way"]], texts.get(SAME_AS)
        both = [custom_id for custom_id in own if known and custom_id in known]
        counted = one["way"] in ONNX_WAYS and known is not None
        one["compared_answers"] = len(both) if counted else None
        one["equal_answers"] = sum(own[name] == known[name] for name in both) if counted and known else None
        one["times"] = {name: one["rows_per_second"] / rates[name] for name in REFERENCES if name in rates}


def describe_machine() -> dict[str, Any]:
    """The processor, its cores and the vector instructions that matter, and the versions of what ran."""
    file = Path("/proc/cpuinfo")
    lines = [line.partition(":") for line in file.read_text().splitlines()] if file.is_file() else []
    fields = {name.strip(): value.strip() for name, _, value in lines}
    flags = fields.get("flags", "").split()
    return {
        "processor": fields.get("model name", platform.processor()),
        "cores": len(os.sched_getaffinity(0)),
        "flags": {flag: flag in flags for flag in FLAGS},
        "platform": platform.platform(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }


def spread(values: list[float | None], form: str = ".2f") -> str:
    """The median, and the least and the most where there are several; a dash where there is nothing."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    middle = format(statistics.median(known), form)
    return middle if len(known) == 1 else f"{middle} ({min(known):{form}} to {max(known):{form}})"


def build_table(settings: Settings, model: str, report: dict[str, Any]) -> Table:
    roofs = [one for one in report["roofs"] if one["model"] == model]
    measured = ", ".join(f"{size}: {spread([one[size] for one in roofs], '.0f')}" for size in roofs[0]["sizes"])
    best = spread([one["best"] for one in roofs], ".0f")
    table = Table(
        title=f"{model}: median of {settings.rounds} rounds (least to most)",
        caption=f"Roof {best} tokens/s: the best prefill rate of the same graph over tokens fed at once ({measured})."
        " computed: prompt and new tokens, without those taken from a cache. equal: answers like those of"
        f" {SAME_AS}. x: rows/s as a multiple, by round. In `duplicates` only the job has all rows; the others have"
        " each distinct row once. The job's time is the whole run_batch, its memory that of Spark too.",
    )
    heads = [
        "rows/s",
        "new tok/s",
        "computed tok/s",
        "of roof",
        "peak MiB",
        "equal",
        *(f"x {name}" for name in REFERENCES),
    ]
    for head in ("workload", "way", *heads):
        table.add_column(head, justify="left" if head in {"workload", "way"} else "right")
    for workload in settings.workloads:
        for way in settings.ways:
            ones = [
                one
                for one in report["results"]
                if (one["model"], one["workload"], one["way"]) == (model, workload, way)
            ]
            if not ones:
                table.add_row(workload, way, "absent")
                continue
            equal = [one["equal_answers"] for one in ones if one["equal_answers"] is not None]
            table.add_row(
                workload,
                way,
                spread([one["rows_per_second"] for one in ones]),
                spread([one["new_tokens_per_second"] for one in ones], ".0f"),
                spread([one["computed_tokens_per_second"] for one in ones], ".0f"),
                spread([one["roof_share"] for one in ones], ".0%"),
                spread([one["peak_bytes"] / 2**20 for one in ones], ".0f"),
                f"{min(equal)} of {ones[0]['compared_answers']}" if equal else "-",
                *(spread([one["times"].get(name) for one in ones]) for name in REFERENCES),
            )
        table.add_section()
    return table


def plot(settings: Settings, report: dict[str, Any], file: Path) -> None:
    """Bars of rows a second: medians, with lines from the least to the most; a row of panels for each model."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(
        len(settings.models),
        len(settings.workloads),
        figsize=(3.4 * len(settings.workloads), 3.2 * len(settings.models)),
        squeeze=False,
        layout="constrained",
    )
    for line, model in zip(panels, settings.models, strict=True):
        for panel, workload in zip(line, settings.workloads, strict=True):
            for position, way in enumerate(settings.ways):
                rates = [
                    one["rows_per_second"]
                    for one in report["results"]
                    if (one["model"], one["workload"], one["way"]) == (model, workload, way)
                ]
                if rates:
                    middle = statistics.median(rates)
                    panel.bar(position, middle, yerr=[[middle - min(rates)], [max(rates) - middle]], capsize=3)
                else:
                    panel.text(position, 0, "absent", rotation=90, ha="center", va="bottom")
            panel.set_xticks(range(len(settings.ways)), settings.ways, rotation=45, ha="right")
            panel.set_title(f"{model}, {workload}")
            panel.set_ylabel("rows/s")
    machine = report["machine"]
    figure.suptitle(
        f"{machine['processor']}, {machine['cores']} cores, {settings.rounds} rounds of {settings.rows} rows"
    )
    figure.savefig(file, dpi=120)


def run_rounds(settings: Settings, console: Console) -> dict[str, Any]:
    """Everything measured: `machine`, `settings`, `roofs`, `results` and `absent`."""
    for model in settings.models:
        console.print(f"preparing {model} in {settings.cache}")
        prepare_model(settings, model)
    roofs: list[Result] = []
    results: list[Result] = []
    absent: dict[str, str] = {}
    for number in range(1, settings.rounds + 1):
        for model in settings.models:
            rates = run_way(settings, "roof", model, [])
            best = max(rates.values())
            roofs.append({"round": number, "model": model, "best": best, "sizes": list(rates), **rates})

            def say(text: str, number: int = number) -> None:
                console.print(f"round {number}: {text}", highlight=False, markup=False)

            for workload in settings.workloads:
                done = run_workload(settings, model, workload, best, absent, say)
                results += [{"round": number, **one} for one in done]
    options = {name: str(value) if isinstance(value, Path) else value for name, value in vars(settings).items()}
    return {
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "settings": options,
        "roofs": roofs,
        "results": results,
        "absent": absent,
    }


def choices(known: list[str]) -> Callable[[Any, Any, str], list[str]]:
    """A reader of an option that names some of them, with commas between."""

    def read(_context: Any, _option: Any, text: str) -> list[str]:
        names = text.split(",")
        unknown = [name for name in names if name not in known]
        if unknown:
            raise click.BadParameter(f"{unknown[0]!r} is not one of {', '.join(known)}")
        return names

    return read


def listed(name: str, known: list[str]) -> Callable[[Any], Any]:
    return click.option(name, default=",".join(known), show_default=True, callback=choices(known))


@click.command()
@listed("--models", MODELS)
@listed("--workloads", list(bench_models.WORKLOADS))
@listed("--ways", list(bench_ways.WAYS))
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--rows", type=click.IntRange(min=1), default=48, show_default=True, help="Rows of a workload.")
@click.option("--slots", type=click.IntRange(1, 32), default=16, show_default=True, help="Rows generated together.")
@click.option("--cache", type=click.Path(path_type=Path), default=ROOT / ".cache" / "bench", help="Converted models.")
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "output" / "benchmark", help="What is written.")
@click.option("--openvino-python", help="A Python with openvino-genai, and optimum-cli beside it.")
def main(**options: Any) -> None:
    """Measure the ways, print a table for each model, and write results.json and rows_per_second.png."""
    if options["openvino_python"] is None and importlib.util.find_spec("openvino_genai"):
        options["openvino_python"] = sys.executable
    # Measurements run in folders of their own.
    settings = Settings(**{**options, "cache": options["cache"].resolve(), "out": options["out"].resolve()})
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    try:
        report = run_rounds(settings, console)
    except Refused as reason:
        raise click.ClickException(str(reason)) from reason
    settings.out.mkdir(parents=True, exist_ok=True)
    (settings.out / "results.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    for model in settings.models:
        console.print(build_table(settings, model, report))
    for key, why in report["absent"].items():
        console.print(f"absent: {key}: {why}", highlight=False, markup=False)
    for note in sorted({f"{one['way']}: {one['note']}" for one in report["results"] if one["note"]}):
        console.print(note)
    plot(settings, report, settings.out / "rows_per_second.png")
    console.print(f"written to {settings.out}")


if __name__ == "__main__":
    main()
