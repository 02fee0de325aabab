"""What pytest has to know before it imports the tests."""

import pytest

pytest.register_assert_rewrite("asyncckpt.testing.store_contract")
