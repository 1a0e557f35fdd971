"""Tokenizers of every kind that can be cut, and text in eight scripts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support import tiny

SCRIPTS = (
    "The quick brown fox; def f(x): return x**2  # ok\n\tI'LL pay 12,345.67!",
    "Übergrößenträger, naïve façade, œuvre, Łódź.",
    "Съешь же ещё этих мягких французских булок.",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.",
    "דג סקרן שט בים מאוכזב ولد ومدرسة كبيرة",
    "नमस्ते दुनिया, यह एक परीक्षा है।",
    "敏捷的棕色狐狸跳过了懒狗。いろはにほへと 키스의 고유조건은",
    "🦙👩‍👩‍👧‍👦 e\u0301 \u200d \ufeff <s> <pad> </s>x \U0001f9d9",
)
# The first article of the Universal Declaration of Human Rights.
DECLARATION = (
    "All human beings are born free and equal in dignity and rights. They are endowed with reason and conscience and "
    "should act towards one another in a spirit of brotherhood.",
    "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и совестью и должны "
    "поступать в отношении друг друга в духе братства.",
    "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα. Είναι προικισμένοι με λογική "
    "και συνείδηση, και οφείλουν να συμπεριφέρονται μεταξύ τους με πνεύμα αδελφοσύνης.",
    "כל בני אדם נולדו בני חורין ושווים בערכם ובזכויותיהם. כולם חוננו בתבונה ובמצפון, לפיכך חובה עליהם לנהוג איש ברעהו "
    "ברוח של אחווה.",
    "يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق. وقد وهبوا عقلاً وضميرًا وعليهم أن يعامل بعضهم بعضًا بروح الإخاء.",
    "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है। उन्हें बुद्धि और अन्तरात्मा की देन प्राप्त है और "
    "परस्पर उन्हें भाईचारे के भाव से बर्ताव करना चाहिए।",
    "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。人間は、理性と良心とを授けられており、"
    "互いに同胞の精神をもって行動しなければならない。",
    "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. 인간은 천부적으로 이성과 양심을 부여받았으며 "
    "서로 형제애의 정신으로 행동하여야 한다.",
)
EACH = 25  # strings of every script
UNMERGED = "ψυχοφθόρα"  # a word of `SCRIPTS` that is a token of "whole words", which no merges make, as in Llama 3


def strings() -> list[str]:
    """Two hundred of them, from all over the text."""
    found = []
    for text in DECLARATION:
        for number in range(EACH):
            start = number * (len(text) - 8) // EACH
            found.append(text[start : start + 5 + 3 * number])
    assert len(set(found)) == EACH * len(DECLARATION) == 200
    return found


def learn(kind: str) -> Any:
    """A tokenizer of each kind that can be cut."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    text = [Path(tiny.__file__).read_text(encoding="utf-8"), *SCRIPTS[:3]] * 3
    special = ["<unk>", "<s>", "</s>"]
    if kind in ("byte-level", "whole words"):
        tokenizer = Tokenizer(models.BPE(ignore_merges=kind == "whole words"))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer: Any = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(text, trainer)
        tokenizer = with_unmerged(tokenizer) if kind == "whole words" else tokenizer
    elif kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=500, special_tokens=special, unk_token="<unk>", show_progress=False
        )
        tokenizer.train_from_iterator(text, trainer)
    else:
        spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        trained = Tokenizer(models.BPE())
        trained.normalizer = spaces
        trained.train_from_iterator(text, trainers.BpeTrainer(vocab_size=400, show_progress=False))
        learned = [token for token, _ in sorted(trained.get_vocab().items(), key=lambda item: item[1])]
        pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *learned]
        vocabulary = {piece: number for number, piece in enumerate(pieces)}
        merges = [
            (piece[:cut], piece[cut:])
            for piece in learned
            for cut in range(1, len(piece))
            if piece[:cut] in vocabulary and piece[cut:] in vocabulary
        ]
        tokenizer = Tokenizer(
            models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
        )
        tokenizer.normalizer = spaces
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (*special, "<pad>")])
    begin = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", begin)])
    return tokenizer


def with_unmerged(tokenizer: Any) -> Any:
    """The same byte-level tokenizer with a word that is a token, and its last one, though no merges make it."""
    from tokenizers import Tokenizer

    document = json.loads(tokenizer.to_str())
    document["model"]["vocab"][spelled(UNMERGED)] = tokenizer.get_vocab_size()
    return Tokenizer.from_str(json.dumps(document))


def spelled(word: str) -> str:
    """A word with a space before it in the characters that stand for bytes."""
    from tokenizers import pre_tokenizers

    [(found, _)] = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(f" {word}")
    return str(found)
