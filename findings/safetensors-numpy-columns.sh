#!/usr/bin/env bash
# safetensors 0.8.0: `safetensors.numpy.save_file` of columns that NumPy took out of a matrix, read back.
#
# Bet: what is read back is what was given, or a view that is not contiguous is refused, as `safetensors.torch` refuses it.
# Seen: the array's memory is written as it lies there, under the shape of the view: the file is valid and holds other numbers.
# Columns chosen by a list of indices are such an array too, although they are a copy.
#
#   W[:3]: the same
#   W[:, :3]: other numbers
#   W[:, kept]: other numbers
#   W.T: other numbers
#   np.take(W, kept, axis=1): the same
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --no-compile --disable-pip-version-check --target "$place/packages" \
    safetensors==0.8.0 numpy==2.4.6
cd "$place"
PYTHONPATH=packages python3 -W ignore - > seen.txt <<'END'
import numpy as np
from safetensors.numpy import load_file, save_file
W = np.arange(24, dtype=np.float32).reshape(4, 6)
kept = [0, 2, 3]
parts = {"W[:3]": W[:3], "W[:, :3]": W[:, :3], "W[:, kept]": W[:, kept], "W.T": W.T, "np.take(W, kept, axis=1)": np.take(W, kept, axis=1)}
save_file(parts, "parts.safetensors")
read = load_file("parts.safetensors")
for name, part in parts.items():
    assert read[name].shape == part.shape
    print(f"{name}:", "the same" if (read[name] == part).all() else "other numbers")
END
cat seen.txt
diff seen.txt - <<'END'
W[:3]: the same
W[:, :3]: other numbers
W[:, kept]: other numbers
W.T: other numbers
np.take(W, kept, axis=1): the same
END
