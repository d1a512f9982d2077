"""`moeport convert`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(name="convert", help="Convert checkpoints from and to Hugging Face.", no_args_is_help=True)


@app.command("from-hf")
def from_hf(
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="Folder with config.json and safetensors.", show_default=False),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="RUN_DIR", help="Run folder to make.", show_default=False)
    ],
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A tokenizer.json, if FOLDER has none.", show_default=False)
    ] = None,
    without_tokenizer: Annotated[
        bool, typer.Option("--without-tokenizer", help="Convert the weights although there is no tokenizer.")
    ] = False,
    ignore_key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY", help="A key of config.json that changes no results. Repeatable.", show_default=False
        ),
    ] = None,
) -> None:
    """Convert a folder of the Hugging Face hub to a run.

    Families: mixtral, qwen2_moe, qwen3_moe, olmoe, and, as a start for upcycling, llama, qwen2, qwen3. Every tensor and
    every key of config.json is converted, or refused by name.

    Example: moeport convert from-hf Qwen3-30B-A3B -o runs/qwen3
    """
    from moeport.convert.from_hf import from_hf as convert
    from moeport.pages.console import wide_console

    console = wide_console()
    with _Progress() as progress:
        found = convert(
            folder,
            output,
            ignored=ignore_key or (),
            tokenizer=tokenizer,
            without_tokenizer=without_tokenizer,
            report=progress.add,
        )
    console.print(
        f"{output}: {found.family}, {found.tensors:,} tensors with {found.parameters:,} parameters", soft_wrap=True
    )
    for note in found.notes:
        console.print(f"  {note}", soft_wrap=True, markup=False)
    console.print(
        f"train: moeport train {output}/config.yaml --set training.start_from={output} --set run.dir=FOLDER",
        soft_wrap=True,
        markup=False,
    )


@app.command("to-hf")
def to_hf(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of a run.", show_default=False)],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder to make.", show_default=False)],
    family: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A model_type. Default: that of the converted folder, or the first that can express the model.",
            show_default=False,
        ),
    ] = None,
    layout: Annotated[
        Literal["experts", "fused"] | None,
        typer.Option(
            help="A tensor per expert and projection, or two per layer. Default: as converted, or experts.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16", "float64"] | None,
        typer.Option(help="Element type. Default: as converted, or as in the checkpoint.", show_default=False),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Most bytes of a file.")] = "5GB",
    checkpoint: Annotated[
        str, typer.Option(metavar="latest|best|step-N", help="Checkpoint to convert: latest, best or step-N.")
    ] = "latest",
) -> None:
    """Convert a run to a folder that transformers opens.

    What transformers cannot express is refused, with the nearest that it can.

    Example: moeport convert to-hf runs/qwen3 Qwen3-tuned --dtype bfloat16
    """
    from moeport.convert.to_hf import ExportOptions, parse_size
    from moeport.convert.to_hf import to_hf as convert
    from moeport.pages.console import wide_console

    options = ExportOptions(family, layout, dtype, parse_size(max_shard_size), checkpoint)
    console = wide_console()
    with _Progress() as progress:
        done = convert(run_dir, folder, options, progress.add)
    files = f"{done.files} file{'s' if done.files > 1 else ''}"
    console.print(f"{folder}: {done.family}, {done.tensors:,} tensors in {files}", soft_wrap=True)
    if done.verified:
        console.print("  every tensor and expert has the checksum that it was converted from", soft_wrap=True)
    for note in done.notes:
        console.print(f"  {note}", soft_wrap=True, markup=False)


class _Progress:
    """A line on standard error that counts what was written, on terminals only."""

    def __init__(self) -> None:
        from moeport.pages.console import PlainConsole

        self.bytes = 0
        console = PlainConsole(stderr=True)
        self.status = console.status("reading") if console.is_terminal else None

    def __enter__(self) -> "_Progress":
        if self.status:
            self.status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.status:
            self.status.stop()

    def add(self, name: str, size: int) -> None:
        """Count a tensor."""
        self.bytes += size
        if self.status:
            self.status.update(f"{self.bytes / 1e9:.2f} GB  {name}")
