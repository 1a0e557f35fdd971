#!/usr/bin/env bash
# nvidia-modelopt 0.47.0 (torch 2.13.0, transformers 5.14.1): `LogitsDistillationLoss`, its loss for healing a pruned model, as it comes.
#
# Bet: the KL divergence of teacher and student in nats, mean over tokens, so that half of it and half of a cross-entropy
# (`StaticLossBalancer(0.5)`) weigh alike, whatever the vocabulary.
# Seen: it is divided by the size of the vocabulary as well: 4,096 entries make it 4,096 times smaller, and of the balanced
# gradient the teacher's part is next to nothing. `batchmean`, the reduction that the docs of torch recommend, divides
# logits of shape [sequences, tokens, vocabulary] by the sequences alone. Only `none` and a mean of one's own is the mean over
# tokens.
#
#   256 entries: KL of a token 2.5, mean × entries 2.5, batchmean / tokens 2.5, none 2.5
#   256 entries: gradient of the teacher's half over that of the text's half 1e-03
#   4096 entries: KL of a token 2.6, mean × entries 2.6, batchmean / tokens 2.6, none 2.6
#   4096 entries: gradient of the teacher's half over that of the text's half 2e-05
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$place/packages" \
    torch==2.13.0 transformers==5.14.1 nvidia-modelopt==0.47.0
cd "$place"
PYTHONPATH=packages python3 -W ignore - > seen.txt <<'END'
import modelopt.torch.distill as mtd
import torch
from torch import nn
from torch.nn import functional
tokens, channels = 32, 64
for entries in (256, 4096):
    torch.manual_seed(0)
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(channels, entries)
            nn.init.normal_(self.head.weight, std=0.2)
        def forward(self, states):
            return self.head(states)
    student, teacher, given = Model(), Model(), torch.randn(2, tokens, channels)
    with torch.no_grad():
        own, wanted = student(given).log_softmax(-1), teacher(given).log_softmax(-1)
        true = (wanted.exp() * (wanted - own)).sum(-1).mean()
        found = {name: mtd.LogitsDistillationLoss(reduction=name)(own, wanted).mean() for name in ("mean", "batchmean", "none")}
    print(f"{entries} entries: KL of a token {true:.1f}, mean × entries {found['mean'] * entries:.1f}, "
          f"batchmean / tokens {found['batchmean'] / tokens:.1f}, none {found['none']:.1f}")
    settings = {"teacher_model": teacher, "criterion": mtd.LogitsDistillationLoss(), "loss_balancer": mtd.StaticLossBalancer(0.5)}
    both = mtd.convert(student, mode=[("kd_loss", settings)])
    both.train()
    labels = wanted.exp().flatten(0, 1).multinomial(1).flatten()
    def gradient(text):
        both.zero_grad()
        logits = both(given)
        cost = functional.cross_entropy(logits.flatten(0, 1), labels)
        both.compute_kd_loss(student_loss=cost if text else cost * 0).backward()
        return both.head.weight.grad.clone()
    of_teacher = gradient(text=False)
    of_text = gradient(text=True) - of_teacher
    print(f"{entries} entries: gradient of the teacher's half over that of the text's half {of_teacher.norm() / of_text.norm():.0e}")
END
cat seen.txt
diff seen.txt - <<'END'
256 entries: KL of a token 2.5, mean × entries 2.5, batchmean / tokens 2.5, none 2.5
256 entries: gradient of the teacher's half over that of the text's half 1e-03
4096 entries: KL of a token 2.6, mean × entries 2.6, batchmean / tokens 2.6, none 2.6
4096 entries: gradient of the teacher's half over that of the text's half 2e-05
END
