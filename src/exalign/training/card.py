"""The README.md of a trained model: what it is, and the settings that made it."""

from __future__ import annotations

import yaml

from exalign.redaction import redact_values
from exalign.settings import Settings

_TEXT = """---
library_name: transformers
pipeline_tag: {pipeline_tag}
tags:
- exalign
---
# {title}

{description}

Trained with exalign under these settings:

```yaml
{settings}```
"""


def model_card(title: str, description: str, settings: Settings, *, pipeline_tag: str) -> str:
    """A model card in Markdown with the front matter that model hubs read."""
    shown = yaml.safe_dump(redact_values(settings.model_dump(mode="json")), sort_keys=False)
    return _TEXT.format(title=title, description=description, settings=shown, pipeline_tag=pipeline_tag)
