"""What a run needs, looked for before any process is started: a model, places to write to, trackers.

All of it would fail by itself, and late: a config that lacks a size when the weights are read, a folder that is a file
when the trainer is made, a picture that cannot be written when a day of training is over.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from transformers.integrations import get_available_reporting_integrations
from transformers.utils.hub import cached_file

from ..planning.model_config import read_config
from .arguments import Request


def check_conditions(request: Request) -> None:
    """See that the model is there, and that what is written can be.

    Raises:
        ValueError: One of them is not so.
    """
    _check_files(request)
    _check_trackers(request)
    _check_model(request)


def parse_checkpoint(asked: str | bool | None) -> str | bool | None:
    """Read `resume_from_checkpoint`: the path of a checkpoint, or a word for "the newest" or for "none"."""
    return {"true": True, "false": None, "none": None}.get(str(asked).lower(), asked)


def _check_files(request: Request) -> None:
    plot, output = request.run.plot, request.training.get("output_dir")
    if plot is not None and not Path(plot).absolute().parent.is_dir():
        raise ValueError(f"--plot {plot}: there is no folder for it. Make the folder, or name another file.")
    if plot is not None and Path(plot).is_dir():
        raise ValueError(f"--plot {plot} is a folder, and a picture is a file. Name a file in it: {plot}/curves.png.")
    if plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            f"--plot {plot} needs matplotlib, which is not installed. pip install matplotlib, or leave it out."
        )
    for folder in (Path(output), *Path(output).absolute().parents) if output else ():
        if folder.exists() and not folder.is_dir():
            raise ValueError(
                f"output_dir={output!r}: {str(folder)!r} is a file, so there can be no such folder. Name another one."
            )
    checkpoint = parse_checkpoint(request.training.get("resume_from_checkpoint"))
    if isinstance(checkpoint, str) and not Path(checkpoint).is_dir():
        raise ValueError(
            f"resume_from_checkpoint={checkpoint!r} is no folder, so there is no checkpoint in it. Name one, such as "
            "OUTPUT_DIR/checkpoint-100, or write true for the newest in output_dir, if there is any."
        )


def _check_trackers(request: Request) -> None:
    asked = request.training.get("report_to") or []
    missing = {asked} if isinstance(asked, str) else set(asked)
    missing -= {"all", "none", *get_available_reporting_integrations()}
    if missing:
        raise ValueError(
            f"report_to has {', '.join(sorted(missing))}, which is not installed or not known, and would fail once the "
            'model is loaded. pip install it, or write "none".'
        )


def _check_model(request: Request) -> None:
    name, revision = str(request.model.model_name_or_path), request.model.model_revision
    hub = {"revision": revision, "token": request.training.get("hub_token")}
    if Path(name).is_dir() and revision != "main":
        raise ValueError(
            f"model_revision={revision!r} of the folder {name!r}: only models of the Hub have revisions, and the "
            "folder would be read as it is. Leave it out, or give the id of the model."
        )
    try:
        cached_file(name, "config.json", **hub)
    except OSError as error:
        raise ValueError(
            f"model_name_or_path={name!r}: its config.json cannot be had. {error} Give the folder of a model, or the "
            "id of one on the Hub that can be reached from here."
        ) from error
    read_config(name, trust_remote_code=request.training.get("trust_remote_code", False), **hub)
