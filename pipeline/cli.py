"""The command ``postquant``. Everything heavy is imported by the command that needs it.

Exit codes: 0 done; 2 a mistake in the input, told in one line; 3 the verification failed; 130 interrupted.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from typing import Annotated

import typer

from postquant.pipeline.cli_bundle import bundle, conformance
from postquant.pipeline.cli_options import option, read_options
from postquant.pipeline.cli_session import console, print_json, progress_of, reading_settings, told
from postquant.pipeline.config import QuantConfig
from postquant.runtime_ops.errors import OutputError, VerificationError

app = typer.Typer(
    name="postquant",
    help="Post-training quantization of exported ONNX models that the receiver can check.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Data = Annotated[str, typer.Option("--data", metavar="DATA", help="Samples: a .npz, .npy or a folder of them.")]
Config = Annotated[
    str | None, typer.Option("--config", metavar="FILE", help="quant.toml with [image] for a folder of images.")
]
CustomOps = Annotated[list[str] | None, option("custom_ops")]


def _show_version(wanted: bool) -> None:
    if wanted:
        from postquant.pipeline.fingerprint import package_versions

        typer.echo(f"postquant {package_versions()['postquant']}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL.onnx", help="The float model.")],
    calib: Annotated[
        str,
        typer.Option(
            "--calib",
            metavar="DATA",
            help="Calibration samples: a .npz, a .npy, a folder of them, or a folder of images (see [image]).",
        ),
    ],
    out: Annotated[str, typer.Option("--out", metavar="DIR", help="Folder for model, plan and report.")],
    wbits: Annotated[str | None, option("wbits")] = None,
    abits: Annotated[str | None, option("abits")] = None,
    budget: Annotated[str | None, option("budget")] = None,
    weights: Annotated[str | None, option("weights")] = None,
    activations: Annotated[str | None, option("activations")] = None,
    method: Annotated[str | None, option("method")] = None,
    config: Annotated[
        str | None, typer.Option("--config", metavar="FILE", help="quant.toml; options win over it.")
    ] = None,
    target: Annotated[str | None, option("target")] = None,
    seed: Annotated[str | None, option("seed")] = None,
    threads: Annotated[str | None, option("threads")] = None,
    samples: Annotated[str | None, option("samples")] = None,
    first_last_bits: Annotated[str | None, option("first_last_bits")] = None,
    depthwise_bits: Annotated[str | None, option("depthwise_bits")] = None,
    sums_bits: Annotated[str | None, option("sums_bits")] = None,
    objective: Annotated[str | None, option("objective")] = None,
    alpha: Annotated[str | None, option("alpha")] = None,
    beta: Annotated[str | None, option("beta")] = None,
    candidates: Annotated[str | None, option("candidates")] = None,
    rounds: Annotated[str | None, option("rounds")] = None,
    percentile: Annotated[str | None, option("percentile")] = None,
    lp: Annotated[str | None, option("lp")] = None,
    align_input: Annotated[bool | None, option("align_input")] = None,
    equalize: Annotated[bool | None, option("equalize")] = None,
    cross_layer: Annotated[bool | None, option("cross_layer")] = None,
    smooth: Annotated[bool | None, option("smooth")] = None,
    bias_correction: Annotated[bool | None, option("bias_correction")] = None,
    border: Annotated[str | None, option("border")] = None,
    feedback: Annotated[bool | None, option("feedback")] = None,
    feedback_cells: Annotated[bool | None, option("feedback_cells")] = None,
    adaptive_step: Annotated[bool | None, option("adaptive_step")] = None,
    learn: Annotated[bool | None, option("learn")] = None,
    effort: Annotated[str | None, option("effort")] = None,
    max_layers: Annotated[str | None, option("max_layers")] = None,
    fisher: Annotated[bool | None, option("fisher")] = None,
    augment: Annotated[bool | None, option("augment")] = None,
    memory: Annotated[str | None, option("memory")] = None,
    device: Annotated[str | None, option("device")] = None,
    simplify: Annotated[bool | None, option("simplify")] = None,
    weight_storage: Annotated[str | None, option("weight_storage")] = None,
    post_exact: Annotated[bool | None, option("post_exact")] = None,
    max_positions: Annotated[str | None, option("max_positions")] = None,
    search_work: Annotated[str | None, option("search_work")] = None,
    verify_samples: Annotated[str | None, option("verify_samples")] = None,
    compare_onnxruntime: Annotated[bool | None, option("compare_onnxruntime")] = None,
    bundle: Annotated[bool | None, option("bundle")] = None,
    encodings: Annotated[str | None, option("encodings")] = None,
    custom_ops: CustomOps = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="List every layer in the table.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Quantize a model: writes DIR/model.onnx, DIR/plan.safetensors and DIR/report.json.

    Interrupted at any point, the same command goes on after the last finished stage.
    """
    given = dict(locals())
    with told("run the same command again to go on after the last finished stage"):
        fields = QuantConfig.__dataclass_fields__
        options = read_options({name: value for name, value in given.items() if name in fields})
        settings = QuantConfig.from_toml(config, **options) if config else QuantConfig(**options)
        from postquant.pipeline.api import quantize as run
        from postquant.pipeline.output import check_inputs_stay

        if config is not None:  # the run itself knows the settings only
            check_inputs_stay(pathlib.Path(out), [pathlib.Path(config)])
        with progress_of(quiet or as_json) as progress:
            result = run(pathlib.Path(model), calib, settings, out=out, progress=progress)
        if as_json:
            run_stats = {"seconds": round(result.stats.seconds, 3), "peak_bytes": result.stats.peak_bytes}
            print_json({"report": result.report.to_json(), "run": run_stats, "out": out})
        elif not quiet:
            from postquant.pipeline.summary import print_summary

            print_summary(result.report, result.stats, console(), out=pathlib.Path(out), verbose=verbose)


@app.command()
def sensitivity(
    model: Annotated[str, typer.Argument(metavar="MODEL.onnx", help="The float model.")],
    calib: Annotated[str, typer.Option("--calib", metavar="DATA", help="Calibration samples, as for quantize.")],
    wbits: Annotated[str | None, option("wbits")] = None,
    abits: Annotated[str | None, option("abits")] = None,
    budget: Annotated[str | None, option("budget")] = None,
    weights: Annotated[str | None, option("weights")] = None,
    config: Annotated[
        str | None, typer.Option("--config", metavar="FILE", help="quant.toml; options win over it.")
    ] = None,
    target: Annotated[str | None, option("target")] = None,
    samples: Annotated[str | None, option("samples")] = None,
    threads: Annotated[str | None, option("threads")] = None,
    weight_storage: Annotated[str | None, option("weight_storage")] = None,
    custom_ops: CustomOps = None,
    picture: Annotated[
        str | None, typer.Option("--picture", metavar="FILE.png", help="Draw layers and bits (extra report).")
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Show what the bits of each layer do to the outputs, and which ones a budget would get."""
    given = dict(locals())
    with told():
        from postquant.pipeline.bits_picture import check_picture, draw_bits
        from postquant.pipeline.sensitivity import measure_sensitivity
        from postquant.pipeline.sensitivity_table import print_sensitivity

        if picture is not None:
            check_picture(pathlib.Path(picture))
        fields = QuantConfig.__dataclass_fields__
        options = read_options({name: value for name, value in given.items() if name in fields})
        settings = QuantConfig.from_toml(config, **options) if config else QuantConfig(**options)
        with progress_of(quiet or as_json) as progress:
            report = measure_sensitivity(pathlib.Path(model), calib, settings, progress=progress)
        if picture is not None:
            draw_bits(report, pathlib.Path(picture))
        if as_json:
            print_json(report.to_json())
        elif not quiet:
            print_sensitivity(report, console())


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(metavar="FILE|DIR", help="A model, a plan, or a result folder.")],
    custom_ops: CustomOps = None,
    as_json: Json = False,
) -> None:
    """Show what a model or a result holds: operators, bits, scales, what is float."""
    with told():
        from postquant.pipeline.inspection import inspect_model
        from postquant.pipeline.tables import print_inspection

        inspection = inspect_model(pathlib.Path(path), custom_ops=reading_settings(None, custom_ops).custom_ops)
        if as_json:
            print_json(inspection.to_json())
        else:
            print_inspection(inspection, console())


@app.command()
def compare(
    fp32: Annotated[str, typer.Argument(metavar="FP32.onnx", help="The float model.")],
    quant: Annotated[str, typer.Argument(metavar="QUANT.onnx", help="The quantized model.")],
    data: Data,
    html: Annotated[str | None, typer.Option("--html", metavar="FILE", help="Also write a page.")] = None,
    config: Config = None,
    custom_ops: CustomOps = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Compare a quantized model with its float model, layer by layer and end to end."""
    with told():
        if html is not None:
            from postquant.pipeline.html.folder import require_pages

            require_pages()
        from postquant.pipeline.compare import compare_models
        from postquant.pipeline.inputs import open_calibration
        from postquant.pipeline.load import load_model
        from postquant.pipeline.tables import print_comparison

        with progress_of(quiet or as_json) as progress:
            settings = reading_settings(config, custom_ops)
            source = open_calibration(data, load_model(fp32, check=False), settings)
            comparison = compare_models(fp32, quant, source, progress=progress, custom_ops=settings.custom_ops)
        if html is not None:
            from postquant.pipeline.html.compare_page import compare_page
            from postquant.pipeline.html.folder import write_page

            write_page(compare_page(comparison, fp32, quant), pathlib.Path(html))
        if as_json:
            print_json(comparison.to_json())
        else:
            print_comparison(comparison, console())


@app.command()
def report(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A result folder.")],
    out: Annotated[
        str | None,
        typer.Option("--out", metavar="FILE", help="Write a new page there, with time and memory of the run."),
    ] = None,
    show: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """Show the page about a result: DIR/report.html, which is written where it is missing."""
    with told():
        from postquant.pipeline.html.folder import ensure_page

        page = ensure_page(pathlib.Path(directory), None if out is None else pathlib.Path(out)).resolve()
        typer.echo(page)
        if show and typer.launch(page.as_uri()) != 0:
            raise OutputError("no browser could be started", where=str(page), hint="open the file yourself")


@app.command()
def verify(
    directory: Annotated[str, typer.Argument(metavar="DIR|ZIP", help="A result folder, or a bundle in one file.")],
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="DATA", help="Samples; without them seeded random ones in the recorded range."),
    ] = None,
    public_key: Annotated[
        str | None, typer.Option("--public-key", metavar="FILE", help="PEM file; the bundle must be signed with it.")
    ] = None,
    config: Config = None,
    custom_ops: CustomOps = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Check a result again: digests, signature, ONNX checker, onnxruntime, plan against model, integers."""
    with told():
        from postquant.pipeline.bundle.signature import read_public_key
        from postquant.pipeline.verify_folder import verify_archive, verify_folder

        key = None if public_key is None else read_public_key(pathlib.Path(public_key))
        with progress_of(quiet or as_json) as progress:
            settings = reading_settings(config, custom_ops)
            check = verify_archive if pathlib.Path(directory).is_file() else verify_folder
            checks = check(pathlib.Path(directory), data, config=settings, progress=progress, public_key=key)
        if as_json:
            found = [dataclasses.asdict(check) for check in checks]
            print_json({"passed": all(check.passed for check in checks), "checks": found})
        elif not quiet:
            from postquant.pipeline.summary import print_checks

            print_checks(checks, console())
        failed = [f"{check.name}: {check.detail.rstrip('.')}" for check in checks if not check.passed]
        if failed:
            raise VerificationError("the verification failed", where=directory, found="; ".join(failed))


@app.command()
def demo(
    out: Annotated[str, typer.Option("--out", metavar="DIR", help="Folder for the results.")] = "postquant-demo",
) -> None:
    """Quantize a small network on handwritten digits and compare its accuracy with onnxruntime's quantizer."""
    with told():
        from postquant.pipeline.demo import run_demo

        run_demo(pathlib.Path(out), console())


@app.command()
def targets(as_json: Json = False) -> None:
    """List the built-in targets."""
    with told():
        from postquant.passes.target import builtin_targets, load_target

        found = [(name, load_target(name).description) for name in builtin_targets()]
        if as_json:
            print_json([{"name": name, "description": text} for name, text in found])
        else:
            for name, text in found:
                typer.echo(f"{name:<18} {text}")


app.command()(bundle)
app.command()(conformance)


def main() -> None:
    """Entry point of the command."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a name that the terminal cannot show is no reason to fail
    app()
