#!/usr/bin/env bash
# optimum-quanto 0.2.7: rows of several widths, in bfloat16, quantized to 2 and 4 bits (qint2, qint4), which quanto does in groups.
#
# Bet: groups of 128; a width that they do not divide is refused, filled up, or gets the largest power of two that divides it.
# Seen: 128, 96, 64 or 32, whichever divides the width first, and where none does the row is one group, however long it is, without
# a word. So one neuron of 4,096 less takes 4 bits from 4.25 to 4.01 bits per weight and the error up by more than a quarter, and
# 4,000 neurons (125 times 32) get 5.00 bits per weight.
#
#   4096 neurons: groups of 128, bits per weight 4.25 and 2.25
#   4000 neurons: groups of 32, bits per weight 5.00 and 3.00
#   4064 neurons: groups of 32, bits per weight 5.00 and 3.00
#   4032 neurons: groups of 96, bits per weight 4.33 and 2.33
#   4095 neurons: groups of 4095, bits per weight 4.01 and 2.01
#   error of the weights at 4095 over that at 4096, above 1.25 in 4 and in 2 bits: True True
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --no-compile --disable-pip-version-check --target "$place/packages" torch==2.13.0 optimum-quanto==0.2.7
cd "$place"
export HF_HUB_OFFLINE=1
cat > look.py <<'END'
import torch
from optimum.quanto import freeze, qint2, qint4, quantize

def quantized(neurons, kind):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(neurons, 256, bias=False)).to(torch.bfloat16)
    with torch.no_grad():
        whole = model[0].weight.normal_().clone()
    quantize(model, weights=kind)
    freeze(model)
    stored = sum(own.numel() * own.element_size() for own in model.state_dict().values())
    error = (model[0].weight.dequantize().float() - whole.float()).norm() / whole.float().norm()
    return model[0].weight_group_size or neurons, 8 * stored / whole.numel(), error

errors = {}
for neurons in (4096, 4000, 4064, 4032, 4095):
    (group, four, at_four), (_, two, at_two) = quantized(neurons, qint4), quantized(neurons, qint2)
    errors[neurons] = at_four, at_two
    print(f"{neurons} neurons: groups of {group}, bits per weight {four:.2f} and {two:.2f}")
worse = [bool(odd > 1.25 * whole) for odd, whole in zip(errors[4095], errors[4096])]
print("error of the weights at 4095 over that at 4096, above 1.25 in 4 and in 2 bits:", *worse)
END
PYTHONPATH=packages python3 look.py > seen.txt 2> warnings.txt || { cat seen.txt warnings.txt; exit 1; }
cat seen.txt
diff seen.txt - <<'END'
4096 neurons: groups of 128, bits per weight 4.25 and 2.25
4000 neurons: groups of 32, bits per weight 5.00 and 3.00
4064 neurons: groups of 32, bits per weight 5.00 and 3.00
4032 neurons: groups of 96, bits per weight 4.33 and 2.33
4095 neurons: groups of 4095, bits per weight 4.01 and 2.01
error of the weights at 4095 over that at 4096, above 1.25 in 4 and in 2 bits: True True
END
