"""``slim export``: ONNX and TensorRT from a finished run, each checked against the one before."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slimcli import console
from slimcli.artifacts import opsets
from slimcli.artifacts.event_lines import large
from slimcli.cli import full_disk
from slimcli.cli.arguments import existing
from slimcli.cli.engine_options import EngineOptions, engine_options, is_given
from slimcli.errors import MissingError, Problem, RecipeError, VerificationError

if TYPE_CHECKING:
    from slimcli.artifacts.verify import Seam
    from slimcli.cli.finished import FinishedRun


@dataclass
class Exported:
    """What was made: seams, files, metrics, sentences."""

    seams: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    trtexec: str = ""
    audit: dict[str, Any] = field(default_factory=dict)


def _sizes(_context: click.Context, _parameter: click.Parameter, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter("expected numbers such as 8 or 1,8,32") from None


@click.command(name="export")
@click.argument(
    "run",
    type=click.Path(path_type=Path),
    required=False,
    callback=existing("a run folder or an ONNX file"),
)
@click.option("--onnx", "want_onnx", is_flag=True, help="Write model.onnx. The default.")
@click.option("--trt", "want_trt", is_flag=True, help="Build a TensorRT engine from model.onnx.")
@click.option(
    "--runtime",
    type=click.Choice(["tensorrt", "rtx"]),
    default="tensorrt",
    show_default=True,
    help="rtx: TensorRT-RTX, builds without a GPU.",
)
@click.option("--fp16", is_flag=True, help="Engine in half precision (not for quantized models).")
@click.option(
    "--batch",
    callback=_sizes,
    default="1,8,32",
    show_default=True,
    help="Smallest, typical, largest batch of the engine.",
)
@click.option("--workspace", type=click.FloatRange(min=0, min_open=True), help="GiB of scratch.")
@click.option(
    "--timing-cache",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File that remembers kernel timings.",
)
@click.option("--version-compatible", is_flag=True, help="Loads in later versions of TensorRT.")
@click.option("--hardware-compatible", is_flag=True, help="Runs on other GPUs, Ampere and newer.")
@click.option(
    "--compute-capability", multiple=True, metavar="SM89", help="GPU to build for, rtx only."
)
@click.option(
    "--opset",
    type=click.IntRange(opsets.LOWEST, opsets.NEWEST),
    default=opsets.DEFAULT,
    show_default=True,
    help="ONNX opset of model.onnx.",
)
def command(run: Path | None, want_onnx: bool, want_trt: bool, opset: int, **options: Any) -> None:
    """Write ONNX and TensorRT files of a finished run, each verified against the one before.

    RUN is a run folder or its artifacts folder, or an ONNX file (then only an engine is built). At
    a terminal it may be left out: the newest finished run is taken and named.

    \b
    Examples:
      slim export checkpoints/digits/latest --onnx
      slim export checkpoints/digits/latest --trt --batch 1,8,32
      slim export checkpoints/digits/latest --trt --runtime rtx     without a GPU
    """
    from slimcli.cli import finished

    engine = engine_options(options, want_trt)
    path = run if run is not None else finished.newest()
    exported = Exported()
    with full_disk.repeat("slim export"):
        if path.is_file() or not _is_run(path):
            file = _bare_file(path, want_onnx, want_trt)
            _engine_of_file(file, engine, exported)
            where = file.parent
        else:
            writes_onnx = want_onnx or not want_trt or is_given("opset")
            where = _export_run(path, writes_onnx, want_trt, engine, opset, exported)
    _show(where, exported)
    _say_what_is_next(where, exported)


def _say_what_is_next(where: Path, exported: Exported) -> None:
    """The forms that can be compared here: no engine without a GPU."""
    from slimcli.artifacts.tensorrt import machine
    from slimcli.cli.finished import FORMS

    forms = [form for form, name in FORMS.items() if name in exported.files]
    if machine.gpu() is None:
        forms = [form for form in forms if form != "trt"]
    if forms and where.name == "artifacts":
        compared = ",".join(("deploy", *forms))
        console.say(f"Next: {console.command('eval', where.parent, '--compare', compared)}")


def _is_run(path: Path) -> bool:
    folder = path.resolve()
    folder = folder.parent if folder.name == "artifacts" else folder
    return (folder / "recipe.yaml").is_file() and (folder / "events.jsonl").is_file()


def _bare_file(path: Path, want_onnx: bool, want_trt: bool) -> Path:
    """The ONNX file to build from, where there is no run around it.

    Raises:
        RecipeError: There is none, or something is asked that needs the run.
    """
    file = path if path.is_file() else path / "model.onnx"
    if not file.is_file() or file.suffix != ".onnx":
        raise RecipeError(
            Problem(
                "E-RUN-UNKNOWN", "neither a run folder nor an ONNX file", str(path),
                fix="slim list runs",
            )
        )  # fmt: skip
    if want_onnx or not want_trt or is_given("opset"):
        raise RecipeError(
            Problem(
                "E-EXPORT-FILE", "writing ONNX needs the run: its recipe, hooks and weights",
                str(path), fix="with a file only --trt is possible",
            )
        )  # fmt: skip
    return file


def _export_run(
    path: Path,
    want_onnx: bool,
    want_trt: bool,
    options: EngineOptions,
    opset: int,
    exported: Exported,
) -> Path:
    """Exports a run; the folder of its artifacts."""
    from slimcli.cli import finished
    from slimcli.cli.report import refresh

    run = finished.open_finished(path)
    try:
        _make_files(run, want_onnx, want_trt, options, opset, exported)
    finally:
        _update_summary(run, exported)
        refresh(run.folder.path)
    return run.folder.artifacts


def _make_files(
    run: FinishedRun,
    want_onnx: bool,
    want_trt: bool,
    options: EngineOptions,
    opset: int,
    exported: Exported,
) -> None:
    path = run.folder.artifacts / "model.onnx"
    if run.lacks_deploy_files():
        made = run.remake_deploy_files()
        exported.seams += made.seams
        exported.files |= made.file_bytes
        exported.notes.append("the deploy files were missing: made again from checkpoints/best.pt")
    if want_onnx or not path.is_file():
        _onnx(run, path, opset, exported)
    if not want_trt:
        return
    engine = _engine_of_file(path, options, exported)
    _verify_engine(run, path, engine, options, exported)


def _onnx(run: FinishedRun, path: Path, opset: int, exported: Exported) -> None:
    from slimcli.artifacts import onnx, verify

    plain = run.deployed()
    metadata = {"task_name": run.job.task_name, "algorithm": run.stage.algorithm}
    path.parent.mkdir(exist_ok=True)
    report = onnx.export(plain, run.example, path, opset=opset, metadata=metadata)
    if report.exporter != "dynamo":
        exported.notes.append(f"exported with {report.exporter}: {report.exporter_reason}")
    if not report.is_batch_dynamic:
        exported.notes.append(f"{path.name} has a fixed batch: {report.batch_reason}")
    exported.notes += [f"lint: {each}" for each in report.findings if each.severity == "warning"]
    seam = onnx.compare(plain, path, run.predict, run.validation_batches())
    exported.seams.append(seam.summary())
    if not seam.ok:
        place = verify.first_difference(plain, onnx.OnnxModel(path), run.example)
        raise _disagrees(path, seam, f"first differing layer: {place}" if place else "")
    exported.files[path.name] = report.file_bytes
    exported.metrics["deploy"] = run.evaluate(plain)
    exported.metrics["onnx"] = run.evaluate(onnx.OnnxModel(path))


def _disagrees(path: Path, seam: Seam, place: str) -> VerificationError:
    """The error of a seam above its limit; the file loses its name."""
    failed = path.with_name(path.name + ".failed")
    path.replace(failed)
    return VerificationError(
        Problem(
            f"E-VERIFY-{seam.target.upper()}",
            f"{seam.target} differs from {seam.source}",
            str(failed),
            f"a difference of at most {seam.limit:.1e}",
            f"{seam.max_abs:.1e} at output {seam.where or 'output'}",
            place,
        )
    )


def _engine_of_file(path: Path, options: EngineOptions, exported: Exported) -> Path:
    """Builds the engine beside the ONNX file; its path.

    Raises:
        MissingError: TensorRT or a GPU is missing; the ONNX file stays.
    """
    from slimcli.artifacts import onnx
    from slimcli.artifacts.onnx.half import to_half
    from slimcli.artifacts.tensorrt.engine import engine_of

    source = to_half(path, path.with_name("model.fp16.onnx")) if options.fp16 else path
    try:
        report = engine_of(
            source,
            source.with_suffix(".engine"),
            runtime=options.runtime,
            batches=options.batch,
            workspace_bytes=options.workspace_bytes,
            timing_cache=options.timing_cache,
            version_compatible=options.version_compatible,
            hardware_compatible=options.hardware_compatible,
            compute_capabilities=options.compute_capabilities,
        )
    except MissingError as error:
        console.say(f"{source} is ready; an engine can be built from it on another machine")
        raise error.at(str(source)) from error
    exported.files[report.path.name] = report.file_bytes
    exported.trtexec = report.command
    exported.audit = report.audit.summary() if onnx.is_quantized(source) else {}
    exported.notes += [f"TensorRT: {' '.join(text.split())}" for text in report.warnings[:5]]
    return report.path


def _verify_engine(
    run: FinishedRun, onnx_path: Path, engine: Path, options: EngineOptions, exported: Exported
) -> None:
    """Runs the engine on real batches, if this machine can."""
    from slimcli.artifacts import onnx, verify
    from slimcli.artifacts.onnx.half import HALF_LIMIT
    from slimcli.artifacts.tensorrt import machine

    if machine.gpu() is None:
        exported.notes.append(f"{engine.name} was built but not run: this machine has no GPU")
        return
    from slimcli.artifacts.tensorrt.model import EngineModel

    model, source = EngineModel(engine), onnx.OnnxModel(onnx_path)
    seam = verify.compare(
        verify.runner(source, run.predict),
        verify.runner(model, run.predict),
        _within(run.validation_batches(), options.batch),
        names=("onnx", "trt"),
        limit=HALF_LIMIT if options.fp16 or source.is_quantized else verify.RELATIVE_LIMIT,
    )
    exported.seams.append(seam.summary())
    if not seam.ok:
        raise _disagrees(engine, seam, "")
    exported.metrics["trt"] = run.evaluate(model)


def _within(batches: list[Any], sizes: tuple[int, ...]) -> list[Any]:
    """Batches cut to the largest size the engine takes."""
    from slimcli.artifacts import nested

    def cut(batch: Any) -> Any:
        tensors = nested.describe(batch)[1]
        return nested.substitute(batch, iter([each[: max(sizes)] for _, each in tensors]))

    return [cut(batch) for batch in batches]


def _update_summary(run: FinishedRun, exported: Exported) -> None:
    """The seams, sizes and metrics of this export replace those of the same names."""
    from slimcli.artifacts import summary

    content = summary.read(run.folder.summary)
    done = {(each["from"], each["to"]) for each in exported.seams}
    kept = [each for each in content["verification"] if (each["from"], each["to"]) not in done]
    content["verification"] = kept + exported.seams
    final = content["final"] or {"metrics": {}, "file_bytes": {}}
    final.setdefault("file_bytes", {}).update(exported.files)
    final.setdefault("metrics_by_form", {}).update(exported.metrics)
    content["final"] = final
    summary.write(run.folder.summary, content)


def _show(where: Path, exported: Exported) -> None:
    files = [str(where / name) for name in exported.files]
    if console.settings().json:
        console.document(
            {
                "version": 1,
                "files": {str(where / name): size for name, size in exported.files.items()},
                "verification": exported.seams,
                "metrics": exported.metrics,
                "audit": exported.audit,
                "trtexec": exported.trtexec,
                "notes": exported.notes,
            }
        )
        return
    for file, size in zip(files, exported.files.values(), strict=True):
        console.result(file if console.settings().quiet else f"{file}  {large(size, 'B')}")
    for each in exported.seams:
        difference = "not a number" if each["max_abs"] is None else f"{each['max_abs']:.1e}"
        console.say(
            f"{each['from']} and {each['to']} agree: {difference} (limit {each['limit']:.1e})"
        )
    for form, values in exported.metrics.items():
        console.say(f"{form:<7}" + "  ".join(f"{k} {v:.4f}" for k, v in values.items()))
    if exported.audit:
        console.say(f"int8   {_audit_text(exported.audit)}")
    for note in exported.notes:
        console.say(f"note   {note}")
    if exported.trtexec:
        console.say(f"the same with trtexec:\n  {exported.trtexec}")


def _audit_text(audit: dict[str, Any]) -> str:
    if "unavailable" in audit:
        return f"audit unavailable: {audit['unavailable']}"
    return f"{audit['int8']} of {audit['heavy']} heavy layers run in int8"
