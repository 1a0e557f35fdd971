#!/usr/bin/env bash
# executorch 1.5.1, torchao 0.18.0, torch 2.13.0, on a CPU: an MLP of 1,536 neurons, and of 1,088 and 1,083 as after pruning,
# quantized as ExecuTorch's own Llama export does (`8da4w`, whose groups are of 128 unless told otherwise) and lowered to XNNPACK.
#
# Bet: a matrix whose rows the groups do not divide is an error, as in the same function's `4w`, or named; a smaller MLP is a
# smaller file.
# Seen: that matrix stays in 32 bits, without a word, so that the file of 1,088 neurons is more than twice that of 1,536, and has 13
# bits per weight. Groups of 32, which divide 1,088, make it smaller than the whole; 1,083 has no such groups. All run.
#
#   1536 neurons, groups by default: down_proj quantized True, bits per weight 4.1, over the whole 1.0, runs True
#   1088 neurons, groups by default: down_proj quantized False, bits per weight 13.4, over the whole 2.3, runs True
#   1088 neurons, groups of 32: down_proj quantized True, bits per weight 4.5, over the whole 0.8, runs True
#   1083 neurons, groups of 32: down_proj quantized False, bits per weight 13.7, over the whole 2.3, runs True
#   1088 neurons, 4w, groups of 128: AssertionError
#   messages that name groups or what was left out: 0
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/own"
"$place/own/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 executorch==1.5.1 torchao==0.18.0
cd "$place"
export HF_HUB_OFFLINE=1
cat > look.py <<'END'
import re, sys, torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackDynamicallyQuantizedPartitioner, XnnpackPartitioner
from executorch.examples.models.llama.source_transformation.quantize import quantize
from executorch.exir import to_edge_transform_and_lower
from executorch.runtime import Runtime
from torchao.utils import unwrap_tensor_subclass

class MLP(torch.nn.Module):
    def __init__(self, neurons):
        super().__init__()
        self.gate_proj, self.up_proj = (torch.nn.Linear(512, neurons, bias=False) for _ in range(2))
        self.down_proj = torch.nn.Linear(neurons, 512, bias=False)

    def forward(self, x):
        return self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))

torch.manual_seed(0)
whole = None
for neurons, groups in ((1536, {}), (1088, {}), (1088, {"group_size": 32}), (1083, {"group_size": 32})):
    model, given = MLP(neurons).eval(), torch.randn(4, 512)
    expected = model(given)
    model = quantize(model, "8da4w", **groups)
    done = type(model.down_proj.weight) is not torch.nn.Parameter
    exported = torch.export.export(unwrap_tensor_subclass(model), (given,))
    partitioners = [XnnpackDynamicallyQuantizedPartitioner(), XnnpackPartitioner()]
    file = to_edge_transform_and_lower(exported, partitioner=partitioners).to_executorch().buffer
    whole = whole or len(file)
    found = Runtime.get().load_program(file).load_method("forward").execute([given])[0]
    runs = bool((found - expected).norm() < 0.3 * expected.norm())
    said = f"groups of {groups['group_size']}" if groups else "groups by default"
    print(f"SEEN {neurons} neurons, {said}: down_proj quantized {done}, bits per weight {8 * len(file) / (3 * 512 * neurons):.1f}, "
          f"over the whole {len(file) / whole:.1f}, runs {runs}")
messages = [line for line in open(sys.argv[1]) if re.search(r"not divisible|group.?size|kipping|down_proj", line)]
try:
    quantize(MLP(1088), "4w", group_size=128)
    print("SEEN 1088 neurons, 4w, groups of 128: quantized")
except AssertionError as error:
    print("SEEN 1088 neurons, 4w, groups of 128:", type(error).__name__)
print("SEEN messages that name groups or what was left out:", len(messages))
END
own/bin/python look.py warnings.txt > log.txt 2> warnings.txt || { cat log.txt warnings.txt; exit 1; }
grep '^SEEN ' log.txt | cut -d' ' -f2- > seen.txt
cat seen.txt
diff seen.txt - <<'END'
1536 neurons, groups by default: down_proj quantized True, bits per weight 4.1, over the whole 1.0, runs True
1088 neurons, groups by default: down_proj quantized False, bits per weight 13.4, over the whole 2.3, runs True
1088 neurons, groups of 32: down_proj quantized True, bits per weight 4.5, over the whole 0.8, runs True
1083 neurons, groups of 32: down_proj quantized False, bits per weight 13.7, over the whole 2.3, runs True
1088 neurons, 4w, groups of 128: AssertionError
messages that name groups or what was left out: 0
END
