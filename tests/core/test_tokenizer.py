"""The tokenizer against the ids of the original one, and its conventions: start, end, padding, truncation."""

import json
import sys
import unicodedata

import pytest
import torch
from reference import GOLDEN

from ldm.checkpoint.vocabulary import Vocabulary
from ldm.tokenizer import Tokenizer, byte_characters, clean, clip_vocabulary

# 40 prompts with the ids of transformers' slow CLIPTokenizer and ftfy, padded with the end token: what SD1.5 was
# released with. Medical captions, white space, HTML, broken and odd Unicode, special tokens, overlong texts.
ROWS = json.loads((GOLDEN / "tokenizer.json").read_text(encoding="utf-8"))["rows"]
PROMPTS = [row["prompt"] for row in ROWS]
START, END = 49406, 49407

# What transformers 4.57.6's slow CLIPTokenizer with ftfy 6.3.1 makes of 510 texts with HTML entities, written well and
# badly, some beside a "<"; and of texts with words that were added to its vocabulary.
ENTITIES = json.loads((GOLDEN / "tokenizer_entities.json").read_text(encoding="utf-8"))["rows"]
ADDED = json.loads((GOLDEN / "tokenizer_added.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer()


@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_the_ids_are_the_original_ones(tokenizer, row):
    assert tokenizer([row["prompt"]]).tolist() == [row["ids"]]
    # Start, text, end; where a prompt was cut off, the first 75 of its tokens.
    assert min(len(tokenizer.encode(row["prompt"])), 75) + 2 == row["n_tokens"]


def test_html_entities_are_left_where_the_original_leaves_them(tokenizer):
    assert len(ENTITIES) >= 500
    assert [row["prompt"] for row in ENTITIES if tokenizer.encode(row["prompt"]) != row["ids"]] == []


@pytest.fixture(scope="module")
def words() -> Vocabulary:
    return Vocabulary(added={text: (i,) for text, i in ADDED["added"].items() if i > END})


@pytest.mark.parametrize("row", ADDED["rows"], ids=range(len(ADDED["rows"])))
def test_added_words_are_taken_whole_and_as_they_are_written(words, row):
    assert Tokenizer(vocabulary=words).encode(row["prompt"]) == row["ids"]


def test_an_added_word_may_stand_for_several_ids(words):
    tokenizer = Tokenizer(vocabulary=Vocabulary(added={"<lesion>": (49408, 49409)}))
    assert tokenizer(["a <lesion>"]).tolist()[0][:5] == [START, 320, 49408, 49409, END]
    assert tokenizer.rows == set(range(49410))


def test_a_vocabulary_of_another_model_is_used(tokenizer):
    clips = clip_vocabulary()
    turned = {piece: 49407 - i for piece, i in clips.ids.items()}
    other = Tokenizer(vocabulary=Vocabulary(turned, clips.merges, padding="!"))
    ids = tokenizer.encode("a chest x-ray")
    assert other(["a chest x-ray"]).tolist()[0] == [1, *(49407 - i for i in ids), 0] + [49407] * (75 - len(ids))


def test_a_vocabulary_without_clips_special_tokens_is_refused():
    with pytest.raises(ValueError, match=r"has no <\|startoftext\|>: it is not CLIP's"):
        Tokenizer(vocabulary=Vocabulary({"a</w>": 0}, (("a", "b"),)))


@pytest.mark.parametrize(
    ("vocabulary", "rows", "message"),
    [
        (Vocabulary(), 49409, r"49409 rows, and 1 of them \(49408\) .* no word that .*--embedding"),
        (Vocabulary(), 49400, r"49400 rows, its tokenizer words for 49408"),
        (Vocabulary(added={"<cat>": (49500,)}), 49409, r"49409 rows, and 1 of them \(49408\)"),
    ],
)
def test_rows_that_no_word_reaches_are_refused(vocabulary, rows, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer(vocabulary=vocabulary).require_rows(rows)
    Tokenizer(vocabulary=Vocabulary(added={"<cat>": (49408,)})).require_rows(49409)


def test_a_batch_is_its_prompts_one_by_one(tokenizer):
    ids = tokenizer(PROMPTS)
    assert ids.dtype == torch.int64
    assert ids.tolist() == [row["ids"] for row in ROWS]
    assert tokenizer(tuple(PROMPTS[::-1])).tolist() == ids.tolist()[::-1]  # neither order nor the cache matters
    assert tokenizer([]).shape == (0, 77)


def test_the_empty_prompt_is_start_and_padding(tokenizer):
    assert tokenizer([""]).tolist() == [[START] + [END] * 76]


def test_padding_is_the_end_token_not_zero(tokenizer):
    row = tokenizer(["a chest x-ray!"])[0].tolist()
    text = tokenizer.encode("a chest x-ray!")
    assert row == [START, *text, END] + [END] * (75 - len(text))
    assert 0 not in row  # id 0 is an exclamation mark: open_clip's tokenizer pads with it


@pytest.mark.parametrize("words", [74, 75, 76, 500])
def test_truncation_keeps_the_end_token_last(tokenizer, words):
    row = tokenizer(["word " * words])[0].tolist()
    word = tokenizer.encode("word")[0]
    assert row == [START] + [word] * min(words, 75) + [END] * (76 - min(words, 75))


def test_other_lengths_follow_the_configuration():
    short = Tokenizer(tokens=9)
    assert short(["word " * 20]).tolist() == [[START] + [2653] * 7 + [END]]


def test_a_single_string_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r'texts: a single string "a prompt", expected a list of prompts'):
        tokenizer("a prompt")


def test_the_vocabulary_is_complete(tokenizer):
    assert len(tokenizer.pieces) == len(tokenizer.ids) == 49408
    assert (tokenizer.start, tokenizer.end) == (START, END)
    assert [tokenizer.ids[tokenizer.pieces[i]] for i in range(49408)] == list(range(49408))
    assert tokenizer.rows == set(range(49408))
    characters = byte_characters()
    assert sorted(characters) == list(range(256))
    assert len(set(characters.values())) == 256
    assert not any(character.isspace() for character in characters.values())  # white space separates pieces


def test_decoding_gives_readable_text(tokenizer):
    ids = tokenizer.encode("Chest X-ray of a subject with Pleural Effusion")
    assert tokenizer.decode(ids) == "chest x - ray of a subject with pleural effusion"
    assert tokenizer.decode(tokenizer([""])[0, :3].tolist()) == "<|startoftext|> <|endoftext|> <|endoftext|>"
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("prompt", PROMPTS, ids=range(len(PROMPTS)))
def test_decoded_text_encodes_to_the_same_ids(tokenizer, prompt):
    ids = tokenizer.encode(prompt)
    assert tokenizer.encode(tokenizer.decode(ids)) == ids


def test_a_character_cut_in_the_middle_decodes_to_a_replacement(tokenizer):
    ids = tokenizer.encode("胸部")  # several tokens a character; truncation may fall between them
    decoded = [tokenizer.decode(ids[:end]) for end in range(len(ids) + 1)]
    assert (decoded[0], decoded[-1]) == ("", "胸部")
    assert any("\N{REPLACEMENT CHARACTER}" in text for text in decoded[1:-1])


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("a chest\r\nx-ray", "a chest\nx-ray"),  # line ends of Windows
        (unicodedata.normalize("NFD", "naïve café"), unicodedata.normalize("NFC", "naïve café")),  # macOS file names
        ("\ufeffa chest x-ray", "a chest x-ray"),  # the byte order mark of a Windows text file
        ("A CHEST X-RAY", "a chest x-ray"),
        ("a\u00a0chest\tx-ray ", "a chest x-ray"),
        ("&amp;gt; 3", "&gt; 3"),  # once, and once only
        ("1 &lt; 2 &amp; 3", "1 < 2 & 3"),
    ],
)
def test_texts_that_read_the_same_are_the_same(tokenizer, text, same):
    assert tokenizer.encode(text) == tokenizer.encode(same)


def test_cleaning_is_idempotent_on_clean_text():
    assert clean("  Chest \n X-ray &amp; more ") == "chest x-ray & more"
    assert clean(clean("“Smart” Ã© text")) == clean("“Smart” Ã© text") == '"smart" é text'


def test_open_clip_itself_is_not_imported(monkeypatch):
    # Only its vocabulary file is needed; importing the package takes seconds and all of its models.
    for name in [name for name in sys.modules if name.split(".")[0] == "open_clip"]:
        monkeypatch.delitem(sys.modules, name)
    Tokenizer()
    assert not [name for name in sys.modules if name.split(".")[0] == "open_clip"]


def test_a_missing_vocabulary_says_what_to_install(monkeypatch):
    monkeypatch.setattr("ldm.tokenizer.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install open_clip_torch"):
        Tokenizer()
