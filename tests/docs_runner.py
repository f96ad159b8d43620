"""Runs the command lines of the docs in this process, in a folder like a checkout, with small sizes and few steps.

The words of a command are those of the docs. Placeholders become files and runs that are made when they are needed, and
words are added by rules that look at the script and at the merged config; no rule repeats a command.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import docs_files
import pytest
import torch
import yaml
from docs_commands import ROOT, Command, commands, data_blocks
from docs_files import CLIP_WIDTH, MAKERS, TWO, make, weights_of
from docs_sizes import short_run, small_sizes, strings, words_of
from script_modules import load_script

import main as front_door
import run_para_metrics
from ldm.config.loading import load_config
from ldm.runs.find import is_named, list_runs
from ldm.runs.folder import last_checkpoint
from ldm.scoring.engine import Outcome, _answer
from ldm.training.cli import Options, parse_arguments
from ldm.training.recipe import load_recipe
from ldm.util import UserError

INTERRUPTED = 130  # exit status of a command that polls until Ctrl-C
# Words added to a script, whose own words they override; a script without an entry is not run.
ADDED = {
    "sample_diffusion": "-n 2 -c 2 --batch_size 2",
    "generate": "--steps 2",
    "edit": "-c 31",
    "edit_score": "--num-samples 4 --num-steps 2 --columns 2",
    "image_scores": "",
    "name_units": "--num-images 2 --points 2 --num-steps 2",
    "pca_baseline": "",
    "load_and_save_model": "",
    "preprocess_clip": "--num_workers 0",
    "dataset": "",
    "bench_metrics": "--quick --codes 2 --metrics mig",
    "bench_directions": "-K 4 -M 2 -B 2 -n 1",
    "bench_training": "--networks unet --stages judge --precision fp32 --steps 1 --batch-size 2 --device cpu",
    "train": "data.params.num_workers=0 lightning.trainer.max_steps=1 --accelerator cpu --no-test",
}
ADDED_IF = {  # by a word of the command
    "recon": "-n 4 --num-steps 2",
    "world": "--keep " + " ".join(f"{name}={count}" for name, count in TWO.items()),
    "--size": "--size 32 32",
    "emoji": "--packages packages",
    "--seeds": "--seeds 0,1",
}
REQUIRED = {  # where a script is named without arguments
    "name_units": "-r RUN_OF_ENCDIFF --clip RUN_OF_CLIP/clip",
    "bench_directions": "-r RUN_OF_TEXT_TO_IMAGE",
    "load_and_save_model": "--ckpt_path RUN_OF_NOISECLR --save_path tokens.safetensors",
}
RUN_OF = {"generate": "tiny_imagenet", "edit": "noiseclr", "image_scores": "encdiff", "default": "clip_disdiff"}
SUBSTITUTES = {"SEED": "0", "THE_RECIPE": "TEXT_TO_IMAGE", "FOLDER": "pictures", "IMAGES": "pictures"}


class SerialEngine:
    """Runs the jobs of the scores one after the other, in the place of Dask's processes."""

    num_workers = 1

    def __init__(self, *_: object) -> None:
        self._jobs: list[Any] = []

    def __enter__(self) -> SerialEngine:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, job: Any, priority: float = 0.0) -> None:
        self._jobs.append(job)

    def outcomes(self) -> Iterator[Outcome]:
        while self._jobs:
            job = self._jobs.pop(0)
            yield Outcome(job, *_answer(job.function, job.args))


class Checkout:
    """A folder like a checkout in which commands are run, each one once."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.done = folder, set()
        folder.mkdir(parents=True)
        for path in [*ROOT.iterdir(), ROOT / ".ci"]:
            if not path.name.startswith(".") or path.name == ".ci":
                if path.name not in ("logs", "data") and not (folder / path.name).exists():
                    (folder / path.name).symlink_to(path)
        docs_files.write_data(folder)

    def run(self, command: Command) -> None:
        """Run a command; fail if it ends with an error, or if no rule can run it."""
        if command.words not in self.done:
            self.done.add(command.words)
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(self.folder)
                patch.setenv("DATA_ROOT", "data")
                for word in command.exports:
                    patch.setenv(*word.split("=", 1))
                try:
                    self._run(command, [self._filled(word, command) for word in command.words])
                except (Exception, SystemExit) as error:
                    error.add_note(f"{command.place}: {shlex.join(command.words)}")
                    raise

    def _run(self, command: Command, words: list[str]) -> None:
        self._write_shown(command)
        match words:
            case ["export", _]:
                pass  # an entry of ``exports`` of the commands below
            case ["cp", "-r", source, target]:
                shutil.copytree(source, target)
            case ["bash", *rest]:
                self._run_shell(command, rest)
            case ["python", "main.py", *rest]:
                self._check(front_door.main(self._main_words(rest)), words)
            case ["python", "run_para_metrics.py", *rest]:
                expected = INTERRUPTED if "--watch" in rest else 0
                self._check(self._call(run_para_metrics, added(rest)), words, expected)
            case ["python", script, *rest] if Path(script).stem in ADDED and Path(script).parent.name == "scripts":
                self._check(self._call(Path(script).stem, self._script_words(Path(script).stem, rest)), words)
            case _:
                raise UserError(f"no rule runs {command.words}")

    @staticmethod
    def _check(code: int | None, words: Sequence[str], expected: int = 0) -> None:
        assert (code or 0) == expected, f"exit status {code}: {words}"

    @staticmethod
    def _call(program: Any, words: Sequence[str]) -> int | None:
        """Run a module, or a script by its name, with words in ``sys.argv``."""
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])  # as Python does for a script
            patch.setattr(sys, "argv", [str(program), *words])
            try:
                return (load_script(program) if isinstance(program, str) else program).main()
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)

    # Words -----------------------------------------------------------------------------------------------------------

    def _filled(self, word: str, command: Command) -> str:
        """Return a word with the files and runs that its placeholders stand for; files are made."""
        for name, value in SUBSTITUTES.items():
            word = re.sub(rf"\b{name}\b|(?<=_){name}\b", value, word)
        script = Path(command.program).stem

        def run(match: re.Match) -> str:
            name = match[1] or RUN_OF.get(script, RUN_OF["default"])
            return str(self.need(name.lower().partition("_or_")[0]))

        word = re.sub(r"logs/\d{4}-[\dT-]+_(\w+)", lambda match: str(self.need(match[1])), word)
        word = re.sub(r"(?<![A-Z_])RUN(?:_OF_([A-Z_]+))?\b", run, word)
        for part in re.split(r"[=\[\],]", word):
            if part in MAKERS:
                make(self.folder / part)
            elif part.endswith((".csv", ".safetensors")):
                self._compute(part)
        if re.fullmatch(r"[A-Z][A-Z_]+", word) and not (self.folder / word).exists():
            raise UserError(f"no rule for the placeholder {word} of {command.words}")
        return word

    def _compute(self, file: str) -> None:
        """Run the command that writes a file of embeddings, if there is one."""
        if not (self.folder / file).exists():
            for command in commands():
                if "preprocess_clip" in command.program and command.words[command.words.index("--output") + 1] == file:
                    self.run(command)
                    break

    def _write_shown(self, command: Command) -> None:
        """Write the files of a user, ``mine.yaml`` and so on, which the docs show; and run what makes their data."""
        for word in command.words:
            option, _, name = word.rpartition("=")
            if re.fullmatch(r"mine\w*\.yaml", name) and not (self.folder / name).exists():
                (self.folder / name).write_text(shown_file(command, option == "data"))
            if (found := re.fullmatch(r"(logs/\w+)/data\.yaml", word)) and not (self.folder / word).exists():
                self.run(command_of("--recipe", f"logdir: {found[1]}"))
        if "emoji" in " ".join(command.words) and command.program == "main.py":
            self.run(command_of("emoji"))

    def _main_words(self, words: list[str]) -> list[str]:
        options = parse_arguments(words)
        if options.recipe:
            return [*words, *self._recipe_words(options)]
        if options.resume:
            keys = {"data.params.num_workers": 0}
            if options.train:
                keys |= {"lightning.trainer.max_steps": 3} | (self._keys(options) if options.base else {})
                keys["lightning.trainer.max_steps"] = 3
            return [*words, *words_of(keys)]
        if not options.train:
            return words
        return [*words, *words_of(self._keys(options))]

    def _keys(self, options: Options) -> dict[str, Any]:
        """Return the keys that make a training short, after the runs and files that it needs were made."""
        config = load_config(options.base, options.overrides, [options.log_root, "logs"], allow_pending=True)
        for message in config.pending:
            self.need(re.search(r"named '([^']+)'", message)[1])
        for _, value in strings(config.content):
            if value.endswith((".csv", ".safetensors")):
                self._compute(value)
        return {**short_run(config.content), **self._model_keys(config.content)}

    def _model_keys(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keys that make a model small, and replace weights that are not on this machine."""
        model = content.get("model") or {}
        found = small_sizes(model, "model")
        for key, value in strings(model, "model"):
            if re.match(r"(ViT|RN)", value):
                found[key] = str(make(self.folder / "CLIP"))
                unet = model["params"]["unet_config"]["params"]
                widths = [name for name in ("c_embed_dim", "adm_in_channels") if name in unet]
                found |= {f"model.params.unet_config.params.{name}": CLIP_WIDTH for name in widths}
            elif key.endswith(".pretrained_model") and not Path(value).exists():
                found[key] = str(make(self.folder / "PIPELINE"))
        images = ((content.get("data") or {}).get("params") or {}).get("train") or {}
        if (images.get("params") or {}).get("image_size", 0) > 64:
            found["data.params.train.params.image_size"] = 16
        return found

    def _recipe_words(self, options: Options) -> list[str]:
        """Return ``stage.key=value`` words for all stages; runs that do not exist yet need no words."""
        found = []
        for stage in load_recipe(options).stages:
            config = load_config(stage.base, stage.overrides, [stage.log_root, "logs"], allow_pending=True)
            keys = {**short_run(config.content), **self._model_keys(config.content)}
            found += [f"{stage.name}.{word}" for word in words_of(keys)]
        return found

    def _script_words(self, script: str, words: list[str]) -> list[str]:
        if not words:
            example = Command(("python", f"scripts/{script}.py"), ROOT, 0)
            words = [self._filled(word, example) for word in REQUIRED.get(script, "").split()]
        if script == "preprocess_clip" or any(word.endswith(".pth") for word in words) and script == "generate":
            words = [*words, "--clip", str(make(self.folder / "CLIP"))]
        if script == "sample_diffusion" and "--base" in words or "-b" in words:
            words += self._weights(words)
        if "emoji" in words:
            make(self.folder / "packages")
        return [*added(words), *ADDED[script].split()]

    def _weights(self, words: list[str]) -> list[str]:
        """Write the checkpoint of a config, and return the words that make its networks small."""
        base = words[words.index("--base" if "--base" in words else "-b") + 1]
        path = self.folder / words[words.index("-r") + 1]
        if base.startswith("configs/"):
            folder, stem = Path(base).parts[-2], Path(base).stem
            shutil.copy(last_checkpoint(self.need(f"{folder}/{stem}")), path)
            return words_of(self._model_keys(load_config([base], allow_pending=True).content))
        if path.name not in MAKERS:
            torch.save({"state_dict": weights_of(yaml.safe_load((self.folder / base).read_text())["model"])}, path)
        return []

    def need(self, name: str) -> Path:
        """Return the newest run of a name or of a config ``folder/stem``; a command of the docs trains it if needed."""
        for is_last in (False, True):
            for path, record in list_runs([self.folder / "logs", self.folder]):
                if is_named(record, name) and record.get("status") == "finished":
                    return path
            if is_last:
                break
            self.run(command_that_trains(name))
        raise UserError(f"the command of the docs for {name} made no run of that name")

    def _run_shell(self, command: Command, words: list[str]) -> None:
        """Run a shell script with a Python that only records its words, and run main.py with these words."""
        environment = self.folder / "environment"
        if not environment.exists():
            (environment / "bin").mkdir(parents=True)
            stamp = subprocess.run("cat setup.py constraints.txt | cksum", shell=True, capture_output=True, text=True)
            (environment / ".stamp").write_text(stamp.stdout)
            (environment / "bin" / "python").write_text(
                '#!/bin/sh\nprintf "%s\\t" "$@" >> "$RECORD"; echo >> "$RECORD"\n'
            )
            (environment / "bin" / "python").chmod(0o755)
        record = self.folder / "record.txt"
        record.write_text("")
        variables = {**os.environ, "VENV": str(environment), "RECORD": str(record)}
        subprocess.run(["bash", *words], env=variables, check=True, capture_output=True, timeout=60)
        calls = [line.split("\t")[:-1] for line in record.read_text().splitlines()]
        assert calls, f"{words} runs nothing"
        for call in calls:
            if call[0] == "main.py":
                self.run(Command(("python", *call), command.page, command.line))
            else:
                assert call[0] == "-m" and call[1] in ("ruff", "pyright", "pytest"), call
                self._check_selection(call)

    @staticmethod
    def _check_selection(call: list[str]) -> None:
        if "-k" in call:
            names = call[call.index("-k") + 1]
            assert any(f"def test_{names}" in path.read_text() for path in (ROOT / "tests").rglob("test_*.py")), names


def added(words: Sequence[str]) -> list[str]:
    """Return words with those that one of them requires."""
    return [*words, *(part for word, more in ADDED_IF.items() if word in words for part in more.split())]


def command_of(word: str, text: str = "") -> Command:
    """Return the first command with a word; ``text`` is part of a file that it names."""
    for command in commands():
        files = [ROOT / name for name in command.words if name.startswith("configs/")]
        if word in command.words and (not text or any(text in file.read_text() for file in files)):
            return command
    raise UserError(f"no command of the docs with {word} and {text}")


def command_that_trains(name: str) -> Command:
    """Return the command of the docs that trains a run of a name: below ``logs``, and by ``-n``, if there is one."""
    found = []
    for command in commands():
        if command.program == "main.py" and "-t" in command.words:
            options = parse_arguments(command.words[2:])
            if options.base and not options.resume:
                record = {"name": options.name or Path(options.base[0]).stem, "configs": options.base}
                if is_named(record, name):
                    is_own = not all(file.startswith("configs/") for file in options.base)
                    found.append((is_own, options.logdir is not None, options.name != name, len(found), command))
    if found:
        return min(found)[-1]
    raise UserError(f"no command of the docs trains {name}")


def shown_file(command: Command, is_own_data: bool) -> str:
    """Return the block of YAML that shows a file of a user: the data of a recipe, or a section ``data`` of a config.

    A block of the page of the command has precedence.
    """
    pages = [command.page, *sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]
    for page in pages:
        for _, language, text in data_blocks(page) if page.suffix == ".md" else ():
            if language == "yaml" and re.search(
                r"^path: photos" if is_own_data else r"^data:\n(.*\n)*.*photos", text, re.M
            ):
                return text
    raise UserError(f"no block of the docs shows the file of {command.words}")
