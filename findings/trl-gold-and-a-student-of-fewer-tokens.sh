#!/usr/bin/env bash
# trl 1.16.0: `ULDLoss`, by which GOLDTrainer distills between tokenizers, where the student has some of its teacher's tokens.
#
# Bet: with `uld_use_hybrid_loss`, which compares the tokens that both have, a student that spells its teacher's word in two
# pieces, as surely as its teacher says it in one, loses least: split tokens are merged by the product of their chances.
# Seen: it loses most, with either way to merge. The product stands at the student's piece and the word's chance at a token that
# the student lacks. The student has no token that its teacher lacks, so what is unmatched is left out of the loss, and the word
# with it. A student that expects anything else is better, and one that rules the word out is best. Without the option, "bayesian"
# ranks them as one would, and "observed", the default, which takes the chances behind each token, does not tell them apart.
#
#   hybrid, observed: spelled right 0.1305, undecided 0.1263, ruled out 0.1228
#   hybrid, bayesian: spelled right 0.1157, undecided 0.0278, ruled out 0.0024
#   sorted, observed: spelled right 0.7450, undecided 0.7450, ruled out 0.7450
#   sorted, bayesian: spelled right 0.0200, undecided 0.5456, ruled out 0.5050
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --no-compile --disable-pip-version-check --target "$place/packages" \
    torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0 trl==1.16.0
cd "$place"
export TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 TQDM_DISABLE=1 TRL_EXPERIMENTAL_SILENCE=1
PYTHONPATH=packages python3 -W ignore - > log.txt <<'END'
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from trl.experimental.gold.gold_config import GOLDConfig
from trl.experimental.gold.gold_trainer import ULDLoss

def tokenizer(vocabulary, merges):
    model = models.BPE(vocab={token: number for number, token in enumerate(vocabulary)}, merges=merges)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))

teacher, student = tokenizer(["a", "b", ".", "ab"], [("a", "b")]), tokenizer(["a", "b", "."], [])
text = ".ab."  # the first of them is the prompt
its, own = (torch.tensor([reader(text)["input_ids"]]) for reader in (teacher, student))
bytes_of = ([[0, 0], [0, 2], [2, 3]], [[0, 0], [0, 1], [1, 2], [2, 3]])
its_bytes, own_bytes = (torch.tensor([places]) for places in bytes_of)
word = torch.tensor([[[0.01, 0.01, 0.01, 0.97], [0.01, 0.01, 0.97, 0.01], [0.25] * 4]]).log()  # what the teacher expects
end, last = [0.01, 0.01, 0.98], [1 / 3] * 3
students = {
    "spelled right": [[0.98, 0.01, 0.01], [0.01, 0.98, 0.01], end, last],
    "undecided": [[1 / 3] * 3, [1 / 3] * 3, end, last],
    "ruled out": [[0.01, 0.01, 0.98], [0.01, 0.01, 0.98], end, last],
}
options = dict(uld_skip_student_eos=False, uld_skip_teacher_eos=False, report_to=[], use_cpu=True, bf16=False)
for hybrid in (True, False):
    for strategy in ("observed", "bayesian"):
        config = GOLDConfig("out", use_uld_loss=True, uld_use_hybrid_loss=hybrid, uld_token_merge_strategy=strategy, **options)
        loss = ULDLoss(config, student, teacher, device="cpu")
        labels = [torch.cat([torch.full((1, 1), -100), ids[:, 1:]], 1) for ids in (own, its)]
        lost = [
            f"{name} {float(loss(torch.tensor([chances]).log(), word, *labels, own, its, own_bytes, its_bytes)):.4f}"
            for name, chances in students.items()
        ]
        print(f"SEEN {'hybrid' if hybrid else 'sorted'}, {strategy}: {', '.join(lost)}")
END
sed -n 's/^SEEN //p' log.txt > seen.txt
cat seen.txt
diff seen.txt - <<'END'
hybrid, observed: spelled right 0.1305, undecided 0.1263, ruled out 0.1228
hybrid, bayesian: spelled right 0.1157, undecided 0.0278, ruled out 0.0024
sorted, observed: spelled right 0.7450, undecided 0.7450, ruled out 0.7450
sorted, bayesian: spelled right 0.0200, undecided 0.5456, ruled out 0.5050
END
