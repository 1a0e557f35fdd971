"""What a run keeps of its candidates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from llmprune_cli.coupling.subject import understand
from llmprune_cli.journal.workfolder import WorkFolder
from llmprune_cli.options import ModelReference
from llmprune_cli.plan.target import Target
from llmprune_cli.source.opening import open_checkpoint


def test_a_candidate_is_remembered_with_its_protected_layers(tiny_llama: Path, tmp_path: Path) -> None:
    with open_checkpoint(ModelReference(str(tiny_llama)), need_weights=False) as checkpoint:
        target = Target(understand(checkpoint).widths, (0,), ("moved",), (0,))
    work = WorkFolder(tmp_path)
    work.save_judged(target, 0.5)
    assert work.judged(target) == 0.5 and work.judged(replace(target, protected=())) is None
