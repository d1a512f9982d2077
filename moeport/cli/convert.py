"""`moeport convert`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from moeport.cli.options import Overrides, output_folder
from moeport.cli.progress import FileProgress

if TYPE_CHECKING:
    from moeport.pages.console import PlainConsole

RunToMake = Annotated[
    Path, output_folder("-o", "--output", metavar="RUN_DIR", help="Run folder to make.", show_default=False)
]

app = typer.Typer(
    name="convert",
    help="Convert checkpoints from and to Hugging Face and torch.distributed.checkpoint.",
    no_args_is_help=True,
)


@app.command("from-hf")
def from_hf(
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="Folder with config.json and safetensors.", show_default=False),
    ],
    output: RunToMake,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A tokenizer.json, if FOLDER has none.", show_default=False)
    ] = None,
    without_tokenizer: Annotated[
        bool, typer.Option("--without-tokenizer", help="Convert the weights although there is no tokenizer.")
    ] = False,
    without_mtp: Annotated[
        bool, typer.Option("--without-mtp", help="Leave out the layers of multi-token prediction of DeepSeek-V3.")
    ] = False,
    ignore_key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY", help="A key of config.json that changes no results. Repeatable.", show_default=False
        ),
    ] = None,
) -> None:
    """Convert a folder of the Hugging Face hub to a run.

    Families: mixtral, qwen2_moe, qwen3_moe, olmoe, deepseek_v2, deepseek_v3, and, as a start for upcycling, llama,
    qwen2, qwen3. Every tensor and every key of config.json is converted, or refused by name.

    Example: moeport convert from-hf Qwen3-30B-A3B -o runs/qwen3
    """
    from moeport.convert.from_hf import from_hf as convert
    from moeport.pages.console import wide_console

    console = wide_console()
    with FileProgress() as progress:
        found = convert(
            folder,
            output,
            ignored=ignore_key or (),
            tokenizer=tokenizer,
            without_tokenizer=without_tokenizer,
            without_mtp=without_mtp,
            report=progress.add,
        )
    console.print(
        f"{output}: {found.family}, {found.tensors:,} tensors with {found.parameters:,} parameters", soft_wrap=True
    )
    for note in found.notes:
        console.print(f"  {note}", soft_wrap=True)
    _print_next(console, output)


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
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Largest size of a file.")] = "5GB",
    checkpoint: Annotated[
        str, typer.Option(metavar="latest|best|step-N", help="Checkpoint to convert: latest, best or step-N.")
    ] = "latest",
) -> None:
    """Convert a run to a folder that transformers opens.

    What transformers cannot express is refused, with the nearest alternative.

    Example: moeport convert to-hf runs/qwen3 Qwen3-tuned --dtype bfloat16
    """
    from moeport.convert.export_options import ExportOptions, parse_size
    from moeport.convert.to_hf import to_hf as convert
    from moeport.pages.console import wide_console

    options = ExportOptions(family, layout, dtype, parse_size(max_shard_size), checkpoint)
    console = wide_console()
    with FileProgress() as progress:
        done = convert(run_dir, folder, options, progress.add)
    files = f"{done.files} file{'s' if done.files > 1 else ''}"
    console.print(f"{folder}: {done.family}, {done.tensors:,} tensors in {files}", soft_wrap=True)
    if done.verified:
        console.print("  every tensor and expert has the checksum that it was converted from", soft_wrap=True)
    for note in done.notes:
        console.print(f"  {note}", soft_wrap=True)


@app.command("upcycle")
def upcycle(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of a run.", show_default=False)],
    output: RunToMake,
    overrides: Overrides = None,
    noise: Annotated[
        float, typer.Option(min=0, help="Noise on each expert's weights, as a share of their standard deviation.")
    ] = 0.0,
    router: Annotated[
        Literal["normal", "zeros"], typer.Option(help="New rows of the router: drawn as for a new model, or zeros.")
    ] = "normal",
    seed: Annotated[int, typer.Option(min=0, help="Seed of noise and router.")] = 0,
    checkpoint: Annotated[
        str, typer.Option(metavar="latest|best|step-N", help="Checkpoint to start from: latest, best or step-N.")
    ] = "latest",
) -> None:
    """Make a mixture-of-experts model from a trained one, with the keys given by --set.

    Dense blocks are copied into experts, or cut into narrower ones; a mixture gets null experts or another router.

    Example: moeport convert upcycle runs/llama -o runs/moe --set model.moe.num_experts=8 --set model.moe.router.top_k=2
    """
    from moeport.convert.upcycle import upcycle as make
    from moeport.convert.upcycle_plan import UpcycleOptions
    from moeport.pages.console import wide_console

    console = wide_console()
    with FileProgress() as progress:
        made = make(run_dir, output, overrides or (), UpcycleOptions(noise, router, seed, checkpoint), progress.add)
    moe = made.config.model.moe
    cut = f", each block cut into {made.slices}" if made.slices > 1 else ""
    experts = f"{moe.num_experts} experts of width {moe.expert_hidden}, {moe.router.experts_per_token} per token"
    console.print(f"{output}: {experts}{cut}", soft_wrap=True)
    same = (
        "computes what the source did" if made.is_same else "does not compute what the source did until it is trained"
    )
    console.print(f"  the model {same}", soft_wrap=True)
    _print_next(console, output)


@app.command("dcp")
def dcp(
    source: Annotated[
        Path, typer.Argument(metavar="RUN_DIR", help="Folder of a run, or of a checkpoint.", show_default=False)
    ],
    output: Annotated[
        Path, output_folder("-o", "--output", metavar="FOLDER", help="Folder to make.", show_default=False)
    ],
    names: Annotated[
        Literal["moeport", "torchtitan"],
        typer.Option(help="Names of the tensors: moeport's, or those of torchtitan's Qwen3 and Qwen3-MoE."),
    ] = "moeport",
    checkpoint: Annotated[
        str, typer.Option(metavar="latest|best|step-N", help="Checkpoint to convert: latest, best or step-N.")
    ] = "latest",
) -> None:
    """Convert a checkpoint to a folder of torch.distributed.checkpoint, with the optimiser's state.

    Example: moeport convert dcp runs/qwen3 -o qwen3-dcp --names torchtitan
    """
    from moeport.convert.to_dcp import to_dcp
    from moeport.pages.console import wide_console

    console = wide_console()
    with FileProgress() as progress:
        done = to_dcp(source, output, names, checkpoint, progress.add)
    state = "with the optimiser's state" if done.moments else "without an optimiser's state"
    console.print(
        f"{output}: {done.tensors:,} tensors of {done.checkpoint.name}, {done.parameters:,} parameters, {state}",
        soft_wrap=True,
    )


@app.command("from-dcp")
def from_dcp(
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="Folder that torch.distributed.checkpoint wrote.", show_default=False),
    ],
    output: RunToMake,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Config with a model section that describes a folder not written by moeport.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Convert a folder of torch.distributed.checkpoint to a run.

    One that `convert dcp` wrote becomes the same run again, and can be resumed; any other gives weights to start from.

    Example: moeport convert from-dcp outputs/checkpoint/step-1000 -o runs/qwen3 --config qwen3.yaml
    """
    from moeport.convert.from_dcp import from_dcp as convert
    from moeport.pages.console import wide_console

    console = wide_console()
    with FileProgress() as progress:
        done = convert(folder, output, config, progress.add)
    console.print(
        f"{output}: {done.tensors:,} tensors by the names of {done.names}, as {done.checkpoint.name}", soft_wrap=True
    )
    for note in done.notes:
        console.print(f"  {note}", soft_wrap=True)
    if done.resumes:
        console.print(f"resume: moeport train {output}/config.yaml --resume", soft_wrap=True)
    else:
        _print_next(console, output)


def _print_next(console: "PlainConsole", run_dir: Path) -> None:
    """How to train from a run that was made."""
    command = f"moeport train {run_dir}/config.yaml --set run.dir=FOLDER"
    console.print(f"train: {command}", soft_wrap=True)
