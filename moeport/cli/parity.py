"""`moeport parity`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeport.cli.options import Flags, Overrides, SharedConfigFile, grouped, output_file, output_folder
from moeport.parity.options import PARTS, Amount, BundleOptions, ReportFiles

if TYPE_CHECKING:
    from moeport.parity.result import Report

app = typer.Typer(
    name="parity",
    help="Compare backends, types and machines, layer by layer. Exit code 0: pass or warn; 1: fail, and with --strict "
    "warn; 2: an error that you can fix.",
    no_args_is_help=True,
)

VARIANT = (
    "BACKEND[-DEVICE][:DTYPE][@RANKS] and KEY=VALUE, as in 'torch-cpu:bf16 backend.compile=true'. @4 starts four ranks "
    "on this machine, @2x2 four ranks as if on two nodes."
)

AmountFlags = Annotated[
    Amount,
    Flags(
        sequences=typer.Option(min=1, help="Sequences per batch; default: 2, or the number of micro-batches."),
        tokens=typer.Option(min=1, help="Tokens per sequence of text; images are always whole."),
        steps=typer.Option(min=0, help="Optimiser steps of the trajectory."),
        micro_batches=typer.Option(
            min=1,
            help="Parts of the batch, computed one after another; each of n ranks computes an n-th of them. Default: "
            "one per rank.",
        ),
    ),
]
BundleFlags = Annotated[
    BundleOptions,
    Flags(
        replay=typer.Option(metavar="BUNDLE", help="Take the routing of the pass and of one step from this bundle."),
        keep=typer.Option(
            metavar="KIND=HOW",
            help="How much of a kind of tensor is kept: full, sample or statistics; ALL=HOW for every kind. "
            "Repeatable. Default: samples of parameters, activations, gradients and updates; everything else in full.",
        ),
        sample_size=typer.Option(min=1, help="Number of entries kept of a sampled tensor."),
        overwrite=typer.Option("--overwrite", help="Replace an existing bundle; otherwise it is refused."),
    ),
]
ReportFlags = Annotated[
    ReportFiles,
    Flags(
        json_file=output_file("--json", help="Write the whole result as JSON."),
        markdown=output_file("--markdown", help="Write the tables as Markdown."),
        html_file=output_file("--html", help="Write one HTML page with charts."),
        overwrite=typer.Option(
            "--overwrite", help="Replace existing files of these names; otherwise they are refused."
        ),
        strict=typer.Option("--strict", help="Exit with 1 on a warning too."),
    ),
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        metavar="RUN_DIR", help="Run folder or step-* folder to take the weights from. Default: the initial weights."
    ),
]

Parts = Annotated[
    str,
    typer.Option(
        metavar="PART,...",
        help=f"Compare only these parts: {', '.join(PARTS)}. Default: all; a part that cannot be judged is a warning.",
    ),
]


@app.command()
@grouped
def run(
    file: SharedConfigFile,
    backends: Annotated[
        str, typer.Option(metavar="A,B,...", help="Variants without overrides; the first is the reference.")
    ] = "",
    variant: Annotated[
        list[str] | None, typer.Option(metavar="SPEC", help=f"A further variant: {VARIANT} Repeatable.")
    ] = None,
    overrides: Overrides = None,
    *,
    amount: AmountFlags,
    checkpoint: Checkpoint = None,
    golden: Annotated[
        str, typer.Option(metavar="SPEC|none", help="Variant that serves as the golden of the double benchmark.")
    ] = "numpy:fp64",
    isolate: Annotated[
        bool, typer.Option("--isolate", help="Feed A's inputs to B's operation at the first divergence.")
    ] = False,
    parts: Parts = "",
    files: ReportFlags,
) -> None:
    """Compare variants of a config on this machine with the same weights, batches and noise."""
    from moeport.errors import UserError
    from moeport.parity.run import run as run_variants
    from moeport.parity.subject import Variant, size_for

    _refuse_existing(files)
    variants = [*filter(None, backends.split(",")), *(variant or ())]
    if len(variants) < 2:
        raise UserError(
            f"parity run compares at least two variants (got {len(variants)}); "
            "name them, as in --backends numpy,torch-cpu"
        )
    report = run_variants(
        file,
        variants,
        overrides or (),
        size=size_for([*map(Variant.parse, variants)], **vars(amount)),
        checkpoint=checkpoint,
        golden=None if golden == "none" else golden,
        isolate=isolate,
        parts=[*filter(None, parts.split(","))],
        report=_progress,
    )
    _finish(report, files)


@app.command()
@grouped
def record(
    file: SharedConfigFile,
    output: Annotated[Path, output_folder("-o", "--output", metavar="BUNDLE", help="Folder to write.")],
    variant: Annotated[str, typer.Option(metavar="SPEC", help=VARIANT)] = "torch-cpu",
    overrides: Overrides = None,
    *,
    amount: AmountFlags,
    checkpoint: Checkpoint = None,
    bundle: BundleFlags,
) -> None:
    """Record a variant as a bundle, to be compared with one from another machine.

    Under torchrun, srun, mpirun or msrun, all ranks of the job record one bundle.
    """
    from dataclasses import replace

    from moeport.launch.launcher import launched
    from moeport.parity.bundle import load_bundle
    from moeport.parity.job import Job, record_bundle
    from moeport.parity.subject import Variant, size_for

    launch, parsed = launched(), Variant.parse(variant)
    if bundle.replay:
        amount = replace(amount, steps=min(amount.steps, 1))
    if amount.micro_batches is None:
        amount = replace(amount, micro_batches=parsed.ranks if launch is None else launch.size)
    job = Job(variant, file, overrides or (), size_for([parsed], **vars(amount)), checkpoint)
    report = _progress if launch is None or launch.rank == 0 else lambda text: None
    if launch is None and parsed.ranks > 1:
        job.write(output, job.size.steps, bundle)
    elif not record_bundle(job, output, bundle, report):
        return
    written = load_bundle(output)
    total = sum(path.stat().st_size for path in output.iterdir())
    typer.echo(f"{output}: {len(written.tensors)} tensors, {total / 1e6:.1f} MB")
    if written.non_finite:
        typer.echo(f"not finite: the first {written.non_finite}")


@app.command()
@grouped
def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="Bundle of the reference.", show_default=False)],
    b: Annotated[Path, typer.Argument(metavar="B", help="Bundle to compare with it.", show_default=False)],
    golden: Annotated[
        Path | None,
        typer.Option(
            metavar="BUNDLE", help="Golden bundle for the double benchmark; record it in fp64 with --replay A."
        ),
    ] = None,
    replayed: Annotated[
        Path | None, typer.Option(metavar="BUNDLE", help="B recorded once more with --replay A.")
    ] = None,
    names: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="YAML that maps names of B's tensors to those of A, for other models."),
    ] = None,
    *,
    parts: Parts = "",
    files: ReportFlags,
) -> None:
    """Compare two bundles."""
    from moeport.parity.bundle import load_bundle
    from moeport.parity.compare import compare as compare_recordings
    from moeport.parity.result import Report

    _refuse_existing(files)
    found = compare_recordings(
        load_bundle(a),
        load_bundle(b),
        golden=load_bundle(golden) if golden else None,
        replayed=load_bundle(replayed) if replayed else None,
        names=_names(names) if names else None,
        parts=[*filter(None, parts.split(","))],
    )
    _finish(Report(found.verdict, [found]), files)


def _refuse_existing(files: ReportFiles) -> None:
    """Raises UserError, before the work, for a file that would be replaced without a word."""
    from moeport.errors import UserError

    for path in (files.json_file, files.markdown, files.html_file):
        is_file = path and path.is_file() and not path.is_relative_to("/dev")  # such as a redirected /dev/stdout
        if is_file and not files.overwrite:
            raise UserError(f"{path}: already exists; name another file, or replace it with --overwrite")


def _progress(text: str) -> None:
    typer.echo(text, err=True)


def _finish(report: Report, files: ReportFiles) -> None:
    """Print, write, exit."""
    from moeport.files import write_text
    from moeport.pages.console import wide_console
    from moeport.parity import text
    from moeport.parity.result import EXIT_CODES

    wide_console().print(text.render(report), soft_wrap=True)
    if files.json_file:
        write_text(files.json_file, report.to_json())
    if files.markdown:
        write_text(files.markdown, text.markdown(report))
    if files.html_file:
        from moeport.parity import html

        write_text(files.html_file, html.page(report))
    raise typer.Exit(1 if files.strict and report.verdict == "warn" else EXIT_CODES[report.verdict])


def _names(file: Path) -> dict[str, str]:
    import yaml

    from moeport.errors import UserError
    from moeport.reading import read_text

    try:
        names = yaml.safe_load(read_text(file, 2**18))
    except OSError as error:
        raise UserError(f"{file}: cannot read the names: {error.strerror}") from error
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file}: cannot read the names: {reason}") from error
    if not isinstance(names, dict) or not all(isinstance(x, str) for pair in names.items() for x in pair):
        raise UserError(f"{file}: expected a mapping of B's names to A's, as in `model.norm: final_norm:rms_norm`")
    return names
