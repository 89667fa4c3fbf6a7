"""Train a GPT-2, or fine-tune one.

`python train.py` (`minigpt2 train` where minigpt2 is installed) trains a small model for a few minutes on 2 cores,
on the sources of Python's standard library; with `--help` it lists the settings.

A run folder holds the settings (train_config.json), the metrics of every step (metrics.jsonl, loss.png), snapshots of
everything that decides the future of the run (snapshots/), the weights of the best validation (best/) and, at the end,
the last ones. `python train.py --out FOLDER --resume` continues a run that stopped, whatever stopped it, as if it had
not, or with other settings: `--max-steps 400` extends it. `torchrun --nproc-per-node N train.py ...` runs it on N
processes.

Exit status: 0 done, 1 stopped by an error in the middle, 2 a mistake in the settings, 128 + N stopped by signal N, with
a snapshot taken (130 SIGINT, 143 SIGTERM).
"""

from __future__ import annotations

import dataclasses
import sys
import time
from contextlib import ExitStack, nullcontext
from pathlib import Path

import torch
import tyro

from minigpt2 import tune_allocator
from minigpt2.command_line import complain, one_line_warnings, parsed, reader_left, replace_unprintable
from minigpt2.data.batches import Tokens, check_enough, check_ids, open_corpus
from minigpt2.device import is_out_of_memory
from minigpt2.generate import sample_text
from minigpt2.run_folder import BEST, SNAPSHOTS
from minigpt2.tokenizer import Tokenizer
from minigpt2.training import folder, snapshot
from minigpt2.training.guards import NonFiniteError, Norms, stop_on_signals
from minigpt2.training.metrics import Metrics, Speedometer, Steps, enough_steps, plot_losses
from minigpt2.training.parallel import Processes, started, torchrun
from minigpt2.training.precision import DTYPES, resolve_precision
from minigpt2.training.settings import TrainConfig, chosen, command
from minigpt2.training.state import seed_of
from minigpt2.training.step import save_weights
from minigpt2.training.trainer import Trainer, make_model
from minigpt2.training.vocabulary import tokenizer_of_run


def train(trainer: Trainer, out: Path) -> int:
    """The loop: step, validate, log, snapshot. Returns 0, or the exit status of the signal that ended it."""
    config, processes = trainer.config, trainer.processes
    speedometer = Speedometer(trainer.model.config, trainer.length, processes, DTYPES[config.precision])
    norms, rates = Norms(), {"--lr": config.lr, "--embedding-lr": config.embedding_lr}
    first = {}
    if trainer.step == 0:
        first["val_loss_before"] = trainer.best = trainer.validate()
        trainer.say(f"validation loss before training: {trainer.val_loss:.4f}")
        if config.snapshot_every:
            trainer.save(out / SNAPSHOTS, config.keep)
    with (
        Metrics(out, trainer.step, config.to_json(), writes=processes.main) as metrics,
        Steps(total=config.max_steps, initial=trainer.step, disable=not processes.main) as bar,
        stop_on_signals() as stop,
    ):
        while not trainer.ended:
            began, tokens = time.perf_counter(), trainer.tokens
            try:
                row = trainer.advance()
            except NonFiniteError as error:
                if not trainer.partly_moved:
                    trainer.save(out / SNAPSHOTS, config.keep)
                raise NonFiniteError(f"{error}; {lower_rate(trainer, out)}") from None
            if warning := norms.warning(row, rates):
                trainer.say(warning)
            row |= {"seconds": metrics.seconds} | (first if trainer.step == 1 else {})
            row |= speedometer.row(trainer.tokens - tokens, time.perf_counter() - began)
            if trainer.step % config.eval_every == 0 or trainer.step == config.max_steps:
                row["val_loss"] = trainer.validate()
                trainer.say(f"step {trainer.step}: validation loss {trainer.val_loss:.4f}")
                trainer.stale += 1
                if trainer.val_loss < trainer.best:
                    trainer.best, trainer.stale = trainer.val_loss, 0
                    save_weights(trainer.model, out / BEST, processes, trainer.tokenizer)
            metrics.write(row)
            signal = processes.highest(stop.signal)
            due = config.snapshot_every and (trainer.step % config.snapshot_every == 0 or trainer.ended)
            if due or signal:
                metrics.flush()  # a snapshot never has more steps than the metrics
                trainer.save(out / SNAPSHOTS, config.keep)
            bar.show(row, trainer.val_loss)
            if signal and not trainer.ended:
                go_on = command("--out", out, "--resume")
                trainer.say(f"stopped after step {trainer.step}, with a snapshot; go on with: {go_on}")
                return 128 + signal
        bar.finish()
    return 0


def lower_rate(trainer: Trainer, out: Path) -> str:
    """What to do about a loss or gradient that is not finite."""
    if trainer.saved_step < 0:
        return "there is no snapshot from before"
    lower = [f"{(rate or 0) / 10:g}" for rate in (trainer.config.lr, trainer.config.embedding_lr)]
    go_on = command("--out", out, "--resume", "--lr", lower[0], "--embedding-lr", lower[1])
    return f"there is a snapshot from before, of step {trainer.saved_step}; go on from it with lower rates: {go_on}"


def read_settings() -> tuple[TrainConfig, folder.Record | None]:
    """The settings of the command line, and the record of the run that is to be resumed, if it was begun: its settings
    are what they were unless they are given again."""
    config = parsed(lambda: tyro.cli(TrainConfig))
    if not config.resume or config.out is None or (record := folder.read(config.out)) is None:
        return config, None
    again = parsed(lambda: tyro.cli(TrainConfig, default=record.config))
    if config.parallel is None and not torchrun():  # a run may go on in one process
        again = dataclasses.replace(again, parallel=None)
    return again, record


def set_up(
    config: TrainConfig, record: folder.Record | None, out: Path, processes: Processes
) -> tuple[Trainer, folder.Record]:
    """The trainer, where it starts or where its newest snapshot left it, and the run's record."""
    if config.parallel and not processes.torchrun:
        raise ValueError(f"--parallel {config.parallel} needs torchrun --nproc-per-node N -m minigpt2 train ...")
    config = dataclasses.replace(config, parallel=config.parallel or ("ddp" if processes.torchrun else None))
    saved, said = folder.start_of(config, record, out)
    given, config = config, config.resolved()
    config = dataclasses.replace(config, precision=resolve_precision(config.precision, processes.device))
    if config.tune_allocator and processes.device.type == "cpu":
        said.append(tune_allocator())
    torch.manual_seed(config.seed)
    model, config = make_model(config, processes, saved.path if saved else None)
    tokenizer = tokenizer_of_run(config.init, config.data, model.config.vocab_size, out if record else None)
    place = folder.token_folder(config, out, record, tokenizer) if processes.main else Path()
    place = Path(processes.gather(str(place))[0])
    corpus = open_corpus(place, place, tokenizer=tokenizer)
    if record is None or config.new_data:
        check_ids(corpus, place, model.config.vocab_size)
    config = config.with_length(model.config.n_positions, corpus)
    check_enough(corpus, config.batch, config.length or 1, processes.world)
    trainer = Trainer(config, model, corpus, processes)
    trainer.tokenizer = tokenizer
    if processes.rank:  # process 0 goes on with the state that made the weights, as a single process does
        torch.manual_seed(seed_of(config.seed, 0, processes.rank))
    known = trainer.corpus_fingerprint, trainer.made_by
    before, record = record, folder.next_record(config, record, out, place, *known)
    if saved is not None:
        trainer.restore(saved, record.earlier)
    if before is not None:
        differ = folder.note_changes(record, before, trainer.step)
        said += [
            f"from step {trainer.step} on: --{n.replace('_', '-')} {b}, before {a}" for n, (a, b) in differ.items()
        ]
        if differ.keys() & {"batch", "eval_batches", "data"}:  # the best loss was that of other validation windows
            trainer.measure_best(out / BEST)
    elif choice := chosen(given, config):
        said.append(f"not given, so chosen: {choice}")
    if processes.main:
        trainer.save_tokenizer(out)
        folder.write(out, record)
    processes.wait()
    size = f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters"
    many = (f" x {processes.world} ({config.parallel})" if processes.world > 1 else "") + f", {config.precision}"
    source = config.data or "the Python standard library's own sources"
    said.append(f"{size} on {processes.device}{many}, attention {config.attention}, run folder {out}")
    said.append(f"{len(corpus.train):,} training and {len(corpus.validation):,} validation tokens from {source}")
    trainer.say("\n".join(said))
    return trainer, record


def finish(trainer: Trainer, record: folder.Record, out: Path) -> None:
    """Write the last weights and the loss curve, and show some text."""
    model = save_weights(trainer.model, out, trainer.processes, trainer.tokenizer)
    if not trainer.processes.main:
        return
    folder.write(out, dataclasses.replace(record, finished=trainer.step))
    if trainer.stopped_early:
        trainer.say(f"ended at step {trainer.step}: {trainer.stale} validations in a row were no better than the best")
    trainer.say(f"saved {out}/model.safetensors")
    if trainer.tokenizer is not None and (prompt := first_words(trainer.validation, trainer.tokenizer)):
        trainer.say(f"continue a text with it: {command('--model', out, '--prompt', prompt, program='generate')}")
    first = "those it began with: no validation was better than the first"
    best = f"in {out / BEST}" if (out / BEST).exists() else first
    trainer.say(f"the weights of the best validation loss, {trainer.best:.4f}, are {best}")
    trainer.say("\n".join(filter(None, (enough_steps(out), plot_losses(out)))))
    if trainer.tokenizer is not None:
        trainer.say("a sample of its text:\n" + sample_text(model.eval(), trainer.tokenizer, 200, trainer.config.seed))


def first_words(tokens: Tokens, tokenizer: Tokenizer, most: int = 3) -> str:
    """The words that a text begins with, to prompt a model with."""
    words = tokenizer.decode(tokens[:64].tolist()).split()
    return " ".join(list(filter(str.isprintable, words))[:most])


def run(config: TrainConfig, record: folder.Record | None, processes: Processes) -> int:
    """One run, or the rest of one; returns the exit status."""
    with ExitStack() as stack:
        try:
            claim = folder.claimed(config.out) if processes.main else nullcontext(Path())
            out = Path(processes.gather(str(stack.enter_context(claim)))[0])
            trainer, record = set_up(config, record, out, processes)
        except (ValueError, OSError, RuntimeError) as error:  # everything the user can mend
            return complain(error, 2)
        try:
            if trainer.ended and record.finished == trainer.step:
                trainer.say(f"{out} is finished, with {trainer.step} steps; {trainer.what_goes_on()}")
                return 0
            status = train(trainer, out)
            if status == 0:
                finish(trainer, record, out)
            return status
        except (NonFiniteError, snapshot.SnapshotError, OSError) as error:  # any other is a bug and shows its trace
            return complain(error, 1)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            less = "a smaller --batch, with --accumulate for as many tokens a step, or --memory-budget auto, takes less"
            return complain(MemoryError(f"there is not enough memory for this; {less}"), 1)


def main() -> int:
    replace_unprintable()
    with ExitStack() as stack:
        stack.enter_context(one_line_warnings(Path(sys.argv[0]).name))
        try:
            config, record = read_settings()
            folder.check_changes(config, record)
            config.check()
            processes = stack.enter_context(started(config.device))
        except (ValueError, OSError) as error:
            return complain(error, 2)
        try:
            status = run(config, record, processes)
        except KeyboardInterrupt:
            status = 130
        try:
            sys.stdout.flush()
        except OSError:  # the weights are there; nobody reads what was said of them
            reader_left()
        return processes.ended(status)


if __name__ == "__main__":
    sys.exit(main())
