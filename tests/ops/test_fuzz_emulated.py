"""The examples of test_fuzz.py and test_importance_fuzz.py, fewer of them, with the CUDA kernels under the emulator."""

from __future__ import annotations

import pytest
import test_fuzz
import test_importance_fuzz
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.fixture(scope="module", autouse=True)
def _on_the_emulator(emulated_ops):
    with emulated_ops.installed():
        yield


def fewer(test, examples):
    """The same test with examples of its own number."""
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None)(
        given(st.data())(test.hypothesis.inner_test)
    )


test_sample_categorical = fewer(test_fuzz.test_sample_categorical, 60)
test_sample_candidates = fewer(test_fuzz.test_sample_candidates, 60)
test_gather_log_probs = fewer(test_fuzz.test_gather_log_probs, 60)
test_linear_log_probs = fewer(test_fuzz.test_linear_log_probs, 30)
test_ids_out_of_range = fewer(test_fuzz.test_ids_out_of_range, 20)
test_select = fewer(test_importance_fuzz.test_select, 60)
test_resample = fewer(test_importance_fuzz.test_resample, 60)
test_reverse = fewer(test_importance_fuzz.test_reverse, 40)
