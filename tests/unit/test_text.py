from hypothesis import given
from hypothesis import strategies as st

from hippo_mpi.engine.text import find_stop

ALPHABET = st.text("ab<|>", max_size=12)


@given(st.lists(ALPHABET, max_size=8), st.lists(ALPHABET.filter(bool), min_size=1, max_size=3))
def test_shown_text_never_has_a_stop_word(pieces: list[str], words: list[str]) -> None:
    """Text shown piece by piece begins like the whole, and is complete if no stop word comes."""
    stops, shown, text = tuple(words), "", ""
    for piece in pieces:
        text += piece
        cut, safe = find_stop(text, stops)
        shown += text[len(shown) : safe]
        if cut is not None:
            break
        assert len(text) - len(shown) < max(map(len, words))
    assert text.startswith(shown)
    assert not any(word in shown for word in words)


def test_a_beginning_stop_word_is_held_back() -> None:
    assert find_stop("hello <", ("<end>",)) == (None, 6)
    assert find_stop("hello <end> more", ("<end>",)) == (6, 6)
    assert find_stop("hello", ()) == (None, 5)
