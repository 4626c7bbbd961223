"""The commands ``postquant bundle`` and ``postquant conformance``."""

from __future__ import annotations

import pathlib
from typing import Annotated

import typer

from postquant.pipeline.cli_session import console, print_json, progress_of, reading_settings, told
from postquant.runtime_ops.errors import OutputError, VerificationError


def bundle(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="The --out of postquant quantize.")],
    archive: Annotated[
        str | None, typer.Option("--zip", metavar="FILE", help="Also write the bundle to one file.")
    ] = None,
    sign: Annotated[str | None, typer.Option("--sign", metavar="FILE", help="Ed25519 key in PEM to sign with.")] = None,
    inputs: Annotated[
        str | None,
        typer.Option("--conformance-inputs", metavar="DATA", help="Samples for the conformance data; two are used."),
    ] = None,
    licence: Annotated[str | None, typer.Option("--licence", metavar="TEXT", help="Licence of the model.")] = None,
    origin: Annotated[str | None, typer.Option("--origin", metavar="TEXT", help="Where the model comes from.")] = None,
    config: Annotated[
        str | None, typer.Option("--config", metavar="FILE", help="quant.toml with [image] for a folder of images.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
) -> None:
    """Make the hand-over bundle of a result folder: sign it, pack it, say whose it is."""
    with told():
        from postquant.pipeline.bundle.archive import write_archive
        from postquant.pipeline.bundle.complete import complete_bundle

        folder = pathlib.Path(directory)
        with progress_of(quiet) as progress:
            manifest = complete_bundle(
                folder,
                conformance_inputs=inputs,
                config=reading_settings(config, None),
                licence=licence,
                origin=origin,
                sign_with=None if sign is None else pathlib.Path(sign),
                progress=progress,
            )
        if archive is not None:
            write_archive(folder, pathlib.Path(archive))
        if not quiet:
            size = sum(entry.bytes for entry in manifest.files.values())
            signed = "not signed" if manifest.signer is None else f"signed, {manifest.signer}"
            typer.echo(f"{archive or directory}: {len(manifest.files)} files, {size / 1e6:.2f} MB, {signed}")
            for note in manifest.notes:
                typer.echo(f"note: {note}")


def conformance(
    directory: Annotated[str, typer.Argument(metavar="DIR|ZIP", help="A bundle.")],
    outputs: Annotated[
        str, typer.Option("--outputs", metavar="FOLDER", help="What the receiver's runtime wrote: .npy, .npz, raw.")
    ],
    junit: Annotated[str | None, typer.Option("--junit", metavar="FILE", help="Also write JUnit XML.")] = None,
    page: Annotated[str | None, typer.Option("--html", metavar="FILE", help="Also write a page.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")] = False,
) -> None:
    """Compare what a receiver computed with a bundle; exit code 3 where it departs."""
    with told():
        from postquant.pipeline.conformance.render import json_values, to_html, to_junit
        from postquant.pipeline.conformance.table import conformance_table
        from postquant.pipeline.verify_folder import compared_with

        result = compared_with(pathlib.Path(directory), pathlib.Path(outputs))
        for text, file in ((to_junit(result), junit), (to_html(result), page)):
            if file is not None:
                _write(text, pathlib.Path(file))
        if as_json:
            print_json(json_values(result))
        elif not quiet:
            console().print(conformance_table(result))
            typer.echo(result.summary)
        if not result.passed:
            raise VerificationError("the receiver departs from the bundle", where=directory, found=result.summary)


def _write(text: str, path: pathlib.Path) -> None:
    from postquant.passes.plan import write_atomically

    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise OutputError("a file cannot be written", where=str(path), found=error.strerror or str(error)) from None
