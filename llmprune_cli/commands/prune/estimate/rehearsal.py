"""The steps of a calibrated prune, tried on two layers and one window of text; the very functions that will take them.

Each stage is timed at two lengths of the window, which tells what a layer costs from what a token does.
"""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from torch.nn import functional

from llmprune_cli.apply.surgery import pruned_entries, pruned_tensors
from llmprune_cli.choose.importances import ranks_layers, reads_text
from llmprune_cli.choose.measuring import Measuring
from llmprune_cli.choose.selection import make_random_plan, measure_units, score_layers, score_weights, try_plan
from llmprune_cli.commands.prune.estimate.job import Job
from llmprune_cli.commands.prune.estimate.stopwatch import Stopwatch, Tried
from llmprune_cli.commands.prune.estimate.two_layers import NoRoom, TwoLayers, Unsolved, commonest_layers, imagined
from llmprune_cli.folder.documents import fsync
from llmprune_cli.folder.scratch import scratch_folder
from llmprune_cli.folder.shards import write_shards
from llmprune_cli.folder.tensors import TensorEntry, split_name
from llmprune_cli.plan.document import Plan
from llmprune_cli.progress import QUIET, StageEstimate
from llmprune_cli.repair.least_squares import DAMPING, Moments, solve_reader
from llmprune_cli.repair.refit import repair
from llmprune_cli.run.calibration import CalibrationText
from llmprune_cli.run.divergence import Side, compare
from llmprune_cli.run.layered_model import VOCABULARY
from llmprune_cli.run.speed.clock import wait
from llmprune_cli.run.speed.throughput import ENOUGH, Clock
from llmprune_cli.run.workbench import Workbench
from llmprune_cli.text.corpus import Corpus
from llmprune_cli.vocabulary.choice import rank_tokens

LONGEST, SHORTEST = 512, 32  # tokens of the window that is tried
SHARE = 8  # of these tokens, one in so many makes the shorter window
WINDOW_S = 0.15  # that a layer may take for it
HEAD_TOKENS, HEAD_VOCABULARY = 128, 8192  # of the output projection that is tried
SOLVED = 768  # inputs of the reader that is solved
SAMPLE_BYTES = 2**25  # of the weights that are scored and written


def rehearse(job: Job) -> tuple[StageEstimate, ...]:
    """The stages of a prune with the seconds that they will take."""
    plan = job.decided.plan or make_random_plan(job.decided.subject, job.decided.target, QUIET)
    free = [number for number in plan.layers if number not in plan.protected] or list(plan.layers)
    numbers = commonest_layers(job.decided.subject.architecture.layer_kinds, free)
    stages: list[StageEstimate] = []
    if job.reads_text:
        numbers = numbers if len(numbers) > 1 else numbers * 2
        stages += _calibrated(job, plan, numbers)
    return (*stages, *_of_bytes(job, plan, numbers[0]))


# --- what text goes through -----------------------------------------------------------------------------------------


def _calibrated(job: Job, plan: Plan, numbers: tuple[int, ...]) -> list[StageEstimate]:
    two = TwoLayers.of(job.model, numbers)
    long = _window_length(job, two)
    short = max(2, long // SHARE)
    runs = [(length, _run(job, two.plan(plan), two, length)) for length in (short, long)]
    head = _head_seconds(job)
    solving: dict[tuple[int, int, int], float] = {}
    found: dict[str, StageEstimate] = {}
    for few, many in zip(runs[0][1], runs[1][1], strict=True):
        seconds = _stage_seconds(job, (short, few), (long, many))
        per_layer = sum(_solution_seconds(job, shape, solving) for shape in many.solved) / two.layers
        seconds += per_layer * len(plan.layers)
        rounds = many.growth if not _is_triangular(many) else many.growth * (job.model.layers + 1) / (two.layers + 1)
        seconds += rounds * (many.predicted * head[0] + many.learned * head[1])
        known = found.get(many.name)
        if known is not None:  # the second candidate, and all that follow
            times = job.candidates - 1
            found[many.name] = replace(known, seconds=known.seconds + times * seconds, times=1 + times)
        else:
            found[many.name] = StageEstimate(many.name, seconds, 1, many.chooses)
    return list(found.values())


def _window_length(job: Job, two: TwoLayers) -> int:
    """Tokens of the longer window: as many as take a moment."""
    states, place = torch.zeros(1, SHORTEST, two.widths.hidden_size), torch.device(two.device)
    with torch.inference_mode():
        layer = two.load_layer(0)
        layer.run(states)
        wait(place)
        started = time.perf_counter()
        layer.run(states)
        wait(place)
    taken = time.perf_counter() - started
    return min(max(SHORTEST, int(SHORTEST * WINDOW_S / taken)), LONGEST, job.windows.length)


def _run(job: Job, plan: Plan, two: TwoLayers, length: int) -> list[Tried]:
    """Take all steps with windows of a length."""
    watch = Stopwatch(job.model.device)
    two = replace(two, watch=watch)
    bench = _bench(job, two, length)
    if job.ranked_windows:
        _rank(job, bench)
    if job.calibrates:
        _calibrate(job, bench, plan)
    watch.end()
    return watch.stages


def _rank(job: Job, bench: Workbench) -> None:
    """What ranking tokens takes."""
    two, text = bench.model, bench.text
    assert isinstance(two, TwoLayers) and text is not None
    window, tokens = text.fitted[:1], job.ranked_windows * job.windows.length
    bench.listener.stage("Ranking tokens", two.layers)
    two.watch.shared(-(-tokens // window.shape[1]))
    rank_tokens(two, [(window, 1.0)], window.shape[1], VOCABULARY, bench.listener.advance)


def _calibrate(job: Job, bench: Workbench, plan: Plan) -> None:
    """What everything else takes that text goes through."""
    two, text, choice = bench.model, bench.text, job.request.choice
    assert isinstance(two, TwoLayers) and text is not None
    method = choice.settled.refit or ""
    if job.measures:
        measuring = Measuring(bench, text.fitted)
        activity = measure_units(measuring, choice)
        if ranks_layers(choice):
            score_layers(measuring, choice, activity)
    for _ in range(min(2, job.candidates)):  # the first one walks through the unpruned model as well
        try_plan(bench, text, plan, method, "Candidates", Unsolved)
    two.watch.chosen()
    if job.repairs:
        repair(bench, plan, method, Unsolved)
    _judge(two, bench, text)


def _bench(job: Job, two: TwoLayers, length: int) -> Workbench:
    """Two layers and random text: as many windows of a length as the run will have tokens."""
    windows, generator = job.windows, torch.Generator().manual_seed(0)
    fitted, held_out, judged = (
        torch.randint(0, VOCABULARY, (-(-count * windows.length // length), length), generator=generator)
        for count in (windows.fitted, windows.held_out, windows.judged)
    )
    text = CalibrationText(Corpus("", "", ""), fitted, held_out, judged)
    bench = Workbench(two, text, two.watch.listener, offload_dir=job.bench.offload_dir)
    if job.keeps_dense:
        return bench
    return replace(bench, known={"fitted": NoRoom(bench.all_layers_dir), "tried": NoRoom(bench.all_layers_dir)})


def _judge(two: TwoLayers, bench: Workbench, text: CalibrationText) -> None:
    """What the report card takes: both models walk, and are compared."""
    bench.listener.stage("Judging on held-out text", 2 * two.layers)
    windows, sides = text.judged[:1], []
    two.watch.shared(max(ENOUGH, len(text.judged)), tried=ENOUGH)
    with torch.inference_mode():
        for _ in range(2):
            walked = []
            for place in two.walk(windows, Clock().advance):
                walked.append(place)
                bench.listener.advance(1)
            sides.append(Side(two.load_ends(), *walked[-1]))
        compare(sides[0], sides[1], windows)


def _is_triangular(stage: Tried) -> bool:
    """Whether one layer more is gone through by one model more."""
    return any(amount > 1 for *_, amount in stage.sweeps)


def _stage_seconds(job: Job, few: tuple[int, Tried], many: tuple[int, Tried]) -> float:
    """What the layers of a stage will take, as a layer and a token take so much each."""
    tokens = many[1].windows * many[0], few[1].windows * few[0]
    run_tokens = tokens[0] * many[1].growth
    total, layers = 0.0, job.model.layers
    for (first, second, amount), (_, shorter, _) in zip(many[1].sweeps, few[1].sweeps, strict=True):
        per_token = max(0.0, second - shorter) / max(1, tokens[0] - tokens[1])
        per_layer = max(0.0, second - per_token * tokens[0])
        steps = layers if amount == 1 else layers * (layers + 1) / 4  # two models went through the second layer
        total += steps * (per_layer + per_token * run_tokens) + max(0.0, first - second)
    return total


def _head_seconds(job: Job) -> tuple[float, float]:
    """What the output projection takes for a token: its loss alone, and its gradient as well."""
    channels, vocabulary = job.model.widths.hidden_size, int(job.model.checkpoint.config.vocab_size)
    generator = torch.Generator().manual_seed(0)
    tried = min(vocabulary, HEAD_VOCABULARY)
    place = torch.device(job.model.device)
    weight = torch.empty(tried, channels).normal_(0, 0.02, generator=generator).to(place)
    states = torch.empty(HEAD_TOKENS, channels).normal_(generator=generator).to(place)
    wanted = torch.zeros(HEAD_TOKENS, dtype=torch.long, device=place)
    found = []
    for learns in (False, True):
        taken = []
        for _ in range(3):
            given = states.clone().requires_grad_(learns)
            wait(place)
            started = time.perf_counter()
            with torch.set_grad_enabled(learns):
                loss = functional.nll_loss(functional.log_softmax(functional.linear(given, weight), -1), wanted)
            if learns:
                torch.autograd.grad(loss, given)
            wait(place)
            taken.append(time.perf_counter() - started)
        found.append(min(taken) / HEAD_TOKENS * vocabulary / tried)
    return found[0], found[1]


def _solution_seconds(job: Job, shape: tuple[int, int, int], known: dict[tuple[int, int, int], float]) -> float:
    """What the solution of a reader takes: that of a smaller one, times the cube of how much smaller that is."""
    if shape in known:
        return known[shape]
    factor = max(1.0, shape[1] / SOLVED)
    outputs, inputs, kept = (max(1, int(size / factor)) for size in shape)
    generator, place = torch.Generator().manual_seed(0), torch.device(job.model.device)
    moments = Moments.zero(outputs, torch.arange(kept), place)
    matrix, read = (torch.randn(rows, inputs, generator=generator).to(place) for rows in (outputs, inputs))
    moments.add(read, read @ matrix.T)
    taken = []
    for _ in range(2):  # the first time, threads and memory are new
        wait(place)
        started = time.perf_counter()
        moments.error(matrix)
        solve_reader(moments, matrix, DAMPING)
        moments.error(matrix)
        wait(place)
        taken.append(time.perf_counter() - started)
    known[shape] = min(taken) * factor**3
    return known[shape]


# --- what bytes are read and written --------------------------------------------------------------------------------


def _of_bytes(job: Job, plan: Plan, number: int) -> list[StageEstimate]:
    """Scoring by weights, where that is asked for, and writing: what a part of a layer takes, by its bytes."""
    subject, choice = job.decided.subject, job.request.choice
    checkpoint = imagined(subject.checkpoint)
    sample: list[TensorEntry] = []
    size = 0
    for entry in sorted(checkpoint.entries, key=lambda entry: entry.size_bytes):
        if split_name(entry.name)[1][:1] == (number,) and (not sample or size + entry.size_bytes <= SAMPLE_BYTES):
            sample.append(entry)
            size += entry.size_bytes
    part = replace(subject, checkpoint=replace(checkpoint, entries=tuple(sample)))
    factor, found = checkpoint.size_bytes / size, []
    if job.measures and not reads_text(choice):
        started = time.perf_counter()
        score_weights(part, job.decided.target, choice.settled.importance or "", choice.seed, QUIET)
        found.append(StageEstimate("Scoring", factor * (time.perf_counter() - started), 1, True))
    with scratch_folder() as folder:
        entries = pruned_entries(part.checkpoint, subject.trace, plan)
        tensors = pruned_tensors(part.checkpoint, subject.trace, plan, lambda size_bytes: None)
        started = time.perf_counter()
        write_shards(folder, entries, tensors, 2**62)
        for path in folder.iterdir():
            fsync(path)
        found.append(StageEstimate("Writing", factor * (time.perf_counter() - started), 1, False))
    return found
