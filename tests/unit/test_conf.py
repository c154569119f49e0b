import re
from pathlib import Path

import yaml

from phibatch.config import build_config, read_config

CONF = Path(__file__).parents[2] / "conf"
EXAMPLES = ("system", "template")
"""Settings of `input` whose line in batch.yaml is an example, since their default is nothing."""


def test_the_file_to_start_from_shows_every_setting_with_its_default():
    """What stands behind a comment sign in conf/batch.yaml is the default, and no setting is left out."""
    text = (CONF / "batch.yaml").read_text()
    shown = yaml.safe_load(re.sub(r"(?m)^(  )# ", r"\1", text))
    for name in EXAMPLES:
        assert shown["input"].pop(name)
    config = build_config(shown)
    assert config == read_config(CONF / "batch.yaml")
    for section, values in config.model_dump().items():
        hidden = {"table", *EXAMPLES}
        assert set(values) - hidden == set(shown[section]) - hidden, section


def test_every_spark_setting_has_its_reason():
    """Each block of conf/spark-defaults.conf opens with a comment, and nothing in it is newer than Spark 4.0."""
    blocks = (CONF / "spark-defaults.conf").read_text().strip().split("\n\n")[1:]
    assert blocks
    for block in blocks:
        comment, *settings = re.split(r"\n(?=spark\.)", block)
        assert comment.startswith("# ")
        assert settings
        assert all(re.fullmatch(r"spark\.[\w.]+ +\S+", setting) for setting in settings)
