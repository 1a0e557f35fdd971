"""What each command takes, and what is refused in a moment."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llmprune_cli.choose.importances import IMPORTANCES, LAYER_IMPORTANCES, needs_text, ranks_layers, reads_text
from llmprune_cli.commands.push import check_push_to
from llmprune_cli.errors import UsageError
from llmprune_cli.formats.registry import FORMATS
from llmprune_cli.formats.request import Conversion, check_conversion, check_counted
from llmprune_cli.heal import LEARNED, MODES, OPTIMIZERS, REPORTERS, TEACHER_MODES, TRAINED
from llmprune_cli.heal.options import Healed, Healing, Teaching
from llmprune_cli.options import (
    ROTATES,
    Choice,
    Delivery,
    Evaluation,
    ModelReference,
    Scratch,
    Text,
)
from llmprune_cli.processes import is_first
from llmprune_cli.repair import REFITS
from llmprune_cli.startup.model_argument import has_weights
from llmprune_cli.vocabulary.request import VocabularyRequest, check_vocabulary

HEAD_BYTES = 4096  # of a file, by which it is known
DTYPES = ("float32", "float16", "bfloat16")
# The values that an option has to be one of.
CHOICES: dict[tuple[type, str], tuple[str, ...]] = {
    (Choice, "importance"): tuple(IMPORTANCES),
    (Choice, "layer_importance"): tuple(LAYER_IMPORTANCES),
    (Choice, "refit"): tuple(REFITS),
    (Choice, "compute_dtype"): ("auto", *DTYPES),
    (Healing, "loss_on"): LEARNED,
    (Healing, "mode"): MODES,
    (Healing, "train"): TRAINED,
    (Healing, "optimizer"): tuple(OPTIMIZERS),
    (Healing, "compute_dtype"): ("auto", "float32", "bfloat16"),
    (Teaching, "teacher_mode"): TEACHER_MODES,
    (Healed, "report_to"): tuple(REPORTERS),
    (ModelReference, "dtype"): DTYPES,
    (Conversion, "format"): tuple(FORMATS),
}
CALLED = {"wanda": "activation", "llm-pruner": "taylor"}  # by the names of the papers that they are from


PRUNE_PARTS = (Choice, Text, Delivery, Scratch, Evaluation, VocabularyRequest)  # of what `prune` takes


@dataclass(frozen=True)
class PruneRequest:
    """What `prune` takes."""

    model: ModelReference
    choice: Choice
    text: Text = field(default_factory=Text)
    delivery: Delivery = field(default_factory=Delivery)
    scratch: Scratch = field(default_factory=Scratch)
    evaluation: Evaluation | None = None  # None: nothing is evaluated
    vocabulary: VocabularyRequest = field(default_factory=VocabularyRequest)

    def __post_init__(self) -> None:
        """Refuse what contradicts itself, or would do nothing."""
        self._check_what_goes()
        delivery, scratch, evaluates = self.delivery, self.scratch, self.evaluation is not None
        if delivery.output is None and not (delivery.dry_run or evaluates or delivery.save_plan):
            raise UsageError("give --output DIR, or --dry-run, --save-plan or --eval.")
        if self.choice.rotate and (delivery.plan or delivery.save_plan or scratch.resume):
            raise UsageError(ROTATES)
        if scratch.resume and (delivery.output is None or delivery.dry_run):
            raise UsageError("--resume goes on with a run that writes a model; give its --output, and no --dry-run.")
        if delivery.dry_run and evaluates:
            raise UsageError("--dry-run makes no model to evaluate; leave out --eval.")
        if delivery.report and (delivery.dry_run or not self.needs_text or not (delivery.output or evaluates)):
            raise UsageError(
                "--report draws what calibration measures on a pruned model: give --output or --eval, and a --refit or "
                "an --importance that reads text."
            )
        self._check_recover()
        if delivery.gguf is not None and (delivery.output is None or delivery.dry_run):
            raise UsageError("--gguf exports a model that is written; give its --output, and no --dry-run.")
        if delivery.push_to is not None and (delivery.output is None or delivery.dry_run):
            raise UsageError("--push-to uploads a model that is written; give its --output, and no --dry-run.")
        folders = (("--statistics", scratch.statistics), ("--offload-dir", scratch.offload_dir))
        for name, value in (*folders, ("--resume", scratch.resume)):
            if value and not self.needs_text:
                raise UsageError(f"{name} is for runs that calibrate; give another --importance or --refit.")

    @property
    def recover(self) -> str | None:
        """Tokens to heal on afterwards; None: nothing is trained."""
        return self.delivery.recover

    def _check_recover(self) -> None:
        if self.delivery.finalists is not None and (self.recover is None or self.choice.budget is None):
            raise UsageError("--finalists heals candidates for a size; give --recover and a --target with it.")
        if self.delivery.finalists is not None and (self.delivery.save_plan or self.delivery.report):
            raise UsageError("--finalists makes several plans; leave out --save-plan and --report.")
        if self.recover is None:
            return
        if self.delivery.output is None or self.delivery.dry_run:
            raise UsageError("--recover heals a model that is written; give its --output, and no --dry-run.")
        if self.scratch.resume:
            raise UsageError("--resume goes on with one command; run prune, and then recover, which has its own.")
        try:
            _ = self.healing.token_count
        except UsageError as error:
            raise UsageError(f"--recover: {error}") from None

    @property
    def export(self) -> tuple[Conversion, Path] | None:
        """What is exported afterwards, and where to."""
        output, dtype = self.delivery.output, self.delivery.gguf
        if output is None or dtype is None:
            return None
        return Conversion("gguf", dtype), output.with_name(f"{output.name}-gguf")

    @property
    def healing(self) -> Healing:
        """How the pruned model is healed: on the text that it was calibrated on."""
        text = self.text
        return Healing(
            tokens=self.recover or "0",
            text=text.calibration,
            text_split=text.calibration_split,
            text_column=text.text_column,
            seq_len=text.calibration_seq_len,
            seed=self.choice.seed,
        )

    def check_tokens_may_go(self) -> None:
        """Refuse what does not go with a smaller vocabulary, asked for or replayed.

        Raises:
            UsageError: see above.
        """
        if self.choice.rotate:
            raise UsageError("--vocab-size does not go with --rotate; leave one of them out.")
        if self.choice.budget is not None and self.choice.budget.kind == "speedup" and self.vocabulary.number is None:
            raise UsageError("--target-speedup finds no number of tokens; give one, --vocab N, or ask for a size.")

    def _check_what_goes(self) -> None:
        widths, plan = self.choice.widths, self.delivery.plan
        asked = not widths.is_empty or self.choice.budget is not None or self.vocabulary.vocab_size is not None
        self.vocabulary.check(has_target=self.choice.budget is not None)
        if self.vocabulary.may_go:
            self.check_tokens_may_go()
        if self.choice.budget is not None and plan is not None:
            raise UsageError("a target chooses the widths; leave out the width options and --plan.")
        if plan is not None and (asked or widths.keep_layers or widths.round_to is not None):
            raise UsageError("a plan already says which widths; give --plan or width options, not both.")
        if plan is None and not asked:
            raise UsageError("say what to prune: --target, --pruning-ratio, a width of its own, or --plan.")

    @property
    def needs_text(self) -> bool:
        """Whether anything is measured on calibration text."""
        return needs_text(self.choice, self.delivery.plan is not None)

    @property
    def keeps_measurements(self) -> bool:
        """Whether a dry run measures what the run that goes on from it needs, and was told no place to keep it in."""
        has_use = reads_text(self.choice) or self.choice.settled.refit != "none"
        measures = self.choice.budget is not None or self._names_layers
        return self.delivery.dry_run and measures and has_use and self.scratch.statistics is None

    @property
    def _names_layers(self) -> bool:
        """Whether layers go that text names, and the weights for it are here; a dry run fetches none."""
        by_text = self.delivery.plan is None and ranks_layers(self.choice)
        return by_text and has_weights(self.model.name)

    @property
    def needs_weights(self) -> bool:
        """Whether headers and configuration are not enough."""
        delivery = self.delivery
        if not delivery.dry_run or delivery.save_plan is not None or self.choice.budget is not None:
            return True
        return self._names_layers

    @property
    def writes(self) -> bool:
        """Whether a model is written, if only to be evaluated."""
        return not self.delivery.dry_run and (self.delivery.output is not None or self.evaluation is not None)


def check_prune(request: PruneRequest) -> None:
    """Refuse what can be refused in a moment, before any library is loaded; nothing is written.

    Raises:
        LlmpruneError: see there.
    """
    from llmprune_cli.commands.recover.request import healing_of
    from llmprune_cli.folder.documents import MOST_JSON_BYTES, check_own_folder, is_there
    from llmprune_cli.folder.staging import check_target as check_output
    from llmprune_cli.plan.stored import read_stored
    from llmprune_cli.report.chart import check_chart_target
    from llmprune_cli.startup.config_checks import check_widths
    from llmprune_cli.startup.model_argument import check_model, check_target, check_tokenizer
    from llmprune_cli.text.names import check_column, check_split, check_texts

    delivery = request.delivery
    if request.recover is not None and delivery.output is not None:
        healing_of(request, delivery.output, Healed(delivery.output))
    check_model(request.model, request.needs_weights)
    budget = request.choice.budget
    check_target(budget, request.model.name, request.vocabulary.may_go)
    if budget is not None and budget.dtype is not None:
        check_counted(budget.dtype)
    check_widths(request.model.name, request.choice.widths)
    heals_or_judges = request.evaluation is not None or request.recover is not None
    if heals_or_judges or (request.needs_text and request.needs_weights):
        check_tokenizer(request.model.name)
    if delivery.plan is not None and not (is_there(delivery.plan) and delivery.plan.stat().st_size > MOST_JSON_BYTES):
        read_stored(delivery.plan, MOST_JSON_BYTES)  # how large a plan may be depends on the model
    text, evaluation = request.text, request.evaluation
    check_column(text.text_column, text.calibration, *([evaluation.dataset] if evaluation is not None else []))
    check_texts(text.calibration, text.text_column)
    if request.needs_text:
        check_split(text.calibration, text.calibration_split, Text.calibration_split, "--calibration-split")
    check_vocabulary(request.vocabulary, request.model.name)
    if request.evaluation is not None:
        _check_evaluated(request.evaluation)
    exported = request.export[1] if request.export is not None else None
    for folder, option in (
        (request.scratch.statistics, "--statistics"),
        (request.scratch.offload_dir, "--offload-dir"),
    ):
        if folder is not None:
            check_own_folder(folder, option, (Path(request.model.name), delivery.output, exported))
    if is_first():
        _check_saved(request)
    if is_first() and delivery.report is not None:
        check_chart_target(delivery.report, delivery.output)
    if is_first() and delivery.output is not None:
        model = Path(request.model.name)
        check_output(delivery.output, delivery.overwrite, model if is_there(model) else None)
    if is_first():
        check_push_to(delivery.push_to, delivery.public)
    if request.export is not None:
        conversion, folder = request.export
        check_export(request.model, folder, delivery.overwrite, conversion)


def _check_saved(request: PruneRequest) -> None:
    """Refuse a plan or a recipe in the place of what is read, of a model's file, or of each other."""
    from llmprune_cli.folder.documents import check_apart, check_own_folder, check_replaceable, is_there
    from llmprune_cli.text.names import parts_of

    delivery, evaluation = request.delivery, request.evaluation
    texts = [request.text.calibration, request.vocabulary.vocab_text, evaluation and evaluation.dataset]
    names = [request.model.name, *(part.name for text in texts if text for part in parts_of(text))]
    files = [*map(Path, names), *([request.vocabulary.keep_tokens] if request.vocabulary.keep_tokens else [])]
    for path, option in ((delivery.save_plan, "--save-plan"), (delivery.save_config, "--save-config")):
        if path is not None:
            check_replaceable(path, option)
            replaced = [Path(request.model.name)] if is_there(path) and not _is_saved(path) else []
            check_own_folder(path.parent, option, (delivery.output, *replaced))
            check_apart(path, option, files)
            files.append(path)


def _is_saved(path: Path) -> bool:
    """Whether a file is a plan or a recipe that an earlier run saved."""
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    return any(mark in head for mark in (b'"plan_version"', b"command: prune", b'"command": "prune"'))


def check_eval(models: Iterable[ModelReference], evaluation: Evaluation, tasks: Sequence[str] = ()) -> None:
    """The same for `eval`."""
    from llmprune_cli.run.questions.request import check_tasks
    from llmprune_cli.startup.model_argument import check_model, check_tokenizer
    from llmprune_cli.text.names import check_column

    check_column(evaluation.text_column, evaluation.dataset)
    for model in models:
        check_model(model, needs_weights=True)
        check_tokenizer(model.name)
    _check_evaluated(evaluation)
    check_tasks(tasks)


def _check_evaluated(evaluation: Evaluation) -> None:
    from llmprune_cli.text.names import WIKITEXT2, check_single, check_split, check_text

    if evaluation.dataset is not None:
        check_single(evaluation.dataset, "--dataset")
    check_text(evaluation.dataset or WIKITEXT2, evaluation.text_column)
    check_split(evaluation.dataset, evaluation.split, Evaluation.split, "--split")


def check_export(model: ModelReference, output: Path, overwrite: bool, conversion: Conversion) -> None:
    """The same for `export`."""
    from llmprune_cli.folder.documents import is_there
    from llmprune_cli.folder.staging import check_target as check_output
    from llmprune_cli.startup.model_argument import check_model

    check_conversion(conversion, output)
    check_model(model, needs_weights=True)
    source = Path(model.name)
    check_output(output, overwrite, source if is_there(source) else None)
