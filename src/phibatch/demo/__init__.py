"""The embedded demo model, its Hugging Face twin, and tables of requests that it answers. See CARD.md."""

from pathlib import Path

_HERE = Path(__file__).parent

MODEL_DIR = _HERE / "model"
TWIN_DIR = _HERE / "twin"
PROMPTS = _HERE / "prompts.parquet"
CONVERSATIONS = _HERE / "conversations.parquet"
