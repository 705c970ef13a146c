"""Which encoders a comparison has, and what it says of an entry in an earlier form."""

import pytest

from mixgf.comparison import encoder_sets
from mixgf.config.comparison import Compare
from mixgf.config.run import Config
from mixgf.errors import UserError


def test_a_corpus_behind_a_checkpoint_is_refused_with_the_field_that_names_it(tmp_path):
    config = Config(output=str(tmp_path), compare=Compare(encoders={"shared": f"{tmp_path}/a@{tmp_path}/b"}))
    with pytest.raises(
        UserError, match=r"no such checkpoint; its corpus .*shared=.*/a and compare\.corpora=shared=.*/b$"
    ):
        encoder_sets.encoder_sets(config, str(tmp_path / "compare"))
