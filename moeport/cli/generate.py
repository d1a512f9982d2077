"""`moeport generate`."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer


def generate(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of a training run.", show_default=False)],
    prompt: Annotated[
        list[str], typer.Option(help="Text to continue; - reads standard input. Repeatable.", show_default=False)
    ] = [],  # noqa: B006
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help='More prompts: one per line, or a .jsonl file of objects with the key "prompt".'
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens to add to each text.")] = 200,
    temperature: Annotated[
        float, typer.Option(min=0, help="Divides the logits; 0 always takes the most likely token.")
    ] = 0.8,
    top_k: Annotated[int, typer.Option(min=1, help="Sample from the N most likely tokens.")] = 50,
    top_p: Annotated[
        float,
        typer.Option(help="Of these, from the fewest with probabilities that sum to at least X; above 0, at most 1."),
    ] = 1.0,
    stop: Annotated[
        list[str], typer.Option(help="A text ends before this string. Repeatable.", show_default=False)
    ] = [],  # noqa: B006
    seed: Annotated[
        list[int],
        typer.Option(
            min=0, help="Seed of the sampling. Repeatable: one for each prompt, or several texts from one prompt."
        ),
    ] = [0],  # noqa: B006
    batch_size: Annotated[
        int, typer.Option(min=1, help="Texts to continue together; up to rounding, it changes none of them.")
    ] = 16,
    checkpoint: Annotated[
        str, typer.Option(metavar="latest|best|step-N", help="Checkpoint to use: latest, best or step-N.")
    ] = "latest",
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON per text.")] = False,
) -> None:
    """Continue texts with a trained model."""
    from moeport.training.generate import generate_texts
    from moeport.training.sampling import Sampling

    given = _prompts(prompt, prompts)
    sampling = Sampling(max_tokens, temperature, top_k, top_p, tuple(stop))
    streams = len(given) == len(seed) == 1 and not as_json and sys.stdout.isatty()
    show = _show if streams else None
    options: dict[str, Any] = {"seeds": seed, "checkpoint": checkpoint, "batch_size": batch_size, "on_text": show}
    texts = generate_texts(run_dir, given, sampling, **options)
    if as_json:
        for text in texts:
            _write(json.dumps(vars(text), ensure_ascii=False) + "\n")
    elif streams:
        _show(given[0])
        next(iter(texts))
        _show("\n")
    else:
        for number, text in enumerate(texts, start=1):
            heading = f"--- text {number}, seed {text.seed}\n" if len(given) * len(seed) > 1 else ""
            _show(f"{heading}{text.prompt}{text.text}\n")


def _prompts(prompt: list[str], file: Path | None) -> list[str]:
    """The prompts of the options and of the file, in this order.

    Raises UserError if there are none, or the file cannot be used.
    """
    from moeport.errors import UserError

    found = [sys.stdin.buffer.read().decode("utf-8", "surrogateescape") if each == "-" else each for each in prompt]
    found += [] if file is None else _in_file(file)
    if not found and file:
        raise UserError(f"--prompts {file}: is empty; expected a prompt per line")
    if not found:
        raise UserError("there is no prompt; expected --prompt TEXT or --prompts FILE with one per line")
    return found


def _in_file(file: Path) -> list[str]:
    from moeport.errors import UserError
    from moeport.reading import read_bytes

    try:
        text = read_bytes(file).decode("utf-8", "surrogateescape")
    except OSError as error:
        raise UserError(f"--prompts {file}: cannot be read: {error.strerror}; expected a prompt per line") from error
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []
    if file.suffix != ".jsonl":
        return lines
    return [_in_line(file, number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def _in_line(file: Path, number: int, line: str) -> str:
    from moeport.errors import UserError
    from moeport.reading import parse_json

    try:
        row = parse_json(line)
    except ValueError as error:
        raise UserError(f"{file}:{number}: {error}; expected a line of JSON") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise UserError(f'{file}:{number}: has no text under "prompt"; expected {{"prompt": "..."}}')
    return str(row["prompt"])


def _show(text: str) -> None:
    """Print the text, on a terminal without control characters."""
    from moeport.pages.console import printable

    _write(printable(text) if sys.stdout.isatty() else text)


def _write(text: str) -> None:
    typer.echo(text.encode(), nl=False)  # UTF-8 in any locale
