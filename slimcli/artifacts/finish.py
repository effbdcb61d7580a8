"""From the trained model to its artifacts, each one checked against the one before it.

Knows the model as a callable and the algorithm by its two methods; it decides no threshold and
draws nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from slimcli.artifacts import deploy, verify
from slimcli.compressor import Compressor
from slimcli.errors import Problem, SlimError, VerificationError
from slimcli.network import count
from slimcli.network.example import Example

Report = Callable[..., None]


@dataclass(frozen=True)
class FinishRequest:
    """What is to be made of what.

    Attributes:
        model: The best trained model.
        compressor: Its algorithm.
        fresh_model: ``() -> nn.Module``: the user's own model, to describe the result against.
        example: A small batch, on the model's device.
        samples: Samples in that batch.
        predict: ``(model, batch) -> prediction`` for the batches.
        batches: Validation batches to compare on, on the model's device.
        evaluate: ``(model) -> metrics`` over the whole validation set.
        folder: Where the artifacts go.
        deploy: Whether a deploy format is wanted.
        onnx: Whether an ONNX file is wanted.
        metadata: Stored in the ONNX file.
        emit: Told of each seam and file: ``emit(event, **fields)``.
    """

    model: nn.Module
    compressor: Compressor
    fresh_model: Callable[[], nn.Module]
    example: Example
    samples: int
    predict: Callable[[Any, Any], Any]
    batches: Sequence[Any]
    evaluate: Callable[[Any], dict[str, float]]
    folder: Path
    deploy: bool
    onnx: bool
    metadata: Mapping[str, str]
    emit: Report


@dataclass
class Finished:
    """What came out.

    Attributes:
        plain: The deployed model.
        macs: Its multiply-accumulates for one sample.
        params: Its parameters.
        seams: One entry a comparison, as summary.json has them.
        metrics: Metrics by form: ``trained``, ``deploy``, ``onnx``.
        file_bytes: Size by file name.
        notes: What a reader should know.
    """

    plain: nn.Module
    macs: int
    params: int
    seams: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    file_bytes: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def finish_run(request: FinishRequest, finished: Finished | None = None) -> Finished:
    """Deploy, verify, save, export, verify.

    Args:
        request: What is to be made.
        finished: Filled as things get done, so that a failure leaves what was reached.

    Raises:
        VerificationError: An artifact differs from its source; the first differing layer is named.
        RunError: An artifact can't be made or written.
    """
    plain = request.compressor.deploy(request.model)
    macs = count.count_macs(plain, request.example, request.samples).total
    finished = finished or Finished(plain, 0, 0)
    finished.plain, finished.macs, finished.params = plain, macs, count.count_params(plain)
    finished.metrics["trained"] = request.evaluate(request.model)
    if not request.deploy:
        return finished
    _check(request, finished, ("trained", "deploy"), request.model, plain)
    if request.compressor.deploys_to == "module":
        plain = _store(request, finished, plain)
    finished.metrics["deploy"] = request.evaluate(plain)
    if request.onnx:
        _onnx(request, finished, plain)
    return finished


def _check(
    request: FinishRequest,
    finished: Finished,
    names: tuple[str, str],
    reference: nn.Module,
    candidate: nn.Module,
) -> None:
    """Compare two forms on validation batches and record the seam."""
    seam = verify.compare(
        verify.runner(reference, request.predict),
        verify.runner(candidate, request.predict),
        request.batches,
        names=names,
    )
    entry = seam.summary()
    finished.seams.append(entry)
    request.emit("verified", **entry)
    if seam.ok:
        return
    place = verify.first_difference(reference, candidate, request.example)
    raise VerificationError(
        Problem(
            f"E-VERIFY-{names[1].upper()}",
            f"{names[1]} differs from {names[0]}",
            expected=f"a difference of at most {seam.limit:.1e}",
            received=f"{seam.max_abs:.1e} at output {seam.where or 'output'}",
            fix=f"first differing layer: {place}" if place else "",
        )
    )


def _store(request: FinishRequest, finished: Finished, plain: nn.Module) -> nn.Module:
    """Write the deploy format and go on with what can be read back from it."""
    request.folder.mkdir(exist_ok=True)
    for path in deploy.save(request.folder, plain, request.fresh_model()):
        _note_file(request, finished, path)
    loaded = deploy.load_deploy(request.folder, request.fresh_model())
    loaded.to(next((each.device for each in plain.parameters()), None))
    _check(request, finished, ("deploy", "deploy file"), plain, loaded)
    return loaded


def _onnx(request: FinishRequest, finished: Finished, plain: nn.Module) -> None:
    """Export, run with onnxruntime, compare, evaluate."""
    from slimcli.artifacts import onnx

    request.folder.mkdir(exist_ok=True)
    path = request.folder / "model.onnx"
    metadata = dict(request.metadata)
    report = onnx.export(plain, request.example, path, metadata=metadata)
    if not report.is_batch_dynamic and request.batches:
        # Batches of validation are what it will be given.
        example = Example(request.batches[0], request.predict)
        report = onnx.export(plain, example, path, metadata=metadata)
    if report.exporter != "dynamo":
        finished.notes.append(f"exported with {report.exporter}: {report.exporter_reason}")
    finished.notes += [f"lint: {each}" for each in report.findings if each.severity == "warning"]
    if not report.is_batch_dynamic:
        finished.notes.append(f"model.onnx has a fixed batch size: {report.batch_reason}")
    _note_file(request, finished, path)
    exported = onnx.OnnxModel(path)
    everything = request.batches
    if not report.is_batch_dynamic:
        request = replace(request, batches=_fitting(request, exported))
    try:
        _check(request, finished, ("deploy", "onnx"), plain, exported)
    except VerificationError as error:
        failed = path.with_name(f"{path.name}.failed")  # nobody must take it for the result
        path.replace(failed)
        raise error.at(str(failed)) from error
    if len(request.batches) == len(everything):
        finished.metrics["onnx"] = request.evaluate(exported)
    else:
        finished.notes.append("model.onnx was not evaluated: its batch size is not that of all")


def _fitting(request: FinishRequest, exported: Any) -> list[Any]:
    """The batches that a file with a fixed batch size can be given; all others are of other size.

    Raises:
        RunError: It can't be run on the first one, which it was made with.
    """
    found = []
    run = verify.runner(exported, request.predict)
    for number, batch in enumerate(request.batches):
        try:
            run(batch)
        except SlimError:
            if number == 0:
                raise
        else:
            found.append(batch)
    return found


def _note_file(request: FinishRequest, finished: Finished, path: Path) -> None:
    size = path.stat().st_size
    finished.file_bytes[path.name] = size
    request.emit("artifact", path=str(path), bytes=size)
