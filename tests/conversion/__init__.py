import pytest

# their assertions explain themselves as those in tests do
pytest.register_assert_rewrite("tests.conversion.checkpoints", "tests.conversion.moe_checkpoints")
