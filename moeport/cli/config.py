"""`moeport config`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeport.cli.options import ConfigFile, Overrides, output_file

if TYPE_CHECKING:
    from moeport.config import Config

app = typer.Typer(name="config", help="Check and show configs.", no_args_is_help=True)


@app.command()
def check(file: ConfigFile, overrides: Overrides = None) -> None:
    """Check a config and describe the model it defines; warn of settings that are valid but rarely meant."""
    from moeport.config import load_config

    config = load_config(file, overrides or ())
    typer.echo(f"{file}: ok")
    for line in summary(config):
        typer.echo(line)
    for line in warnings(config):
        typer.echo(line, err=True)


@app.command()
def show(file: ConfigFile, overrides: Overrides = None) -> None:
    """Print a config with every default filled in."""
    from moeport.config import load_config, resolved_yaml

    typer.echo(resolved_yaml(load_config(file, overrides or ())), nl=False)


@app.command()
def schema(
    output: Annotated[Path | None, output_file("-o", "--output", help="Write it to a file.")] = None,
) -> None:
    """Print the JSON Schema of the config, for editors."""
    from moeport.config import json_schema
    from moeport.files import write_text

    text = json.dumps(json_schema(), indent=2)
    if output is None:
        typer.echo(text)
    else:
        write_text(output, text + "\n")


@app.command("from")
def translate(
    framework: Annotated[
        str, typer.Argument(metavar="FRAMEWORK", help="megatron, mindformers, torchtitan or hf.", show_default=False)
    ],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The config to translate.", show_default=False)],
    output: Annotated[Path | None, output_file("-o", "--output", help="Write the YAML to a file.")] = None,
    ranks: Annotated[
        int | None,
        typer.Option(
            min=1, help="Number of data-parallel ranks that FILE is for, if it gives only the batch of one rank."
        ),
    ] = None,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Leave out what cannot be expressed, instead of refusing it.")
    ] = False,
) -> None:
    """Translate the config of another framework, with a verdict on every key.

    Frameworks: megatron (a shell script or YAML with its options), mindformers (YAML), torchtitan (TOML), hf
    (config.json). Standard error lists every key: understood, ignored and why, not expressible and why, or unknown.
    Keys that cannot be expressed and change what is trained are refused.

    Example: moeport config from megatron pretrain_moe.sh -o config.yaml
    """
    from moeport.convert.translate.translate import translate as convert
    from moeport.files import write_text

    found = convert(framework, file, ranks, allow_missing)
    for line in found.as_lines():
        typer.echo(line, err=True)
    if output is None:
        typer.echo(found.as_yaml(str(file)), nl=False)
    else:
        write_text(output, found.as_yaml(str(file)))


def summary(config: Config) -> list[str]:
    """Describes the model in a few lines, without counts if only the tokenizer file knows the vocabulary size."""
    from moeport.config.data import known_vocab_size
    from moeport.data.inspect import dealt_label
    from moeport.model.build import build_model
    from moeport.pages.words import counted

    model, moe = config.model, config.model.moe
    experts = (
        f"{counted(moe.num_experts, 'expert')}, {moe.router.experts_per_token} per token, router {moe.router.name}"
    )
    lines = [f"{counted(model.num_layers, 'block')} of width {model.d_model}, {len(model.moe_layers)} with {experts}"]
    vocab_size = model.vocab_size or known_vocab_size(config.data)
    if vocab_size:
        shapes = build_model(model, config.data, vocab_size)
        counts, flops = shapes.parameter_counts(), shapes.training_flops_per_token(config.data.tokens_per_sequence)
        lines.append(f"{counts.total:,} parameters, {counts.active:,} active per token")
        lines.append(f"{flops:,} floating-point operations per training token")
    return lines + [
        dealt_label(number, domain.name, len(config.data.domains)) for number, domain in enumerate(config.data.domains)
    ]


def warnings(config: Config) -> list[str]:
    """What is valid but rarely meant, and what to set instead; a line each."""
    moe = config.model.moe
    return [
        f"warning: model.moe.router.{option}: {does}; set {instead}"
        for option, does, instead in moe.router.warnings(moe.num_experts)
    ]
