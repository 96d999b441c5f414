from hypothesis import given
from hypothesis import strategies as st

from hippo_mpi.parallel.step_plan import StepPlan, decode, encode

INT = st.integers(0, 2**31 - 1)


@given(st.builds(StepPlan, st.integers(0, 2**32 - 1), INT, INT, INT, st.booleans()))
def test_decode_inverts_encode(plan: StepPlan) -> None:
    assert decode(encode(plan)) == plan
