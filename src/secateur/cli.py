"""The command line: every command is a thin call into the library.

Heavy imports are inside the commands, because ``--help`` must answer at once. Errors that the user can correct become
one message on standard error and exit code 1, in one place (``endings``).
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.endings import Commands, debugging, resumable
from secateur.errors import InputError, VerificationError
from secateur.lock import held
from secateur.whole import place_of, write_whole

if TYPE_CHECKING:
    from rich.console import Console

    from secateur.config import Recipe


app = typer.Typer(
    cls=Commands,
    name="secateur",
    help="Prune whole structures from large language models, guided by LoRA, and recover the lost knowledge.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,  # plain help and usage errors: half the start-up time, and one line is one line
)


class Runtime(StrEnum):
    """Programs that must open the result."""

    transformers = "transformers"
    everywhere = "everywhere"
    vllm = "vllm"
    llama_cpp = "llama.cpp"


class Form(StrEnum):
    """Forms that a saved model can be converted to."""

    gguf = "gguf"
    uniform = "uniform"
    onnx = "onnx"


# Options of several commands, with the same names and the same meaning in all of them.
Model = Annotated[str, typer.Argument(help="A folder, a hub id or a built-in name.", metavar="MODEL")]
RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", help="A YAML file with settings.", metavar="FILE", show_default=False)
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="One setting; may be repeated.", metavar="SECTION.KEY=VALUE")
]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code from the model's folder. Only for folders you trust.")
]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, mps ...", metavar="DEVICE")]
Tasks = Annotated[
    str | None, typer.Option(help="Tasks of lm-eval: names, task files or folders of them.", metavar="A,B")
]
Window = Annotated[int | None, typer.Option(help="Tokens per window.", metavar="N")]


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"secateur {version('secateur')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and other programs' warnings.")] = False,
) -> None:
    if debug:
        os.environ["SECATEUR_DEBUG"] = "1"
    if not debugging():
        _quieten()


@app.command()
def prune(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the result.", metavar="OUT")],
    model: Annotated[
        str | None, typer.Argument(help="A folder, a hub id or a built-in name; smollm2-135m when left out.")
    ] = None,
    ratio: Annotated[
        str | None, typer.Option(help="Fraction of all parameters to remove, between 0 and 1.", metavar="FRACTION")
    ] = None,
    ratios: Annotated[
        str | None,
        typer.Option(
            help="Several fractions: one run of the method, and a folder OUT/ratio-R for each.", metavar="A,B"
        ),
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="How units are chosen; see `secateur methods`.", metavar="NAME")
    ] = None,
    recipe: RecipeFile = None,
    overrides: Overrides = None,
    within: Annotated[
        str | None, typer.Option(help="Time for the whole run, instead of steps: 30m, 2h ...", metavar="TIME")
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(help="Tokens that the run reads, instead of steps: 200k, 1.6M ...", metavar="N")
    ] = None,
    runs_on: Annotated[Runtime | None, typer.Option(help="Programs that must open the result.")] = None,
    device: Device = None,
    trust_remote_code: Trust = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and print what would be done.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue after the last finished stage for OUT.")] = False,
) -> None:
    """Make a model smaller: prune, recover, measure, save and verify."""
    flags = {
        **_model_flags(model, device, trust_remote_code),
        "budget.ratio": None if ratio is None else parse_ratio(ratio),
        "method": method,
        "budget.runs_on": None if runs_on is None else runs_on.value,
        "effort.within": within,
        "effort.tokens": tokens,
    }
    fractions = None if ratios is None else [parse_ratio(part, "--ratios") for part in _names(ratios, "--ratios")]
    if fractions and ratio is not None:
        raise InputError("Give --ratio for one ratio, or --ratios for several, and not both.")
    from secateur import pipeline, progress

    settings = _settings(recipe, overrides, flags)
    progress.show()
    if fractions:
        progress.say(_header(settings, fractions))
        with resumable("Finished ratios and stages are kept. The same command with --resume continues."):
            found = pipeline.prune_ratios(settings, fractions, output, resume=resume, dry_run=dry_run)
        for fraction, numbers in found.items():
            _report(numbers, output / f"ratio-{fraction}")
        return
    progress.say(_header(settings, [settings.budget.ratio]))
    if resume and (finished := pipeline.finished(settings, output)) is not None:
        progress.say(f"This run is finished; its folder is {output}. Nothing is done again.")
        _report(finished, output)
        return
    with resumable(f"Finished stages are kept. The same command with --resume continues the run for {output}.", output):
        result = pipeline.run(settings, output=output, resume=resume, dry_run=dry_run)
    if not dry_run:
        _report(result.metrics, output)


@app.command()
def inspect(
    model: Model,
    verify: Annotated[
        bool, typer.Option("--verify", help="Cut every group on a copy and compare with masking it.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole graph as JSON.")] = False,
    recipe: RecipeFile = None,
    overrides: Overrides = None,
    device: Device = None,
    trust_remote_code: Trust = False,
) -> None:
    """Show which node groups of a model can be pruned, and why the others cannot."""
    from secateur import progress, tables
    from secateur.loading import load, outline
    from secateur.surgery import checked_trace, verify_cuts
    from secateur.surgery.verify import WHOLE_UP_TO

    settings = _settings(recipe, overrides, _model_flags(model, device, trust_remote_code))
    opened = settings.model
    progress.show()
    network = outline(**opened.model_dump(exclude={"device", "dtype"}))
    graph = checked_trace(network, settings.budget.kinds)
    if as_json:
        typer.echo(json.dumps(graph.to_json(), indent=1))
    else:
        _console().print(tables.groups(graph))
    if verify:
        if graph.parameter_count() <= WHOLE_UP_TO:  # else a small model of its kind is checked, without its weights
            network, _ = load(**opened.model_dump())
        found = verify_cuts(network)
        if not as_json:
            _console().print(tables.check_table(found))
        wrong = [check.group for check in found if not check.ok]
        if wrong:
            raise VerificationError(
                f"Slicing and masking disagree for {', '.join(wrong[:5])}. Please report this model."
            )
        progress.say(f"All {len(found)} cuts compute the same as masking.")


@app.command()
def analyze(
    model: Model,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="New folder for the analysis and its heat map.", metavar="DIR")
    ] = None,
    ratios: Annotated[
        str, typer.Option(help="Fractions of a group to remove, separated by commas.", metavar="A,B")
    ] = "0.25,0.5",
    criterion: Annotated[
        str, typer.Option(help="Criterion that chooses units in a group: taylor, wanda, magnitude ...", metavar="NAME")
    ] = "taylor",
    text: Annotated[
        list[str] | None, typer.Option(help="File or source to measure on; may be repeated.", metavar="FILE")
    ] = None,
    window: Window = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens of text in all.", metavar="N")] = None,
    recipe: RecipeFile = None,
    overrides: Overrides = None,
    device: Device = None,
    trust_remote_code: Trust = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted analysis for DIR.")] = False,
) -> None:
    """Measure how sensitive each node group is: cut it alone, and measure the change of the predictions."""
    fractions = [parse_ratio(part, "--ratios", "of each group") for part in _names(ratios, "--ratios")]
    from secateur import inspection, progress, tables
    from secateur.loading import load

    flags = {
        **_model_flags(model, device, trust_remote_code),
        "calibration.text": text,
        "calibration.window": window,
        "calibration.tokens": tokens,
    }
    settings = _settings(recipe, overrides, flags)
    progress.show()
    with resumable(
        "Finished measurements are kept. The same command with --resume continues." if output else "", output
    ):
        found = inspection.analyze(
            *load(**settings.model.model_dump()),
            ratios=fractions,
            criterion=criterion,
            recipe=settings,
            output=output,
            resume=resume,
        )
    _console().print(tables.analysis(found, by=settings.budget.protect_by, share=settings.budget.protect_share))
    if output is not None:
        progress.say(f"{output / 'analysis.json'} can be used as --set budget.protect_from. The heat map is beside it.")


@app.command()
def evaluate(
    model: Model,
    tasks: Tasks = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="File (measured whole) or source (its held-out part); may be repeated.", metavar="FILE"),
    ] = None,
    window: Window = None,
    tokens: Annotated[
        int | None,
        typer.Option(help="Token limit for each file (default: all), and for all sources together.", metavar="N"),
    ] = None,
    as_json: Annotated[
        Path | None, typer.Option("--json", help="Write the numbers to this file, too.", metavar="FILE")
    ] = None,
    recipe: RecipeFile = None,
    overrides: Overrides = None,
    device: Device = None,
    trust_remote_code: Trust = False,
) -> None:
    """Measure a model: perplexity on text (built-in when none is named), tasks, parameters, bytes and speed."""
    from secateur import inspection, progress, tables
    from secateur.export import compare_states
    from secateur.inputs import refuse_inputs

    flags = {
        **_model_flags(model, device, trust_remote_code),
        "evaluation.text": text,
        "evaluation.window": window,
        "evaluation.tokens": tokens,
    }
    settings = _settings(recipe, overrides, flags)
    names = [] if tasks is None else _names(tasks, "--tasks")
    asked = settings.evaluation
    progress.show()
    if as_json is not None:
        _check_writable(as_json)
        refuse_inputs(as_json, settings, names, [recipe])
    with nullcontext() if as_json is None else held(as_json):
        metrics = inspection.evaluate(
            settings, names, max_tokens=asked.tokens if "tokens" in asked.model_fields_set else None
        )
        _console().print(tables.results(compare_states(metrics, ["model"])))
        if as_json is not None:
            _write_whole(as_json, json.dumps(metrics, indent=1) + "\n")


@app.command()
def plan(
    run: Annotated[Path, typer.Argument(help="The output folder of a finished run.", metavar="RUN")],
    ratios: Annotated[
        str, typer.Option(help="Fractions of all parameters to remove, separated by commas.", metavar="A,B")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="New folder for the plans.", metavar="DIR")],
    overrides: Overrides = None,
    trust_remote_code: Trust = False,
) -> None:
    """Make plans for other ratios from the scores of a run, without scoring again."""
    fractions = [parse_ratio(ratio, "--ratios") for ratio in _names(ratios, "--ratios")]
    from secateur import inspection, progress

    progress.show()
    inspection.plans(run, fractions, output, overrides=overrides or [], trust_remote_code=trust_remote_code)
    progress.say(f"The plans are in {output}: {', '.join(f'ratio-{ratio}.json' for ratio in fractions)}")


@app.command()
def apply(
    plan: Annotated[Path, typer.Argument(help="A plan.json of a run; it may be edited.", metavar="PLAN")],
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the result.", metavar="OUT")],
    recipe: RecipeFile = None,
    overrides: Overrides = None,
    device: Device = None,
    trust_remote_code: Trust = False,
) -> None:
    """Cut a model by a plan, without training, then save and verify it."""
    from secateur import pipeline, progress
    from secateur.types import PruningPlan

    settings = _settings(recipe, overrides, _model_flags(model, device, trust_remote_code))
    progress.show()
    result = pipeline.apply(PruningPlan.load(plan), settings, output)
    progress.say(f"{result.plan.parameters_after:,} of {result.plan.parameters_before:,} parameters are kept.")
    progress.say(f"The model is in {output}")


@app.command()
def export(
    folder: Annotated[str, typer.Argument(help="A folder that a model was saved to.", metavar="DIR")],
    to: Annotated[
        Form,
        typer.Option(
            help="gguf: a file for llama.cpp; uniform: layers padded with zeros to equal sizes, for every program that "
            "supports the family; onnx: a graph for ONNX Runtime."
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="New file (gguf) or folder.", metavar="PATH")],
    recipe: RecipeFile = None,
    overrides: Overrides = None,
    device: Device = None,
    trust_remote_code: Trust = False,
) -> None:
    """Convert a saved model for other programs, and open it with them if they are installed."""
    from secateur import pipeline, progress

    settings = _settings(recipe, overrides, _model_flags(folder, device, trust_remote_code))
    progress.show()
    progress.say(pipeline.convert(settings, to.value, output))
    progress.say(f"The converted model is in {output}")


@app.command()
def verify(
    folder: Annotated[str, typer.Argument(help="A folder that a model was saved to.", metavar="DIR")],
    recipe: RecipeFile = None,
    overrides: Overrides = None,
    device: Device = None,
    trust_remote_code: Trust = False,
) -> None:
    """Open a saved folder in a fresh process, compare its logits, and print which programs support it."""
    from secateur import inspection, progress, tables

    settings = _settings(recipe, overrides, _model_flags(folder, device, trust_remote_code))
    progress.show()
    found = inspection.verify(settings)
    _console().print(tables.verdicts(found))


@app.command()
def compare(
    model: Model,
    methods: Annotated[str, typer.Option(help="Methods, separated by commas; random is always added.", metavar="A,B")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for tables, plot and page.", metavar="DIR")],
    ratios: Annotated[
        str, typer.Option(help="Fractions of all parameters to remove, separated by commas.", metavar="A,B")
    ] = "0.2,0.5",
    tasks: Tasks = None,
    recipe: RecipeFile = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="One setting for all, or METHOD.KEY=VALUE for one method; may be repeated.",
            metavar="SECTION.KEY=VALUE",
        ),
    ] = None,
    device: Device = None,
    trust_remote_code: Trust = False,
    resume: Annotated[bool, typer.Option("--resume", help="Add the rows that are missing in DIR.")] = False,
) -> None:
    """Compare methods under the same budget, text, training steps and evaluation."""
    fractions = [parse_ratio(ratio, "--ratios") for ratio in _names(ratios, "--ratios")]
    from secateur import progress, tables
    from secateur.compare import compare as run
    from secateur.compare import split_overrides

    shared, own = split_overrides(overrides or [])
    settings = _settings(recipe, shared, _model_flags(model, device, trust_remote_code))
    progress.show()
    with resumable("Finished rows are kept. The same command with --resume adds the others."):
        comparison = run(
            settings,
            _names(methods, "--methods"),
            fractions,
            output,
            settings=own,
            tasks=[] if tasks is None else _names(tasks, "--tasks"),
            resume=resume,
        )
    _console().print(tables.leaderboard(comparison))
    _console().print(f"Tables, plot and page are in {output}: report.html, results.csv, results.json, quality.png")
    if all(row.error is not None for row in comparison.rows):
        raise InputError("No row has a result; the reasons are below the table. --resume tries the failed rows again.")


@app.command()
def methods() -> None:
    """List the pruning methods, what they need, and their papers."""
    from secateur.methods import METHODS

    for name, method in METHODS.items():
        typer.echo(f"{name:<12} needs {method.needs:<10} {method.paper}\n    {method.summary}")
    typer.echo("\nA method's own settings: docs/keys.md; for instance --set method.periods=8")


@app.command()
def data() -> None:
    """List the built-in text with its licences, and how other text is named."""
    from secateur.data import OWN_TEXT, SOURCES

    for source in SOURCES.values():
        missing = "" if source.folder else f"\n    not installed: {source.install}"
        typer.echo(f"{source.name:<12} {source.size:<20} {source.licence}\n    {source.description}{missing}")
    typer.echo(f"{OWN_TEXT:<12} {'as asked for':<20} none\n    text that the model to be pruned writes itself")
    typer.echo(
        "\nOther text: files (.txt, .jsonl, .parquet) and hub datasets (id:config:split), for instance\n"
        "    --set calibration.text=my.jsonl --set recovery.text=[my.jsonl,wikipedia]"
    )


def _model_flags(model: str | None, device: str | None, trust_remote_code: bool) -> dict[str, Any]:
    """The command line's options for the model, as keys of the recipe; None for options that were not given."""
    return {"model.name": model, "model.device": device, "model.trust_remote_code": trust_remote_code or None}


def _settings(recipe: Path | None, overrides: Sequence[str] | None, flags: Mapping[str, Any]) -> Recipe:
    """The recipe of a command: the file, overridden by options, overridden by ``--set``."""
    from secateur.config import load_recipe

    return load_recipe(recipe, overrides or [], {key: value for key, value in flags.items() if value is not None})


def _names(text: str, option: str) -> list[str]:
    """The names between the commas; raises InputError when there are none."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise InputError(f"{option} {text!r} names nothing. Give one or more names, separated by commas.")
    return names


def parse_ratio(text: str, option: str = "--ratio", of: str = "of all parameters") -> float:
    """The value of an option that is a ratio; raises InputError unless it lies strictly between 0 and 1."""
    try:
        ratio = float(text)
    except ValueError:
        ratio = math.nan
    if not 0 < ratio < 1:  # also refuses nan
        raise InputError(
            f"{option} {text} is not allowed: it is the fraction {of} to remove, a number strictly between 0 and 1, "
            "such as 0.2."
        )
    return ratio


def _check_writable(file: Path) -> None:
    """Raise InputError when ``--json`` could not be written at the end. Writes nothing."""
    place = place_of(file, "--json")
    folder = place.parent
    if not folder.is_dir():
        raise InputError(f"--json {file}: there is no folder {file.parent}. Name a file in one that exists.")
    if place.is_dir():
        raise InputError(f"--json {file} is a folder. Name a file.")
    if place.exists() and not place.is_file():
        raise InputError(f"--json {file} is no ordinary file, and would be replaced. Name another one.")
    if not (os.access(folder, os.W_OK) and (not place.exists() or os.access(place, os.W_OK))):
        raise InputError(f"--json {file} cannot be written (permission). Name a file elsewhere.")


def _write_whole(file: Path, text: str) -> None:
    """Write a file atomically; raises InputError when it cannot be written."""
    try:
        write_whole(place_of(file), text)  # through a link, which is kept
    except OSError as error:
        raise InputError(f"{file} cannot be written: {error.strerror or error}. The numbers are: {text}") from error


def _header(recipe: Recipe, ratios: Sequence[float]) -> str:
    shares = ", ".join(f"{ratio:.0%}" for ratio in ratios)
    return f"secateur: {shares} of all parameters off {recipe.model.name} by {recipe.method.name}"


def _report(metrics: Mapping[str, Any], output: Path) -> None:
    from secateur import tables
    from secateur.export import compare_states

    console = _console()
    console.print(tables.results(compare_states(metrics)))
    console.print(f"The model is in {output}")
    if (output / "secateur" / "report.html").is_file():
        console.print(f"Its report is {output / 'secateur' / 'report.html'}")


def _console() -> Console:
    from rich.console import Console

    # text of a model and names of folders may contain brackets and colons, which are not markup
    return Console(markup=False, emoji=False, highlight=False, width=None if sys.stdout.isatty() else 120)


def _quieten() -> None:
    """Keep other programs' chatter off the screen; a user's own environment variables win."""
    for name, value in (
        ("TOKENIZERS_PARALLELISM", "false"),
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("HF_DATASETS_DISABLE_PROGRESS_BARS", "1"),
        ("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1"),
    ):
        os.environ.setdefault(name, value)
    for name in ("bitsandbytes", "torch.onnx"):  # say at import what they cannot speed up, or what is not installed
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
