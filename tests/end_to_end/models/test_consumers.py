"""Stock software takes a pruned folder as it is: lm-evaluation-harness, peft, mlx-lm, vLLM, transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

from support import ROOT
from support.cli import BY_MAGNITUDE, run_cli
from support.full import in_full
from support.stock import load_stock

CAPITALS = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Germany": "Berlin"}
TASK = """
task: capitals
dataset_path: json
dataset_kwargs: {data_files: {test: TEST_FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "The capital of {{country}} is"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def pruned(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 without a KV group in each layer (so that heads × head dim is not the hidden size) and fewer neurons."""
    folder = tmp_path_factory.mktemp("consumers") / "pruned"
    widths = ("--num-key-value-heads", "2", "--intermediate-size", "1472")
    run = run_cli("prune", smollm2, *widths, *BY_MAGNITUDE, "--output", folder)
    assert run.code == 0, run.stderr
    return folder


@pytest.mark.parametrize("which", ["smollm2", "pruned"])
def test_lm_eval_scores_a_folder(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed; run make check-consumers")
    folder: Path = request.getfixturevalue(which)
    capitals = list(CAPITALS.values())
    rows = [{"country": c, "choices": capitals, "answer": number} for number, c in enumerate(CAPITALS)]
    (tmp_path / "capitals.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "capitals.yaml").write_text(TASK.replace("TEST_FILE", str(tmp_path / "capitals.jsonl")))
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={folder}"]
    command += ["--tasks", "capitals", "--include_path", str(tmp_path), "--device", "cpu", "--batch_size", "1"]
    env = {**os.environ, "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [*command, "--output_path", str(tmp_path / "out")], capture_output=True, text=True, cwd=tmp_path, env=env
    )
    assert done.returncode == 0, done.stderr
    (results,) = (tmp_path / "out").rglob("results_*.json")
    accuracy = json.loads(results.read_text())["results"]["capitals"]["acc,none"]
    assert 0 <= accuracy <= 1 and (which == "pruned" or accuracy > 0.75)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_peft_tunes_and_merges_a_pruned_folder(pruned: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed; run make check-consumers")
    torch.manual_seed(0)
    model = peft.get_peft_model(
        load_stock(pruned).float(), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    )
    tokens = torch.randint(3, 1000, (2, 24))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(3):
        loss = model(input_ids=tokens, labels=tokens).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    with torch.no_grad():
        tuned = model(input_ids=tokens).logits
        model.merge_and_unload().save_pretrained(tmp_path / "merged")
        merged = load_stock(tmp_path / "merged")(input_ids=tokens).logits
    torch.testing.assert_close(merged, tuned, rtol=1e-3, atol=1e-3)


def test_mlx_computes_the_same(pruned: Path, tmp_path: Path) -> None:
    """In float32, as both round bfloat16 in ways of their own."""
    pytest.importorskip("mlx_lm", reason="mlx_lm is not installed; run make check-consumers")
    run = run_cli("export", pruned, "--dtype", "float32", "--output", tmp_path / "whole")
    assert run.code == 0, run.stderr
    code = (
        "import sys, mlx.core as mx, mlx_lm, numpy\n"
        "model, tokenizer = mlx_lm.load(sys.argv[1])\n"
        "tokens = tokenizer.encode('The history of the city is one of trade and war.')\n"
        "numpy.savez(sys.argv[2], tokens=tokens, logits=numpy.array(model(mx.array([tokens]))))"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "whole", tmp_path / "mlx.npz"], check=True)
    found = numpy.load(tmp_path / "mlx.npz")
    with torch.no_grad():
        logits = load_stock(tmp_path / "whole")(torch.tensor(found["tokens"])[None]).logits
    ours, theirs = logits.log_softmax(-1), torch.tensor(found["logits"]).log_softmax(-1)
    assert (ours.exp() * (ours - theirs)).sum(-1).mean() < 1e-5


BLOCKS = {"transformers": "AutoModelForCausalLM", "vllm": "import LLM", "mlx_lm": "mlx_lm.generate"}


@in_full
@pytest.mark.parametrize("runtime", BLOCKS)
def test_the_documented_block_generates_text(runtime: str, pruned: Path, tmp_path: Path) -> None:
    pytest.importorskip(runtime, reason=f"{runtime} is not installed; run make check-consumers")
    if runtime == "vllm" and not torch.cuda.is_available():
        pytest.skip("vLLM from PyPI needs a GPU")
    page = (ROOT / "docs" / "exports.md").read_text(encoding="utf-8")
    script = next(block for block in page.split("```") if block.startswith("sh\n") and BLOCKS[runtime] in block)[3:]
    (tmp_path / "pruned").symlink_to(pruned)
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "400"}
    done = subprocess.run(["bash", "-ec", script], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 50
