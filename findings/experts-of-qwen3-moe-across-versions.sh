#!/usr/bin/env bash
# transformers 5.23.0 and 4.57.6: a configuration that the newer one saves says another number of experts to the older one.
#
# Bet: the older version reads the number, or refuses a name that it does not know.
# Seen: the newer one writes `num_local_experts: 8` alone; the older one reads past it and builds its default of 128.
#
#   saved: num_local_experts = 8, num_experts = None
#   read by 5.23.0: 8
#   read by 4.57.6: 128
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$place/new" transformers==5.23.0
python3 -m pip install --quiet --disable-pip-version-check --target "$place/old" transformers==4.57.6
cd "$place"
export TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1
PYTHONPATH=new python3 - > new.txt <<'END'
import json
from transformers import AutoConfig, Qwen3MoeConfig
Qwen3MoeConfig(num_experts=8).save_pretrained("model")
saved = json.load(open("model/config.json"))
print("saved: num_local_experts = %s, num_experts = %s" % (saved.get("num_local_experts"), saved.get("num_experts")))
print("read by 5.23.0:", AutoConfig.from_pretrained("model").num_experts)
END
PYTHONPATH=old python3 - > old.txt <<'END'
from transformers import AutoConfig
print("read by 4.57.6:", AutoConfig.from_pretrained("model").num_experts)
END
cat new.txt old.txt
diff <(cat new.txt old.txt) - <<'END'
saved: num_local_experts = 8, num_experts = None
read by 5.23.0: 8
read by 4.57.6: 128
END
