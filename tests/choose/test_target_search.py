"""A target for the size is met by the best candidate of those that were tried."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llmprune_cli.choose.selection import first_target, judged_windows
from llmprune_cli.choose.targets.limits import SizeLimit, measure_size, size_limit, whole_target
from llmprune_cli.choose.targets.search import Candidate, conditions_of, least_target, most_candidates, search_widths
from llmprune_cli.coupling.subject import Subject, understand
from llmprune_cli.errors import PlanError, UnsupportedError
from llmprune_cli.family.architecture import has_layers
from llmprune_cli.family.cache import Cached
from llmprune_cli.formats.gguf.writing import weights_bytes
from llmprune_cli.options import Choice, ModelReference, WidthRequest
from llmprune_cli.plan.requested_widths import Target, resolve
from llmprune_cli.run.calibration import CalibrationText
from llmprune_cli.sizes import Budget, size_text
from llmprune_cli.source.full_model import load_model
from llmprune_cli.source.opening import open_checkpoint
from llmprune_cli.text.corpus import Corpus
from support import families
from support.architectures import architecture_of, count_llama, llama_on_paper
from support.cli import CALIBRATED, run_cli
from support.full import examples, in_full
from support.refusals import PLAN, UNSUPPORTED, assert_refused
from support.tiny import BYTE_LEVEL_VOCABULARY, save_byte_level, save_tiny


@pytest.mark.parametrize("family", examples(["llama", "gpt2", "qwen3_moe", "gemma2"], ["llama"]))
@pytest.mark.parametrize("share", examples(["85%", "60%"], ["60%"]))
def test_a_target_is_reached_and_never_exceeded(family: str, share: str, tmp_path: Path, text_file: Path) -> None:
    settings = {**families.SIZES, **families.FAMILIES[family]}
    source = save_tiny(tmp_path / "model", families.model_type(family), **settings)
    run = run_cli(
        *("prune", source, "--target-params", share, "--output", tmp_path / "out", "--json"),
        *("--calibration", text_file, *CALIBRATED),
    )
    assert run.code == 0, run.stderr
    result = json.loads(run.stdout)
    limit = float(share[:-1]) / 100 * result["before"]["parameters"]
    assert 0.5 * limit < result["after"]["parameters"] <= limit
    assert result["importance"] == "consensus" and result["refit"] == "residual"
    divergences = [candidate["kl"] for candidate in result["candidates"]]
    assert divergences == sorted(divergences) and all(c["parameters"] <= limit for c in result["candidates"])
    assert result["candidates"][0]["widths"] == result["after"]["widths"]
    tried = {"llama": "num_attention_heads", "qwen3_moe": "num_experts"}
    if family in tried:
        assert len({candidate["widths"][tried[family]] for candidate in result["candidates"]}) > 1
    with open_checkpoint(ModelReference(str(tmp_path / "out")), need_weights=True) as pruned:
        load_model(pruned, "cpu", "float32")


def test_a_dry_run_shows_the_candidates(tiny_llama: Path, text_file: Path) -> None:
    options = ("--target-size", "100KB", "--dry-run", "--calibration", text_file, *CALIBRATED)
    run = run_cli("prune", tiny_llama, *options)
    assert run.code == 0 and "Candidates, best first" in run.stdout and "Dry run" in run.stdout
    most = re.search(r"Expect about \d+ (?:s|min|h).* and at most (\d+) candidates, ", run.stderr)
    tried = re.findall(r"^Trying (\d+) of at most (\d+): ", run.stderr, re.MULTILINE)
    assert most and [*tried] == [(str(number), most[1]) for number in range(1, len(tried) + 1)] and tried
    assert "Left to do: expect about" in run.stdout and "candidates" not in run.stdout  # what is left to do
    assert json.loads(run_cli("prune", tiny_llama, *options, "--json").stdout)["after"]["size_bytes"] <= 100_000


def test_a_size_with_a_cache_is_shown_as_the_target_counts_it(tiny_llama: Path, text_file: Path) -> None:
    options = ("--target-size", "110KB", "--context", "64", "--calibration", text_file, *CALIBRATED, "--dry-run")
    result = json.loads(run_cli("prune", tiny_llama, *options, "--json").stdout)
    for side in ("before", "after"):
        widths = result[side]["widths"]
        cached = 2 * widths["num_hidden_layers"] * widths["num_key_value_heads"] * widths["head_dim"] * 64 * 4
        assert result["counted"][f"{side}_bytes"] == result[side]["size_bytes"] + cached
    assert result["counted"]["after_bytes"] <= 110_000
    assert re.search(
        r"^ *size, 64 tokens cached +\S+ KiB +\S+ KiB ", run_cli("prune", tiny_llama, *options).stdout, re.M
    )


@in_full
def test_a_size_in_a_type_is_that_of_the_tensors_in_the_file(tmp_path: Path, text_file: Path) -> None:
    from gguf import GGUFReader

    model = save_tiny(tmp_path / "model", num_hidden_layers=4, vocab_size=BYTE_LEVEL_VOCABULARY)
    save_byte_level(model)
    text = ("--calibration", text_file, "--calibration-tokens", "80", "--calibration-seq-len", "40")
    words = ("--target-size", "110 KB as q8_0", "--context", "64", "--importance", "range", "--refit", "none")
    run = run_cli("prune", model, *words, *text, "--output", tmp_path / "out", "--gguf", "q8_0", "--json")
    assert run.code == 0, run.stderr
    result, (file,) = json.loads(run.stdout), list((tmp_path / "out-gguf").glob("*.gguf"))
    assert result["target"] == "110,000 bytes as q8_0 with the KV cache of 64 tokens"
    widths = result["after"]["widths"]
    cached = 2 * widths["num_hidden_layers"] * widths["num_key_value_heads"] * widths["head_dim"] * 64 * 2
    with open_checkpoint(ModelReference(str(tmp_path / "out")), need_weights=True) as checkpoint:
        counted = weights_bytes(checkpoint.entries, checkpoint.config, "q8_0")
    assert counted == sum(int(tensor.n_bytes) for tensor in GGUFReader(file).tensors)
    assert 0.8 * 110_000 < counted + cached <= 110_000
    assert result["counted"]["after_bytes"] == counted + cached < result["counted"]["before_bytes"]
    shown = run_cli("prune", model, *words, *text, "--dry-run").stdout
    after = size_text(counted + cached)
    assert re.search(rf"^ *size as q8_0, 64 tokens cached +\S+ KiB +{after} ", shown, re.MULTILINE), shown


def test_a_size_in_a_type_that_a_family_is_not_written_in_is_refused(make_tiny: Callable[..., Path]) -> None:
    run = run_cli("prune", make_tiny("opt", ffn_dim=48), "--target-size", "50KB as q8_0", "--dry-run")
    assert_refused(run, UNSUPPORTED, "Its size as q8_0 is unknown", "does not write opt for llama.cpp")
    run = run_cli("prune", make_tiny(), "--target-size", "4GiB as q8_0", "--context", "64", "--dry-run")
    assert_refused(run, PLAN, "4,294,967,296 bytes (4.00 GiB) as q8_0 with the KV cache of 64 tokens removes nothing")


def test_a_cache_that_is_not_known_is_said_and_cannot_be_asked_for(make_tiny: Callable[..., Path]) -> None:
    model = make_tiny("openai-gpt", n_layer=2, n_embd=64, n_head=8, n_positions=64)
    assert re.search(r"^KV cache per token +unknown$", run_cli("inspect", model).stdout, re.MULTILINE)
    assert json.loads(run_cli("inspect", model, "--json").stdout)["before"]["kv_cache_bytes_per_token"] is None
    run = run_cli("prune", model, "--target-size", "300KB", "--context", "64", "--dry-run")
    assert_refused(run, UNSUPPORTED, "What openai-gpt keeps of a token", "Leave --context out")


@pytest.mark.parametrize("asked", ["--layers 2", "--layers 2 --importance magnitude", "--target 80%"])
def test_layers_whose_work_follows_their_number_go_from_the_end(
    make_tiny: Callable[..., Path], text_file: Path, asked: str
) -> None:
    model = make_tiny("gpt2", num_hidden_layers=4, n_inner=48, scale_attn_by_inverse_layer_idx=True)
    text = () if "magnitude" in asked else ("--calibration", text_file, *CALIBRATED)
    run = run_cli("prune", model, *asked.split(), "--refit", "none", *text, "--dry-run", "--json")
    assert run.code == 0, run.stderr
    result = json.loads(run.stdout)
    if "--layers" in asked:
        assert result["dropped_layers"] == [2, 3]
    else:
        assert len({candidate["widths"]["num_hidden_layers"] for candidate in result["candidates"]}) > 1


# --- on paper ------------------------------------------------------------------------------------------------------

WIDE = {"intermediate_size": 192, "num_hidden_layers": 8, "max_position_embeddings": 64}
LESS_IS_WORSE = tuple(float(layer) for layer in range(8))  # the deeper a layer, the more it matters


def search(
    subject: Subject,
    budget: Budget,
    scores: tuple[float, ...],
    judge: Callable[[Target], float],
    keep_layers: tuple[int, ...] = (),
    bound: Target | None = None,
    round_to: int | None = None,
) -> tuple[Candidate, ...]:
    conditions = conditions_of(subject, WidthRequest(keep_layers=keep_layers, round_to=round_to), None)
    return search_widths(subject, size_limit(subject, budget), scores, judge, conditions, bound)


def missing_layers(target: Target) -> float:
    """A divergence that only layers cause."""
    return 8 - len(target.layers)


def missing_neurons(target: Target) -> float:
    """A divergence that only neurons cause."""
    return -target.widths.intermediate_size


@pytest.mark.parametrize("changes", [{}, {"num_attention_heads": 4}, WIDE, {"hidden_size": 128}])
def test_sizes_are_those_of_the_formula(changes: dict[str, int]) -> None:
    subject = llama_on_paper(**changes)
    whole = Target(subject.widths, tuple(range(subject.widths.num_hidden_layers)), ())
    assert measure_size(subject, whole) == (count_llama(subject.widths), 2 * count_llama(subject.widths))
    for asked in (WidthRequest(pruning_ratio=0.5), WidthRequest(num_key_value_heads=1, num_hidden_layers=1)):
        target = resolve(subject.architecture, {}, asked)
        assert measure_size(subject, target)[0] == count_llama(target.widths)


@pytest.mark.parametrize("judge", [missing_layers, missing_neurons])
@pytest.mark.parametrize("share", [0.9, 0.6, 0.4])
def test_candidates_fit_come_best_first_and_have_the_widest_mlp(share: float, judge: Callable[[Target], float]) -> None:
    subject = llama_on_paper(**WIDE)
    limit = share * count_llama(subject.widths)
    found = search(subject, Budget(share, "share"), LESS_IS_WORSE, judge)
    assert [candidate.kl for candidate in found] == sorted(judge(candidate.target) for candidate in found)
    assert len({(candidate.target.widths, candidate.target.layers) for candidate in found}) == len(found) > 1
    for candidate in found:
        widths = candidate.target.widths
        assert widths.hidden_size == 64 and candidate.parameters == count_llama(widths) <= limit
        wider = replace(widths, intermediate_size=widths.intermediate_size + 2)  # the step of 192 neurons
        assert widths.intermediate_size % 2 == 0 and (widths.intermediate_size == 192 or count_llama(wider) > limit)


def test_bytes_are_a_limit_too() -> None:
    subject = llama_on_paper(**WIDE)
    (best, *_) = search(subject, Budget(200_000, "bytes"), LESS_IS_WORSE, missing_layers)
    assert 190_000 < 2 * best.parameters <= 200_000


def test_neurons_come_in_the_multiples_that_are_asked_for() -> None:
    subject = llama_on_paper(**WIDE)
    for candidate in search(subject, Budget(0.6, "share"), LESS_IS_WORSE, missing_layers, round_to=48):
        assert candidate.target.widths.intermediate_size % 48 == 0 and candidate.target.widths.hidden_size == 64


@pytest.mark.parametrize(("neurons", "step"), [(14336, 256), (4096, 64), (1536, 32), (48, 1)])
@pytest.mark.parametrize("kind", ["q4_k_m", "q8_0"])
def test_where_quantized_weights_are_counted_blocks_divide_the_neurons(kind: str, neurons: int, step: int) -> None:
    subject = llama_on_paper(intermediate_size=neurons)
    choice = Choice(target=f"1MB as {kind}")
    found = [target.widths.intermediate_size for target in _tried(subject, choice)]
    assert found and all(own % step == 0 for own in found)
    asked = conditions_of(subject, WidthRequest(round_to=3), choice.budget)
    assert asked.steps == {"intermediate_size": 3}


def test_blocks_divide_each_kind_of_neurons_in_steps_of_its_own() -> None:
    """A Qwen3-235B names 12,288 neurons, of which no layer has any, beside experts of 1,536."""
    sizes = {"intermediate_size": 12288, "moe_intermediate_size": 1536}
    subject = replace(llama_on_paper(), architecture=architecture_of("qwen3_moe", **sizes))
    budget = Choice(target="1MB as q4_k_m").budget
    both = {"intermediate_size": 256, "moe_intermediate_size": 32}
    assert conditions_of(subject, WidthRequest(), budget).steps == both
    trace = replace(subject.trace, refused={"intermediate_size": "no tensor has it"})
    assert conditions_of(replace(subject, trace=trace), WidthRequest(), budget).steps == {"moe_intermediate_size": 32}


def test_the_finest_steps_of_all_kinds_of_neurons_are_tried() -> None:
    """Of 32 steps of 256 neurons and 64 of 64 none is left out, though the former are the wider MLP."""
    architecture = architecture_of("qwen3_moe", head_dim=8, intermediate_size=8192, moe_intermediate_size=4096)
    subject = replace(llama_on_paper(intermediate_size=8192), architecture=architecture)
    limit = SizeLimit(3136, lambda target: target.widths.moe_intermediate_size, "neurons", whole_target(subject))
    conditions = conditions_of(subject, WidthRequest(), Choice(target="1MB as q4_k_m").budget)
    found = search_widths(subject, limit, (0.0,) * 4, missing_neurons, conditions)
    assert {own.target.widths.moe_intermediate_size for own in found} == {3136}  # 49 times 64


@pytest.mark.parametrize(("neurons", "step"), [(14336, 128), (1536, 16), (48, 1)])
def test_a_target_is_met_more_closely_than_a_ratio(neurons: int, step: int) -> None:
    subject = llama_on_paper(intermediate_size=neurons)
    found = [target.widths.intermediate_size for target in _tried(subject, Choice(target="1MB"))]
    assert all(own % step == 0 for own in found) and any(own % (2 * step) for own in found), found


def _tried(subject: Subject, choice: Choice) -> list[Target]:
    """What a search for two thirds of the weights tries."""
    whole = whole_target(subject)
    limit = size_limit(subject, Budget(2 / 3 * measure_size(subject, whole)[1], "bytes"))
    scores = (0.0,) * subject.widths.num_hidden_layers
    found = search_widths(subject, limit, scores, missing_neurons, conditions_of(subject, choice.widths, choice.budget))
    return [own.target for own in found]


def test_bytes_count_the_cache_of_keys_and_values() -> None:
    subject = llama_on_paper(**WIDE)
    whole = Target(subject.widths, tuple(range(8)), ())
    limit = size_limit(subject, Budget(10**6, "bytes", context=100))
    cached = 2 * 8 * 2 * 8 * 100 * 2  # keys and values, layers, KV heads of 8 numbers, tokens, bytes
    assert limit.of(whole) == measure_size(subject, whole)[1] + cached
    fewer = replace(subject.widths, num_key_value_heads=1, num_attention_heads=4, num_hidden_layers=4)
    target = Target(fewer, (0, 1, 2, 3), ())
    assert limit.of(target) == measure_size(subject, target)[1] + cached // 4


def test_a_cache_that_is_not_known_is_not_counted() -> None:
    subject = llama_on_paper(**WIDE)
    unknown = replace(subject, architecture=replace(subject.architecture, cached=None))
    with pytest.raises(UnsupportedError, match=r"What llama keeps of a token .* Leave --context out"):
        size_limit(unknown, Budget(10**6, "bytes", context=100))
    whole = whole_target(unknown)
    assert size_limit(unknown, Budget(10**6, "bytes")).of(whole) == measure_size(unknown, whole)[1]


def test_keys_that_transformers_repeats_are_counted_once_in_a_type_of_gguf() -> None:
    subject = llama_on_paper(**WIDE)
    repeated = replace(subject, architecture=replace(subject.architecture, cached=(Cached(of_head=16),) * 8))
    whole = whole_target(repeated)
    for dtype, heads in ((None, 8), ("q8_0", 2)):
        limit = size_limit(repeated, Budget(10**6, "bytes", dtype, context=100), lambda _: 0)
        assert limit.of(whole) == 16 * heads * 8 * 100 * 2


def test_layers_go_by_their_scores() -> None:
    subject = llama_on_paper(**WIDE)
    scores = (5.0, 1.0, 4.0, 0.5, 3.0, 2.0, 6.0, 7.0)
    found = search(subject, Budget(0.7, "share"), scores, missing_neurons)
    order = [3, 1, 5, 4, 2, 0, 6, 7]
    for candidate in found:
        assert candidate.target.layers == tuple(sorted(order[8 - len(candidate.target.layers) :]))
    assert len({candidate.target.layers for candidate in found}) > 2


def test_a_way_ends_when_it_gets_worse() -> None:
    """Of layers a second time in a row, of heads at once; each way starts at the best that was found before it."""
    tried: list[tuple[int, int, int]] = []

    def judge(target: Target) -> float:
        tried.append((len(target.layers), target.widths.num_key_value_heads, target.widths.num_attention_heads))
        return abs(len(target.layers) - 7) + 10 * (2 - target.widths.num_key_value_heads)

    search(llama_on_paper(**WIDE), Budget(0.7, "share"), LESS_IS_WORSE, judge)
    assert tried == [
        (8, 2, 8),
        (7, 2, 8),
        (6, 2, 8),
        (5, 2, 8),
        (7, 1, 4),
        (7, 2, 4),
    ]  # 64 channels are no multiple of 6 heads


@pytest.mark.parametrize("judge", [missing_layers, missing_neurons])
def test_no_more_goes_than_where_a_smaller_budget_is_spent_best(judge: Callable[[Target], float]) -> None:
    subject = llama_on_paper(**WIDE)
    (bound, *_) = search(subject, Budget(0.5, "share"), LESS_IS_WORSE, judge)
    free = search(subject, Budget(0.8, "share"), LESS_IS_WORSE, judge)
    bounded = search(subject, Budget(0.8, "share"), LESS_IS_WORSE, judge, bound=bound.target)
    most = bound.target.widths
    for candidate in bounded:
        own = candidate.target.widths
        assert len(candidate.target.layers) >= len(bound.target.layers)
        assert own.num_key_value_heads >= most.num_key_value_heads and own.heads_per_group >= most.heads_per_group
    assert len(bounded) <= len(free) and bounded[0] == free[0]


@pytest.fixture(scope="module")
def rhythmic(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """A model of which few layers can go one by one: attention and experts come by rhythms."""
    rhythms = {"attn_layer_period": 8, "attn_layer_offset": 4, "expert_layer_period": 2, "expert_layer_offset": 1}
    sizes = {"num_hidden_layers": 16, "hidden_size": 32, "num_attention_heads": 4, "num_experts": 4}
    own = {**families.FAMILIES["jamba"], **sizes, **rhythms}
    folder = save_tiny(tmp_path_factory.mktemp("rhythmic") / "model", "jamba", **own)
    with open_checkpoint(ModelReference(str(folder)), need_weights=True) as checkpoint:
        return understand(checkpoint)


@pytest.mark.parametrize("share", [0.4, 0.45])
def test_where_the_layers_of_the_least_scores_cannot_go_others_do(rhythmic: Subject, share: float) -> None:
    scores = tuple(float(7 * layer % 16) for layer in range(16))
    found = search(rhythmic, Budget(share, "share"), scores, lambda target: -len(target.layers))
    whole = measure_size(rhythmic, whole_target(rhythmic))[0]
    assert len(found) > 1 and all(candidate.parameters <= share * whole for candidate in found)
    assert all(has_layers(rhythmic.architecture.config, candidate.target.layers) for candidate in found)
    assert 8 < len(found[0].target.layers) < 16


def test_layers_that_would_compute_something_else_are_not_tried(make_tiny: Callable[..., Path]) -> None:
    folder = make_tiny("gpt2", num_hidden_layers=8, n_inner=48, scale_attn_by_inverse_layer_idx=True)
    with open_checkpoint(ModelReference(str(folder)), need_weights=True) as checkpoint:
        subject = understand(checkpoint)
    for kept in ((), (0, 1)):
        found = search(subject, Budget(0.7, "share"), LESS_IS_WORSE, missing_layers, keep_layers=kept)
        assert min(len(candidate.target.layers) for candidate in found) < 8
        assert all(candidate.target.layers == tuple(range(len(candidate.target.layers))) for candidate in found)
    last_stays = conditions_of(subject, WidthRequest(keep_layers=(-1,)), None)
    assert len(least_target(subject, last_stays).layers) == 8


def test_where_layers_leave_much_room_other_ways_start_from_all_of_them(rhythmic: Subject) -> None:
    scores = (0.0,) * 16
    found = search(rhythmic, Budget(0.6, "share"), scores, missing_neurons)
    assert len(found[0].target.layers) == 8 and found[0].target.widths.intermediate_size == 48
    fewer_experts = [own.target for own in found if own.target.widths.num_experts == 3]
    assert fewer_experts and all(len(target.layers) == 16 for target in fewer_experts)
    assert len(found) <= most_candidates(rhythmic)


def test_refused_widths_are_left_whole() -> None:
    subject = llama_on_paper(("num_key_value_heads", "num_attention_heads"), **WIDE)
    for candidate in search(subject, Budget(0.6, "share"), LESS_IS_WORSE, missing_neurons):
        assert candidate.target.widths.num_attention_heads == 8
    subject = llama_on_paper(("intermediate_size",), **WIDE)
    found = search(subject, Budget(0.6, "share"), LESS_IS_WORSE, missing_layers)
    assert {candidate.target.widths.intermediate_size for candidate in found} == {192}
    assert all(candidate.parameters <= 0.6 * count_llama(subject.widths) for candidate in found)
    subject = llama_on_paper(("num_hidden_layers",), **WIDE)
    assert len(least_target(subject, conditions_of(subject, WidthRequest(), None)).layers) == 8
    found = search(subject, Budget(0.6, "share"), LESS_IS_WORSE, missing_neurons)
    assert {len(candidate.target.layers) for candidate in found} == {8} and len(found) <= most_candidates(subject)


@pytest.mark.parametrize(("kept", "share"), [((0, -1), 0.8), ((2,), 0.5), ((0, 1, 2, 3, 4, 5), 0.85)])
def test_beside_protected_layers_only_whole_layers_go_and_as_few_as_can(kept: tuple[int, ...], share: float) -> None:
    subject = llama_on_paper(**WIDE)
    (only,) = search(subject, Budget(share, "share"), LESS_IS_WORSE, missing_layers, keep_layers=kept)
    layers, limit = only.target.layers, share * count_llama(subject.widths)
    assert {layer % 8 for layer in kept} <= {*layers} and only.target.widths.changed_from(subject.widths) == (
        "num_hidden_layers",
    )
    more = replace(only.target.widths, num_hidden_layers=len(layers) + 1)
    assert only.parameters <= limit < count_llama(more)
    free = [layer for layer in range(8) if layer not in {number % 8 for number in kept}]
    assert sorted({*free} - {*layers}) == free[: 8 - len(layers)]  # those of the least scores


@pytest.mark.parametrize(("kept", "remedy"), [((), "give the widths yourself"), ((0, 1, 2), "protect fewer layers")])
def test_a_budget_out_of_reach_names_the_least(kept: tuple[int, ...], remedy: str) -> None:
    subject = llama_on_paper(**WIDE)
    conditions = conditions_of(subject, WidthRequest(keep_layers=kept), None)
    least = measure_size(subject, least_target(subject, conditions))[0]
    with pytest.raises(PlanError, match=f"at most 1,000 parameters; .* reaches is {least:,} .*{remedy}"):
        limit = size_limit(subject, Budget(1000, "parameters"))
        first_target(subject, Choice(WidthRequest(keep_layers=kept)), limit)
    assert search(subject, Budget(least, "parameters"), LESS_IS_WORSE, missing_layers, keep_layers=kept)


def test_the_least_is_less_in_every_width() -> None:
    subject = llama_on_paper(**WIDE)
    widths = least_target(subject, conditions_of(subject, WidthRequest(), None)).widths
    assert (widths.num_key_value_heads, widths.num_attention_heads, widths.num_hidden_layers) == (1, 2, 4)
    assert widths.intermediate_size == 28 and widths.hidden_size == 64  # 15% of 192, in steps of two


@pytest.mark.parametrize(("length", "windows"), [(512, 4), (2048, 1), (4096, 1), (16, 128)])
def test_a_candidate_is_judged_on_as_many_tokens_whatever_the_window_is(length: int, windows: int) -> None:
    text = CalibrationText(Corpus("", "", ""), *(torch.zeros(2, length) for _ in range(3)))
    assert judged_windows(text) == windows
