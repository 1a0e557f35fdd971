"""Configurations of models that were published from December 2025 on, each with the public copy that it was read from.

`recent_configs.json` holds of each what `published_configs.py` says: all of config.json but `quantization_config`,
`auto_map` and what belongs to images and sound.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RECENT: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("recent_configs.json").read_text())
